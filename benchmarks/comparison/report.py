"""The page of a comparison: a table, the sweeps, the curves, and p over training."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.comparison.candidates import SHUFFLED
from benchmarks.comparison.outcomes import Outcome
from benchmarks.tables import markdown
from hf_schatten.report.figures import plot_p_of_runs
from hf_schatten.report.log import LAYER_PREFIX

BASE = "p = -4"  # to which all others are compared
TARGETS = ("AdamW", "Muon")  # whose losses at the end others reach

# Colours that colour-blind readers tell apart (M. Okabe and K. Ito, 2008).
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"
COLOURS = {BASE: BLUE, "Muon": ORANGE, "AdamW": "black"}


@dataclass(frozen=True)
class Standing:
    """The outcomes of one candidate in one regime.

    Attributes:
        name: of the candidate, as in tables.
        sweep: outcomes of the first seed by learning rate, increasing.
        best: outcomes at the best rate of the sweep, by seed.
    """

    name: str
    sweep: Mapping[float, Outcome]
    best: Mapping[int, Outcome]

    @classmethod
    def of(cls, name: str, outcomes: Iterable[Outcome]) -> Standing:
        """Return the standing of a candidate with these outcomes, of one regime."""
        ordered = sorted(outcomes, key=lambda each: (each.seed, each.rate))
        sweep = {each.rate: each for each in ordered if each.seed == 0}
        rate = min(sweep, key=lambda rate: sweep[rate].loss, default=math.nan)
        return cls(name, sweep, {each.seed: each for each in ordered if each.rate == rate})

    @property
    def rate(self) -> float:
        """The best learning rate of the sweep; not a number without one."""
        return next((each.rate for each in self.best.values()), math.nan)

    @property
    def losses(self) -> dict[int, float]:
        """Losses at the best rate by seed."""
        return {seed: each.loss for seed, each in self.best.items()}

    def median(self, quantity: Callable[[Outcome], float]) -> float:
        """Return the median of a quantity over the seeds at the best rate that have it; 0 where none has."""
        return median([value for each in self.best.values() if (value := quantity(each))] or [0])

    def curve(self) -> list[tuple[float, float, float]]:
        """Return step, seconds and loss of the evaluations that all seeds at the best rate have, means over them."""
        curves = [each.curve for each in self.best.values()]
        return [tuple(map(mean, zip(*points, strict=True))) for points in zip(*curves, strict=False)]


def with_error(values: Sequence[float], *, signed: bool = False, digits: int = 4) -> str:
    """Return a mean and its standard error, of which one value has none, nor those of which one diverged."""
    has_error = len(values) > 1 and all(map(math.isfinite, values))
    error = f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}" if has_error else ""
    return f"{mean(values):{'+' if signed else ''}.{digits}f}{error}"


def rows_of(standings: Sequence[Standing], tokens: int = 0) -> list[tuple[str, ...]]:
    """Return the table of a regime, its header first; with tokens per second where a run's tokens are counted."""
    by_name = {each.name: each for each in standings}
    targets = {name: by_name[name].curve() for name in TARGETS if name in by_name}
    has_curves = any(targets.values())
    header = ["optimizer", "rate", "seeds", "validation loss", f"paired difference to {BASE}", "seconds", "state"]
    if tokens:
        header.append("tokens/s")
    if has_curves:
        header += [f"steps, seconds to {name}'s loss" for name in targets]
    rows = [tuple(header)]
    for each in standings:
        seconds, state = each.median(lambda run: run.seconds), each.median(lambda run: run.state) / 1e6
        row = [each.name, f"{each.rate:g}", str(len(each.best)), with_error([*each.losses.values()])]
        row += [paired(each, by_name[BASE]) if BASE in by_name else "", _number(seconds), _number(state)]
        if tokens:
            row.append(f"{tokens / seconds:,.0f}")
        if has_curves:
            row += [_reached(each.curve(), curve) for curve in targets.values()]
        rows.append(tuple(row))
    return rows


def paired(standing: Standing, base: Standing, digits: int = 4) -> str:
    """Return the mean difference to the base over the seeds that both have, two at least, and its standard error."""
    both = standing.losses.keys() & base.losses.keys()
    differences = [standing.losses[seed] - base.losses[seed] for seed in sorted(both)]
    is_itself = standing.name == base.name
    return with_error(differences, signed=True, digits=digits) if len(differences) > 1 and not is_itself else ""


def _number(value: float) -> str:
    return f"{value:.3g}" if value else "–"  # of outcomes that did not measure it


def _reached(curve: Sequence[tuple[float, float, float]], target: Sequence[tuple[float, float, float]]) -> str:
    """Return where a curve reaches the end of another one, relative to that one's steps and seconds."""
    reached = reach(curve, target[-1][2]) if curve and target else None
    return "–" if reached is None else f"{reached[0] / target[-1][0]:.2f}, {reached[1] / target[-1][1]:.2f}"


def reach(curve: Sequence[tuple[float, float, float]], target: float) -> tuple[float, float] | None:
    """Return step and seconds at which a loss is reached, between two evaluations by a straight line.

    Args:
        curve: step, seconds and loss of the evaluations, in their order.
        target: a loss.

    Returns:
        Step and seconds, or None where the loss stays above the target.
    """
    before: tuple[float, float, float] | None = None
    for point in curve:
        if point[2] <= target:
            if before is None or not math.isfinite(before[2]):
                return point[0], point[1]
            share = (before[2] - target) / (before[2] - point[2])
            return before[0] + share * (point[0] - before[0]), before[1] + share * (point[1] - before[1])
        before = point
    return None


