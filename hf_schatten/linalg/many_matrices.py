"""Operations on many matrices at once, wherever they lie in memory: each is one operation to torch's dispatcher.

``torch._foreach_*`` does as much for tensors that are dense, of one dtype, and need no mask. These take slices and
transposes, convert on the way, and leave out what is not finite without waiting for the device. On a GPU each is one
Triton kernel; elsewhere, torch's operations in turn on blocks of matrices that stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from hf_schatten.linalg.accelerated import kernels_of
from hf_schatten.linalg.place import Place, flat, unflattened

# Elements of a block on a CPU: a few of them in float32 fit into the cache of a core. Fresh memory costs more there
# than arithmetic does, so that temporaries are of this size and not of a stack's.
BLOCK = 1 << 18

_AT_MOST_SINGLE = torch.float32, torch.bfloat16, torch.float16


def advance_averages(
    averages: list[Tensor],
    places: list[Place],
    gradients: list[Tensor],
    gradient_places: list[Place],
    rates: list[float],
    ahead: list[bool],
    keep: Tensor,
    out: Tensor | None,
    divisors: Tensor | None,
) -> None:
    """Take gradients into moving averages of B matrices, and write the averages, or what they would be next.

    Args:
        averages: tensors in which the averages lie, B, float32 or float64.
        places: of each (r, c) matrix in its tensor.
        gradients: tensors in which the gradients lie, B, of any floating point dtype.
        gradient_places: the same of the gradients.
        rates: 1 - β of each, B.
        ahead: whether to write what one gradient more would make of the average, B.
        keep: 1 where the gradient is finite, 0 where the average stays as it is, (B,).
        out: (B, m, n), m <= n, for the averages, transposed where r > c; None where they are not wanted.
        divisors: of what is written, (B,).
    """
    kernels = kernels_of(keep.device)
    if kernels is not None and _alike(averages) and _alike(gradients):
        kernels.advance_averages(averages, places, gradients, gradient_places, rates, ahead, keep, out, divisors)
        increment_version(averages)
    else:
        _advance_averages(averages, flat(places), gradients, flat(gradient_places), rates, ahead, keep, out, divisors)


@torch.library.custom_op("hf_schatten::advance_averages", mutates_args=("averages", "out"))
def _advance_averages(
    averages: list[Tensor],
    places: list[int],
    gradients: list[Tensor],
    gradient_places: list[int],
    rates: list[float],
    ahead: list[bool],
    keep: Tensor,
    out: Tensor | None,
    divisors: Tensor | None,
) -> None:
    at, gradients_at = unflattened(places), unflattened(gradient_places)
    kept = None if keep.device.type != "cpu" else keep.tolist()
    for index, (average, place, gradient, gradient_place) in enumerate(
        zip(averages, at, gradients, gradients_at, strict=True)
    ):
        mean, rate = place.view(average), rates[index]
        new = gradient_place.view(gradient).reshape(place.sizes)
        if kept is None:
            new = torch.where(keep[index] > 0, new.to(mean.dtype), mean)
        elif not kept[index]:
            new = mean
        slot = None if out is None else _stored(out[index], place)
        assert out is None or divisors is not None
        for rows in _blocks(mean):
            part, entering = mean[:, rows], new[:, rows].to(mean.dtype)
            part.lerp_(entering, rate)
            if slot is not None and divisors is not None:
                found = part.lerp(entering, rate) if ahead[index] else part.clone()
                slot[:, rows].copy_(found.div_(divisors[index].to(found.dtype)))
        if out is not None and slot is not None and slot.data_ptr() != out[index].data_ptr():
            out[index].copy_(slot.view(place.shape).mT)


def add_updates(
    weights: list[Tensor], places: list[Place], updates: list[Tensor], factors: Tensor, decays: Tensor
) -> None:
    """Subtract ``decay · W + factor · update`` from each of B matrices.

    Args:
        weights: tensors in which the matrices lie, B, of a floating point dtype.
        places: of each (r, c) matrix in its tensor.
        updates: (m, n), m <= n, contiguous, transposed where r > c; of any floating point dtype.
        factors: one for each, (B,).
        decays: one for each, (B,).
    """
    kernels = kernels_of(factors.device)
    if kernels is not None and _alike(weights) and _alike(updates):
        kernels.add_updates(weights, places, updates, factors, decays)
        increment_version(weights)
    else:
        _add_updates(weights, flat(places), updates, factors, decays)


@torch.library.custom_op("hf_schatten::add_updates", mutates_args=("weights",))
def _add_updates(
    weights: list[Tensor], places: list[int], updates: list[Tensor], factors: Tensor, decays: Tensor
) -> None:
    at = unflattened(places)
    on_cpu = factors.device.type == "cpu"
    each_factor = factors.tolist() if on_cpu else factors.unbind()
    each_decay = decays.tolist() if on_cpu else decays.unbind()
    for tensor, place, update, factor, decay in zip(weights, at, updates, each_factor, each_decay, strict=True):
        matrix = place.view(tensor)
        rows, columns = place.shape
        change = update if rows <= columns else update.mT.contiguous()
        change = change.view(place.sizes)
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        for part in _blocks(matrix):
            piece = matrix[:, part]
            step = change[:, part].to(dtype)
            if matrix.dtype != dtype:
                moved = piece.to(dtype)
                piece.copy_(moved.sub_(moved * decay).sub_(step * factor))
            elif on_cpu:
                if decay:
                    piece.mul_(1 - decay)
                piece.add_(step, alpha=-factor)
            else:
                piece.addcmul_(piece, decay, value=-1).addcmul_(step, factor, value=-1)


def largest_magnitudes(tensors: list[Tensor]) -> Tensor:
    """Return the largest magnitude in each of N floating tensors of one device, (N,); not finite where one is not.

    None of them is empty. The result is float32, or float64 where a tensor is.
    """
    kernels = kernels_of(tensors[0].device)
    at_most_single = tensors[0].dtype in _AT_MOST_SINGLE and _alike(tensors)
    if kernels is not None and at_most_single and all(tensor.is_contiguous() for tensor in tensors):
        return kernels.largest_magnitudes(tensors)
    return torch.stack(torch._foreach_norm(tensors, torch.inf))


def inner_products(A: Tensor, B: Tensor) -> Tensor:
    """Return ``⟨A, B⟩`` and ``⟨B, B⟩`` of matrices (B, m, n), as (2, B) of float32 at least, in which it adds up."""
    kernels = kernels_of(A.device)
    if kernels is not None and A.dtype in _AT_MOST_SINGLE:
        return kernels.inner_products(A.contiguous(), B.contiguous())
    return _inner_products(A, B)


@torch.library.custom_op("hf_schatten::inner_products", mutates_args=())
def _inner_products(A: Tensor, B: Tensor) -> Tensor:
    dtype = torch.promote_types(A.dtype, torch.float32)
    found = torch.zeros(2, len(A), dtype=dtype, device=A.device)
    for index, rows in _pieces(A):
        a, b = (matrices[index, rows].flatten(1).to(dtype) for matrices in (A, B))
        found[0, index] += torch.linalg.vecdot(a, b)
        found[1, index] += torch.linalg.vecdot(b, b)
    return found


def weighted_sum(
    first: Tensor,
    others: Tensor,
    weights: Tensor,
    out: Tensor,
    diagonal: Tensor | None = None,
    products: Tensor | None = None,
) -> None:
    """Write a sum of matrices with weights, and a multiple of the identity, into ``out``.

    It is added up in the dtype of the weights and rounded once.

    Args:
        first: (B, m, n).
        others: more of them, (K, B, m, n); contiguous on an accelerator.
        weights: (B, K + 1).
        out: (B, m, n), which may be one of the others.
        diagonal: what the identity is multiplied by, (B,). Default: nothing.
        products: (2, B) zeros, to which ``⟨first, sum⟩`` and ``⟨sum, sum⟩`` are added. Default: not computed.
    """
    kernels = kernels_of(first.device)
    if kernels is not None and weights.dtype == torch.float32:
        kernels.weighted_sum(first.contiguous(), others, weights, out, diagonal, products)
        increment_version([out] if products is None else [out, products])
    else:
        _weighted_sum(first, others, weights, out, diagonal, products)


# Without defaults: torch 2.11 expects everything that may be written to be given.
@torch.library.custom_op("hf_schatten::weighted_sum", mutates_args=("out", "products"))
def _weighted_sum(
    first: Tensor, others: Tensor, weights: Tensor, out: Tensor, diagonal: Tensor | None, products: Tensor | None
) -> None:
    pieces = list(_pieces(first))
    # Fresh memory for each piece would cost more than the arithmetic.
    buffers = weights.new_empty(3, *first[pieces[0]].shape)
    for index, rows in pieces:
        part = first[index, rows]
        start, term, total = buffers[:, : part.shape[0], : part.shape[1]]
        w = weights[index, :, None, None]
        start.copy_(part)
        torch.mul(start, w[:, 0], out=total)
        for number, other in enumerate(others, start=1):
            total.addcmul_(term.copy_(other[index, rows]), w[:, number])
        if diagonal is not None:
            total.diagonal(rows.start, -2, -1).add_(diagonal[index, None])
        if products is not None:
            products[0, index] += start.mul_(total).sum((-2, -1))
            products[1, index] += torch.linalg.vector_norm(total, dim=(-2, -1)).square()
        out[index, rows].copy_(total)


def _pieces(matrices: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices of matrices and of rows that divide (B, m, n) into blocks on a CPU, and everything elsewhere."""
    count, m, n = matrices.shape
    at_once, rows = max(1, BLOCK // (m * n)), max(1, BLOCK // n)
    if matrices.device.type != "cpu":
        at_once, rows = count, m
    for index in range(0, count, at_once):
        for start in range(0, m, rows):
            yield slice(index, index + at_once), slice(start, start + rows)


def _alike(tensors: Sequence[Tensor]) -> bool:
    """Return whether tensors have one dtype, as a kernel's must."""
    return len({tensor.dtype for tensor in tensors}) == 1


def _stored(slot: Tensor, place: Place) -> Tensor:
    """Return where a matrix is written, with four dimensions: the slot (m, n), or a copy where it is transposed."""
    rows, columns = place.shape
    return (slot if rows <= columns else slot.new_empty(rows, columns)).view(place.sizes)


def _blocks(matrix: Tensor) -> Iterator[slice]:
    """Yield slices of the second dimension, of about :data:`BLOCK` elements on a CPU, and everything elsewhere."""
    count = matrix.shape[1]
    if matrix.device.type != "cpu" or not matrix.numel():
        yield slice(0, count)
        return
    size = max(1, BLOCK * count // matrix.numel())
    yield from (slice(*ends) for ends in pairwise([*range(0, count, size), count]))


@_advance_averages.register_fake
def _(*arguments: object) -> None: ...


@_add_updates.register_fake
def _(*arguments: object) -> None: ...


@_inner_products.register_fake
def _(A: Tensor, B: Tensor) -> Tensor:
    return A.new_empty(2, len(A), dtype=torch.promote_types(A.dtype, torch.float32))


@_weighted_sum.register_fake
def _(*arguments: object) -> None: ...
