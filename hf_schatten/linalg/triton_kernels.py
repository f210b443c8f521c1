"""Triton kernels of the operations on many matrices, for GPUs; imported where there is one.

Each has the meaning of the operation of the same name in :mod:`hf_schatten.linalg.many_matrices` or
:mod:`hf_schatten.linalg.symmetric_product`, which compute it with torch alone where Triton is missing. Here are those
on batches of matrices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_schatten.linalg.triton_launch import launched_where_it_lies
from hf_schatten.linalg.triton_numbers import iteration_numbers, squared_units
from hf_schatten.linalg.triton_placed import add_updates, advance_averages, largest_magnitudes

__all__ = [
    "add_updates",
    "advance_averages",
    "inner_products",
    "iteration_numbers",
    "largest_magnitudes",
    "squared_units",
    "symmetric",
    "weighted_sum",
]

_BLOCK = 4096  # elements of a block
_FEW = 16  # the least that matrix units multiply
_SINGLE_PRECISION = "ieee" if torch.version.hip else "tf32x3"  # of products of float32


@triton.jit
def _symmetric_kernel(
    X,
    Y,
    A,
    out,
    a,
    b,
    c,
    m,
    k,
    matrix_stride,
    row_stride,
    POLYNOMIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``X Yᵀ``, or with POLYNOMIAL ``a I + b A + c X Yᵀ``, on tiles on and below the diagonal, and mirrored."""
    tile = tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)  # the root is rounded
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    column = tile - row * (row + 1) // 2
    rows = row * BLOCK + tl.arange(0, BLOCK)
    columns = column * BLOCK + tl.arange(0, BLOCK)
    left = X + index * matrix_stride + rows[:, None].to(tl.int64) * row_stride
    right = Y + index * matrix_stride + columns[:, None].to(tl.int64) * row_stride
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, k, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        x = tl.load(left + depth[None, :], mask=(rows[:, None] < m) & (depth[None, :] < k), other=0.0)
        y = tl.load(right + depth[None, :], mask=(columns[:, None] < m) & (depth[None, :] < k), other=0.0)
        total = tl.dot(x, tl.trans(y), total, input_precision=PRECISION)
    inside = (rows[:, None] < m) & (columns[None, :] < m)
    if POLYNOMIAL:
        gram = tl.load(A + index * m * m + rows[:, None] * m + columns[None, :], mask=inside, other=0.0)
        total = tl.load(c + index) * total + tl.load(b + index) * gram.to(tl.float32)
        total += tl.where(rows[:, None] == columns[None, :], tl.load(a + index), 0.0)
    result = total.to(out.dtype.element_ty)
    tl.store(out + index * m * m + rows[:, None] * m + columns[None, :], result, mask=inside)
    if row != column:
        mirrored = out + index * m * m + columns[:, None] * m + rows[None, :]
        tl.store(mirrored, tl.trans(result), mask=(columns[:, None] < m) & (rows[None, :] < m))


@launched_where_it_lies
def symmetric(
    X: Tensor,
    Y: Tensor,
    out: Tensor,
    polynomial: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Write ``X Yᵀ`` of (B, m, k), known to be symmetric, or ``a I + b X + c X Yᵀ``, into ``out`` (B, m, m).

    Both have the same strides, the last of them 1; all are contiguous but for a product alone. The product of float32
    has three parts in TF32, whose sum is as exact but for a bit or two.
    """
    assert X.stride() == Y.stride()
    assert X.stride(-1) == 1
    count, m, k = X.shape
    a, b, c = (number.contiguous() for number in polynomial) if polynomial else (out, out, out)
    half = X.dtype.itemsize < torch.float32.itemsize
    block = 128 if m >= 256 else 64 if m > _FEW else _FEW
    side = triton.cdiv(m, block)
    grid = side * (side + 1) // 2, count
    _symmetric_kernel[grid](
        *(X, Y, X, out, a, b, c, m, k, X.stride(0), X.stride(1)),
        POLYNOMIAL=polynomial is not None,
        PRECISION=_SINGLE_PRECISION,
        BLOCK=block,
        DEPTH=64 if half or block == _FEW else 32,
        num_warps=8 if block == 128 and (k > m or not half) else 4,  # by times on an H200
        num_stages=3,
    )
    return out


@triton.jit
def _weighted_sum_kernel(
    first,
    others,
    weights,
    diagonal,
    out,
    partial,
    size,
    n,
    stride,
    COUNT: tl.constexpr,
    DIAGONAL: tl.constexpr,
    PRODUCTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    at = index * size + element
    weight = weights + index * (COUNT + 1)
    apart = stride + index * 0  # of two terms, in 64 bits
    start = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
    total = start * tl.load(weight)
    for term in tl.static_range(COUNT):
        value = tl.load(others + term * apart + at, mask=inside, other=0.0).to(tl.float32)
        total += value * tl.load(weight + term + 1)
    if DIAGONAL:
        total += tl.where(element // n == element % n, tl.load(diagonal + index), 0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
    if PRODUCTS:
        total = tl.where(inside, total, 0.0)
        _store_products(partial, tl.sum(start * total), tl.sum(total * total))


@triton.jit
def _store_products(partial, first, second):
    """Store two numbers of this block of a matrix in ``partial``, (2, matrices, blocks)."""
    blocks = tl.num_programs(0)
    at = partial + tl.program_id(1).to(tl.int64) * blocks + tl.program_id(0)
    tl.store(at, first)
    tl.store(at + tl.num_programs(1).to(tl.int64) * blocks, second)


@launched_where_it_lies
def weighted_sum(
    first: Tensor,
    others: Tensor,
    weights: Tensor,
    out: Tensor,
    diagonal: Tensor | None = None,
    products: Tensor | None = None,
) -> Tensor:
    """Write ``Σ_k w_k T_k`` into ``out``: first (B, m, n) and others (K, B, m, n), contiguous, weights (B, K + 1)."""
    count, m, n = first.shape
    blocks = triton.cdiv(m * n, _BLOCK)
    partial = out if products is None else products.new_empty(2, count, blocks)
    _weighted_sum_kernel[blocks, count](
        *(first, others, weights.contiguous(), weights if diagonal is None else diagonal.contiguous(), out, partial),
        *(m * n, n, first.numel()),
        COUNT=len(others),
        DIAGONAL=diagonal is not None,
        PRODUCTS=products is not None,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    if products is not None:
        torch.sum(partial, -1, out=products)
    return out


@triton.jit
def _inner_products_kernel(A, B, partial, size, BLOCK: tl.constexpr):
    index = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(A + index * size + element, mask=element < size, other=0.0).to(tl.float32)
    b = tl.load(B + index * size + element, mask=element < size, other=0.0).to(tl.float32)
    _store_products(partial, tl.sum(a * b), tl.sum(b * b))


@launched_where_it_lies
def inner_products(A: Tensor, B: Tensor) -> Tensor:
    """Return ``⟨A, B⟩`` and ``⟨B, B⟩`` of contiguous (B, m, n), as (2, B) float32; in the same order every time."""
    count, m, n = A.shape
    blocks = triton.cdiv(m * n, _BLOCK)
    partial = torch.empty(2, count, blocks, dtype=torch.float32, device=A.device)
    _inner_products_kernel[blocks, count](A, B, partial, m * n, BLOCK=_BLOCK, num_warps=8)
    return partial.sum(-1)
