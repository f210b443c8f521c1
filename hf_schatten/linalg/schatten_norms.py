"""Schatten norms, their dual orders, and what is measured with them: stable rank and relative size.

Exact to float64 rounding, by the SVD, whatever the scale. A zero matrix has norm 0; a matrix with NaN or inf gives NaN
and leaves the rest of its batch alone.

Source: F. L. Cesista 2025, "Steepest Descent Under Schatten-p Norms".
"""

import math

import torch
from torch import Tensor


def dual_order(order: float) -> float:
    """Return the order q with ``1/order + 1/q = 1``, whose Schatten norm is the dual one.

    Args:
        order: of a norm, in [1, inf].

    Raises:
        ValueError: when order lies outside [1, inf].

    Source:
        "Steepest Descent Under Schatten-p Norms", corollary 3.
    """
    _check_order(order)
    return math.inf if order == 1 else 1 + 1 / (order - 1)


def schatten_norm(X: Tensor, order: float) -> Tensor:
    """Return ``(Σ σ_i^order)^{1/order}``: order 1 is the nuclear, 2 the Frobenius, inf the spectral norm.

    Args:
        X: matrices (..., m, n), floating point.
        order: of the norm, in [1, inf].

    Returns:
        norms (...), of X's dtype.

    Raises:
        ValueError: when order lies outside [1, inf], or X is not floating point or has fewer than two dimensions.

    Source:
        "Steepest Descent Under Schatten-p Norms", definition 1.
    """
    _check_order(order)
    relative, largest = relative_to_largest(_singular_values(X))
    return (largest.squeeze(-1) * torch.linalg.vector_norm(relative, order, dim=-1)).to(X.dtype)


def stable_rank(X: Tensor) -> Tensor:
    """Return ``‖X‖_F² / ‖X‖_2²``, between 1 and the rank; 0 for a zero matrix.

    Args:
        X: matrices (..., m, n), floating point.

    Returns:
        stable ranks (...), of X's dtype.

    Raises:
        ValueError: when X is not floating point or has fewer than two dimensions.

    Source:
        "Steepest Descent Under Schatten-p Norms", definition 7.
    """
    relative, _ = relative_to_largest(_singular_values(X))
    return relative.square().sum(-1).to(X.dtype)


def relative_size(update: Tensor, W: Tensor, order: float) -> Tensor:
    """Return ``‖update‖ / ‖W‖`` in the Schatten norm of an order.

    Args:
        update: matrices (..., m, n).
        W: weights (..., m, n), to which the update is added; the leading dimensions broadcast to those of ``update``.
        order: of both norms, in [1, inf].

    Returns:
        ratios (...), of the dtype of ``update``: inf where only W is zero, NaN where both are.

    Raises:
        ValueError: when order lies outside [1, inf], or a matrix has fewer than two dimensions.

    Source:
        "Steepest Descent Under Schatten-p Norms", definition 6.
    """
    return (schatten_norm(update.double(), order) / schatten_norm(W.double(), order)).to(update.dtype)


def scaled_to_unit(X: Tensor) -> tuple[Tensor, Tensor]:
    """Divide X (..., m, n) by its largest magnitudes, so that no decomposition overflows, underflows or raises.

    Returns:
        float64 matrices with elements in [-1, 1], and float64 scales (..., 1, 1) by which they are to be multiplied.
        Where X has a NaN or inf the matrix is zero and the scale is that: multiplied, NaN.

    Raises:
        ValueError: when X is not floating point or has fewer than two dimensions.
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
    """Return float64 singular values of X (..., m, n), shape (..., min(m, n))."""
    unit, scale = scaled_to_unit(X)
    return torch.linalg.svdvals(unit) * scale.squeeze(-1)


def _check_order(order: float) -> None:
    if not order >= 1:  # true of NaN too
        raise ValueError(f"the order of a norm must lie in [1, inf], got {order!r}")