def write_page(regime: str, summary: str, standings: Sequence[Standing], folder: Path, tokens: int = 0) -> Path:
    """Write the page of a regime, ``NAME.md``, with its pictures beside it, and return its path.

    Args:
        regime: by name, or the path of the file that describes it.
        summary: what is trained there.
        standings: of the candidates that have run there.
        folder: is made.
        tokens: of a run, 0 where there are none to count.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = word(Path(regime).stem)
    parts = [
        f"# {regime}: optimizers compared",
        f"{summary}. {_origin(standings)}",
        markdown(rows_of(standings, tokens)),
        _LEGEND,
    ]
    if any(each.curve() for each in standings):
        draw_curves(standings, folder / f"{name}.png")
        parts.append(f"![Validation loss by step and by time]({name}.png)")
    parts += ["## Sweeps of the learning rate", "Validation loss of seed 0; – has not run.", _sweeps(standings)]
    for each in standings:
        if any(outcome.candidate.startswith(SHUFFLED) for outcome in each.best.values()):
            continue  # its p are another picture's
        histories = {f"seed {seed}": _log_of(outcome) for seed, outcome in each.best.items()}
        picture = folder / f"{name}_{word(each.name)}.png"
        if any(histories.values()) and plot_p_of_runs(histories, picture):
            parts += [f"## The p of *{each.name}*", f"![p of each matrix over training, by seed]({picture.name})"]
    page = folder / f"{name}.md"
    page.write_text("\n\n".join(parts) + "\n", "utf-8")
    return page


_LEGEND = (
    "Each optimizer at the best learning rate of its sweep. validation loss, paired difference: mean ± standard error "
    "over the seeds; seeds share data and first weights. seconds: of all steps, without evaluations; on a CPU, of the "
    "process. state: of the optimizer, in MB. steps, seconds to a loss: relative to those of the optimizer named; – "
    "is never."
)


def word(text: str) -> str:
    """Return a text as a part of a file's name."""
    return re.sub(r"[^\w-]+", "_", text).strip("_")


def _origin(standings: Sequence[Standing]) -> str:
    """Say where and when the outcomes were measured."""
    outcomes = [outcome for each in standings for outcome in (*each.sweep.values(), *each.best.values())]
    machines, dates = (sorted({getattr(each, name) for each in outcomes}) for name in ("machine", "date"))
    return f"{'; '.join(machines)}; {' to '.join(sorted({dates[0], dates[-1]}))}."


def _sweeps(standings: Sequence[Standing]) -> str:
    rates = sorted({rate for each in standings for rate in each.sweep})
    rows = [("optimizer", *(f"{rate:g}" for rate in rates))]
    for each in standings:
        cells = [f"{each.sweep[rate].loss:.4f}" if rate in each.sweep else "–" for rate in rates]
        best = rates.index(each.rate)
        cells[best] = f"**{cells[best]}**"
        rows.append((each.name, *cells))
    return markdown(rows)


def _log_of(outcome: Outcome) -> list[dict[str, float]]:
    """Return the estimates of an outcome in the form of a Trainer's log."""
    return [
        {"step": int(step)} | {LAYER_PREFIX + name: 1 / s if s else math.inf for name, s in exponents.items()}
        for step, exponents in outcome.exponents.items()
    ]


def draw_curves(standings: Sequence[Standing], path: Path) -> None:
    """Draw the loss at the best learning rate against step and against time, each curve with its name at its end."""
    figure = Figure(figsize=(12, 5), dpi=110, layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for each in sorted(standings, key=lambda each: each.name in COLOURS):  # these on top
        curve = each.curve()
        if not curve:
            continue
        steps, seconds, losses = zip(*curve, strict=True)
        colour, width = COLOURS.get(each.name, GREY), 1.8 if each.name in COLOURS else 1.0
        by_step.plot(steps, losses, color=colour, linewidth=width, label=each.name)
        by_time.plot(seconds, losses, color=colour, linewidth=width)
    ends = [float(line.get_ydata()[-1]) for line in by_step.lines]
    finite = [end for end in ends if math.isfinite(end)] or [0.0]
    margin = 0.1 * (max(finite) - min(finite)) or 0.1
    by_step.set(xlabel="step", ylabel="validation loss", ylim=(min(finite) - 4 * margin, max(finite) + 8 * margin))
    by_time.set(xlabel="seconds of the steps")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
    _name_ends(by_step, ends)
    figure.savefig(path)


def _name_ends(axes: Axes, ends: Sequence[float]) -> None:
    """Write each curve's name at its right end, with names that would meet pushed apart."""
    low, high = axes.get_ylim()
    free = math.inf
    for value, line in sorted(zip(ends, axes.lines, strict=True), key=lambda end: -end[0]):
        free = min(value if math.isfinite(value) else high, high, free - (high - low) / 28)
        axes.annotate(
            str(line.get_label()),
            (1.01, free),
            xycoords=("axes fraction", "data"),
            annotation_clip=False,
            va="center",
            color=line.get_color(),
            fontsize=9,
        )
