"""What a comparison says about the p that was learned: stable over seeds, or not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from benchmarks.comparison.comparison import Candidate, Outcome, Standing, Task
from benchmarks.comparison.comparison_stability import learned_exponents, stability, stability_sections

EXACT = {"rel": 1e-12, "abs": 1e-12}
HOLDER = Candidate("holder", "schatten_p", "", (1e-3,))
TASK = Task(Path("train.py"), (), "eval_loss", False, (1, 2, 3), (HOLDER,))


def outcome(seed, p_by_step):
    entries = [{"step": step, **{f"schatten_p/{layer}": p for layer, p in p.items()}} for step, p in p_by_step.items()]
    losses = [{"step": step, "loss": 2.0} for step in p_by_step]  # which Trainer logs apart
    logs = [{"step": 1, "loss": 2.0}, *entries, *losses, {"step": 9, "eval_loss": 1.0}]
    return Outcome("holder", 1e-3, seed, (), logs, [9], [1.0], [1.0], [1.0], [1.0])


def test_the_learned_exponents_are_those_of_the_logs():
    run = outcome(1, {4: {"a": 4.0, "b": "inf"}, 8: {"a": -5.0, "b": 2.0}})
    assert learned_exponents(run) == {4: {"a": 0.25, "b": 0.0}, 8: {"a": -0.2, "b": 0.5}}
    assert learned_exponents(outcome(1, {})) == {}


def test_layers_that_differ_are_told_from_seeds_that_differ():
    generator = np.random.default_rng(0)
    layers = generator.uniform(0, 1, 12)
    exponents = layers + 0.01 * generator.standard_normal((3, 12))
    runs = [{5: dict(enumerate(row))} for row in exponents]
    (found,) = stability(runs)
    assert found.step == 5
    assert found.between_layers == pytest.approx(np.std(np.mean(exponents, axis=0)), **EXACT)
    assert found.between_seeds == pytest.approx(math.sqrt(np.mean(np.std(exponents, axis=0, ddof=1) ** 2)), **EXACT)
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = np.mean([spearmanr(exponents[i], exponents[j]).statistic for i, j in pairs])
    assert found.rank_correlation == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert found.between_layers > 10 * found.between_seeds
    (noise,) = stability([{5: dict(enumerate(row))} for row in generator.uniform(0, 1, (3, 12))])
    assert noise.between_layers < noise.between_seeds


def test_estimates_that_one_seed_lacks_are_left_out_and_one_p_has_no_ranks():
    (found,) = stability([{5: {"a": 0.0, "b": 0.0}, 6: {"a": 0.0, "b": 0.1}}, {5: {"a": 0.1, "b": 0.2}}])
    assert found.step == 5
    assert math.isnan(found.rank_correlation)


def test_the_page_has_a_picture_and_a_table_of_what_was_learned_only(tmp_path):
    runs = [outcome(seed, {4: {"a": 4.0 + seed, "b": "inf"}, 8: {"a": 5.0, "b": "inf"}}) for seed in (1, 2)]
    sections = stability_sections([Standing(TASK, HOLDER, tuple(runs))], tmp_path)
    assert "### holder" in sections
    assert (tmp_path / "p_by_layer_holder.png").stat().st_size > 10_000
    table = next(part for part in sections if part.startswith("| step"))
    assert table.splitlines()[3] == "| 8 | 0.100 | 0.000 | 1.00 |"
    fixed = outcome(1, {4: {"a": 4.0, "b": 4.0}})
    assert stability_sections([Standing(TASK, HOLDER, (fixed,))], tmp_path) == []
