"""Triton kernels on matrices that lie anywhere in other tensors, for GPUs: one launch serves all of them.

Each has the meaning of the operation of the same name in :mod:`hf_schatten.linalg.many_matrices`. A table of
addresses, sizes and strides tells where the matrices are. Where all of these are multiples of 16, accesses are wide.
On an H200, narrow ones, with a division of 64 bits for every position, took several times as long.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_schatten.linalg.constants import constant
from hf_schatten.linalg.place import Place
from hf_schatten.linalg.triton_launch import launched_where_it_lies

_BLOCK = 8192  # elements that are looked at together
_TILE = 64  # side of the squares in which matrices are read and written
_ALIGNMENT = tl.constexpr(16)  # of addresses in bytes, and of sizes and strides in elements
_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


# Of a table's entry: an address, rows and columns; then for rows, and for columns, inner size and two strides.
@triton.jit
def _size(entry, number, ALIGNED: tl.constexpr):
    """Number of rows, 1, or columns, 2, in an entry."""
    size = tl.load(entry + number).to(tl.int32)
    if ALIGNED:
        size = tl.multiple_of(size, _ALIGNMENT)
    return size


@triton.jit
def _pointers(entry, i, j, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to the elements of rows i and columns j; ALIGNED, of which `_table` tells, gives wide accesses."""
    start = tl.load(entry).to(tl.pointer_type(TYPE))
    if ALIGNED:
        stride = tl.multiple_of(tl.load(entry + 5), _ALIGNMENT)
        return tl.multiple_of(start, _ALIGNMENT) + i[:, None] * stride + j[None, :]
    return start + _offsets(i, entry + 3)[:, None] + _offsets(j, entry + 6)[None, :]


