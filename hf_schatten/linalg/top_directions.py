"""Directions of the largest singular values alone, which no polynomial of Newton–Schulz's degree separates."""

import math

import torch
from torch import Tensor

from hf_schatten.linalg.spectral_power import spectral_power

_SEED = 0
_POLISHING_STEPS = 4  # take the table's 11 % at p = inf to rounding: each turns an error e into 1.5 e²


def top_singular_direction(X: Tensor, *, squarings: int = 6) -> Tensor:
    """The rank-1 matrix ``u₁ v₁ᵀ``, i.e. the target ``1[σ = σ_max]`` ("Interpolating Between SGD and Muon").

    The steepest descent of order 1, by power iteration without a random start: ``(X Xᵀ)^{2^squarings}`` tends to a
    multiple of ``u₁ u₁ᵀ``, whose column with the largest diagonal element is the start of a last step.

    Args:
        X: Matrices, shape (..., m, n), float32 or float64.
        squarings: Matrix products of the smaller side; the neighbour is suppressed by ``(σ₂/σ₁)^{2^(squarings + 1)}``,
            1/600 at a gap of 5 % by default.

    Returns:
        Tensor of X's shape and dtype, of Frobenius norm 1; zero for a zero matrix.
    """
    if X.shape[-2] > X.shape[-1]:
        return top_singular_direction(X.mT, squarings=squarings).mT
    tiny = torch.finfo(X.dtype).tiny
    X = X / X.abs().amax((-2, -1), keepdim=True).clamp(tiny)
    power = X @ X.mT  # (..., m, m)
    for _ in range(squarings):
        power = power / torch.linalg.matrix_norm(power, keepdim=True).clamp(tiny)
        power = power @ power
    largest = power.diagonal(dim1=-2, dim2=-1).argmax(-1)
    u = power.take_along_dim(largest[..., None, None], -1)  # (..., m, 1)
    v = _normalised(X.mT @ _normalised(u))  # (..., n, 1)
    return _normalised(X @ v) @ v.mT


def top_k_direction(X: Tensor, k: int, *, iterations: int = 16) -> Tensor:
    """The partial isometry ``U_k V_kᵀ`` of the k largest singular values: 1 for these, 0 for the rest.

    Subspace iteration from a fixed start, by products of X with k columns and QR decompositions. Where σ_{k+1} is
    close to σ_k the block mixes their vectors, weighted by ``(σ_{k+1}/σ_k)^{2 iterations}``: the result still has k
    singular values of 1, and on a Gaussian matrix, which has no gap, ``⟨X, U_k V_kᵀ⟩`` is 99 % of its maximum.

    Args:
        X: Matrices, shape (..., m, n), of a floating point dtype.
        k: At least 1; from min(m, n) on, the result is the polar factor.
        iterations: Products with X and with Xᵀ, as many of each.

    Returns:
        Tensor of X's shape and dtype. Singular values below 5e-4 of the largest come out below 1, zero stays zero.

    Raises:
        ValueError: If k is below 1, or X is not floating point or has fewer than two dimensions.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k!r}")
    if X.ndim < 2 or not X.is_floating_point():
        raise ValueError(f"X must be floating point with two dimensions or more, got {X.dtype} {tuple(X.shape)}")
    if X.shape[-2] > X.shape[-1]:
        return top_k_direction(X.mT, k, iterations=iterations).mT
    if X.numel() == 0:
        return torch.zeros_like(X)
    working = X.to(torch.promote_types(X.dtype, torch.float32))
    working = working / working.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(working.dtype).tiny)
    U = _start(working, min(k, X.shape[-2]))
    for _ in range(iterations):
        V = torch.linalg.qr(working.mT @ U).Q  # (..., n, k)
        U, core = torch.linalg.qr(working @ V)  # (..., m, k) and (..., k, k) with X V = U core
    return (U @ _polar_factor(core) @ V.mT).to(X.dtype)


def _normalised(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp(torch.finfo(x.dtype).tiny)


def _start(like: Tensor, k: int) -> Tensor:
    """The same Gaussian columns (m, k) for every matrix, from a generator of their own."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(like.shape[-2], k, generator=generator, dtype=like.dtype).to(like.device)


def _polar_factor(X: Tensor) -> Tensor:
    """The polar factor of small matrices (..., k, k) to rounding: `spectral_power`, then Newton–Schulz steps."""
    Y = spectral_power(X, math.inf, compute_dtype=X.dtype)
    for _ in range(_POLISHING_STEPS):
        Y = 1.5 * Y - 0.5 * (Y @ Y.mT) @ Y
    return Y
