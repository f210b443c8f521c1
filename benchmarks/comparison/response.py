"""The response: how the loss changes when one kind of layer has another p than all others.

Usage:
    python benchmarks/comparison/response.py                # after compare_optimizers.py; a quarter of an hour
    python benchmarks/comparison/response.py text vit       # some regimes
    python benchmarks/comparison/response.py --report       # draw what has run

For each kind of layer (queries, down-projections, …) p of that kind alone is varied, with p = -4 for all others, at
the best learning rate that ``compare_optimizers.py`` found for p = -4. ``response.png`` draws the difference to p = -4
for all, paired by seed, against 1/p, and marks where the criterion puts this kind at the end of training.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.comparison.compare_optimizers import CANDIDATES, standing
from benchmarks.comparison.outcomes import NAME, Outcome, Run, load
from benchmarks.comparison.regimes import find
from benchmarks.comparison.report import BASE
from benchmarks.comparison.runs import parse_arguments, run_all
from benchmarks.geometry.command_line import positive
from benchmarks.tables import print_table

VALUES = ("-8", "inf", "4")  # of p, in their order from the base on
_BASE = CANDIDATES[BASE]
_ADAPTIVE = "adaptive"


def candidate(kind: str, p: str) -> str:
    """Return the candidate in which one kind has this p."""
    return f"{_BASE}@{kind}={p}"


def wanted(regimes: Sequence[str], outcomes: Sequence[Outcome], seeds: int) -> list[Run]:
    """Return the runs that are missing, seed by seed."""
    done = {Run(each.regime, each.candidate, each.rate, each.seed) for each in outcomes}
    runs = []
    for seed in range(seeds):
        for regime in regimes:
            base = standing(regime, BASE, outcomes)
            if base.best:
                candidates = [_BASE, *(candidate(kind, p) for p in VALUES for kind in find(regime).kinds)]
                runs += [Run(regime, each, base.rate, seed) for each in candidates]
    return [run for run in runs if run not in done]


def responses(regime: str, outcomes: Sequence[Outcome]) -> dict[str, dict[str, list[float]]]:
    """Return the differences to the base, paired by seed, by kind and p."""
    base = standing(regime, BASE, outcomes)
    found: dict[str, dict[str, list[float]]] = {}
    for kind in find(regime).kinds:
        for p in VALUES:
            name = candidate(kind, p)
            mine = [each for each in outcomes if (each.regime, each.candidate, each.rate) == (regime, name, base.rate)]
            differences = [each.loss - base.losses[each.seed] for each in mine if each.seed in base.losses]
            if differences:
                found.setdefault(kind, {})[p] = differences
    return found


def chosen_exponents(regime: str, kind: str, outcomes: Sequence[Outcome]) -> list[float]:
    """Return the mean 1/p that ``p=adaptive`` chose for a kind at its last estimate, by seed at its best rate."""
    chosen = []
    for each in standing(regime, _ADAPTIVE, outcomes).best.values():
        last = each.exponents[max(each.exponents, key=int)]
        chosen.append(mean(s for name, s in last.items() if fnmatch(name, find(regime).kinds[kind])))
    return chosen


def error(values: Sequence[float]) -> float:
    """Return the standard error of a mean, not a number of one value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def draw(
    found: Mapping[str, Mapping[str, Mapping[str, list[float]]]], outcomes: Sequence[Outcome], path: Path
) -> None:
    """Draw a panel for each kind, a row for each regime."""
    columns = max(len(kinds) for kinds in found.values())
    figure = Figure(figsize=(2.6 * columns, 2.5 * len(found)), dpi=110, layout="constrained")
    grid = figure.subplots(len(found), columns, squeeze=False, sharex=True, sharey="row")
    for row, (regime, kinds) in zip(grid, found.items(), strict=True):
        for axes, kind in zip(row, kinds, strict=False):
            _panel(axes, kinds[kind], chosen_exponents(regime, kind, outcomes))
            axes.set_title(f"{regime}: {kind}", fontsize=9)
        for axes in row[len(kinds) :]:
            axes.set_visible(False)
        row[0].set_ylabel("loss - loss of p = -4", fontsize=8)
    figure.suptitle(
        "One kind of layer with another p, all others with p = -4: mean and standard error.\n"
        "Dotted: the p that the estimate gave this kind at the end, a line for each seed"
    )
    figure.savefig(path)


def _panel(axes: Axes, by_p: Mapping[str, list[float]], chosen: Sequence[float]) -> None:
    exponents = [-0.25, *(1 / float(p) for p in by_p)]
    means = [0.0, *map(mean, by_p.values())]
    errors = [0.0, *(0.0 if math.isnan(error(values)) else error(values) for values in by_p.values())]
    axes.axhline(0, color="0.8", linewidth=0.8)
    axes.errorbar(exponents, means, errors, marker="o", markersize=3, color="#0072b2", capsize=2)
    for s in chosen:
        axes.axvline(s, color="#d55e00", linewidth=0.8, linestyle=":")
    axes.set_xticks([-0.25, -0.125, 0, 0.25], ["-4", "-8", "∞", "4"])
    axes.set_xlabel("p of this kind", fontsize=8)
    axes.tick_params(labelsize=7, labelbottom=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print the table and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=positive, default=3, help="seeds (default %(default)s)")
    options = parse_arguments(parser, arguments)
    path = options.output / NAME
    if not options.report:
        for outcome in run_all(
            path,
            lambda outcomes: wanted(options.regimes, outcomes, options.seeds),
            workers=options.workers,
            device=options.device,
            deadline=options.deadline,
        ):
            print(f"{outcome.regime}, {outcome.candidate}, seed {outcome.seed}: {outcome.loss:.4f}", flush=True)
    outcomes = load(path)
    found = {regime: kinds for regime in options.regimes if (kinds := responses(regime, outcomes))}
    for regime, kinds in found.items():
        print(f"\n{regime}: paired difference to p = -4 for all\n")
        rows = [
            (kind, *(f"{mean(by_p[p]):+.4f} ± {error(by_p[p]):.4f}" if p in by_p else "" for p in VALUES))
            for kind, by_p in kinds.items()
        ]
        print_table(("p of this kind alone", *VALUES), rows)
    if found:
        draw(found, outcomes, options.output / "response.png")


if __name__ == "__main__":
    main()
