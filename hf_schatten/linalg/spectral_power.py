"""Spectral powers ``U diag(σ^{1/p}) Vᵀ`` of batches of matrices, by matrix products only.

A Newton–Schulz run passes through iterates ``X₀ = X/c, X₁, …, X_K`` whose singular values saturate at
different scales, so that a weighted sum of the iterates represents any power of σ at the price of the polar
factor (design, section 3)::

    X_k = a_k X_{k-1} + (b_k A + c_k A²) X_{k-1},    A = X_{k-1} X_{k-1}ᵀ
    U diag(σ^s) Vᵀ ≈ c^s Σ_k w_k X_k,                s = 1/p
"""

import torch
from torch import Tensor

from hf_schatten.linalg.coefficient_table import MAX_EXPONENT, MIN_EXPONENT, interpolate

# The normaliser is an upper bound of σ_max only up to rounding; outside (0, 1] the polynomials explode.
_SAFETY = 1.01

# From this aspect ratio n/m on, iterating on the m × m Gram matrix takes fewer operations.
_GRAM_ASPECT = 1.4


def exponent_from_p(p: float | Tensor) -> float | Tensor:
    """The spectral exponent ``s = 1/p``.

    Args:
        p: A number ``>= 1`` (``inf`` allowed) or ``<= -4``; or a tensor of such numbers. The values of a tensor
            are not checked, since that would wait for the device; `spectral_power` clamps their ``s`` to
            [-0.25, 1].

    Returns:
        ``1/p``, of p's own kind.

    Raises:
        ValueError: If the number ``p`` lies in (-4, 1) or is NaN.
    """
    if isinstance(p, Tensor):
        return p.reciprocal()
    if not (p >= 1 / MAX_EXPONENT or p <= 1 / MIN_EXPONENT):
        raise ValueError(f"p must be >= 1 (math.inf allowed) or <= -4, got {p!r}")
    return 1 / p


