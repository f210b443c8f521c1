"""Triton kernels of the operations on many matrices, for GPUs; imported where there is one.

Each has the meaning of the operation of the same name in :mod:`hf_schatten.linalg.many_matrices` or
:mod:`hf_schatten.linalg.symmetric_product`, which compute it with torch alone where Triton is missing. Matrices are
found through tables of addresses, so that one launch serves all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_schatten.linalg.place import Place

Function = TypeVar("Function", bound=Callable[..., Any])

_TILE = 64  # side of the squares in which matrices are read and written
_BLOCK = 4096  # elements of what has no rows
_SINGLE_PRECISION = "ieee" if torch.version.hip else "tf32x3"  # of products of float32
_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def _launched_where_it_lies(function: Function) -> Function:
    """Launch on the device of the first argument: Triton takes the current one, which may be another."""

    @functools.wraps(function)
    def launch(first: Any, *others: Any, **options: Any) -> Any:
        with torch.cuda.device_of(first if isinstance(first, Tensor) else first[0]):
            return function(first, *others, **options)

    return cast(Function, launch)


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
    left = X + index * m * k + rows[:, None] * k
    right = Y + index * m * k + columns[:, None] * k
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


@_launched_where_it_lies
def symmetric(
    X: Tensor,
    Y: Tensor,
    out: Tensor,
    polynomial: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Write ``X Yᵀ`` of (B, m, k), known to be symmetric, or ``a I + b X + c X Yᵀ``, into ``out`` (B, m, m).

    Both are contiguous. The product of float32 has three parts in TF32, whose sum is as exact but for a bit or two.
    """
    assert X.is_contiguous()
    assert Y.is_contiguous()
    count, m, k = X.shape
    a, b, c = (number.contiguous() for number in polynomial) if polynomial else (out, out, out)
    half = X.dtype.itemsize < torch.float32.itemsize
    block = 128 if half and m >= 256 else 64
    side = triton.cdiv(m, block)
    grid = side * (side + 1) // 2, count
    _symmetric_kernel[grid](
        *(X, Y, X, out, a, b, c, m, k),
        POLYNOMIAL=polynomial is not None,
        PRECISION=_SINGLE_PRECISION,
        BLOCK=block,
        DEPTH=64 if half else 32,
        num_warps=8 if block == 128 else 4,
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


@_launched_where_it_lies
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
        products.copy_(partial.sum(-1))
    return out


@triton.jit
def _inner_products_kernel(A, B, partial, size, BLOCK: tl.constexpr):
    index = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(A + index * size + element, mask=element < size, other=0.0).to(tl.float32)
    b = tl.load(B + index * size + element, mask=element < size, other=0.0).to(tl.float32)
    _store_products(partial, tl.sum(a * b), tl.sum(b * b))


@_launched_where_it_lies
def inner_products(A: Tensor, B: Tensor) -> Tensor:
    """Return ``⟨A, B⟩`` and ``⟨B, B⟩`` of contiguous (B, m, n), as (2, B) float32; in the same order every time."""
    count, m, n = A.shape
    blocks = triton.cdiv(m * n, _BLOCK)
    partial = torch.empty(2, count, blocks, dtype=torch.float32, device=A.device)
    _inner_products_kernel[blocks, count](A, B, partial, m * n, BLOCK=_BLOCK, num_warps=8)
    return partial.sum(-1)


@triton.jit
def _offsets(position, sizes):
    """Offsets in memory of positions along two dimensions, given the inner size and both strides."""
    inner = tl.load(sizes)
    return (position // inner) * tl.load(sizes + 1) + (position % inner) * tl.load(sizes + 2)


@triton.jit
def _lerp(start, end, rate):
    """As torch.lerp."""
    change = end - start
    return tl.where(rate < 0.5, start + rate * change, end - change * (1 - rate))


# Of a table's entry: an address, rows and columns; then for rows, and for columns, inner size and two strides.
@triton.jit
def _advance_kernel(
    averages,
    gradients,
    rates,
    ahead,
    keep,
    divisors,
    out,
    AVERAGE: tl.constexpr,
    GRADIENT: tl.constexpr,
    WRITES: tl.constexpr,
    TILE: tl.constexpr,
):
    index = tl.program_id(1)
    average, gradient = averages + index * 9, gradients + index * 9
    rows, columns = tl.load(average + 1), tl.load(average + 2)
    across = (columns + TILE - 1) // TILE
    i = (tl.program_id(0) // across) * TILE + tl.arange(0, TILE)
    j = (tl.program_id(0) % across) * TILE + tl.arange(0, TILE)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    mean_at = tl.load(average).to(tl.pointer_type(AVERAGE))
    mean_at += _offsets(i, average + 3)[:, None] + _offsets(j, average + 6)[None, :]
    new_at = tl.load(gradient).to(tl.pointer_type(GRADIENT))
    new_at += _offsets(i, gradient + 3)[:, None] + _offsets(j, gradient + 6)[None, :]
    mean = tl.load(mean_at, mask=inside, other=0.0)
    new = tl.load(new_at, mask=inside, other=0.0).to(AVERAGE)
    new = tl.where(tl.load(keep + index) > 0, new, mean)
    rate = tl.load(rates + index).to(AVERAGE)
    mean = _lerp(mean, new, rate)
    tl.store(mean_at, mean, mask=inside)
    if WRITES:
        found = tl.where(tl.load(ahead + index) > 0, _lerp(mean, new, rate), mean)
        found = (found / tl.load(divisors + index).to(AVERAGE)).to(out.dtype.element_ty)
        slot = out + index.to(tl.int64) * rows * columns
        if rows <= columns:
            tl.store(slot + i[:, None] * columns + j[None, :], found, mask=inside)
        else:
            transposed = (j[:, None] < columns) & (i[None, :] < rows)
            tl.store(slot + j[:, None] * rows + i[None, :], tl.trans(found), mask=transposed)


@_launched_where_it_lies
def advance_averages(
    averages: Sequence[Tensor],
    places: Sequence[Place],
    gradients: Sequence[Tensor],
    gradient_places: Sequence[Place],
    rates: Sequence[float],
    ahead: Sequence[bool],
    keep: Tensor,
    out: Tensor | None,
    divisors: Tensor | None,
) -> None:
    """Take gradients into averages and write what is asked for; tensors of a list have one dtype."""
    numbers = torch.tensor([rates, ahead], dtype=torch.float64).to(keep.device, non_blocking=True)
    _advance_kernel[_tiles(places), len(places)](
        *(_table(averages, places, keep.device), _table(gradients, gradient_places, keep.device)),
        *(numbers[0], numbers[1], keep, keep if divisors is None else divisors, keep if out is None else out),
        AVERAGE=_DTYPES[averages[0].dtype],
        GRADIENT=_DTYPES[gradients[0].dtype],
        WRITES=out is not None,
        TILE=_TILE,
    )


@triton.jit
def _add_kernel(
    weights,
    updates,
    factors,
    decays,
    WEIGHT: tl.constexpr,
    UPDATE: tl.constexpr,
    WORK: tl.constexpr,
    TILE: tl.constexpr,
):
    index = tl.program_id(1)
    weight = weights + index * 9
    rows, columns = tl.load(weight + 1), tl.load(weight + 2)
    across = (columns + TILE - 1) // TILE
    i = (tl.program_id(0) // across) * TILE + tl.arange(0, TILE)
    j = (tl.program_id(0) % across) * TILE + tl.arange(0, TILE)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    at = tl.load(weight).to(tl.pointer_type(WEIGHT))
    at += _offsets(i, weight + 3)[:, None] + _offsets(j, weight + 6)[None, :]
    update_at = tl.load(updates + index).to(tl.pointer_type(UPDATE))
    if rows <= columns:
        update = tl.load(update_at + i[:, None] * columns + j[None, :], mask=inside, other=0.0)
    else:
        transposed = (j[:, None] < columns) & (i[None, :] < rows)
        update = tl.trans(tl.load(update_at + j[:, None] * rows + i[None, :], mask=transposed, other=0.0))
    W = tl.load(at, mask=inside, other=0.0).to(WORK)
    decay, factor = tl.load(decays + index).to(WORK), tl.load(factors + index).to(WORK)
    tl.store(at, (W * (1 - decay) - update.to(WORK) * factor).to(WEIGHT), mask=inside)


@_launched_where_it_lies
def add_updates(
    weights: Sequence[Tensor], places: Sequence[Place], updates: Sequence[Tensor], factors: Tensor, decays: Tensor
) -> None:
    """Subtract ``decay · W + factor · update``; tensors of a list have one dtype."""
    addresses = torch.tensor([update.data_ptr() for update in updates]).to(factors.device, non_blocking=True)
    _add_kernel[_tiles(places), len(places)](
        *(_table(weights, places, factors.device), addresses, factors, decays),
        WEIGHT=_DTYPES[weights[0].dtype],
        UPDATE=_DTYPES[updates[0].dtype],
        WORK=_DTYPES[torch.promote_types(weights[0].dtype, torch.float32)],
        TILE=_TILE,
    )


def _tiles(places: Sequence[Place]) -> int:
    """Return how many tiles the largest matrix has."""
    return max(triton.cdiv(rows, _TILE) * triton.cdiv(columns, _TILE) for rows, columns in {p.shape for p in places})


def _table(tensors: Sequence[Tensor], places: Sequence[Place], device: torch.device) -> Tensor:
    """Return what kernels ask of matrices, nine numbers each, on the device; nothing waits for it."""
    rows = []
    for tensor, place in zip(tensors, places, strict=True):
        (_, inner_rows, _, inner_columns), (s0, s1, s2, s3) = place.sizes, place.strides
        address = tensor.data_ptr() + place.offset * tensor.itemsize
        rows.append([address, *place.shape, inner_rows, s0, s1, inner_columns, s2, s3])
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
