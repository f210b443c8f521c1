"""The page of a comparison: tables, a picture and the numbers behind them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.comparison import comparison_numbers
from benchmarks.comparison.comparison import Outcome, Standing
from benchmarks.comparison.comparison_numbers import numbers_of
from benchmarks.comparison.comparison_stability import stability_sections

REFERENCE = "Muon"

_TOLERANCE = 0.05  # of the best loss, within which one learning rate is said to serve


def write_report(standings: Sequence[Standing], folder: Path, title: str) -> Path:
    """Write ``comparison.md``, ``comparison.png``, ``comparison.json``, and a picture of the p that was learned.

    Args:
        standings: Of the candidates that have run.
        folder: Is made.
        title: Of the page.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "comparison.md"
    if not standings:
        page.write_text(f"# {title}\n\nNothing has run yet.\n", "utf-8")
        return page
    reference = next((each for each in standings if each.candidate.name == REFERENCE), None)
    draw(standings, folder / "comparison.png")
    numbers = [numbers_of(standing, outcome) for standing in standings for outcome in standing.outcomes]
    (folder / comparison_numbers.NAME).write_text(json.dumps(numbers, allow_nan=False, indent=1) + "\n", "utf-8")
    task = standings[0].task
    arguments = " ".join(Path(text).name for text in task.arguments)
    parts = [
        f"# {title}: optimizers compared",
        f"`{task.script.name} {arguments}`, {task.metric} at the end. {_origin(standings)}",
        "## At the best learning rate",
        _table(_HEADER, (_row(standing, reference) for standing in standings)),
        _LEGEND,
        f"![{task.metric} by step and time](comparison.png)",
        "## Sweeps of the learning rate",
        f"{task.metric} with seed {task.seeds[0]}; – has not run.",
        _sweeps(standings),
        one_rate_for_all(standings),
        *stability_sections(standings, folder),
    ]
    page.write_text("\n\n".join(filter(None, parts)) + "\n", "utf-8")
    return page


_HEADER = (
    "optimizer",
    "options",
    "learning rate",
    "metric",
    "seeds",
    "steps to reference",
    "time",
    "optimizer's time",
)
_LEGEND = (
    "metric: mean ± standard error over the seeds. steps to reference: steps until the mean curve reaches "
    f"{REFERENCE}'s metric at the end, relative to all steps; – is never. time, optimizer's time: of a training step, "
    f"due ones included, and of the optimizer in it, relative to {REFERENCE}'s (means over the steps, medians over "
    "the seeds; CPU seconds where the training ran on a CPU)."
)


def _row(standing: Standing, reference: Standing | None) -> tuple[str, ...]:
    best = standing.best_outcomes()
    error = standing.standard_error()
    return (
        standing.candidate.name,
        f"`{standing.candidate.optim_args}`" if standing.candidate.optim_args else "",
        f"{standing.best_rate:.3g}",
        f"{standing.mean():.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}"),
        str(len(best)),
        _steps_to(standing, reference) if reference else "",
        _ratio(standing, reference, lambda outcome: outcome.step_time),
        _ratio(standing, reference, lambda outcome: outcome.optimizer_time),
    )


def _steps_to(standing: Standing, reference: Standing) -> str:
    target = reference.mean_curve()[1][-1]
    reached = steps_to_reach(standing.mean_curve(), target, standing.task.greater_is_better)
    return "–" if reached is None else f"{reached / reference.outcomes[0].steps[-1]:.2f}"


def steps_to_reach(
    curve: tuple[Sequence[int], Sequence[float]], target: float, greater_is_better: bool
) -> float | None:
    """Return the step at which a curve reaches a target, between two evaluations by a straight line.

    Args:
        curve: Steps of the evaluations, increasing, and the metric there.
        target: Of the metric.
        greater_is_better: Whether the curve rises towards it.

    Returns:
        The step, or None where the target is never reached.
    """
    steps, values = curve
    sign = -1 if greater_is_better else 1
    behind = [sign * (value - target) for value in values]
    for index, distance in enumerate(behind):
        if distance <= 0:
            if index == 0 or not math.isfinite(behind[index - 1]):
                return float(steps[index])
            share = behind[index - 1] / (behind[index - 1] - distance)
            return steps[index - 1] + share * (steps[index] - steps[index - 1])
    return None


