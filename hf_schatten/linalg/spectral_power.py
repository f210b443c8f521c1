"""Spectral powers ``U diag(σ^{1/p}) Vᵀ`` of batches of matrices, by matrix products only.

A Newton–Schulz run passes through iterates ``X₀ = X/c, X₁, …, X_K`` whose singular values saturate at different
scales, so that a weighted sum of the iterates represents any power of σ at the price of Muon's polar factor::

    X_k = a_k X_{k-1} + (b_k A + c_k A²) X_{k-1},    A = X_{k-1} X_{k-1}ᵀ
    U diag(σ^s) Vᵀ ≈ c^s Σ_k w_k X_k,                s = 1/p
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hf_schatten.exponent import MAX_EXPONENT, MIN_EXPONENT, exponent_of
from hf_schatten.linalg.coefficient_table import Coefficients
from hf_schatten.linalg.compute_dtype import default_compute_dtype
from hf_schatten.linalg.iteration_numbers import Numbers, iteration_numbers, squared_units
from hf_schatten.linalg.many_matrices import weighted_sum
from hf_schatten.linalg.symmetric_product import (
    combined_with_square,
    commuting_product,
    symmetric_polynomial,
    symmetric_product,
)

# Iterating on the m × m Gram matrix takes 4K - 3 products of m³ and two of m²n, where iterating on X takes 3K of
# m²n: fewer from n/m = 1.31 on at K = 5, from 1.29 to 1.32 for the other K.
_GRAM_ASPECT = 1.35
_GRAM_SPACE_SQUARES = 9  # temporaries there

# Bytes of temporaries, more where one matrix needs more. A CPU is fastest with a few matrices at a time, so that its
# cores share no matrix: with 8 MiB, an iteration took up to 1.9 times as long, and with 128 MiB up to 1.3 times. An
# accelerator needs work for all its processors at once.
WORKSPACE = {"cpu": 64 << 20, "accelerator": 4 << 30}


def spectral_power(
    X: Tensor, p: float | Tensor, *, steps: int = 5, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """Approximate ``U diag(σ^{1/p}) Vᵀ`` of each matrix, each with its own p, in one batched call.

    The scale of X is kept: p = 1 returns X to rounding, and ``t·X`` gives ``t^{1/p}`` times the result of X. A zero
    matrix gives zero; one with NaN or inf gives NaN and leaves the rest of its batch alone. Nothing waits for the
    device. There is no gradient.

    Args:
        X: matrices (..., m, n), floating point; need not be contiguous.
        p: 1 is X itself, ``inf`` the polar factor U Vᵀ, ``p <= -4`` is "beyond Muon" (``s = 1/p`` in [-0.25, 0)).
            A number, or a tensor on X's device that broadcasts to ``X.shape[:-2]``; a tensor's values are not checked,
            but their 1/p is clamped to [-0.25, 1].
        steps: Newton–Schulz steps K, 3 to 8: more cost more and are more accurate. Default 5, Muon's cost.
        compute_dtype: dtype of the matrix products. Default: float64 for float64 X, else float32 on a CPU and
            bfloat16 on an accelerator.

    Returns:
        matrices of X's shape and dtype.

    Raises:
        ValueError: when a number p is NaN or in (-4, 1), X is not floating point or has fewer than two dimensions,
            or there is no table for ``steps``.
    """
    return measured_spectral_power(X, p, steps=steps, compute_dtype=compute_dtype)[0]


def measured_spectral_power(
    X: Tensor, p: float | Tensor, *, steps: int = 5, compute_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return the spectral power O of X, and ``⟨X, O⟩`` and ``⟨O, O⟩`` of its matrices, (2, B), in the same pass."""
    exponent = exponent_of(p)
    batch = _wide_batch(X)
    dtype = _scalar_dtype(X)
    if isinstance(exponent, Tensor):
        s = exponent.to(dtype).expand(X.shape[:-2]).reshape(-1)
    else:
        s = torch.full(batch.shape[:1], exponent, dtype=dtype, device=X.device)
    s = s.clamp(MIN_EXPONENT, MAX_EXPONENT)
    return _iterated(X, batch, s, steps, [], compute_dtype)


def spectral_function(X: Tensor, coefficients: Coefficients, *, compute_dtype: torch.dtype | None = None) -> Tensor:
    """Apply any polynomial iteration to the singular values, relative to the Schatten-8 norm c of each matrix.

    Args:
        X: matrices (..., m, n), floating point; need not be contiguous.
        coefficients: the iteration f, for instance of a :class:`hf_schatten.linalg.FittedTarget`.
        compute_dtype: dtype of the matrix products. Default as in :func:`spectral_power`.

    Returns:
        ``U diag(f(σ/c)) Vᵀ``, of X's shape and dtype, where c exceeds the norm by 1 %, a margin for rounding.

    Raises:
        ValueError: when X is not floating point or has fewer than two dimensions.
    """
    return measured_spectral_function(X, coefficients, compute_dtype=compute_dtype)[0]


