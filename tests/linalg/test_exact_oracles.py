"""The oracles of several blocks and of operator norms against numeric optimisers, programs and closed forms."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import scipy.optimize
import torch
from exact_oracles import multi_block_ball_oracle, multi_block_regularized_oracle, operator_norm_dualizer
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_norms import EXACT, gaussian, inner, inner_blocks, mixed_norm
from torch import Tensor

from hf_schatten.linalg import ball_oracle, dual_order, dualizer, regularized_oracle

pytestmark = pytest.mark.filterwarnings("error")


def minimised(objective: Callable[[list[Tensor]], Tensor], start: list[Tensor]) -> float:
    """The least value of a differentiable function of blocks, by BFGS."""
    sizes = [T.numel() for T in start]

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        flat = torch.tensor(x, requires_grad=True)
        value = objective([part.view_as(T) for part, T in zip(flat.split(sizes), start, strict=True)])
        value.backward()
        assert flat.grad is not None
        return value.item(), flat.grad.numpy()

    x = torch.cat([T.flatten() for T in start]).numpy()
    return float(scipy.optimize.minimize(value_and_gradient, x, jac=True, method="BFGS", tol=1e-10).fun)


BLOCKS = [gaussian(3, 3), 0.3 * gaussian(2, 4, seed=1), 2 * gaussian(4, 2, seed=2)]
WEIGHTS = [1.0, 0.5, 3.0]
SMOOTH = [(1.5, 3.0), (3.0, 1.5), (2.0, 2.0), (4.0, 1.3)]


@pytest.mark.parametrize(("order", "outer_order"), SMOOTH)
@pytest.mark.parametrize("count", [1, 3])
def test_a_numeric_optimiser_finds_nothing_better(count: int, order: float, outer_order: float) -> None:
    blocks, weights, orders = BLOCKS[:count], WEIGHTS[:count], [order] * count
    start = [gaussian(*X.shape, seed=7) - X for X in blocks]
    penalty = 0.7

    def norm(T: Sequence[Tensor]) -> Tensor:
        return mixed_norm(T, orders, outer_order, weights)

    def regularized(T: Sequence[Tensor]) -> Tensor:
        return inner_blocks(blocks, T) + penalty / 2 * norm(T) ** 2

    ball = multi_block_ball_oracle(blocks, order, outer_order, weights)
    torch.testing.assert_close(norm(ball), torch.tensor(1.0).double(), **EXACT)
    least = minimised(lambda T: inner_blocks(blocks, T) / norm(T), start)
    assert inner_blocks(blocks, ball).item() == pytest.approx(least, rel=1e-6, abs=1e-7)

    best = regularized(multi_block_regularized_oracle(blocks, order, outer_order, weights, penalty))
    assert best.item() == pytest.approx(minimised(regularized, start), rel=1e-6, abs=1e-7)


def conic_constraints(spectra: np.ndarray, order: float, outer_order: float, weights: Sequence[float]) -> np.ndarray:
    """Rows A of ``A (t, r, R) <= 0``: r_i bounds the norm of t_i, R the outer norm of w_i r_i; all orders 1 or inf."""
    blocks, rank = spectra.shape
    t, r = np.eye(blocks * rank), np.eye(blocks)
    owner = np.repeat(r, rank, axis=0)  # (blocks · rank, blocks)
    inner_t, inner_r = (owner.T, r) if order == 1 else (t, owner)
    weighted = np.diag(weights)
    outer_r = weighted.sum(0, keepdims=True) if outer_order == 1 else weighted
    zeros = np.zeros((len(outer_r), blocks * rank))
    return np.block([[inner_t, -inner_r, np.zeros((len(inner_t), 1))], [zeros, outer_r, -np.ones((len(outer_r), 1))]])


@pytest.mark.parametrize("order", [1, math.inf])
@pytest.mark.parametrize("outer_order", [1, math.inf])
@pytest.mark.parametrize(
    "spectra",
    [[[3, 2, 1], [0.1, 0.2, 0.7], [5, 4, 0]], [[2, 2, 1], [1, 1, 0.5], [0, 0, 0]]],
    ids=["distinct", "ties and zeros"],
)
def test_polyhedral_norms_against_linear_and_quadratic_programs(
    spectra: list[list[float]], outer_order: float, order: float
) -> None:
    sigma, weights, penalty = np.array(spectra), [2.0, 1.0, 4.0], 0.7
    blocks = [torch.diag(torch.tensor(row, dtype=torch.float64)) for row in spectra]
    constraints = conic_constraints(sigma, order, outer_order, weights)
    cost = np.concatenate([-sigma.ravel(), np.zeros(len(sigma) + 1)])
    bounds = [(0, None)] * (len(cost) - 1)

    program = scipy.optimize.linprog(cost, constraints, np.zeros(len(constraints)), bounds=[*bounds, (0, 1)])
    ball = multi_block_ball_oracle(blocks, order, outer_order, weights)
    assert mixed_norm(ball, [order] * 3, outer_order, weights).item() == pytest.approx(1, rel=1e-12, abs=1e-12)
    assert inner_blocks(blocks, ball).item() == pytest.approx(program.fun, rel=1e-9, abs=1e-9)

    program = scipy.optimize.minimize(
        lambda x: cost @ x + penalty / 2 * x[-1] ** 2,
        np.full(len(cost), 0.1),
        jac=lambda x: cost + penalty * x[-1] * np.eye(len(cost))[-1],
        bounds=[*bounds, (0, None)],
        constraints={"type": "ineq", "fun": lambda x: -constraints @ x, "jac": lambda x: -constraints},
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 300},
    )
    best = multi_block_regularized_oracle(blocks, order, outer_order, weights, penalty)
    value = inner_blocks(blocks, best) + penalty / 2 * mixed_norm(best, [order] * 3, outer_order, weights) ** 2
    assert value.item() == pytest.approx(program.fun, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("outer_order", [1, 1.5, 2, math.inf])
@pytest.mark.parametrize("orders", [[1, 2, math.inf], [math.inf, 1.2, 1], [2, 2, 2]])
def test_every_order_attains_the_dual_mixed_norm(orders: list[float], outer_order: float) -> None:
    duals, reciprocals = [dual_order(order) for order in orders], [1 / w for w in WEIGHTS]
    dual_norm = mixed_norm(BLOCKS, duals, dual_order(outer_order), reciprocals)
    ball = multi_block_ball_oracle(BLOCKS, orders, outer_order, WEIGHTS, radius=0.3)
    torch.testing.assert_close(
        mixed_norm(ball, orders, outer_order, WEIGHTS), torch.tensor(0.3, dtype=torch.float64), **EXACT
    )
    torch.testing.assert_close(inner_blocks(BLOCKS, ball), -0.3 * dual_norm, **EXACT)
    best = multi_block_regularized_oracle(BLOCKS, orders, outer_order, WEIGHTS, penalty=4)
    torch.testing.assert_close(mixed_norm(best, orders, outer_order, WEIGHTS), dual_norm / 4, **EXACT)
    torch.testing.assert_close(inner_blocks(BLOCKS, best), -(dual_norm**2) / 4, **EXACT)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.one_of(st.floats(1, 20), st.just(math.inf)),
    st.one_of(st.floats(1, 20), st.just(math.inf)),
    st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
)
def test_no_random_blocks_are_better(seed: int, order: float, outer_order: float, weights: list[float]) -> None:
    blocks = [gaussian(*X.shape, seed=seed) for X in BLOCKS]
    least = inner_blocks(blocks, multi_block_ball_oracle(blocks, order, outer_order, weights))
    for trial in range(5):
        T = [gaussian(*X.shape, seed=seed + trial + 1) for X in blocks]
        T = [(Y - X) if trial % 2 else Y for X, Y in zip(blocks, T, strict=True)]
        assert inner_blocks(blocks, T) / mixed_norm(T, [order] * 3, outer_order, weights) >= least * (1 + 1e-12)


def test_the_infinity_norm_decouples_the_balls() -> None:
    expected = [ball_oracle(X, 3, radius=0.2 / w) for X, w in zip(BLOCKS, WEIGHTS, strict=True)]
    torch.testing.assert_close(multi_block_ball_oracle(BLOCKS, 3, math.inf, WEIGHTS, 0.2), expected, **EXACT)


def test_the_euclidean_norm_decouples_the_regularized_blocks() -> None:
    expected = [regularized_oracle(X, 3, penalty=0.2 * w**2) for X, w in zip(BLOCKS, WEIGHTS, strict=True)]
    torch.testing.assert_close(multi_block_regularized_oracle(BLOCKS, 3, 2, WEIGHTS, 0.2), expected, **EXACT)


def test_frobenius_and_euclidean_norms_are_gradient_descent() -> None:
    norm = torch.cat([X.flatten() for X in BLOCKS]).norm()
    torch.testing.assert_close(multi_block_ball_oracle(BLOCKS, 2, 2), [-X / norm for X in BLOCKS], **EXACT)
    torch.testing.assert_close(multi_block_regularized_oracle(BLOCKS, 2, 2), [-X for X in BLOCKS], **EXACT)


def test_a_single_block_ignores_the_outer_order() -> None:
    for order, outer_order in itertools.product([1, 1.5, math.inf], repeat=2):
        (ball,) = multi_block_ball_oracle(BLOCKS[:1], order, outer_order, radius=2)
        torch.testing.assert_close(ball, -2 * dualizer(BLOCKS[0], order), **EXACT)


@pytest.mark.parametrize("outer_order", [1, 1.5, 2, math.inf])
@pytest.mark.parametrize("oracle", [multi_block_ball_oracle, multi_block_regularized_oracle])
def test_zero_blocks_do_not_move_and_change_no_other(oracle: Callable[..., list[Tensor]], outer_order: float) -> None:
    *others, zero = oracle([*BLOCKS, torch.zeros(2, 2)], 3, outer_order, [*WEIGHTS, 0.1])
    torch.testing.assert_close(others, oracle(BLOCKS, 3, outer_order, WEIGHTS), **EXACT)
    assert not zero.any()
    assert not any(T.any() for T in oracle([torch.zeros(2, 3), torch.zeros(1, 1)], 3, outer_order))


@pytest.mark.parametrize("outer_order", [1, 3, math.inf])
@pytest.mark.parametrize("oracle", [multi_block_ball_oracle, multi_block_regularized_oracle])
def test_leading_dimensions_are_problems_of_their_own(oracle: Callable[..., list[Tensor]], outer_order: float) -> None:
    A, B = gaussian(2, 3, 4, 6), gaussian(2, 3, 5, 2, seed=1).float()
    batched = oracle([A, B], 1.5, outer_order, [1, 2])
    assert [T.dtype for T in batched] == [torch.float64, torch.float32]
    for index in itertools.product(range(2), range(3)):
        torch.testing.assert_close(
            [T[index] for T in batched], oracle([A[index], B[index]], 1.5, outer_order, [1, 2]), **EXACT
        )


@pytest.mark.parametrize("scale", [1e-300, 1e300])
@pytest.mark.parametrize("outer_order", [1, 1.5, math.inf])
def test_the_ball_ignores_the_scale(outer_order: float, scale: float) -> None:
    scaled = multi_block_ball_oracle([scale * X for X in BLOCKS], 3, outer_order, WEIGHTS)
    torch.testing.assert_close(scaled, multi_block_ball_oracle(BLOCKS, 3, outer_order, WEIGHTS), **EXACT)


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (2, 7, 3)])
def test_operator_norm_dualizers_are_those_of_known_optimizers(shape: tuple[int, ...]) -> None:
    X = gaussian(*shape)
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    one = torch.ones(X.shape[:-2], dtype=torch.float64)
    for norm, expected, size in [
        ("frobenius", X / torch.linalg.matrix_norm(X, keepdim=True), torch.linalg.matrix_norm),
        ("max_of_max", X.sign(), lambda T: T.abs().amax((-2, -1))),
        ("spectral", U @ Vh, lambda T: torch.linalg.matrix_norm(T, 2)),
    ]:
        T = operator_norm_dualizer(X, norm)
        torch.testing.assert_close(T, expected, **EXACT)
        torch.testing.assert_close(size(T), one, **EXACT)
        for other in gaussian(10, *shape, seed=1):
            assert (inner(X, other) / size(other) < inner(X, T)).all()


@pytest.mark.parametrize("norm", ["frobenius", "max_of_max", "spectral"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1e30), (torch.float64, 1e300)])
def test_operator_norm_dualizers_of_zero_nan_and_tiny_elements(dtype: torch.dtype, size: float, norm: str) -> None:
    X = torch.zeros(3, 2, 2, dtype=dtype)
    X[1, 0, 1] = math.nan
    X[2, 0, 0], X[2, 1, 1] = -size, 1 / size
    T = operator_norm_dualizer(X, norm)
    assert T.dtype == dtype
    assert not T[0].any()
    assert T[1].isnan().all()
    assert T[2].flatten().tolist() == [-1, 0, 0, 1 if norm == "max_of_max" else 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("order", [1, 3, math.inf])
def test_low_precision_is_rounded_once_at_the_end(order: float, dtype: torch.dtype) -> None:
    X = gaussian(2, 4, 6).to(dtype)
    own, exact = (multi_block_ball_oracle([Y, Y.mT], order, 2, [1, 2])[1] for Y in (X, X.double()))
    assert torch.equal(own, exact.to(dtype))


def test_errors_name_the_value() -> None:
    X = torch.eye(2)
    for call, message in [
        (lambda: multi_block_ball_oracle([X], 2, 0), r"\[1, inf\], got 0"),
        (lambda: multi_block_ball_oracle([], 2, 2), "0 blocks, 0 orders and 0 weights"),
        (lambda: multi_block_ball_oracle([X, X], [2], 2), "2 blocks, 1 orders and 2 weights"),
        (lambda: multi_block_regularized_oracle([X, X], 2, 2, [1.0]), "2 blocks, 2 orders and 1 weights"),
        (lambda: multi_block_regularized_oracle([X, X], 2, 2, [1.0, 0.0]), r"above 0, got \[1.0, 0.0\]"),
        (lambda: operator_norm_dualizer(X, "nuclear"), "'frobenius', 'max_of_max', 'spectral'.*got 'nuclear'"),
        (lambda: multi_block_ball_oracle([X], 2, 2, radius=-1), "radius must be at least 0, got -1"),
        (lambda: multi_block_regularized_oracle([X], 2, 2, penalty=0), "penalty must be above 0, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
