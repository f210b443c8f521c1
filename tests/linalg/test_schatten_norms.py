"""Schatten norms against their definition on known singular values, and the inequalities that norms obey."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_schatten.linalg import dual_order, relative_size, schatten_norm, stable_rank
from hf_schatten.linalg.schatten_norms import scaled_to_unit

pytestmark = pytest.mark.filterwarnings("error")

ORDERS = [1, 1.01, 1.5, 2, 3, 30, 1e4, math.inf]
SHAPES = [(5, 5), (3, 8), (8, 3), (1, 6), (6, 1), (2, 3, 4, 7)]
SIGMA = torch.tensor([4.0, 3.0, 3.0, 1e-3, 0.0], dtype=torch.float64)

EXACT = {"rtol": 1e-12, "atol": 1e-13}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_singular_values(sigma: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    U, V = (torch.linalg.qr(gaussian(size, len(sigma), seed=seed + size))[0] for size in (m, n))
    return (U * sigma) @ V.mT


@pytest.mark.parametrize(("order", "dual"), [(1, math.inf), (math.inf, 1), (2, 2), (3, 1.5), (1.25, 5), (101, 1.01)])
def test_dual_orders(order: float, dual: float) -> None:
    assert dual_order(order) == pytest.approx(dual, rel=1e-15, abs=1e-15)


def test_dual_orders_are_precise_near_one() -> None:
    assert dual_order(1 + 2**-40) == 1 + 2**40
    assert dual_order(1 + 2**40) == 1 + 2**-40


@given(st.floats(1, 1e6))
def test_duality_is_an_involution(order: float) -> None:
    assert 1 / order + 1 / dual_order(order) == pytest.approx(1, rel=1e-14, abs=1e-14)
    assert dual_order(dual_order(order)) == pytest.approx(order, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize(("m", "n"), [(5, 5), (9, 5), (5, 9), (7, 6)])
@pytest.mark.parametrize("order", ORDERS[:-2])
def test_the_norm_is_that_of_the_singular_values(order: float, m: int, n: int) -> None:
    expected = sum(sigma**order for sigma in SIGMA.tolist()) ** (1 / order)
    norm = schatten_norm(with_singular_values(SIGMA, m, n), order)
    torch.testing.assert_close(norm, torch.tensor(expected, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("order", "name"), [(1, "nuc"), (2, "fro"), (math.inf, 2)])
def test_named_norms_of_batches(order: float, name: str | int, shape: tuple[int, ...]) -> None:
    X = gaussian(*shape)
    torch.testing.assert_close(schatten_norm(X, order), torch.linalg.matrix_norm(X, name), **EXACT)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e150, 1e300])
def test_the_norm_is_homogeneous_at_every_scale(scale: float, order: float) -> None:
    X = gaussian(6, 9)
    torch.testing.assert_close(schatten_norm(scale * X, order) / scale, schatten_norm(X, order), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])  # LAPACK would cope alone; not every device's library does
def test_decompositions_see_elements_of_order_one(scale: float) -> None:
    X = scale * gaussian(2, 3, 4)
    unit, magnitude = scaled_to_unit(X)
    assert unit.abs().amax((-2, -1)).tolist() == [1, 1]
    torch.testing.assert_close(unit * magnitude, X, rtol=1e-15, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_zero_has_norm_zero_and_spoils_no_other(order: float) -> None:
    X = torch.stack([torch.zeros(3, 4), torch.eye(3, 4)])
    expected = torch.tensor([0.0, 3 ** (1 / order)])
    torch.testing.assert_close(schatten_norm(X, order), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("order", [1, 2, math.inf])
def test_what_is_not_finite_is_nan_and_spoils_no_other(order: float, bad: float) -> None:
    X = torch.eye(2).repeat(2, 1, 1)
    X[0, 0, 1] = bad
    for measured in (schatten_norm(X, order), stable_rank(X), relative_size(X, X, order)):
        assert measured.isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("order", [1, 3, math.inf])
def test_low_precision_is_rounded_once_at_the_end(order: float, dtype: torch.dtype) -> None:
    X, W = gaussian(2, 4, 7).to(dtype), gaussian(4, 7, seed=1).to(dtype)
    for measured, exact in [
        (schatten_norm(X, order), schatten_norm(X.double(), order)),
        (stable_rank(X), stable_rank(X.double())),
        (relative_size(X, W, order), relative_size(X.double(), W.double(), order)),
    ]:
        assert torch.equal(measured, exact.to(dtype))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6), st.floats(1, 50), st.floats(1, 50))
def test_inequalities_of_norms(seed: int, m: int, n: int, order: float, other: float) -> None:
    X, Y = gaussian(2, m, n, seed=seed)
    margin = 1 + 1e-12
    norm = schatten_norm(X, order)
    assert schatten_norm(X + Y, order) <= margin * (norm + schatten_norm(Y, order))
    assert (X * Y).sum() <= margin * norm * schatten_norm(Y, dual_order(order))
    smaller, larger = sorted((order, other))
    equivalence = min(m, n) ** (1 / smaller - 1 / larger)
    assert schatten_norm(X, larger) <= margin * schatten_norm(X, smaller)
    assert schatten_norm(X, smaller) <= margin * equivalence * schatten_norm(X, larger)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.one_of(st.floats(1, 100), st.just(math.inf)))
def test_the_norm_ignores_rotations_and_transposition(seed: int, order: float) -> None:
    X = gaussian(4, 6, seed=seed)
    Q, R = (torch.linalg.qr(gaussian(size, size, seed=seed + size))[0] for size in X.shape)
    norm = schatten_norm(X, order)
    torch.testing.assert_close(schatten_norm(Q @ X @ R, order), norm, **EXACT)
    torch.testing.assert_close(schatten_norm(X.mT, order), norm, **EXACT)


@pytest.mark.parametrize("order", [0, 0.999, -1, -math.inf, math.nan])
def test_an_order_outside_the_range_is_an_error(order: float) -> None:
    X = torch.eye(2)
    for call in (lambda: dual_order(order), lambda: schatten_norm(X, order), lambda: relative_size(X, X, order)):
        with pytest.raises(ValueError, match=rf"\[1, inf\], got {order!r}"):
            call()


@pytest.mark.parametrize("X", [torch.ones(3), torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2).cfloat()])
def test_what_is_no_real_matrix_is_an_error(X: Tensor) -> None:
    for measure in (stable_rank, lambda X: schatten_norm(X, 2)):
        with pytest.raises(ValueError, match="floating point with two dimensions"):
            measure(X)


def test_stable_ranks() -> None:
    eye = torch.eye(3, 5)
    X = torch.stack([eye, torch.ones(3, 5), torch.tensor([[2.0], [1.0], [1.0]]) * eye, torch.zeros(3, 5)])
    torch.testing.assert_close(stable_rank(X), torch.tensor([3.0, 1.0, 1.5, 0.0]), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(stable_rank(1e30 * X), stable_rank(X), rtol=1e-6, atol=1e-7)


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_the_stable_rank_lies_between_one_and_the_rank(seed: int, m: int, n: int) -> None:
    assert 1 - 1e-12 <= stable_rank(gaussian(m, n, seed=seed)) <= min(m, n) + 1e-12


@pytest.mark.parametrize(("order", "expected"), [(1, 7 / 6), (2, 5 / math.sqrt(12)), (math.inf, 2.0)])
def test_relative_sizes(order: float, expected: float) -> None:
    update, W = torch.diag(torch.tensor([3.0, 4.0])), 2 * torch.eye(3)
    torch.testing.assert_close(relative_size(update, W, order), torch.tensor(expected), rtol=1e-6, atol=1e-7)
    batch = relative_size(torch.stack([update, 0 * update]), W, order)
    torch.testing.assert_close(batch, torch.tensor([expected, 0.0]), rtol=1e-6, atol=1e-7)


def test_the_relative_size_to_a_zero_matrix() -> None:
    eye, zero = torch.eye(2), torch.zeros(2, 2)
    assert relative_size(eye, zero, 2).isinf()
    assert relative_size(zero, zero, 2).isnan()


def test_relative_sizes_of_huge_half_precision() -> None:
    huge = torch.full((100, 100), 6e4, dtype=torch.float16)  # its norm is no float16
    torch.testing.assert_close(
        relative_size(0.5 * huge, huge, 2), torch.tensor(0.5, dtype=torch.float16), rtol=1e-3, atol=1e-3
    )