@triton.jit
def _offsets(position, sizes):
    """Offsets in memory of positions along two dimensions, given the inner size and both strides."""
    inner = tl.load(sizes).to(tl.int32)
    return (position // inner) * tl.load(sizes + 1) + (position % inner) * tl.load(sizes + 2)


@triton.jit
def lerp(start, end, rate):
    """As torch.lerp."""
    change = end - start
    return tl.where(rate < 0.5, start + rate * change, end - change * (1 - rate))


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
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    index = tl.program_id(1)
    average, gradient = averages + index * 9, gradients + index * 9
    rows, columns = _size(average, 1, ALIGNED), _size(average, 2, ALIGNED)
    across = (columns + TILE - 1) // TILE
    i = (tl.program_id(0) // across) * TILE + tl.arange(0, TILE)
    j = (tl.program_id(0) % across) * TILE + tl.arange(0, TILE)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    mean_at = _pointers(average, i, j, AVERAGE, ALIGNED)
    new_at = _pointers(gradient, i, j, GRADIENT, ALIGNED)
    mean = tl.load(mean_at, mask=inside, other=0.0)
    new = tl.load(new_at, mask=inside, other=0.0).to(AVERAGE)
    new = tl.where(tl.load(keep + index) > 0, new, mean)
    rate = tl.load(rates + index).to(AVERAGE)
    mean = lerp(mean, new, rate)
    tl.store(mean_at, mean, mask=inside)
    if WRITES:
        found = tl.where(tl.load(ahead + index) > 0, lerp(mean, new, rate), mean)
        found = (found / tl.load(divisors + index).to(AVERAGE)).to(out.dtype.element_ty)
        slot = tl.multiple_of(out + index.to(tl.int64) * rows * columns, _ALIGNMENT if ALIGNED else 1)
        if rows <= columns:
            tl.store(slot + i[:, None] * columns + j[None, :], found, mask=inside)
        else:
            transposed = (j[:, None] < columns) & (i[None, :] < rows)
            tl.store(slot + j[:, None] * rows + i[None, :], tl.trans(found), mask=transposed)


@launched_where_it_lies
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
    table, aligned = _table(averages, places, keep.device)
    gradient_table, gradients_aligned = _table(gradients, gradient_places, keep.device)
    own_rates, own_ahead = constant((tuple(rates), tuple(ahead)), keep.device)
    _advance_kernel[_tiles(places), len(places)](
        *(table, gradient_table, own_rates, own_ahead, keep),
        *(keep if divisors is None else divisors, keep if out is None else out),
        AVERAGE=_DTYPES[averages[0].dtype],
        GRADIENT=_DTYPES[gradients[0].dtype],
        WRITES=out is not None,
        ALIGNED=aligned and gradients_aligned,
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
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    index = tl.program_id(1)
    weight = weights + index * 9
    rows, columns = _size(weight, 1, ALIGNED), _size(weight, 2, ALIGNED)
    across = (columns + TILE - 1) // TILE
    i = (tl.program_id(0) // across) * TILE + tl.arange(0, TILE)
    j = (tl.program_id(0) % across) * TILE + tl.arange(0, TILE)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    at = _pointers(weight, i, j, WEIGHT, ALIGNED)
    update_at = tl.multiple_of(tl.load(updates + index).to(tl.pointer_type(UPDATE)), _ALIGNMENT if ALIGNED else 1)
    if rows <= columns:
        update = tl.load(update_at + i[:, None] * columns + j[None, :], mask=inside, other=0.0)
    else:
        transposed = (j[:, None] < columns) & (i[None, :] < rows)
        update = tl.trans(tl.load(update_at + j[:, None] * rows + i[None, :], mask=transposed, other=0.0))
    W = tl.load(at, mask=inside, other=0.0).to(WORK)
    decay, factor = tl.load(decays + index).to(WORK), tl.load(factors + index).to(WORK)
    tl.store(at, (W * (1 - decay) - update.to(WORK) * factor).to(WEIGHT), mask=inside)


@launched_where_it_lies
def add_updates(
    weights: Sequence[Tensor], places: Sequence[Place], updates: Sequence[Tensor], factors: Tensor, decays: Tensor
) -> None:
    """Subtract ``decay · W + factor · update``; tensors of a list have one dtype."""
    addresses = torch.tensor([update.data_ptr() for update in updates]).to(factors.device, non_blocking=True)
    table, aligned = _table(weights, places, factors.device)
    _add_kernel[_tiles(places), len(places)](
        *(table, addresses, factors, decays),
        WEIGHT=_DTYPES[weights[0].dtype],
        UPDATE=_DTYPES[updates[0].dtype],
        WORK=_DTYPES[torch.promote_types(weights[0].dtype, torch.float32)],
        ALIGNED=aligned,
        TILE=_TILE,
    )


@triton.jit
def _magnitude_kernel(
    addresses,
    sizes,
    tensors,
    starts,
    found,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    tensor = tl.load(tensors + block)
    start, size = tl.load(starts + block), tl.load(sizes + tensor)
    address = tl.load(addresses + tensor).to(tl.pointer_type(TYPE))
    if ALIGNED:
        start, size = tl.multiple_of(start, _ALIGNMENT), tl.multiple_of(size, _ALIGNMENT)
        address = tl.multiple_of(address, _ALIGNMENT)
    at = start + tl.arange(0, BLOCK)
    x = tl.abs(tl.load(address + at, mask=at < size, other=0.0).to(tl.float32))
    tl.store(found + block, tl.max(tl.where(x >= 0, x, float("inf"))))  # NaN is not


@triton.jit
def _largest_kernel(magnitudes, ends, found, BLOCK: tl.constexpr):
    tensor = tl.program_id(0)
    end = tl.load(ends + tensor + 1)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(tl.load(ends + tensor), end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(magnitudes + at, mask=at < end, other=0.0))
    tl.store(found + tensor, tl.max(largest))


@launched_where_it_lies
def largest_magnitudes(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest magnitude in each of N contiguous tensors of one dtype, inf for NaN: (N,) float32."""
    device = tensors[0].device
    addresses = constant(tuple(tensor.data_ptr() for tensor in tensors), device, torch.int64)
    sizes, of_blocks, starts, ends, count = _blocks_of(tuple(tensor.numel() for tensor in tensors), device)
    magnitudes, found = (torch.empty(number, device=device, dtype=torch.float32) for number in (count, len(tensors)))
    _magnitude_kernel[(count,)](
        *(addresses, sizes, of_blocks, starts, magnitudes),
        TYPE=_DTYPES[tensors[0].dtype],
        ALIGNED=not any(number % _ALIGNMENT.value for each in tensors for number in (each.data_ptr(), each.numel())),
        BLOCK=_BLOCK,
    )
    _largest_kernel[(len(tensors),)](magnitudes, ends, found, BLOCK=1024)
    return found


@functools.lru_cache(maxsize=64)
def _blocks_of(sizes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Return sizes of tensors; tensor and start of each of their blocks; where the blocks of each end; how many."""
    counts = torch.tensor([triton.cdiv(size, _BLOCK) for size in sizes])
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    of_blocks = torch.arange(len(sizes)).repeat_interleave(counts)
    starts = (torch.arange(len(of_blocks)) - ends[of_blocks]) * _BLOCK
    columns = (each.to(device, non_blocking=True) for each in (torch.tensor(sizes), of_blocks, starts, ends))
    return *columns, len(of_blocks)  # type: ignore[return-value]


def _tiles(places: Sequence[Place]) -> int:
    """Return how many tiles the largest matrix has."""
    return max(triton.cdiv(rows, _TILE) * triton.cdiv(columns, _TILE) for rows, columns in {p.shape for p in places})


def _table(tensors: Sequence[Tensor], places: Sequence[Place], device: torch.device) -> tuple[Tensor, bool]:
    """Return what kernels ask of matrices, nine numbers each, on the device, and whether wide accesses are possible.

    Nothing waits for the device.
    """
    addresses = [each.data_ptr() + place.offset * each.itemsize for each, place in zip(tensors, places, strict=True)]
    return _table_of(tuple(addresses), tuple(places), device)


@functools.lru_cache(maxsize=256)  # weights and averages stay where they are, and gradients mostly
def _table_of(addresses: Sequence[int], places: Sequence[Place], device: torch.device) -> tuple[Tensor, bool]:
    entries = []
    for address, place in zip(addresses, places, strict=True):
        (_, inner_rows, _, inner_columns), (s0, s1, s2, s3) = place.sizes, place.strides
        entries.append([address, *place.shape, inner_rows, s0, s1, inner_columns, s2, s3])
    aligned = all(
        place.sizes[::2] == (1, 1)
        and place.strides[3] == 1
        and not any(number % _ALIGNMENT.value for number in (address, *place.shape, place.strides[1]))
        for address, place in zip(addresses, places, strict=True)
    )
    return torch.tensor(entries, dtype=torch.int64).to(device, non_blocking=True), aligned
