"""The oracles against closed forms, random feasible points and independent numeric optimisers."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_norms import EXACT, gaussian, inner, plain_norm
from torch import Tensor

from hf_schatten.linalg import (
    ball_oracle,
    coupling_factors,
    dual_order,
    dualizer,
    regularized_oracle,
)

pytestmark = pytest.mark.filterwarnings("error")

ORDERS = [1, 1 + 1e-12, 1.05, 1.5, 2, 3, 10, 1e6, math.inf]


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(gaussian(rows, columns, seed=seed))[0]


def with_singular_values(sigma: Sequence[float], m: int, n: int) -> Tensor:
    U, V = orthonormal(m, len(sigma), 1), orthonormal(n, len(sigma), 2)
    return (U * torch.tensor(sigma, dtype=torch.float64)) @ V.mT


MATRICES = {
    "square": gaussian(5, 5),
    "wide": gaussian(3, 7),
    "tall": gaussian(7, 3),
    "row": gaussian(1, 4),
    "column": gaussian(4, 1),
    "batch": gaussian(2, 3, 4, 6),
    "tied": with_singular_values([3, 3, 3, 1], 6, 5),
    "low rank": with_singular_values([2, 1e-3], 6, 5),
    "orthogonal": orthonormal(4, 4),
    "tiny": 1e-300 * gaussian(4, 6),
    "huge": 1e300 * gaussian(4, 6),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("order", ORDERS)
def test_the_dualizer_is_feasible_and_attains_the_dual_norm(order: float, name: str) -> None:
    X = MATRICES[name]
    scale = X.abs().max()
    T = dualizer(X, order)
    torch.testing.assert_close(plain_norm(T, order), torch.ones(X.shape[:-2], dtype=torch.float64), **EXACT)
    torch.testing.assert_close(inner(X / scale, T), plain_norm(X / scale, dual_order(order)), **EXACT)


@pytest.mark.parametrize("name", ["square", "wide", "tall", "batch"])
def test_dualizers_in_closed_form(name: str) -> None:
    X = MATRICES[name]
    U, sigma, Vh = torch.linalg.svd(X, full_matrices=False)
    for order, expected in [
        (1, U[..., :1] @ Vh[..., :1, :]),
        (2, X / torch.linalg.matrix_norm(X, keepdim=True)),
        (3, (U * (sigma / plain_norm(X, 1.5)[..., None]).sqrt().unsqueeze(-2)) @ Vh),
        (math.inf, U @ Vh),
    ]:
        torch.testing.assert_close(dualizer(X, order), expected, **EXACT)


def test_ties_of_the_largest_singular_value_share_order_one_equally() -> None:
    U, V = orthonormal(6, 4, 1), orthonormal(5, 4, 2)
    torch.testing.assert_close(dualizer(MATRICES["tied"], 1), U[:, :3] @ V[:, :3].mT / 3, **EXACT)
    nearly = with_singular_values([3, 3 - 1e-9, 1], 6, 5)
    torch.testing.assert_close(plain_norm(dualizer(nearly, 1), math.inf), torch.tensor(1.0).double(), **EXACT)


@pytest.mark.parametrize("order", [3, 1e9, math.inf])
def test_zero_singular_values_stay_zero(order: float) -> None:
    sigma = torch.linalg.svdvals(dualizer(MATRICES["low rank"], order))
    assert sigma[1] > 0.01
    assert sigma[2:].max() < 1e-12


@pytest.mark.parametrize("name", ["square", "tied", "low rank", "orthogonal"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_choice_among_maximisers_rotates_with_the_matrix(order: float, name: str) -> None:
    X = MATRICES[name]
    Q, R = orthonormal(X.shape[0], X.shape[0], 3), orthonormal(X.shape[1], X.shape[1], 4)
    # At 1 + 1e-12, rounding of 1e-16 in a singular value is a change of 1e-4 in its power.
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if 1 < order < 1.01 else {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(dualizer(Q @ X @ R, order), Q @ dualizer(X, order) @ R, **tolerance)
    torch.testing.assert_close(dualizer(X.mT, order), dualizer(X, order).mT, **tolerance)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("order", [1, 1.5, 2, math.inf])
def test_zero_gives_zero_and_nan_gives_nan_and_neither_spoils_another(order: float, bad: float) -> None:
    X = torch.stack([torch.zeros(2, 3), torch.eye(2, 3)])
    X[0, 1, 1] = bad
    expected = torch.stack([torch.full((2, 3), bad and math.nan), 2 ** (-1 / order) * torch.eye(2, 3)])
    close = {"rtol": 1e-6, "atol": 1e-7, "equal_nan": True}
    torch.testing.assert_close(dualizer(X, order), expected, **close)
    torch.testing.assert_close(ball_oracle(X, order), -expected, **close)
    dual_norms = torch.tensor([1.0, 2 ** (1 - 1 / order)])[:, None, None]
    torch.testing.assert_close(regularized_oracle(X, order), -dual_norms * expected, **close)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("order", [1, 3, math.inf])
def test_low_precision_is_rounded_once_at_the_end(order: float, dtype: torch.dtype) -> None:
    X = gaussian(2, 4, 6).to(dtype)
    oracles: list[Callable[[Tensor], Tensor]] = [
        lambda X: dualizer(X, order),
        lambda X: ball_oracle(X, order, 0.1),
        lambda X: regularized_oracle(X, order, 3.0),
    ]
    for oracle in oracles:
        assert torch.equal(oracle(X), oracle(X.double()).to(dtype))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(1, 5),
    st.one_of(st.floats(1, 20), st.sampled_from([1, math.inf])),
    st.floats(1e-3, 1e3),
)
def test_no_random_point_is_better(seed: int, m: int, n: int, order: float, size: float) -> None:
    X, (*directions,) = gaussian(m, n, seed=seed), gaussian(20, m, n, seed=seed + 1)
    points = torch.stack([T / plain_norm(T, order) for T in [*directions, -X]])
    ball = ball_oracle(X, order, size)
    assert plain_norm(ball, order) <= size * (1 + 1e-12)
    assert (inner(X, size * points) >= inner(X, ball) - 1e-12 * size).all()

    def objective(T: Tensor) -> Tensor:
        return inner(X, T) + size / 2 * plain_norm(T, order) ** 2

    best = objective(regularized_oracle(X, order, size))
    steps = -inner(X, points) / size  # the best multiple of each point
    assert (objective(steps[:, None, None] * points) >= best - 1e-12 * best.abs()).all()


@pytest.mark.parametrize(
    ("outer_order", "expected"),
    [
        (1, [0, 0, 0.5, 0.25]),  # two ties, of which each gets half of the radius, over its weight
        (2, [0, 0.5 / math.sqrt(8.25), 2 / math.sqrt(8.25), 1 / math.sqrt(8.25)]),
        (math.inf, [0, 1, 1, 0.5]),
    ],
)
def test_coupling_factors_in_closed_form(outer_order: float, expected: list[float]) -> None:
    norms, weights = torch.tensor([0.0, 0.5, 2.0, 4.0]), torch.tensor([1.0, 1.0, 1.0, 2.0])
    torch.testing.assert_close(
        coupling_factors(norms, outer_order, weights), torch.tensor(expected), rtol=1e-6, atol=1e-7
    )
    batch = coupling_factors(torch.stack([norms, 0 * norms]), outer_order, weights)
    torch.testing.assert_close(batch, torch.tensor([expected, 4 * [0.0]]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("outer_order", [1, 1.5, 2, math.inf])
def test_coupling_factors_wait_for_no_device_and_hide_no_nan(outer_order: float) -> None:
    assert coupling_factors(torch.empty(2, 3, device="meta"), outer_order).shape == (2, 3)  # nothing to read there
    factors = coupling_factors(torch.tensor([[1.0, math.nan], [1.0, math.inf], [3.0, 1.0]]), outer_order)
    assert factors.isnan().all(-1).tolist() == [True, True, False]
    assert not factors[2].isnan().any()


def test_errors_name_the_value() -> None:
    X = torch.eye(2)
    for call, message in [
        (lambda: dualizer(X, 0.5), r"\[1, inf\], got 0.5"),
        (lambda: dualizer(X[0], 2), "two dimensions or more, got torch.float32 \\(2,\\)"),
        (lambda: ball_oracle(X, math.nan), r"\[1, inf\], got nan"),
        (lambda: ball_oracle(X, 2, radius=-1), "radius must be at least 0, got -1"),
        (lambda: regularized_oracle(X, 2, penalty=0), "penalty must be above 0, got 0"),
        (lambda: coupling_factors(X, 0.9), r"\[1, inf\], got 0.9"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
