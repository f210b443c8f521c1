"""Schatten norms, their dual orders, and what is measured with them: stable rank and relative size.

Exact to float64 rounding, by the SVD, whatever the scale. A zero matrix has norm 0; a matrix with NaN or inf gives NaN
and leaves the rest of its batch alone. Definitions are those of F. L. Cesista 2025, "Steepest Descent Under Schatten-p
Norms".
"""

import math

import torch
from torch import Tensor


def dual_order(order: float) -> float:
    """The order q with ``1/order + 1/q = 1``, whose Schatten norm is the dual one (corollary 3 of the source).

    Raises:
        ValueError: If order lies outside [1, inf].
    """
    _check_order(order)
    return math.inf if order == 1 else 1 + 1 / (order - 1)


def schatten_norm(X: Tensor, order: float) -> Tensor:
    """``(Σ σ_i^order)^{1/order}``: 1 is the nuclear, 2 the Frobenius, inf the spectral norm (definition 1).

    Of X (..., m, n), floating point, in a shape (...) and X's dtype.

    Raises:
        ValueError: If order lies outside [1, inf], or X is not floating point or has fewer than two dimensions.
    """
    _check_order(order)
    relative, largest = relative_to_largest(_singular_values(X))
    return (largest.squeeze(-1) * torch.linalg.vector_norm(relative, order, dim=-1)).to(X.dtype)


def stable_rank(X: Tensor) -> Tensor:
    """``‖X‖_F² / ‖X‖_2²``, between 1 and the rank, of X's dtype; 0 for a zero matrix (definition 7).

    Raises:
        ValueError: If X (..., m, n) is not floating point or has fewer than two dimensions.
    """
    relative, _ = relative_to_largest(_singular_values(X))
    return relative.square().sum(-1).to(X.dtype)


def relative_size(update: Tensor, W: Tensor, order: float) -> Tensor:
    """``‖update‖ / ‖W‖``, update (..., m, n) and what it is added to, in one Schatten norm (definition 6).

    The leading dimensions of W broadcast to those of update, whose dtype the result has. It is inf where only W is
    zero, NaN where both are.

    Raises:
        ValueError: If order lies outside [1, inf], or a matrix has fewer than two dimensions.
    """
    return (schatten_norm(update.double(), order) / schatten_norm(W.double(), order)).to(update.dtype)


def scaled_to_unit(X: Tensor) -> tuple[Tensor, Tensor]:
    """Divide X (..., m, n) by its largest magnitudes, so that no decomposition overflows, underflows or raises.

    Returns:
        float64 matrices with elements in [-1, 1], and float64 scales (..., 1, 1) by which they are to be multiplied.
        Where X has a NaN or inf the matrix is zero and the scale is that: multiplied, NaN.

    Raises:
        ValueError: If X is not floating point or has fewer than two dimensions.
    """
    if X.ndim < 2 or not X.is_floating_point():
        raise ValueError(f"X must be floating point with two dimensions or more, got {X.dtype} {tuple(X.shape)}")
    X = X.to(torch.float64)
    scale = X.abs().amax((-2, -1), keepdim=True)
    return torch.where(scale.isfinite() & (scale > 0), X / scale, 0.0), scale


def relative_to_largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Divide nonnegative x (..., k) by the largest (..., 1), returned too: powers of the quotients cannot overflow.

    Zeros stay zero; one NaN makes all k quotients NaN.
    """
    largest = x.amax(-1, keepdim=True)
    return x / largest.masked_fill(largest == 0, 1.0), largest


def _singular_values(X: Tensor) -> Tensor:
    """float64 singular values of X (..., m, n), shape (..., min(m, n))."""
    unit, scale = scaled_to_unit(X)
    return torch.linalg.svdvals(unit) * scale.squeeze(-1)


def _check_order(order: float) -> None:
    if not order >= 1:  # true of NaN too
        raise ValueError(f"the order of a norm must lie in [1, inf], got {order!r}")