def measured_spectral_function(
    X: Tensor, coefficients: Coefficients, *, compute_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return the spectral function O of X, and ``⟨X, O⟩`` and ``⟨O, O⟩`` of its matrices, (2, B), in the same pass."""
    return _iterated(X, _wide_batch(X), None, coefficients.steps, list(coefficients.row), compute_dtype)


def _iterated(
    X: Tensor, batch: Tensor, s: Tensor | None, steps: int, row: list[float], compute_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    if X.numel() == 0:
        return torch.zeros_like(X), X.new_zeros(2, len(batch))
    found, products = spectral_iteration(batch, s, steps, row, compute_dtype or default_compute_dtype(X))
    return _like(X, found), products


def spectral_power_svd(X: Tensor, p: float | Tensor) -> Tensor:
    """Return the exact ``U diag(σ^{1/p}) Vᵀ`` by an SVD in float64, the reference for :func:`spectral_power`.

    Singular values below ``max(m, n) · eps · σ_max`` count as zero and stay zero.

    Args:
        X: matrices (..., m, n).
        p: a number, or a tensor that broadcasts to ``X.shape[:-2]``.

    Returns:
        matrices of X's shape, float64.

    Raises:
        ValueError: when the number p is NaN or in (-4, 1).
    """
    s = torch.as_tensor(exponent_of(p), dtype=torch.float64, device=X.device)
    U, sigma, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    negligible = sigma <= max(X.shape[-2:]) * torch.finfo(torch.float64).eps * sigma[..., :1]
    power = sigma.masked_fill(negligible, 1.0) ** s.unsqueeze(-1)
    return (U * power.masked_fill(negligible, 0.0).unsqueeze(-2)) @ Vh


def _scalar_dtype(X: Tensor) -> torch.dtype:
    """Return the dtype of norms, coefficients and the weighted sum."""
    return torch.float64 if X.dtype == torch.float64 else torch.float32


def _wide_batch(X: Tensor) -> Tensor:
    """View X (..., m, n) as (B, min(m, n), max(m, n)): the Gram side is the smaller one."""
    if X.ndim < 2 or not X.is_floating_point():
        raise ValueError(f"X must be floating point with two dimensions or more, got {X.dtype} {tuple(X.shape)}")
    batch = X.unsqueeze(0) if X.ndim == 2 else X.flatten(0, -3)
    return batch if X.shape[-2] <= X.shape[-1] else batch.mT


def _like(X: Tensor, batch: Tensor) -> Tensor:
    """Undo `_wide_batch`."""
    return (batch if X.shape[-2] <= X.shape[-1] else batch.mT).reshape(X.shape).to(X.dtype)


def _largest_element(A: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest magnitudes of A's (B, m, n) elements; shape (B, 1, 1), never zero, NaN where there is one."""
    # The infinity norm of torch.linalg takes twenty times as long on a CPU.
    largest = torch.maximum(A.amax((-2, -1), keepdim=True), -A.amin((-2, -1), keepdim=True))
    return largest.to(dtype).clamp(torch.finfo(dtype).tiny)


@torch.library.custom_op("hf_schatten::spectral_iteration", mutates_args=())
def spectral_iteration(
    X: Tensor, s: Tensor | None, steps: int, row: list[float], compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return a polynomial iteration O of X (B, m, n), m <= n, of X's dtype, and ``⟨X, O⟩`` and ``⟨O, O⟩``, (2, B).

    With s (B,) it is the spectral power, from the table for ``steps``; without, ``row`` has the coefficients, and it
    is one of the singular values relative to c. To torch's dispatcher it is one operation, of bounded memory.
    """
    return iterate_in_turns(X, s, steps, row, compute_dtype)


def iterate_in_turns(
    X: Tensor, s: Tensor | None, steps: int, row: Sequence[float], compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What `spectral_iteration` does, as the operations that it consists of: temporaries fit into `WORKSPACE`."""
    out = torch.empty_like(X, memory_format=torch.contiguous_format)
    products = X.new_zeros(2, len(X), dtype=_scalar_dtype(X))
    for some in _turns(X, steps, compute_dtype):
        own = None if s is None else s[some]
        _iterate(X[some], own, steps, row, compute_dtype, out[some], products[:, some])
    return out, products


@spectral_iteration.register_fake
def _(X: Tensor, s: Tensor | None, steps: int, row: list[float], compute_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(X, memory_format=torch.contiguous_format)
    return out, X.new_empty(2, len(X), dtype=_scalar_dtype(X))


@register_flop_formula(torch.ops.hf_schatten.spectral_iteration)
def _operations(X: Sequence[int], s: object, steps: int, row: object, compute_dtype: torch.dtype, **_: object) -> int:
    """The operations of all matrix products, for torch's counter, given shapes."""
    count, m, n = X
    direct = _steps_on_iterate(X, steps, compute_dtype)
    rest = steps - direct
    wide = 2 + 2 * direct  # m² n
    square = steps + 3 * (rest - 1)  # m³
    return 2 * count * m * m * (wide * n + square * m)


def _turns(X: Tensor, steps: int, compute_dtype: torch.dtype) -> Iterator[slice]:
    """Yield slices of the batch X (B, m, n) whose temporaries fit into the workspace, of one matrix at least."""
    count, m, n = X.shape
    direct = _steps_on_iterate(X.shape, steps, compute_dtype)
    squares = 3 if direct == steps - 1 else _GRAM_SPACE_SQUARES
    needed = ((max(direct, 1) + 2) * m * n + squares * m * m) * compute_dtype.itemsize
    size = max(1, WORKSPACE["cpu" if X.device.type == "cpu" else "accelerator"] // needed)
    yield from (slice(start, start + size) for start in range(0, count, size))


def _iterate(
    X: Tensor,
    s: Tensor | None,
    steps: int,
    row: Sequence[float],
    compute_dtype: torch.dtype,
    out: Tensor,
    products: Tensor,
) -> None:
    """Write the result for X (B, m, n) into ``out``, contiguous, and its inner products into ``products``, zeros."""
    direct = _steps_on_iterate(X.shape, steps, compute_dtype)
    if X.dtype == compute_dtype == torch.bfloat16 and X.is_contiguous():
        # As it is: bfloat16 has the range of float32, in which products are added up.
        start, largest = X, products.new_ones(len(X))
    else:
        start = torch.empty_like(X, dtype=compute_dtype, memory_format=torch.contiguous_format)
        largest = _largest_element(X, products.dtype)
        torch.div(X, largest, out=start)  # elements in [-1, 1]: no Gram matrix overflows
        largest = largest.flatten()
    gram = symmetric_product(start, start.mT)  # (B, m, m)
    # Divided by its largest element, it has powers that stay in range, and whose norm is 1 at least.
    squared_unit, inverse = squared_units(gram, products.dtype)
    _multiply_each(gram, inverse)
    square = symmetric_product(gram, gram)
    # The Schatten-8 norm comes from a product that the first step needs anyway, and is close to σ_max.
    norms = torch.linalg.vector_norm(square, dim=-1)  # of rows: one of everything would copy it to float32
    from_start = compute_dtype == products.dtype  # not where that is in half precision
    numbers = iteration_numbers(s, row, steps, direct, norms, largest, squared_unit, from_start)

    # X_1 … X_{direct-1}, and what comes from there on: a product with X_direct.
    terms = torch.empty(max(direct, 1), *X.shape, dtype=compute_dtype, device=X.device)
    P = combined_with_square(gram, square, *numbers.steps[0])
    latest = start
    for k, step in enumerate(numbers.steps[:direct]):
        if k:
            P = symmetric_polynomial(gram, *step, square)
        last = k + 1 == direct  # not needed any more when the sum is written
        place = terms[k] if not last else out if out.dtype == compute_dtype else torch.empty_like(start)
        latest = torch.bmm(P, latest, out=place)
        symmetric_product(latest, latest.mT, out=gram)
    if direct:
        P = symmetric_polynomial(gram, *numbers.steps[direct], square)
    rest = P if direct == steps - 1 else _sum_in_gram_space(P, gram, numbers, direct)
    torch.bmm(rest, latest, out=terms[-1])
    weighted_sum(start if from_start else X, terms, numbers.outer, out, products=products)
    if from_start:
        products[0].mul_(largest)


def _multiply_each(A: Tensor, factors: Tensor) -> None:
    """Multiply matrices (B, m, n) in their place by numbers (B,)."""
    if A.device.type == "cpu":  # where numbers of another dtype than A's would make a copy of A
        torch._foreach_mul_(A.unbind(), factors.tolist())
    else:
        weighted_sum(A, A.new_empty(0, *A.shape), factors[:, None], A)


def _steps_on_iterate(shape: Sequence[int], steps: int, compute_dtype: torch.dtype) -> int:
    """How many steps act on the iterate before the rest act on its Gram matrix, the last one at least."""
    # That squares the singular values: in half precision the small ones drown in its rounding, until two steps have
    # lifted them.
    if shape[-1] < _GRAM_ASPECT * shape[-2]:
        return steps - 1
    return 0 if compute_dtype in (torch.float32, torch.float64) else min(2, steps - 1)


def _sum_in_gram_space(P: Tensor, gram: Tensor, numbers: Numbers, direct: int) -> Tensor:
    """``w_0 I + Σ_k w_k Q_k`` with ``X_k = Q_k X``, from ``gram = X Xᵀ`` (B, m, m) and the first polynomial, Q_1 = P.

    All factors are polynomials of one symmetric matrix and commute: ``X_k X_kᵀ = P_k (X_{k-1} X_{k-1}ᵀ) P_k``.
    """
    if not direct:
        _multiply_each(gram, numbers.inverse_norms)
    first, spare = P, torch.empty_like(gram)
    found = gram.new_empty(len(numbers.steps) - direct - 1, *gram.shape)  # Q_2, …
    for k, step in enumerate(numbers.steps[direct + 1 :]):
        gram = commuting_product(commuting_product(P, gram), P)
        P = symmetric_polynomial(gram, *step, spare)
        commuting_product(P, found[k - 1] if k else first, out=found[k])
    weights, identity = (each.expand(len(gram), *each.shape[1:]) for each in (numbers.inner, numbers.identity))
    weighted_sum(first, found, weights.contiguous(), first, diagonal=identity.contiguous())
    return first
