"""Targets: each family against a float64 SVD, the fits' reports against measurement, and names that are refused."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_schatten.linalg import spectral_power, targets, top_k_direction
from hf_schatten.linalg.targets import SoftThreshold, fit_target, target_of

pytestmark = pytest.mark.filterwarnings("error")

SHAPES = [(12, 12), (10, 31), (31, 10), (2, 3, 8, 20)]
SAFETY = 1.01  # the Schatten-8 norm's margin for rounding
P = torch.tensor(math.inf)


def matrices(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def applied(X: Tensor, f) -> Tensor:
    """U f(σ/c) Vᵀ by the SVD, with c the Schatten-8 norm."""
    U, sigma, Vh = torch.linalg.svd(X, full_matrices=False)
    c = SAFETY * torch.linalg.vector_norm(sigma, 8, dim=-1, keepdim=True)
    return (U * torch.from_numpy(f((sigma / c).numpy())).unsqueeze(-2)) @ Vh


def with_gap(X: Tensor, k: int, ratio: float) -> Tensor:
    """X with the singular values after the k-th scaled down to `ratio` of it, or less."""
    U, sigma, Vh = torch.linalg.svd(X, full_matrices=False)
    tail = sigma[..., k:] / sigma[..., k : k + 1] * sigma[..., k - 1 : k] * ratio
    return (U * torch.cat([sigma[..., :k], tail], -1).unsqueeze(-2)) @ Vh


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "f", "tolerance"),
    # Largest error of a singular value: that of the five-step fit, which the report states.
    [
        ("soft_threshold:0.1", lambda x: np.maximum(x - 0.1, 0), 0.003),
        ("soft_step:0.2", lambda x: 1 / (1 + (0.2 / x) ** 8), 0.04),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fitted_families_equal_the_svd(shape, name, f, tolerance, dtype):
    X = matrices(shape)
    result, _ = target_of(name).direction(X.to(dtype), P, 5)
    assert result.dtype == dtype
    assert result.shape == X.shape
    assert torch.linalg.matrix_norm(result.double() - applied(X, f), 2).max() <= tolerance


def test_any_function_is_a_target():
    X = matrices((9, 14))
    result, _ = target_of(lambda x: np.tanh(5 * x)).direction(X, P, 5)
    assert torch.linalg.matrix_norm(result - applied(X, lambda x: np.tanh(5 * x)), 2) <= 0.01


def test_power_refers_to_the_tables():
    X, p = matrices((3, 8, 12)), torch.tensor([1.0, 3.0, math.inf])
    torch.testing.assert_close(target_of("power").direction(X, p, 5)[0], spectral_power(X, p, steps=5), rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_top_k_equals_the_svd_where_there_is_a_gap(shape, k, dtype, atol):
    X = with_gap(matrices(shape), k, 0.6)  # 0.6^32 = 8e-8
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    expected = U[..., :k] @ Vh[..., :k, :]
    for direction in (top_k_direction(X.to(dtype), k), target_of(f"top_k:{k}").direction(X.to(dtype), P, 5)[0]):
        assert direction.dtype == dtype
        torch.testing.assert_close(direction.double(), expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("k", [2, 8, 32])
def test_top_k_without_a_gap_has_k_ones_and_nearly_the_largest_inner_product(k):
    X = matrices((128, 128))
    direction = top_k_direction(X, k)
    values = torch.linalg.svdvals(direction)
    torch.testing.assert_close(values[:k], torch.ones(k, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert values[k:].max() < 1e-6
    assert (X * direction).sum() >= 0.98 * torch.linalg.svdvals(X)[:k].sum()


def test_top_k_of_ties_is_a_partial_isometry():
    direction = top_k_direction(torch.eye(6, dtype=torch.float64), 2)
    expected = torch.tensor([1.0, 1, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.svdvals(direction), expected, rtol=1e-6, atol=1e-6)


def test_top_k_of_all_is_the_polar_factor():
    X = matrices((7, 12))
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    for k in (7, 100):
        torch.testing.assert_close(top_k_direction(X, k), U @ Vh, rtol=1e-6, atol=1e-6)


def test_top_k_of_a_lower_rank_keeps_its_zeros():
    X = torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0]))
    expected = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(top_k_direction(X, 3), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_top_k_does_not_depend_on_the_scale(scale):
    X = with_gap(matrices((8, 11)), 3, 0.5).float()
    torch.testing.assert_close(top_k_direction(X * scale, 3), top_k_direction(X, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["power", "top_k:1", "top_k:3", "soft_threshold:0.1", "soft_step:0.2"])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 6, 6)])
def test_zero_gives_zero_and_nan_stays_with_its_matrix(name, shape):
    target, X = target_of(name), torch.stack([torch.zeros(shape), torch.full(shape, math.nan), torch.ones(shape)])
    result, _ = target.direction(X, P, 5)
    assert not result[0].any()
    assert result[1].isnan().all()
    assert result[2].isfinite().all()


def test_top_k_leaves_the_random_state_alone_and_repeats():
    state = torch.get_rng_state()
    X = matrices((20, 20))
    torch.testing.assert_close(top_k_direction(X, 4), top_k_direction(X, 4), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_report_is_the_measured_error():
    f = SoftThreshold(0.1)
    fitted = fit_target(f, 3)
    x = np.geomspace(0.01, 1, 777)  # other points than the report's
    error = fitted.coefficients.transfer(x) - np.maximum(x - 0.1, 0)
    assert fitted.max_error == pytest.approx(np.abs(error).max(), rel=0.02)
    assert fitted.relative_error == pytest.approx(np.sqrt((error**2).mean() / (f(x) ** 2).mean()), rel=0.02)
    assert f"largest error {fitted.max_error:.2g}, relative error {fitted.relative_error:.2%}" in str(fitted)
    assert "from 0.01 to 1 of the Schatten-8 norm (3 Newton–Schulz steps)" in str(fitted)
    assert target_of("soft_threshold:0.1").accuracy(3) == str(fitted)


def test_a_target_is_fitted_once_for_each_number_of_steps(monkeypatch):
    calls = []
    real = targets.fit_target.__wrapped__

    def f(x):
        calls.append(len(x))
        return x**3

    target = target_of(f)
    target.accuracy(3)
    fitted, evaluations = fit_target(f, 3), len(calls)
    for _ in range(3):
        target.direction(matrices((4, 5)), P, 3)
    assert len(calls) == evaluations
    assert fit_target(f, 3) is fitted
    assert target_of("soft_step:0.2") == target_of("soft_step:0.20")
    assert real(f, 3) == fitted
    assert len(calls) > evaluations
    assert fit_target(f, 4).coefficients.steps == 4


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda x: np.log(x - 0.5), "<lambda> is nan at the relative singular value 0.01: return finite numbers"),
        (lambda x: 0.0 * x, "is 0 on all of \\[0.01, 1\\]: no update would be left"),
    ],
)
def test_a_function_without_values_is_refused(f, message):
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=message):
        fit_target(f, 3)


def test_a_constant_may_be_returned_as_one_number():
    assert fit_target(lambda x: 1.0, 3).relative_error < 0.2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("best", "target='best' is not allowed: one of power, top_k:K, soft_threshold:TAU, soft_step:TAU"),
        ("topk:4", "Did you mean 'top_k'\\?"),
        ("top_k", "write top_k:K, K a whole number from 1, such as top_k:8"),
        ("top_k:", "write top_k:K"),
        ("top_k:-1", "write top_k:K"),
        ("soft_threshold:0", "write soft_threshold:TAU, TAU between 0 and 1, such as soft_threshold:0.1"),
        ("soft_step:abc", "write soft_step:TAU"),
        ("power:", "write power, whose exponent is 1/p"),
        ("function:f", "a text cannot hold. Pass the function itself"),
    ],
)
def test_a_bad_name_is_refused_with_the_fix(text, message):
    with pytest.raises(ValueError, match=f"target='{text}' is not allowed.*{message}|{message}"):
        target_of(text)


def test_bad_arguments_are_refused():
    for text in ("soft_threshold:1.5", "soft_step:1.5"):
        with pytest.raises(ValueError, match="TAU between 0 and 1"):
            target_of(text)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        top_k_direction(torch.ones(2, 2), 0)
    with pytest.raises(ValueError, match="X must be floating point"):
        top_k_direction(torch.ones(2, 2, dtype=torch.int64), 1)