def _ratio(standing: Standing, reference: Standing | None, time_of: Callable[[Outcome], float]) -> str:
    if reference is None:
        return ""
    own, other = (statistics.median(map(time_of, each.best_outcomes())) for each in (standing, reference))
    return f"{own / other:.2f}"


def _sweeps(standings: Sequence[Standing]) -> str:
    rates = sorted({rate for standing in standings for rate in standing.losses()})
    rows = []
    for standing in standings:
        found = {
            outcome.learning_rate: outcome.final(standing.task.metric)
            for outcome in standing.outcomes
            if outcome.seed == standing.task.seeds[0]
        }
        cells = [f"{found[rate]:.4f}" if rate in found else "–" for rate in rates]
        best = rates.index(standing.best_rate)
        cells[best] = f"**{cells[best]}**"
        rows.append((standing.candidate.name, *cells))
    return _table(("optimizer", *(f"{rate:.3g}" for rate in rates)), rows)


def one_rate_for_all(standings: Sequence[Standing]) -> str:
    """Say which learning rate serves all fixed p best, and by how much each loses with it.

    Only where less of the metric is better, for a relative difference means something there.
    """
    fixed = [standing for standing in standings if standing.candidate.name.startswith("p =")]
    if len(fixed) < 2 or fixed[0].task.greater_is_better:
        return ""
    shared = set.intersection(*(set(standing.losses()) for standing in fixed))
    if not shared:
        return ""
    excess = {
        rate: {
            standing.candidate.name: standing.losses()[rate] / standing.losses()[standing.best_rate] - 1
            for standing in fixed
        }
        for rate in sorted(shared)
    }
    rate = min(excess, key=lambda rate: max(excess[rate].values()))
    worst = max(excess[rate].values())
    each = ", ".join(f"{name}: {100 * value:.2f} %" for name, value in excess[rate].items())
    verdict = "within" if worst <= _TOLERANCE else "not within"
    return (
        f"**One learning rate for every p**: {rate:.3g} is {verdict} {_TOLERANCE:.0%} of the best metric of each "
        f"sweep ({each} above it)."
    )


def draw(standings: Sequence[Standing], path: Path) -> None:
    """Draw the metric at the best learning rate against step and against time."""
    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    metric = standings[0].task.metric
    for index, standing in enumerate(standings):
        style = {"color": f"C{index % 10}", "linestyle": "-" if index < 10 else "--", "linewidth": 1.4}
        steps, values = standing.mean_curve()
        seconds = statistics.median(outcome.step_time for outcome in standing.best_outcomes())
        by_step.plot(steps, values, label=standing.candidate.name, **style)
        by_time.plot(np.array(steps) * seconds, values, **style)
    _finish(by_step, "step", metric, [value for line in by_step.lines for value in np.asarray(line.get_ydata())])
    by_time.set_xlabel("seconds of training (step × mean time of a step)")
    by_time.grid(alpha=0.3)
    _name_curves(by_step)
    figure.savefig(path)


def _finish(axes: Axes, label: str, metric: str, values: Iterable[float]) -> None:
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), float(np.quantile(finite, 0.9))
    margin = 0.05 * (high - low) or 0.01 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)  # the start of training would flatten what differs
    axes.set_xlabel(label)
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)


def _name_curves(axes: Axes) -> None:
    """Write each curve's name at its right end, with names that would meet pushed apart."""
    low, high = axes.get_ylim()
    gap, free = (high - low) / 28, math.inf
    ends = [(float(np.asarray(line.get_ydata())[-1]), line) for line in axes.lines]
    for value, line in sorted(ends, key=lambda end: end[0] if math.isfinite(end[0]) else math.inf, reverse=True):
        free = min(value if math.isfinite(value) else high, high, free - gap)
        axes.annotate(
            str(line.get_label()),
            (1.02, free),
            xycoords=("axes fraction", "data"),
            annotation_clip=False,
            va="center",
            color=line.get_color(),
            fontsize=9,
        )


def _origin(standings: Sequence[Standing]) -> str:
    """Say where and when the outcomes were measured."""
    outcomes = [outcome for standing in standings for outcome in standing.outcomes]
    dates = sorted({outcome.date for outcome in outcomes})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{'; '.join(sorted({outcome.machine for outcome in outcomes}))}; {when}."


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
