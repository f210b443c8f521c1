"""Oracles that only tests ask: of several blocks in a mixed norm, and dualizers of named operator norms.

Sources: B. Ma, J. Zhang and C. He 2026, "Schattor: Schatten-family methods for deep learning optimization"; F. L.
Cesista 2025, "Steepest Descent Under Schatten-p Norms".
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from hf_schatten.linalg import coupling_factors, dual_order, dualizer, schatten_norm

OperatorNorm = Literal["frobenius", "max_of_max", "spectral"]


def multi_block_ball_oracle(
    blocks: Sequence[Tensor],
    order: float | Sequence[float],
    outer_order: float,
    weights: Sequence[float] | Tensor | None = None,
    radius: float = 1.0,
) -> list[Tensor]:
    """``argmin Σ_i ⟨X_i, T_i⟩`` over ``‖T‖ <= radius`` in a mixed norm ("Schattor", lemma 2, equation 5).

    The mixed norm is the vector norm of order ``outer_order`` of the numbers ``w_i ‖T_i‖``, each a Schatten norm.
    Its dual is the vector norm of the dual order of the numbers ``‖X_i‖ / w_i``, each a norm of the dual order.

    Args:
        blocks: Matrices X_i, shapes (..., m_i, n_i), with the same leading dimensions; dtypes may differ.
        order: Of the Schatten norms, in [1, inf]: one for all blocks or one for each.
        outer_order: Of the vector norm, in [1, inf]. With inf every block has a ball of its own; with 1 only those
            blocks move whose ``‖X_i‖ / w_i`` equals the largest, to 1e-12, by equal shares of the radius.
        weights: w_i, above 0: a block of larger weight moves less. The square roots of Lipschitz constants give all
            blocks the constant 1. Default: 1 for all.
        radius: Of the ball, at least 0; 1 in the source.

    Returns:
        ``-radius · coupling_factors(…)_i · dualizer(X_i)``, of the shape and dtype of each block.

    Raises:
        ValueError: If radius is negative, there are no blocks, not as many orders or weights as blocks, or
            weights that are not positive, or as `dualizer`.
    """
    if not radius >= 0:
        raise ValueError(f"radius must be at least 0, got {radius!r}")
    dualized, factors, _ = _coupled(blocks, order, outer_order, weights)
    return _scaled_blocks(blocks, dualized, -radius * factors)


def multi_block_regularized_oracle(
    blocks: Sequence[Tensor],
    order: float | Sequence[float],
    outer_order: float,
    weights: Sequence[float] | Tensor | None = None,
    penalty: float = 1.0,
) -> list[Tensor]:
    """``argmin Σ_i ⟨X_i, T_i⟩ + penalty/2 · ‖T‖²`` in a mixed norm ("Schattor", lemma 2, equation 6).

    Args:
        blocks: Matrices X_i, shapes (..., m_i, n_i), with the same leading dimensions; dtypes may differ.
        order: As in `multi_block_ball_oracle`, like the mixed norm.
        outer_order: As in `multi_block_ball_oracle`. With 2 and weights of 1, no block depends on another.
        weights: As in `multi_block_ball_oracle`.
        penalty: Above 0; 1 in the source.

    Returns:
        `multi_block_ball_oracle`'s blocks at a radius of the dual mixed norm over the penalty.

    Raises:
        ValueError: If penalty is not positive, there are no blocks, not as many orders or weights as blocks, or
            weights that are not positive, or as `dualizer`.
    """
    if not penalty > 0:
        raise ValueError(f"penalty must be above 0, got {penalty!r}")
    dualized, factors, dual_norm = _coupled(blocks, order, outer_order, weights)
    return _scaled_blocks(blocks, dualized, -dual_norm / penalty * factors)


def operator_norm_dualizer(X: Tensor, norm: OperatorNorm) -> Tensor:
    """``argmax ⟨X, T⟩`` over ``‖T‖ = 1`` in a named norm, each the direction of a known optimizer.

    "Steepest Descent Under Schatten-p Norms", section "Steepest Descent Under Operator Norms".

    Args:
        X: Matrices, shape (..., m, n), of a floating point dtype.
        norm: ``frobenius``: ``X / ‖X‖_F``, normalised SGD. ``max_of_max``, the operator norm from ℓ₁ to ℓ_∞ and
            largest magnitude of an element: ``sign(X)``, Adam without accumulation. ``spectral``: the polar factor,
            Muon.

    Returns:
        Tensor of X's shape and dtype, of norm 1; zero for a zero matrix.

    Raises:
        ValueError: If norm has no dualizer here, or X is not floating point or has fewer than two dimensions.
    """
    if norm not in _OPERATOR_NORM_DUALIZERS:
        raise ValueError(f"norm must be one of {tuple(_OPERATOR_NORM_DUALIZERS)}, got {norm!r}")
    return _OPERATOR_NORM_DUALIZERS[norm](X)


def _coupled(
    blocks: Sequence[Tensor],
    order: float | Sequence[float],
    outer_order: float,
    weights: Sequence[float] | Tensor | None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Dualizers of the blocks, their coupling factors (..., blocks), and the dual mixed norm (..., 1); float64."""
    orders = order if isinstance(order, Sequence) else [order] * len(blocks)
    w = torch.as_tensor([1.0] * len(blocks) if weights is None else weights, dtype=torch.float64)
    if not len(blocks) == len(orders) == len(w) > 0:
        raise ValueError(
            "there must be a block or more, and an order and a weight for each; "
            f"got {len(blocks)} blocks, {len(orders)} orders and {len(w)} weights"
        )
    if not (w > 0).all():
        raise ValueError(f"weights must be above 0, got {w.tolist()}")
    exact = [X.double() for X in blocks]
    dualized = [dualizer(X, own) for X, own in zip(exact, orders, strict=True)]
    dual_norms = torch.stack([schatten_norm(X, dual_order(own)) for X, own in zip(exact, orders, strict=True)], -1)
    factors = coupling_factors(dual_norms, outer_order, w)
    return dualized, factors, (dual_norms * factors).sum(-1, keepdim=True)


def _scaled_blocks(blocks: Sequence[Tensor], dualized: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
    return [
        (factor[..., None, None] * T).to(X.dtype)
        for X, T, factor in zip(blocks, dualized, factors.unbind(-1), strict=True)
    ]


_OPERATOR_NORM_DUALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "frobenius": lambda X: dualizer(X, 2),
    "max_of_max": lambda X: X.sign() + 0 * X.abs().amax((-2, -1), keepdim=True),  # the sign of NaN is 0
    "spectral": lambda X: dualizer(X, torch.inf),
}
