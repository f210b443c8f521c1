"""Compare optimizers in kinds of training (regimes), each at the best of its learning rates.

Usage:
    python benchmarks/comparison/compare_optimizers.py                  # six small regimes, two workers: hours
    python benchmarks/comparison/compare_optimizers.py text --seeds 3   # one of them
    python benchmarks/comparison/compare_optimizers.py longer "width 128" --only AdamW Muon "p = -4"
    python benchmarks/comparison/compare_optimizers.py vit --only p=-6 torch.optim.NAdam   # options, or a class
    python benchmarks/comparison/compare_optimizers.py recipes/pretrain_clm/comparison.yaml  # a script with a Trainer
    python benchmarks/comparison/compare_optimizers.py --deadline 600   # what fits ten minutes; one more call goes on
    python benchmarks/comparison/compare_optimizers.py --report         # the tables and pages of what has run

Every optimizer gets a sweep over learning rates with the first seed, extended by factors of two until the best rate is
not at its end, and the other seeds at the best rate. N workers each take runs from a queue (``--workers``), so that
small models fill a GPU. Outcomes are added to ``outcomes.jsonl`` as they come, and a run that is there is not
repeated: after a change of the training, give another ``--output``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence

from benchmarks.comparison.outcomes import NAME, Outcome, Run, load
from benchmarks.comparison.regimes import find
from benchmarks.comparison.report import Standing, rows_of, write_page
from benchmarks.comparison.runs import parse_arguments, run_all
from benchmarks.geometry.command_line import positive
from benchmarks.tables import markdown

_MOST_RATES = 7

CANDIDATES = {
    "AdamW": "adamw",  # betas (0.9, 0.95)
    "AdamW, β₂ = 0.999": "adamw:0.999",
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


def candidate_of(name: str) -> str:
    """Return the candidate with a name of the table, or which this is: options, or the class of another package.

    Raises:
        ValueError: when it is neither.
    """
    if name not in CANDIDATES and not ("=" in name or "." in name):
        raise ValueError(f"{name!r} is none of {', '.join(CANDIDATES)}, no options such as p=3, and no package.Class")
    return CANDIDATES.get(name, name)


def next_runs(regime: str, candidate: str, outcomes: Iterable[Outcome], seeds: int) -> list[Run]:
    """Return what a candidate lacks and can run now: the sweep, its extension, or the other seeds at the best rate."""
    mine = [each for each in outcomes if each.regime == regime and each.candidate == candidate]
    losses = {each.rate: each.loss for each in mine if each.seed == 0}
    first = find(regime).adamw_rates if candidate.startswith("adamw") else find(regime).rates
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
    pairs = [(regime, each) for regime in regimes for each in candidates if find(regime).can(each)]
    runs = [run for pair in pairs for run in next_runs(*pair, outcomes, seeds)]
    return sorted(runs, key=lambda run: run.seed)


def standing(regime: str, name: str, outcomes: Iterable[Outcome]) -> Standing:
    """Return how a candidate stands in a regime, by the name of the table or as :func:`candidate_of` takes it."""
    candidate = candidate_of(name)
    return Standing.of(name, [each for each in outcomes if (each.regime, each.candidate) == (regime, candidate)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print the tables, and write a page for each regime."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="OPTIMIZER", help="leave the others out")
    parser.add_argument("--seeds", type=positive, default=5, help="seeds at the best rate (default %(default)s)")
    options = parse_arguments(parser, arguments)
    try:
        chosen = [candidate_of(name) for name in options.only or CANDIDATES]
    except ValueError as error:
        parser.error(str(error))
    path = options.output / NAME
    if not options.report:
        for outcome in run_all(
            path,
            lambda outcomes: wanted(options.regimes, chosen, outcomes, options.seeds),
            workers=options.workers,
            device=options.device,
            deadline=options.deadline,
        ):
            run = f"{outcome.regime}, {outcome.candidate}, rate {outcome.rate:g}, seed {outcome.seed}"
            print(f"{run}: {outcome.loss:.4f}", flush=True)
    outcomes = load(path)
    for regime in options.regimes:
        all_standings = [standing(regime, name, outcomes) for name in dict.fromkeys([*CANDIDATES, *options.only])]
        if standings := [each for each in all_standings if each.sweep]:
            described = find(regime)
            page = write_page(regime, described.summary, standings, options.output, described.tokens)
            print(f"\n{regime}: {page}\n\n{markdown(rows_of(standings, described.tokens))}")


if __name__ == "__main__":
    main()
