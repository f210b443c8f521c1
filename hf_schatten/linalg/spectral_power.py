"""Spectral powers ``U diag(σ^{1/p}) Vᵀ`` of batches of matrices, by matrix products only.

A Newton–Schulz run passes through iterates ``X₀ = X/c, X₁, …, X_K`` whose singular values saturate at different
scales, so that a weighted sum of the iterates represents any power of σ at the price of Muon's polar factor::

    X_k = a_k X_{k-1} + (b_k A + c_k A²) X_{k-1},    A = X_{k-1} X_{k-1}ᵀ
    U diag(σ^s) Vᵀ ≈ c^s Σ_k w_k X_k,                s = 1/p
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hf_schatten.exponent import MAX_EXPONENT, MIN_EXPONENT, exponent_of
from hf_schatten.linalg.coefficient_table import Coefficients, interpolate
from hf_schatten.linalg.compute_dtype import default_compute_dtype
from hf_schatten.linalg.many_matrices import weighted_sum
from hf_schatten.linalg.symmetric_product import symmetric_product

# The Schatten-8 norm bounds σ_max, but for the rounding of half precision; beyond 1 the polynomials explode.
_SAFETY = 1.01

# Iterating on the m × m Gram matrix takes 4K - 3 products of m³ and two of m²n, where iterating on X takes 3K of
# m²n: fewer from n/m = 1.31 on at K = 5, from 1.29 to 1.32 for the other K.
_GRAM_ASPECT = 1.35
_GRAM_SPACE_SQUARES = 9  # temporaries there

# Bytes of temporaries, more where one matrix needs more. A CPU is fastest with what stays in its cache; an accelerator
# needs work for all its processors at once.
WORKSPACE = {"cpu": 32 << 20, "accelerator": 2 << 30}

# Of a zero matrix, whose norm is that of rounding: what is multiplied by zero stays finite.
_SMALLEST_DIVISOR, _LARGEST_WEIGHT = 1e-30, 1e37


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
    power = spectral_iteration(batch, interpolate(s, steps), s, compute_dtype or default_compute_dtype(X))
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
    return _like(X, spectral_iteration(batch, rows, None, compute_dtype or default_compute_dtype(X)))


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
    """Coefficients of one step and the weight of its result, one for each matrix: tensors (B,)."""

    a: Tensor
    b: Tensor
    c: Tensor
    w: Tensor

    def polynomial(self, gram: Tensor, out: Tensor, scale: Tensor | None = None, squared: bool = False) -> Tensor:
        """Write ``scale · (a I + b A + c A²)`` of A = gram (B, m, m) into ``out``, which may hold A² already."""
        a, b, c = (self.a, self.b, self.c) if scale is None else (self.a * scale, self.b * scale, self.c * scale)
        if not squared:
            symmetric_product(gram, gram, out=out)
        return weighted_sum(gram, [out], torch.stack([b, c], dim=1), out, diagonal=a)


@torch.library.custom_op("hf_schatten::spectral_iteration", mutates_args=())
def spectral_iteration(X: Tensor, rows: Tensor, s: Tensor | None, compute_dtype: torch.dtype) -> Tensor:
    """Apply the coefficients ``rows`` (B, 4K + 1) to X (B, m, n), m <= n; times c^s where s (B,) is given.

    To torch's dispatcher this is one operation. Memory is bounded: matrices take turns within :data:`WORKSPACE`.
    """
    out = torch.empty_like(X, memory_format=torch.contiguous_format)
    for some in _turns(X, rows.shape[-1] // 4, compute_dtype):
        _iterate(X[some], rows[some], None if s is None else s[some], compute_dtype, out[some])
    return out


@spectral_iteration.register_fake
def _(X: Tensor, rows: Tensor, s: Tensor | None, compute_dtype: torch.dtype) -> Tensor:
    return torch.empty_like(X, memory_format=torch.contiguous_format)


def _turns(X: Tensor, steps: int, compute_dtype: torch.dtype) -> Iterator[slice]:
    """Yield slices of the batch X (B, m, n) whose temporaries fit into the workspace, of one matrix at least."""
    count, m, n = X.shape
    direct = _steps_on_iterate(X, steps, compute_dtype)
    needed = ((direct + 2) * m * n + (3 if direct == steps else _GRAM_SPACE_SQUARES) * m * m) * compute_dtype.itemsize
    size = max(1, WORKSPACE["cpu" if X.device.type == "cpu" else "accelerator"] // needed)
    yield from (slice(start, start + size) for start in range(0, count, size))


def _iterate(X: Tensor, rows: Tensor, s: Tensor | None, compute_dtype: torch.dtype, out: Tensor) -> None:
    """Write the result for X (B, m, n) into ``out``, contiguous."""
    steps = rows.shape[-1] // 4
    columns = rows.unbind(1)  # 4K + 1 of (B,)
    a, b, c, w = (columns[k * steps : (k + 1) * steps + k // 3] for k in range(4))
    chain = [_Step(*step) for step in zip(a, b, c, w[1:], strict=True)]
    direct = _steps_on_iterate(X, steps, compute_dtype)
    tiny = torch.finfo(rows.dtype).tiny

    if X.dtype == compute_dtype == torch.bfloat16:
        # As it is: bfloat16 has the range of float32, in which products are added up.
        start = X
        gram = symmetric_product(X, X.mT)
        squared_unit = _largest_element(gram, rows.dtype)
        gram.div_(squared_unit)
        unit = squared_unit.sqrt()
    else:
        start = torch.empty_like(X, dtype=compute_dtype, memory_format=torch.contiguous_format)
        unit = _largest_element(X, rows.dtype)
        torch.div(X, unit, out=start)  # elements in [-1, 1]: no Gram matrix overflows
        gram = symmetric_product(start, start.mT)  # (B, m, m)
    s4 = _frobenius(gram, rows.dtype)  # squared Schatten-4 norm
    gram_squared = symmetric_product(gram.div_(s4), gram)
    # The Schatten-8 norm comes from a product that the first step needs anyway, and is closer to σ_max than S4.
    s8 = _SAFETY**2 * _frobenius(gram_squared, rows.dtype).sqrt()
    gram.div_(s8)
    gram_squared.div_(s8.square())
    relative = (s4.sqrt() * s8.sqrt()).flatten()  # of a zero matrix: s4 * s8 would underflow
    unit = unit.flatten()
    scale = torch.ones_like(unit) if s is None else unit**s * relative**s
    # What X and the start of the iteration are divided by. Of a zero matrix it must not make an infinite coefficient.
    whole = (unit * relative).clamp(tiny)
    divisor = whole.clamp(_SMALLEST_DIVISOR) if start is X else relative

    iterates = torch.empty(direct + (direct < steps), *X.shape, dtype=compute_dtype, device=X.device)
    latest = start
    for k, (step, iterate) in enumerate(zip(chain[:direct], iterates, strict=False)):
        torch.bmm(step.polynomial(gram, gram_squared, None if k else 1 / divisor, squared=not k), latest, out=iterate)
        latest = iterate
        if k + 1 < steps:
            symmetric_product(iterate, iterate.mT, out=gram)
    weights = [step.w * scale for step in chain[:direct]]
    if direct < steps:
        rest = _sum_in_gram_space(gram, gram_squared, chain[direct:], squared=not direct)
        torch.bmm(rest, latest, out=iterates[-1])
        weights.append(scale if direct else scale / divisor)
    if compute_dtype == rows.dtype:
        first, weight = start, w[0] * scale / relative
    else:  # not the start, where that is in half precision
        first, weight = X, w[0] * scale / whole
    finite = torch.stack([weight, *weights], dim=1).clamp(-_LARGEST_WEIGHT, _LARGEST_WEIGHT)
    weighted_sum(first, iterates, finite, out)


def _steps_on_iterate(X: Tensor, steps: int, compute_dtype: torch.dtype) -> int:
    """How many steps act on the iterate before the rest act on its Gram matrix."""
    # That squares the singular values: in half precision the small ones drown in its rounding, until two steps have
    # lifted them.
    if X.shape[-1] < _GRAM_ASPECT * X.shape[-2]:
        return steps
    return 0 if compute_dtype in (torch.float32, torch.float64) else min(2, steps)


def _sum_in_gram_space(gram: Tensor, spare: Tensor, chain: list[_Step], squared: bool) -> Tensor:
    """``Σ_k w_k Q_k`` with ``X_k = Q_k X``, from ``gram = X Xᵀ`` (B, m, m); ``spare`` may hold its square already.

    All factors are polynomials of one symmetric matrix and commute: ``X_k X_kᵀ = P_k (X_{k-1} X_{k-1}ᵀ) P_k``.
    """
    found: list[Tensor] = []
    for step in chain:
        P = step.polynomial(gram, spare, squared=squared and not found)
        found.append(symmetric_product(P, found[-1]) if found else P)
        if len(found) < len(chain):
            gram = symmetric_product(symmetric_product(P, gram), P)
            spare = torch.empty_like(gram)
    weights = torch.stack([step.w for step in chain], dim=1)
    return weighted_sum(found[0], found[1:], weights, torch.empty_like(gram))
