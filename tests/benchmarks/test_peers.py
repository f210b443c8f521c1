"""Every method against the float64 SVD where it is good, and against what is known of it where it is not."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.spectral_power import peers
from benchmarks.spectral_power.accuracy import Subject
from benchmarks.spectral_power.peers import (
    EXPONENTS,
    Method,
    all_methods,
    lagrange,
    minimax_composition,
    newton_schulz,
    polar_taylor,
)
from hf_schatten.linalg import spectral_power_svd

METHODS = all_methods(torch.float32, steps=(5,))


def matrix(m: int, n: int, condition: float) -> Tensor:
    """Return a float32 matrix (m, n) with log-uniform singular values from 1 down to 1/condition."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(k, min(m, n), generator=generator, dtype=torch.float64)).Q for k in (m, n))
    return (U * torch.logspace(0, -math.log10(condition), min(m, n), dtype=torch.float64) @ V.mT).float()


def error(method: Method, X: Tensor, p: float) -> float:
    return Subject.of("X", X).relative_error(method, p)


@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24)])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_well_conditioned_matrices(method, shape):
    X = 7 * matrix(*shape, condition=2)
    p = 2.0 if 2.0 in method.exponents else 4.0
    # A composition oscillates, and so does the polar factor from five steps; six iterations have not converged.
    rough = method.family.startswith("minimax") or method.setting in {"5 + 5", "6 iterations"}
    assert error(method, X, p) < (0.25 if rough else 0.05)


@pytest.mark.parametrize(
    ("family", "p", "bound"),
    [
        ("exact SVD", 3.0, 1e-5),
        ("least squares, a+b+c = 1", 1.0, 1e-5),
        ("minimax on [0.001, 1]", 1.0, 1e-5),
        ("ours", 1.0, 1e-6),
    ],
)
def test_condition_100(family, p, bound):
    X = matrix(40, 40, condition=100)
    assert max(error(method, X, p) for method in METHODS if method.family == family) < bound


@pytest.mark.parametrize("p", [2.0, 4.0])
def test_coupled_square_roots_converge(p):
    X = matrix(40, 40, condition=10)
    errors = [error(m, X, p) for m in METHODS if m.family == "coupled square roots" and m.exponents == (p,)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01  # what the damping leaves


def test_coupled_square_roots_exist_for_two_exponents_only():
    assert {m.exponents for m in METHODS if m.family == "coupled square roots"} == {(2.0,), (4.0,)}
    assert all(m.exponents == EXPONENTS for m in METHODS if m.family != "coupled square roots")


def test_newton_schulz_is_muons():
    X = matrix(20, 50, condition=100)
    Y = X / X.norm()
    for _ in range(5):
        A = Y @ Y.mT
        Y = 3.4445 * Y - 4.7750 * A @ Y + 2.0315 * A @ A @ Y
    for batch in (X, X.mT, torch.stack([X, 3 * X])):
        result = newton_schulz(batch)
        expected = Y if batch.shape[-2] < batch.shape[-1] else Y.mT
        torch.testing.assert_close(result, expected.expand_as(result), rtol=1e-4, atol=1e-5)


def test_lagrange_satisfies_its_constraint_and_its_optimality() -> None:
    fitted = lagrange(0.5, 1)
    a, b, c = fitted.a[0], fitted.b[0], fitted.c[0]
    assert a + b + c == pytest.approx(1, rel=1e-12, abs=1e-12)
    x = (np.arange(100_000) + 0.5) / 100_000
    error = fitted.transfer(x) - np.sqrt(x)
    for direction in (x - x**3, x**3 - x**5):  # along the constraint
        assert (error * direction).mean() == pytest.approx(0, rel=1e-6, abs=1e-6)


def test_lagrange_composes_equal_steps() -> None:
    fitted = lagrange(1 / 3, 4)
    assert fitted.steps == 4
    assert len(set(fitted.a)) == 1
    x = np.linspace(0.2, 1, 50)
    np.testing.assert_allclose(fitted.transfer(x), x ** (1 / 3), rtol=0.25, atol=0.1)


def test_minimax_step_equioscillates():
    x = np.geomspace(1e-3, 1, peers._POINTS)
    first = minimax_composition(0.0, 1).transfer(x) - 1
    extremes = first[np.isclose(abs(first), abs(first).max(), rtol=1e-6)]
    signs = np.sign(extremes)
    assert len(signs) == 4  # three coefficients and the error
    assert (signs[1:] == -signs[:-1]).all()


@pytest.mark.parametrize("steps", [3, 5, 8])
@pytest.mark.parametrize("s", [0.0, 0.1, 0.5, 1.0])
def test_minimax_composition_improves_with_steps(s, steps):
    x = np.geomspace(1e-3, 1, 999)  # between the points of the fit too
    one, many = (abs(minimax_composition(s, k).transfer(x) - x**s).max() for k in (1, steps))
    assert many <= one + 1e-5


@pytest.mark.parametrize("steps", [1, 8])
def test_minimax_composition_leaves_x_alone_at_p_one(steps):
    x = np.geomspace(1e-3, 1, 999)
    np.testing.assert_allclose(minimax_composition(1.0, steps).transfer(x), x, rtol=0, atol=1e-4)


def test_taylor_series_is_exact_at_p_one_and_infinity():
    X = matrix(30, 30, condition=5)
    for p in (1.0, math.inf):
        result = polar_taylor(X, p, polar=minimax_composition(0.0, 8))
        torch.testing.assert_close(result.double(), spectral_power_svd(X, p), rtol=1e-3, atol=1e-3)


def test_half_precision_methods_stay_near_float32():
    X = matrix(24, 60, condition=2)
    for method in all_methods(torch.bfloat16, steps=(5,)):
        # Eight minimax steps before a Taylor series explode on some matrices like this one, and nearly on others.
        if 2.0 in method.exponents and method.setting != "8 + 5":
            assert error(method, X, 2.0) < 0.25
