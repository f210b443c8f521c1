"""Exact steepest descent under Schatten norms: dualizers, and the ball and regularized oracles built on them.

All by float64 SVDs, the references for anything faster. A zero matrix gives zero; one with NaN or inf gives NaN and
leaves the rest of its batch alone. There is no gradient.

Sources: F. L. Cesista 2025, "Steepest Descent Under Schatten-p Norms"; B. Ma, J. Zhang and C. He 2026, "Schattor:
Schatten-family methods for deep learning optimization".
"""

import torch
from torch import Tensor

from hf_schatten.linalg.schatten_norms import dual_order, relative_to_largest, scaled_to_unit

# Singular values, and norms of blocks, this close to the largest, relative to it, are ties to a norm of order 1.
_TIE = 1e-12


def dualizer(X: Tensor, order: float) -> Tensor:
    """Return ``argmax ⟨X, T⟩`` over ``‖T‖ = 1`` in the Schatten norm of an order.

    With q the dual order, it is ``U diag((σ / ‖X‖_q)^{q-1}) Vᵀ``, and the maximum is the dual norm ``‖X‖_q``. Where
    several T attain it, the one of least Frobenius norm is chosen, which does not depend on the SVD's choices:

    - order 1: ``u₁ v₁ᵀ``; the mean of the ``u_i v_iᵀ`` where several singular values equal the largest, to 1e-12.
    - order inf: the polar factor ``U Vᵀ`` with zeros for zero singular values, i.e. those of at most
      ``max(m, n) · eps · σ_max``.

    Args:
        X: matrices (..., m, n), floating point.
        order: of the Schatten norm, in [1, inf].

    Returns:
        matrices of X's shape and dtype.

    Raises:
        ValueError: when order lies outside [1, inf], or X is not floating point or has fewer than two dimensions.

    Source:
        "Steepest Descent Under Schatten-p Norms", proposition 2.
    """
    return _dualized(X, order)[0].to(X.dtype)


def ball_oracle(X: Tensor, order: float, radius: float = 1.0) -> Tensor:
    """Return ``argmin ⟨X, T⟩`` over ``‖T‖ <= radius`` in the Schatten norm of an order: ``-radius · dualizer(X)``.

    The minimum is ``-radius ‖X‖_q``, q the dual order.

    Args:
        X: matrices (..., m, n), floating point.
        order: of the Schatten norm, in [1, inf].
        radius: of the ball, at least 0. Default 1, as in the source.

    Returns:
        matrices of X's shape and dtype.

    Raises:
        ValueError: when radius is negative, or as :func:`dualizer`.

    Source:
        "Schattor", lemma 1, equation 3.
    """
    if not radius >= 0:
        raise ValueError(f"radius must be at least 0, got {radius!r}")
    return (-radius * _dualized(X, order)[0]).to(X.dtype)


def regularized_oracle(X: Tensor, order: float, penalty: float = 1.0) -> Tensor:
    """Return ``argmin ⟨X, T⟩ + penalty/2 · ‖T‖²`` in the Schatten norm of an order.

    With q the dual order, it is ``-‖X‖_q / penalty · dualizer(X)``, and the minimum is ``-‖X‖_q² / (2 penalty)``.

    Args:
        X: matrices (..., m, n), floating point.
        order: of the Schatten norm, in [1, inf].
        penalty: above 0. Default 1.

    Returns:
        matrices of X's shape and dtype.

    Raises:
        ValueError: when penalty is not above 0, or as :func:`dualizer`.

    Source:
        "Schattor", lemma 1, equation 3, where penalty is 1; it is the sharpness λ of theorem 4 of "Steepest Descent
        Under Schatten-p Norms".
    """
    if not penalty > 0:
        raise ValueError(f"penalty must be above 0, got {penalty!r}")
    T, dual_norm = _dualized(X, order)
    return ((-dual_norm / penalty)[..., None, None] * T).to(X.dtype)


def coupling_factors(dual_norms: Tensor, outer_order: float, weights: Tensor | float = 1.0) -> Tensor:
    """Return what the dualizer of each block is multiplied by on the unit sphere of a mixed norm.

    The mixed norm is the vector norm of order ``outer_order`` of the numbers ``w_i ‖T_i‖``, each a Schatten norm.
    With ``d_i = dual_norms_i / w_i`` and β dual to ``outer_order``, these are ``(d_i / ‖d‖_β)^{β-1} / w_i``. The dual
    mixed norm ``‖d‖_β`` is ``(dual_norms * factors).sum(-1)``, by which the regularized oracle multiplies further.
    Nothing waits for the device.

    Args:
        dual_norms: norms of the blocks in the dual order, (..., blocks), floating point. That of a zero block is 0;
            one NaN or inf makes all factors NaN.
        outer_order: of the vector norm that couples the blocks, in [1, inf].
        weights: w_i, above 0 (not checked), broadcast to ``dual_norms`` and of its dtype: more of it moves less.
            Default 1.

    Returns:
        factors of the shape and dtype of ``dual_norms``.

    Raises:
        ValueError: when outer_order lies outside [1, inf].

    Source:
        "Schattor", lemma 2.
    """
    return _dual_vector(dual_norms / weights, outer_order) / weights


def _dual_vector(x: Tensor, order: float) -> Tensor:
    """Return ``argmax ⟨x, t⟩`` over ``‖t‖ = 1`` in the vector norm, x (..., k) nonnegative, as `dualizer` chooses."""
    exponent = dual_order(order) - 1  # inf at order 1
    relative, _ = relative_to_largest(x)
    if order == 1:
        relative = torch.where(relative >= 1 - _TIE, 1.0, relative)  # for 1 ** inf is 1, and all below go to 0
    t = torch.where(relative > 0, relative**exponent, relative)  # 0 ** 0 is 1; NaN passes
    return t / torch.linalg.vector_norm(t, order, dim=-1, keepdim=True).clamp_min(1.0)  # of t = 0 the norm is 0


@torch.no_grad()
def _dualized(X: Tensor, order: float) -> tuple[Tensor, Tensor]:
    """Return the dualizer of X (..., m, n) in float64, and the dual norm that it attains, (...)."""
    unit, scale = scaled_to_unit(X)
    U, sigma, Vh = torch.linalg.svd(unit, full_matrices=False)
    negligible = sigma <= max(X.shape[-2:]) * torch.finfo(torch.float64).eps * sigma[..., :1]
    sigma = sigma.masked_fill(negligible, 0.0) * scale.squeeze(-1)  # (..., r)
    t = _dual_vector(sigma, order)
    return (U * t.unsqueeze(-2)) @ Vh, (sigma * t).sum(-1)
