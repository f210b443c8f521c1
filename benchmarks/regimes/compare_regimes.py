"""Compare optimizers in six kinds of training, each small enough for some seconds of one core.

Usage:
    python benchmarks/regimes/compare_regimes.py                      # all six, two workers: about an hour
    python benchmarks/regimes/compare_regimes.py text --seeds 5       # one regime
    python benchmarks/regimes/compare_regimes.py --deadline 600       # what fits ten minutes; one more call goes on
    python benchmarks/regimes/compare_regimes.py --report             # the table of what has run

Every candidate gets a sweep over learning rates with the first seed, extended by factors of two until the best rate is
not at its end, and the other seeds at the best rate. Outcomes are added to ``outcomes.jsonl`` as they come, and a run
that is there is not repeated.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from statistics import mean, stdev

from benchmarks.geometry.command_line import positive
from benchmarks.regimes.regimes import REGIMES
from benchmarks.regimes.runs import Outcome, Run, load, parse_arguments, run_all
from benchmarks.tables import print_table

_MOST_RATES = 7
_IMPOSSIBLE = {("convolutions", "muon")}  # torch.optim.Muon takes two-dimensional parameters only

CANDIDATES = {
    "AdamW": "adamw",
    "Muon": "muon",
    "p = 2": "p=2",
    "p = 4": "p=4",
    "p = ∞": "p=inf",
    "p = -10": "p=-10",
    "p = -5": "p=-5",
    "p = -4": "p=-4",
    "adaptive": "p=adaptive,p_max=-4",
    "adaptive, shuffled": "shuffled:p=adaptive,p_max=-4",
    "adaptive, ∞ to -4": "p=adaptive,p_min=inf,p_max=-4",
    "queries and keys ∞": "p=-4@query=inf@key=inf",  # about what the estimate chooses on text
    "random p": "random",
    "schedule, 4 to -5": "p=schedule,p_schedule=4:-5",
    # Of the package pytorch_optimizer
    "SOAP": "pytorch_optimizer.SOAP",
    "NorMuon": "pytorch_optimizer.NorMuon",
}


def next_runs(regime: str, candidate: str, outcomes: Iterable[Outcome], seeds: int) -> list[Run]:
    """Return what a candidate lacks and can run now: the sweep, its extension, or the other seeds at the best rate."""
    mine = [each for each in outcomes if each.regime == regime and each.candidate == candidate]
    losses = {each.rate: each.loss for each in mine if each.seed == 0}
    first = REGIMES[regime].adamw_rates if candidate == "adamw" else REGIMES[regime].rates
    if missing := [rate for rate in first if rate not in losses]:
        return [Run(regime, candidate, rate, 0) for rate in missing]
    best = min(losses, key=losses.__getitem__)
    if len(losses) < _MOST_RATES and math.isfinite(losses[best]):
        if best == max(losses):
            return [Run(regime, candidate, best * 2, 0)]
        if best == min(losses):
            return [Run(regime, candidate, best / 2, 0)]
    done = {each.seed for each in mine if each.rate == best}
    return [Run(regime, candidate, best, seed) for seed in range(seeds) if seed not in done]


def wanted(regimes: Sequence[str], candidates: Sequence[str], outcomes: Sequence[Outcome], seeds: int) -> list[Run]:
    """Return all runs that can begin now, sweeps before further seeds."""
    pairs = [(regime, each) for regime in regimes for each in candidates if _is_possible(regime, each)]
    runs = [run for pair in pairs for run in next_runs(*pair, outcomes, seeds)]
    return sorted(runs, key=lambda run: run.seed)


def _is_possible(regime: str, candidate: str) -> bool:
    """Return whether a regime has what a candidate trains."""
    kinds = {each.partition("=")[0] for each in candidate.split("@")[1:]}
    return (regime, candidate) not in _IMPOSSIBLE and kinds <= REGIMES[regime].kinds.keys()


def rows_of(regime: str, outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Return a row for each candidate: best rate, mean and standard error of its losses, and its lead over p = -4."""
    of = {name: best_losses(regime, candidate, outcomes) for name, candidate in CANDIDATES.items()}
    reference = of["p = -4"][1]
    rows: list[tuple[str, ...]] = []
    for name, (rate, losses) in of.items():
        if not losses:
            continue
        differences = [losses[seed] - reference[seed] for seed in losses.keys() & reference.keys()]
        paired = "" if name == "p = -4" or len(differences) < 2 else _with_error(differences, signed=True)
        rows.append((name, f"{rate:g}", str(len(losses)), _with_error(list(losses.values())), paired))
    return rows


def best_losses(regime: str, candidate: str, outcomes: Iterable[Outcome]) -> tuple[float, dict[int, float]]:
    """Return the best rate of the first seed's sweep, and the losses there by seed."""
    mine = [each for each in outcomes if each.regime == regime and each.candidate == candidate]
    sweep = {each.rate: each.loss for each in mine if each.seed == 0}
    if not sweep:
        return math.nan, {}
    best = min(sweep, key=sweep.__getitem__)
    return best, {each.seed: each.loss for each in sorted(mine, key=lambda each: each.seed) if each.rate == best}


def _with_error(values: Sequence[float], *, signed: bool = False) -> str:
    error = f" ± {stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    return f"{mean(values):{'+' if signed else ''}.4f}{error}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=[*CANDIDATES], help="leave the others out")
    parser.add_argument("--seeds", type=positive, default=5, help="seeds at the best rate (default %(default)s)")
    options = parse_arguments(parser, arguments)
    path = options.output / "outcomes.jsonl"
    if not options.report:
        chosen = [CANDIDATES[name] for name in options.only]
        for outcome in run_all(
            path,
            lambda outcomes: wanted(options.regimes, chosen, outcomes, options.seeds),
            workers=options.workers,
            deadline=options.deadline,
        ):
            run = f"{outcome.regime}, {outcome.candidate}, rate {outcome.rate:g}, seed {outcome.seed}"
            print(f"{run}: {outcome.loss:.4f}", flush=True)
    outcomes = load(path)
    for regime in options.regimes:
        print(f"\n{regime}\n")
        header = ("", "rate", "seeds", "validation loss", "paired difference to p = -4")
        print_table(header, rows_of(regime, outcomes))


if __name__ == "__main__":
    main()
