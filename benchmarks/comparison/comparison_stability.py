"""Whether the p that a candidate learns depends on the layer or on the seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from benchmarks.comparison.comparison import Outcome, Standing
from hf_schatten.report.figures import plot_p_of_runs
from hf_schatten.report.log import LAYER_PREFIX

Exponents = Mapping[int, Mapping[str, float]]  # s = 1/p by layer, by step of the estimate


@dataclass(frozen=True)
class Stability:
    """How the learned s = 1/p of one estimate differs between layers and between seeds.

    Attributes:
        step: Of the estimate.
        between_layers: Standard deviation over the layers of the mean over the seeds.
        between_seeds: Root mean square, over the layers, of the standard deviation over the seeds.
        rank_correlation: Spearman's, of the layers' s in two seeds, the mean of all pairs; not a number where all
            layers have one p.
    """

    step: int
    between_layers: float
    between_seeds: float
    rank_correlation: float


def learned_exponents(outcome: Outcome) -> Exponents:
    """Return the s = 1/p of every layer at every estimate of a run; empty where p was fixed."""
    learned: dict[int, dict[str, float]] = {}
    for entry in outcome.logs:  # of which a step may have several
        by_layer = {
            key.removeprefix(LAYER_PREFIX): 1 / float(p) for key, p in entry.items() if key.startswith(LAYER_PREFIX)
        }
        if by_layer:
            learned[entry["step"]] = by_layer
    return learned


def stability(runs: Sequence[Exponents]) -> list[Stability]:
    """Compare runs of several seeds, at every estimate that all of them have.

    Args:
        runs: Two or more, of one model.
    """
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    return [_stability(step, np.array([list(run[step].values()) for run in runs])) for step in steps]


def _stability(step: int, exponents: np.ndarray) -> Stability:
    """Compare (seeds, layers)."""
    correlations = [_rank_correlation(*pair) for pair in combinations(exponents, 2)]
    return Stability(
        step,
        between_layers=float(exponents.mean(axis=0).std()),
        between_seeds=float(np.sqrt(exponents.var(axis=0, ddof=1).mean())),
        rank_correlation=float(np.mean(correlations)),
    )


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])


def stability_sections(standings: Sequence[Standing], folder: Path) -> list[str]:
    """Draw the p by layer of each candidate that learns it, a panel for each seed; return the page's paragraphs."""
    sections = []
    for standing in standings:
        outcomes = standing.best_outcomes()
        runs = [learned_exponents(outcome) for outcome in outcomes]
        differing = any(len(set(by_layer.values())) > 1 for run in runs for by_layer in run.values())
        if not differing:  # a number, or a schedule
            continue
        picture = folder / f"p_by_layer_{standing.candidate.name.replace(' ', '_')}.png"
        plot_p_of_runs({f"seed {outcome.seed}": outcome.logs for outcome in outcomes}, picture)
        sections += [f"### {standing.candidate.name}", f"![p of each layer over training, by seed]({picture.name})"]
        if len(runs) > 1:
            rows = "\n".join(
                f"| {each.step} | {each.between_layers:.3f} | {each.between_seeds:.3f} | {_number(each)} |"
                for each in stability(runs)
            )
            sections.append(f"{_HEADER}\n{rows}")
    if sections:
        sections.insert(0, "## The p that was learned")
        sections.append(_LEGEND)
    return sections


_HEADER = "| step | between layers | between seeds | rank correlation |\n| --- | --- | --- | --- |"
_LEGEND = (
    "between layers: standard deviation over the layers of s = 1/p, averaged over the seeds. between seeds: of one "
    "layer's s over the seeds, root mean square. rank correlation: Spearman's, of the layers' s in two seeds. Layers "
    "differ and p is stable where the first is much larger than the second."
)


def _number(each: Stability) -> str:
    return "–" if math.isnan(each.rank_correlation) else f"{each.rank_correlation:.2f}"
