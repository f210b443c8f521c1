"""Spectral powers ``U diag(σ^{1/p}) Vᵀ`` of batches of matrices, by matrix products only.

A Newton–Schulz run passes through iterates ``X₀ = X/c, X₁, …, X_K`` whose singular values saturate at different
scales, so that a weighted sum of the iterates represents any power of σ at the price of Muon's polar factor::

    X_k = a_k X_{k-1} + (b_k A + c_k A²) X_{k-1},    A = X_{k-1} X_{k-1}ᵀ
    U diag(σ^s) Vᵀ ≈ c^s Σ_k w_k X_k,                s = 1/p
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_schatten.exponent import MAX_EXPONENT, MIN_EXPONENT, exponent_of
from hf_schatten.linalg.coefficient_table import Coefficients, interpolate
from hf_schatten.linalg.compute_dtype import default_compute_dtype
from hf_schatten.linalg.symmetric_product import symmetric_product

# The Schatten-8 norm bounds σ_max, but for the rounding of half precision; beyond 1 the polynomials explode.
_SAFETY = 1.01

# Iterating on the m × m Gram matrix takes 4K - 3 products of m³ and two of m²n, where iterating on X takes 3K of
# m²n: fewer from n/m = 1.31 on at K = 5, from 1.29 to 1.32 for the other K.
_GRAM_ASPECT = 1.35


def spectral_power(
    X: Tensor, p: float | Tensor, *, steps: int = 5, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """Approximate ``U diag(σ^{1/p}) Vᵀ`` of each matrix, each with its own p, in one batched call.

    The result has X's shape and dtype. The scale of X is kept: p = 1 returns X to rounding, and ``t·X`` gives
    ``t^{1/p}`` times the result of X. A zero matrix gives zero; one with NaN or inf gives NaN and leaves the rest of
    its batch alone. Nothing waits for the device. There is no gradient.

    Args:
        X: Matrices, shape (..., m, n), of a floating point dtype; need not be contiguous.
        p: 1 is X itself, ``inf`` the polar factor U Vᵀ, ``p <= -4`` is "beyond Muon" (``s = 1/p`` in [-0.25, 0)).
            A number, or a tensor on X's device that broadcasts to ``X.shape[:-2]``; a tensor's values are not checked,
            but their 1/p is clamped to [-0.25, 1].
        steps: Newton–Schulz steps K, 3 to 8: more cost more and are more accurate.
        compute_dtype: Dtype of the matrix products. Default: float64 for float64 X, else float32 on a CPU and
            bfloat16 on an accelerator.

    Raises:
        ValueError: If a number p is NaN or in (-4, 1), X is not floating point or has fewer than two dimensions,
            or there is no table for ``steps``.
    """
    exponent = exponent_of(p)
    batch = _wide_batch(X)
    dtype = _scalar_dtype(X)
    if isinstance(exponent, Tensor):
        s = exponent.to(dtype).expand(X.shape[:-2]).reshape(-1)
    else:
        s = torch.full(batch.shape[:1], exponent, dtype=dtype, device=X.device)
    s = s.clamp(MIN_EXPONENT, MAX_EXPONENT)
    if X.numel() == 0:
        return torch.zeros_like(X)
    power = _transferred(batch, interpolate(s, steps), s[:, None, None], compute_dtype or default_compute_dtype(X))
    return _like(X, power)


def spectral_function(X: Tensor, coefficients: Coefficients, *, compute_dtype: torch.dtype | None = None) -> Tensor:
    """Apply any polynomial iteration to the singular values, relative to the Schatten-8 norm c of each matrix.

    X (..., m, n) and ``compute_dtype`` are as in `spectral_power`, ``coefficients`` are the iteration f, for instance
    of a `FittedTarget`. Returns ``U diag(f(σ/c)) Vᵀ``, where c exceeds the norm by 1 %, a margin for rounding.

    Raises:
        ValueError: If X is not floating point or has fewer than two dimensions.
    """
    batch = _wide_batch(X)
    if X.numel() == 0:
        return torch.zeros_like(X)
    rows = torch.tensor(coefficients.row, dtype=_scalar_dtype(X), device=X.device).expand(len(batch), -1)
    return _like(X, _transferred(batch, rows, None, compute_dtype or default_compute_dtype(X)))


def spectral_power_svd(X: Tensor, p: float | Tensor) -> Tensor:
    """The exact ``U diag(σ^{1/p}) Vᵀ`` of X (..., m, n), float64, by an SVD: the reference for `spectral_power`.

    Singular values below ``max(m, n) · eps · σ_max`` count as zero and stay zero.

    Raises:
        ValueError: If the number p is NaN or in (-4, 1).
    """
    s = torch.as_tensor(exponent_of(p), dtype=torch.float64, device=X.device)
    U, sigma, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    negligible = sigma <= max(X.shape[-2:]) * torch.finfo(torch.float64).eps * sigma[..., :1]
    power = sigma.masked_fill(negligible, 1.0) ** s.unsqueeze(-1)
    return (U * power.masked_fill(negligible, 0.0).unsqueeze(-2)) @ Vh


def _scalar_dtype(X: Tensor) -> torch.dtype:
    """Dtype of norms, coefficients and the weighted sum."""
    return torch.promote_types(X.dtype, torch.float32)


def _wide_batch(X: Tensor) -> Tensor:
    """View X (..., m, n) as (B, min(m, n), max(m, n)): the Gram side is the smaller one."""
    if X.ndim < 2 or not X.is_floating_point():
        raise ValueError(f"X must be floating point with two dimensions or more, got {X.dtype} {tuple(X.shape)}")
    batch = X.unsqueeze(0) if X.ndim == 2 else X.flatten(0, -3)
    return batch if X.shape[-2] <= X.shape[-1] else batch.mT


def _like(X: Tensor, batch: Tensor) -> Tensor:
    """Undo `_wide_batch`."""
    return (batch if X.shape[-2] <= X.shape[-1] else batch.mT).reshape(X.shape).to(X.dtype)


def _frobenius(A: Tensor, dtype: torch.dtype) -> Tensor:
    """Frobenius norms of A (B, m, n), accumulated in ``dtype``; shape (B, 1, 1), never zero."""
    norm = torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True, dtype=dtype)
    return norm.clamp(torch.finfo(dtype).tiny)


def _largest_element(A: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest magnitudes of A's (B, m, n) elements; shape (B, 1, 1), never zero, NaN where there is one."""
    # The infinity norm of torch.linalg takes twenty times as long on a CPU.
    largest = torch.maximum(A.amax((-2, -1), keepdim=True), -A.amin((-2, -1), keepdim=True))
    return largest.to(dtype).clamp(torch.finfo(dtype).tiny)


