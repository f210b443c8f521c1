"""The measured problem has the constants that the theory is given, the bound holds, and the script runs."""

import math
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks.convergence import schattor_rate as script
from benchmarks.convergence.schattor_rate import GAP, LOSSES, ORDERS, SIGMA, Problem


def values(problem: Problem, X: torch.Tensor) -> torch.Tensor:
    """Return f (B,) at X, with the losses written out."""
    residual = torch.einsum("bjmn,bmn->bj", problem.A, X) - problem.b
    quadratic, nonconvex = residual.chunk(2)
    nonconvex = nonconvex.square() / (2 + 2 * nonconvex.square())
    return torch.cat([quadratic.square() / 2, nonconvex]).mean(1)


@pytest.fixture
def problem() -> Problem:
    problem = Problem.of(6, seeds=2)
    return Problem(problem.A.double(), problem.b.double(), problem.p, problem.noise_scale.double())


def test_gradient_and_gap(problem):
    X = torch.zeros(problem.shape, dtype=torch.float64, requires_grad=True)
    f = values(problem, X)
    torch.testing.assert_close(f.detach(), torch.full_like(f.detach(), GAP), atol=1e-6, rtol=1e-6)
    Y = torch.randn(problem.shape, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(values(problem, Y).sum(), Y)
    torch.testing.assert_close(problem.gradient(Y.detach()), expected, atol=1e-12, rtol=1e-12)


def test_lipschitz_constant_is_one_in_every_geometry(problem):
    torch.manual_seed(0)
    X = torch.randn(problem.shape).double()
    for scale in (1e-2, 1.0, 10.0):
        step = scale * torch.randn(problem.shape).double()
        change = problem.dual_norms(problem.gradient(X + step) - problem.gradient(X))
        sigma = torch.linalg.svdvals(step)
        norms = [torch.linalg.vector_norm(row, p + 1) for row, p in zip(sigma, problem.p, strict=True)]
        assert (change <= torch.stack(norms) * (1 + 1e-9)).all()


def test_covariance_of_the_noise_has_dual_norm_sigma(problem):
    m, n = problem.shape[1:]
    variance = n * problem.noise_scale.flatten() ** 2  # E[noise noiseᵀ] = variance · identity
    norms = [v**0.5 * m ** (1 / (1 + 1 / p)) for v, p in zip(variance.tolist(), problem.p, strict=True)]
    assert norms == pytest.approx([SIGMA] * len(norms), rel=1e-5)


def test_rows_are_losses_times_p_times_seeds():
    problem = Problem.of(4, seeds=3)
    assert list(problem.p) == [p for _, p, _ in product(LOSSES, ORDERS, range(3))]
    assert torch.linalg.matrix_norm(problem.A[0]).tolist() == pytest.approx([1.0] * script.TERMS)
    nuclear = torch.linalg.matrix_norm(problem.A[2 * 3], "nuc")
    assert nuclear.tolist() == pytest.approx([1.0] * script.TERMS, rel=1e-5)


@pytest.mark.parametrize("rule", script.RULES)
def test_bound_falls_with_the_fourth_root_of_the_horizon(rule):
    ratio = script.bound(rule, 2**18) / script.bound(rule, 2**14)
    assert ratio == pytest.approx(0.5, rel=0.05)


def test_measured_stationarity_is_below_the_bound():
    for case, stationarity in script.measure(4, 64, seeds=2).items():
        assert stationarity.shape == (2, 2)
        assert stationarity[0].mean() < script.bound(case.rule, 64)


def test_slope_recovers_a_power_law():
    noise = torch.tensor([0.0, 0.01, -0.01])
    points = {T: T**-0.25 * T**noise for T in (64, 256, 1024)}
    middle, low, high = script.slope(points)
    assert middle == pytest.approx(-0.25, abs=1e-6)
    half = 4.303 * 0.01 / math.sqrt(3)  # the t distribution's quantile at two degrees of freedom
    assert (low, high) == pytest.approx((-0.25 - half, -0.25 + half), abs=1e-4)


def test_whole_run(tmp_path: Path, capsys, monkeypatch):
    plan = script.Plan(horizons=(4, 8), rows=2, sizes=(2, 4), steps=4, seeds=2)
    monkeypatch.setattr(script, "QUICK", plan)
    script.main(["--quick", "--output", str(tmp_path / "new")])
    text = (tmp_path / "new" / "schattor_rate.md").read_text("utf-8")
    assert text.count("| nonconvex | ∞ | ball |") == 4
    assert text.strip() in capsys.readouterr().out
    assert (tmp_path / "new" / "schattor_rate.png").stat().st_size > 10_000