def spectral_power(
    X: Tensor, p: float | Tensor, *, steps: int = 5, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """Approximate ``U diag(σ^{1/p}) Vᵀ`` of each matrix, each with its own p, in one batched call.

    The scale of X is kept: p = 1 returns X to rounding, and ``spectral_power(t·X, p) = t^{1/p} ·
    spectral_power(X, p)``. A zero matrix gives zero. A matrix with NaN or inf gives NaN and leaves the other
    matrices of the batch alone. Nothing waits for the device.

    Args:
        X: Matrices, shape (..., m, n), floating point; may be non-contiguous.
        p: 1 is X itself, ``inf`` the polar factor U Vᵀ; ``p <= -4`` is "beyond Muon" (``s = 1/p`` in
            [-0.25, 0)). A number for all matrices, or a tensor that broadcasts to the batch shape
            ``X.shape[:-2]``. A tensor's values cannot be checked without waiting for the device; their s is
            clamped to [-0.25, 1].
        steps: Newton–Schulz steps K, 3 to 8: more are dearer and more accurate.
        compute_dtype: Dtype of the matrix products. Default: float64 for float64 X, else float32 on a CPU
            and bfloat16 on an accelerator.

    Returns:
        Tensor of X's shape and dtype.

    Raises:
        ValueError: If a number p lies in (-4, 1) or is NaN, X is not floating point or has fewer than two
            dimensions, or there is no table for ``steps``.
    """
    return spectral_power_from_exponent(X, exponent_from_p(p), steps=steps, compute_dtype=compute_dtype)


def spectral_power_from_exponent(
    X: Tensor, s: float | Tensor, *, steps: int = 5, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """`spectral_power` by the spectral exponent ``s = 1/p`` in [-0.25, 1], clamped to that range.

    Args:
        X: Matrices, shape (..., m, n).
        s: A number, or a tensor that broadcasts to ``X.shape[:-2]``.
        steps: As in `spectral_power`.
        compute_dtype: As in `spectral_power`.

    Returns:
        ``U diag(σ^s) Vᵀ``, of X's shape and dtype.

    Raises:
        ValueError: As `spectral_power`, the check of p excepted.
    """
    if X.ndim < 2 or not X.is_floating_point():
        raise ValueError(f"X must be floating point with at least two dimensions, got {X.dtype} {tuple(X.shape)}")
    if X.numel() == 0:
        return X.clone()
    scalar_dtype = torch.promote_types(X.dtype, torch.float32)
    s = torch.as_tensor(s, dtype=scalar_dtype, device=X.device).clamp(MIN_EXPONENT, MAX_EXPONENT)
    s = s.expand(X.shape[:-2]).reshape(-1)  # (B,)
    wide = X.shape[-2] <= X.shape[-1]
    batch = (X if wide else X.mT).flatten(0, -3) if X.ndim > 2 else (X if wide else X.mT).unsqueeze(0)
    power = _power_of_wide(batch, s, steps, compute_dtype or _default_compute_dtype(X), scalar_dtype)
    return (power if wide else power.mT).reshape(X.shape).to(X.dtype)


def _default_compute_dtype(X: Tensor) -> torch.dtype:
    if X.dtype == torch.float64:
        return torch.float64
    return torch.float32 if X.device.type == "cpu" else torch.bfloat16


def _power_of_wide(X: Tensor, s: Tensor, steps: int, compute_dtype: torch.dtype, scalar_dtype: torch.dtype) -> Tensor:
    """Spectral powers of X (B, m, n), m <= n, for exponents s (B,)."""
    tiny = torch.finfo(scalar_dtype).tiny
    a, b, c, w = (list(group) for group in interpolate(s, steps, scalar_dtype))
    largest = torch.linalg.vector_norm(X, torch.inf, dim=(-2, -1), keepdim=True, dtype=scalar_dtype).clamp(tiny)
    unit = X / largest  # (B, m, n), elements in [-1, 1], scalar_dtype
    iterate = unit.to(compute_dtype)

    gram = iterate @ iterate.mT  # (B, m, m)
    s4_squared = _frobenius(gram, scalar_dtype).clamp(tiny)  # ‖iterate‖²_{S4}
    gram = (gram / s4_squared).to(compute_dtype)
    gram_squared = gram @ gram
    # ‖·‖²_{S8}, from a product that the first step needs anyway: tighter than S4, and far than Frobenius.
    s8_squared = (_SAFETY**2 * _frobenius(gram_squared, scalar_dtype).sqrt()).clamp(tiny)
    norm = (s4_squared * s8_squared).sqrt()  # X₀ = iterate / norm

    total = unit * (w[0] / norm)
    # The first step acts on `iterate`, not on X₀: its coefficients take up the normaliser.
    a[0], b[0], c[0] = a[0] / norm, b[0] / (norm * s8_squared), c[0] / (norm * s8_squared**2)
    for k in range(steps):
        if k > 0:
            gram = iterate @ iterate.mT
            gram_squared = gram @ gram
        last = k == steps - 1
        factor = w[steps] if last else 1.0
        polynomial = (gram_squared * (c[k] * factor)).addcmul_(gram, b[k] * factor)
        polynomial.diagonal(dim1=-2, dim2=-1).add_((a[k] * factor).squeeze(-1))
        iterate = polynomial.to(compute_dtype) @ iterate
        total = total + iterate if last else total.addcmul_(iterate, w[k + 1])
    return total * (largest ** s[:, None, None] * norm ** s[:, None, None])


def _frobenius(A: Tensor, dtype: torch.dtype) -> Tensor:
    """Frobenius norm of each matrix of A (B, m, m), accumulated in ``dtype``; shape (B, 1, 1)."""
    return torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True, dtype=dtype)


def spectral_power_svd(X: Tensor, p: float | Tensor) -> Tensor:
    """The exact ``U diag(σ^{1/p}) Vᵀ`` by a float64 SVD: the reference for `spectral_power`.

    Singular values below ``max(m, n) · eps · σ_max`` count as zero and stay zero.

    Args:
        X: Matrices, shape (..., m, n).
        p: As in `spectral_power`.

    Returns:
        float64 tensor of X's shape.

    Raises:
        ValueError: If the number ``p`` lies in (-4, 1) or is NaN.
    """
    s = torch.as_tensor(exponent_from_p(p), dtype=torch.float64, device=X.device)
    U, sigma, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    negligible = sigma <= max(X.shape[-2:]) * torch.finfo(torch.float64).eps * sigma[..., :1]
    power = sigma.masked_fill(negligible, 1.0) ** s.unsqueeze(-1)
    return (U * power.masked_fill(negligible, 0.0).unsqueeze(-2)) @ Vh
