"""The page of a comparison: what is read off the outcomes."""

from __future__ import annotations

import math

import pytest

from benchmarks.comparison.outcomes import Outcome
from benchmarks.comparison.report import Standing, reach, rows_of, write_page


def outcome(rate, seed, loss, seconds=1.0, exponents=None):
    """Return an outcome of four steps whose loss falls in a straight line from 10 at step 0."""
    curve = [[step, seconds * step, 10 + (loss - 10) * step / 4] for step in (2, 4)]
    found = {"2": exponents, "4": exponents} if exponents else {}
    of_machine = {"state": 2_500_000, "machine": "a processor", "date": "2026-11-27"}
    return Outcome("toy", "x", rate, seed, loss, loss, 4 * seconds, found, curve, **of_machine)


@pytest.mark.parametrize(
    ("curve", "target", "expected"),
    [
        ([(10, 1, 3.0), (20, 2, 2.0), (30, 4, 1.0)], 1.5, (25, 3)),
        ([(10, 1, 3.0), (20, 2, 2.0)], 3.5, (10, 1)),
        ([(10, 1, 3.0), (20, 2, 2.0)], 0.5, None),
        ([(10, 1, math.inf), (20, 2, 1.0)], 2.0, (20, 2)),
        ([(10, 1, 1.0), (20, 2, 3.0), (30, 3, 1.0)], 2.0, (10, 1)),
        ([], 2.0, None),
    ],
)
def test_a_loss_is_reached_between_two_evaluations(curve, target, expected):
    assert reach(curve, target) == (None if expected is None else pytest.approx(expected, rel=1e-12, abs=0))


def test_a_standing_is_of_the_best_rate_of_the_first_seed():
    outcomes = [outcome(1e-3, 0, 3.0), outcome(2e-3, 0, 2.0), outcome(2e-3, 1, 4.0), outcome(1e-3, 1, 0.5)]
    standing = Standing.of("x", [*outcomes, outcome(4e-3, 0, math.inf)])
    assert standing.rate == 2e-3
    assert standing.losses == {0: 2.0, 1: 4.0}
    assert list(standing.sweep) == [1e-3, 2e-3, 4e-3]
    assert standing.curve() == [(2, 2, 6.5), (4, 4, 3.0)]
    nothing = Standing.of("x", [])
    assert math.isnan(nothing.rate)
    assert nothing.curve() == []


def test_a_seed_that_diverges_is_reported(tmp_path):
    broken = Outcome("toy", "x", 1e-3, 1, math.inf, math.inf, 1.0, curve=[[2, 1.0, math.inf]], machine="m", date="d")
    standing = Standing.of("AdamW", [outcome(1e-3, 0, 3.0), broken])
    assert standing.curve() == [(2, 1.5, math.inf)]
    base = Standing.of("p = -4", [outcome(1e-3, seed, 1.0) for seed in (0, 1)])
    assert rows_of([standing, base])[1][3:5] == ("inf", "+inf")
    assert write_page("toy", "What is trained", [standing], tmp_path).is_file()


def test_differences_are_paired_and_times_relative():
    base = Standing.of("p = -4", [outcome(1e-3, seed, loss) for seed, loss in enumerate((1.0, 3.0, 2.0))])
    muon = Standing.of("Muon", [outcome(2e-3, seed, loss, seconds=2.0) for seed, loss in enumerate((1.5, 3.7))])
    header, *rows = rows_of([muon, base])
    assert header[-1] == "steps, seconds to Muon's loss"
    # The differences 0.5 and 0.7 have the mean 0.6 and the standard error 0.1.
    assert rows[0] == ("Muon", "0.002", "2", "2.6000 ± 1.1000", "+0.6000 ± 0.1000", "8", "2.5", "1.00, 1.00")
    # It falls by 8 in 4 steps, by 7.4 in 3.7 of them.
    assert rows[1] == ("p = -4", "0.001", "3", "2.0000 ± 0.5774", "", "4", "2.5", "0.93, 0.46")
    assert [row[7] for row in rows_of([muon, base], tokens=4000)] == ["tokens/s", "500", "1,000"]
    alone = rows_of([Standing.of("Muon", [outcome(1e-3, 0, 2.0)])])[1]
    assert alone[3:5] == ("2.0000", "")


def test_the_page_says_where_it_was_measured_and_shows_what_there_is(tmp_path):
    estimated = {"a.weight": -0.25, "b.weight": 0.0}
    adaptive = Standing.of("adaptive, ∞ to -4", [outcome(1e-3, seed, 2.0, exponents=estimated) for seed in (0, 1)])
    plain = Standing.of("AdamW", [outcome(1e-3, 0, 2.5), outcome(2e-3, 0, math.inf)])
    page = write_page("some/toy regime.yaml", "What is trained", [plain, adaptive], tmp_path / "new")
    text = page.read_text("utf-8")
    assert page.name == "toy_regime.md"
    assert "What is trained. a processor; 2026-11-27." in text
    assert "| AdamW             | **2.5000** | inf" in text
    pictures = [line.partition("(")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert pictures == ["toy_regime.png", "toy_regime_adaptive_to_-4.png"]
    for picture in pictures:
        assert (page.parent / picture).stat().st_size > 10_000