class _Step(NamedTuple):
    """Coefficients of one step and the weight of its result, one for each matrix: tensors (B, 1, 1)."""

    a: Tensor
    b: Tensor
    c: Tensor
    w: Tensor

    def polynomial(self, gram: Tensor, gram_squared: Tensor) -> Tensor:
        """``a I + b A + c A²`` of A = gram (B, m, m), in the memory of ``gram_squared``; rounded to A's dtype once."""
        on_cpu = gram.device.type == "cpu"  # where operations on two dtypes are slow
        total = gram_squared.to(self.c.dtype).mul_(self.c) if on_cpu else gram_squared * self.c
        total.diagonal(dim1=-2, dim2=-1).add_(self.a.squeeze(-1))
        if on_cpu:
            return gram_squared.copy_(total.addcmul_(gram, self.b))
        return torch.addcmul(total, gram, self.b, out=gram_squared)


@torch.no_grad()
def _transferred(X: Tensor, rows: Tensor, s: Tensor | None, compute_dtype: torch.dtype) -> Tensor:
    """Apply the coefficients ``rows`` (B, 4K + 1) to X (B, m, n), m <= n; times c^s where s (B, 1, 1) is given."""
    steps = rows.shape[-1] // 4
    columns = rows[..., None, None].unbind(1)  # 4K + 1 of (B, 1, 1)
    a, b, c, w = (columns[k * steps : (k + 1) * steps + k // 3] for k in range(4))
    chain = [_Step(*step) for step in zip(a, b, c, w[1:], strict=True)]

    largest = _largest_element(X, rows.dtype)
    iterate = torch.empty_like(X, dtype=compute_dtype, memory_format=torch.contiguous_format)
    torch.div(X, largest, out=iterate)  # elements in [-1, 1]: no Gram matrix overflows
    gram = symmetric_product(iterate, iterate.mT)  # (B, m, m)
    s4 = _frobenius(gram, rows.dtype)  # squared Schatten-4 norm
    gram_squared = symmetric_product(gram.div_(s4), gram)
    # The Schatten-8 norm comes from a product that the first step needs anyway, and is closer to σ_max than S4.
    s8 = _SAFETY**2 * _frobenius(gram_squared, rows.dtype).sqrt()
    gram.div_(s8)
    gram_squared.div_(s8.square())
    norm = s4.sqrt() * s8.sqrt()  # of a zero matrix: s4 * s8 would underflow
    divisor = (largest * norm).clamp(torch.finfo(norm.dtype).tiny)
    scale = torch.ones_like(norm) if s is None else largest**s * norm**s  # scale / divisor may overflow
    if compute_dtype == scale.dtype:
        total = torch.div(X, divisor, out=iterate) * (w[0] * scale)  # iterate: X₀
    else:
        total = X / divisor  # not read from the iterate, where it is in half precision
        iterate.copy_(total)
        total.mul_(w[0] * scale)
    direct = _steps_on_iterate(X, steps, compute_dtype)
    spare = torch.empty_like(iterate)  # fresh memory for every product would cost several per cent on a CPU
    for k, step in enumerate(chain[:direct], start=1):
        polynomial = step.polynomial(gram, gram_squared)
        iterate, spare = torch.bmm(polynomial, iterate, out=spare), iterate  # X_k
        total.addcmul_(iterate, step.w * scale)
        if k < steps:
            symmetric_product(iterate, iterate.mT, out=gram)
            symmetric_product(gram, gram, out=gram_squared)
    if direct < steps:
        total.addcmul_(_sum_in_gram_space(gram, gram_squared, chain[direct:]) @ iterate, scale)
    return total


def _steps_on_iterate(X: Tensor, steps: int, compute_dtype: torch.dtype) -> int:
    """How many steps act on the iterate before the rest act on its Gram matrix."""
    # That squares the singular values: in half precision the small ones drown in its rounding, until two steps have
    # lifted them.
    if X.shape[-1] < _GRAM_ASPECT * X.shape[-2]:
        return steps
    return 0 if compute_dtype in (torch.float32, torch.float64) else min(2, steps)


def _sum_in_gram_space(gram: Tensor, gram_squared: Tensor, chain: list[_Step]) -> Tensor:
    """``Σ_k w_k Q_k`` with ``X_k = Q_k X``, from ``gram = X Xᵀ`` (B, m, m) and its square.

    All factors are polynomials of one symmetric matrix and commute: ``X_k X_kᵀ = P_k (X_{k-1} X_{k-1}ᵀ) P_k``.
    """
    *inner, last = chain
    Q = total = None
    for step in inner:
        P = step.polynomial(gram, gram_squared)
        Q = P if Q is None else symmetric_product(P, Q)
        total = Q * step.w if total is None else total.addcmul_(Q, step.w)
        gram = symmetric_product(symmetric_product(P, gram), P)
        gram_squared = symmetric_product(gram, gram)
    P = last.polynomial(gram, gram_squared)
    if Q is None or total is None:
        return (P * last.w).to(gram.dtype)
    return total.addcmul_(symmetric_product(P, Q), last.w).to(gram.dtype)
