"""What a process has of a parameter that several share: rows, columns, or a stretch of its elements.

A piece is a product of spans, some for each dimension: one where a dimension is cut once, several where a fused
projection is cut in each of its parts. A flat stretch, as DeepSpeed ZeRO cuts parameters, is a span of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from hf_schatten.distributed.processes import ALONE, Peers, process_count
from hf_schatten.matrices.engines import UnsupportedEngineError
from hf_schatten.private_api import tensor_without_elements

Spans = tuple[tuple[int, int], ...]  # [start, stop), in the order in which they lie in a piece
Box = tuple[tuple[slice, ...], tuple[slice, ...]]  # where a part of a piece lies in the whole, and in the piece


class Pieces(NamedTuple):
    """What each of the processes that share a parameter has of it."""

    peers: Peers
    shape: tuple[int, ...]  # in which it is cut: the parameter's, or that of a vector of its elements
    spans: tuple[tuple[Spans, ...], ...]  # of each process, of each dimension

    def boxes(self, rank: int, start: int, stop: int) -> Iterator[Box]:
        """Yield the parts of a process' piece that lie between two indices of the first dimension, none of them empty.

        Where each lies in the whole is counted from ``start``.
        """
        first, *others = (list(_placed(spans)) for spans in self.spans[rank])
        within = [
            (max(begin, start) - start, min(end, stop) - start, at + max(begin, start) - begin)
            for begin, end, at in first
            if max(begin, start) < min(end, stop)
        ]
        for sides in product(within, *others):
            yield (
                tuple(slice(begin, end) for begin, end, _ in sides),
                tuple(slice(at, at + end - begin) for begin, end, at in sides),
            )

    def numel(self, rank: int, start: int, stop: int) -> int:
        """Return how many elements these parts have together."""
        first, *others = self.spans[rank]
        rows = sum(max(0, min(end, stop) - max(begin, start)) for begin, end in first)
        return rows * math.prod(sum(end - begin for begin, end in spans) for spans in others)


class Partitioned(Tensor):
    """A parameter, or a tensor of its shape, of which this process has a stretch of the elements, and no more.

    It has the whole's shape and dtype, and no elements of its own: only ``pieces`` and ``piece``, a vector.
    """

    pieces: Pieces
    piece: Tensor
    _gradient: Tensor | None = None

    @staticmethod
    def __new__(cls, shape: Sequence[int], piece: Tensor, pieces: Pieces) -> Partitioned:
        """Return a tensor of a shape, given this process' piece of it."""
        made: Partitioned = tensor_without_elements(cls, shape, piece)
        made.piece, made.pieces = piece, pieces
        return made

    @property
    def grad(self) -> Tensor | None:
        """The gradient, cut alike, of any dtype."""
        return self._gradient

    @grad.setter
    def grad(self, gradient: Tensor | None) -> None:
        self._gradient = gradient

    def of(self, piece: Tensor) -> Partitioned:
        """Return another tensor of the same shape, cut alike."""
        return Partitioned(self.shape, piece, self.pieces)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Make zeros that are cut alike; refuse every other operation, for the elements are elsewhere."""
        if func is torch.ops.aten.zeros_like.default:
            return args[0].of(torch.zeros_like(args[0].piece, dtype=(kwargs or {}).get("dtype")))
        raise TypeError(f"{func} needs all elements of a parameter of which this process has a part.")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Partitioned(shape={tuple(self.shape)}, here={self.piece.numel()})"


def is_sharded(parameter: Tensor) -> bool:
    """Return whether a process may have a piece of the parameter only."""
    return isinstance(parameter, (DTensor, Partitioned))


def local(tensor: Tensor) -> Tensor:
    """Return this process' piece of a tensor, which shares its storage; the tensor itself where it is not sharded."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor.piece if isinstance(tensor, Partitioned) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """Return a whole tensor, the same on every process, sharded as a reference of its shape."""
    if not isinstance(reference, DTensor):
        return tensor
    pieces = pieces_of("", reference)
    piece = local(torch.empty_like(reference, dtype=tensor.dtype))
    for of_whole, of_piece in pieces.boxes(pieces.peers.rank, 0, pieces.shape[0]):
        piece[of_piece] = tensor[of_whole]
    return DTensor.from_local(
        piece, reference.device_mesh, reference.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def shared_alike(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of a parameter, sharded as that is: of a whole parameter it may be a sum that is due."""
    if not (isinstance(parameter, DTensor) and isinstance(gradient, DTensor)):
        return gradient
    if gradient.placements != parameter.placements:
        gradient = parameter.grad = gradient.redistribute(placements=parameter.placements)
    return gradient


def pieces_of(name: str, parameter: Tensor) -> Pieces:
    """Return what the processes that share a parameter have of it; copies of it (HSDP) are others' to share.

    Raises:
        UnsupportedEngineError: when it is sharded in a way that is not known.
    """
    if isinstance(parameter, Partitioned):
        return parameter.pieces
    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    cut = tuple(number for number, placement in enumerate(placements) if not isinstance(placement, Replicate))
    across = len(cut) > 1 and mesh.size() != process_count()
    if across or any(_dimension(placements[number]) is None for number in cut):
        raise UnsupportedEngineError(
            f"schatten_p supports parameters that are sharded or replicated on a mesh of all processes, and {name!r} "
            f"has the placements {placements} on {mesh}. Use FSDP version 2, DDP or tensor parallelism, or "
            "optim='adamw_torch'."
        )
    sizes = tuple(mesh.size(number) for number in cut)
    spans = _all_spans(tuple(parameter.shape), tuple(placements[number] for number in cut), sizes)
    pieces = Pieces(_peers(mesh, cut), tuple(parameter.shape), spans)
    if pieces.numel(pieces.peers.rank, 0, parameter.shape[0]) != parameter.to_local().numel():
        raise UnsupportedEngineError(
            f"{name!r} of shape {tuple(parameter.shape)} has the placements {placements}, and not the elements here "
            "that these stand for. Use FSDP version 2 or DDP, or optim='adamw_torch'."
        )
    return pieces


def gathered_features(parameter: Tensor, rows: Tensor, dim: int) -> Tensor:
    """Return rows (T, features) with all features along a dimension of a parameter, where each process has some.

    Rows that are whole are returned as they are. Every process of those that cut the dimension for tensor parallelism,
    which come last in the mesh, must call it with the same rows.

    Raises:
        UnsupportedEngineError: when the features are others than the parameter's here.
    """
    size = parameter.shape[dim]
    if rows.shape[1] == size or not isinstance(parameter, DTensor):
        return rows
    mesh, placements = parameter.device_mesh, parameter.placements
    cut = [n for n, each in enumerate(placements) if _dimension(each) in (dim, dim - parameter.ndim)]
    if not cut:
        return rows
    count, parts = mesh.size(cut[-1]), getattr(placements[cut[-1]], "split_factor", 1)
    spans = [chunk(((0, size),), parts, count, number) for number in range(count)]
    widths = [sum(end - begin for begin, end in each) for each in spans]
    if widths[mesh.get_local_rank(cut[-1])] != rows.shape[1]:
        raise UnsupportedEngineError(
            f"A layer whose weight has the shape {tuple(parameter.shape)} and the placements {placements} has seen "
            f"{rows.shape[1]} of {size} features, and no dimension of its mesh cuts them so: give p a number."
        )
    received = [rows.new_empty(len(rows), width) for width in widths]
    dist.all_gather(received, rows.contiguous(), group=mesh.get_group(cut[-1]))
    found = rows.new_empty(len(rows), size)
    for each, block in zip(spans, received, strict=True):
        for begin, end, at in _placed(each):
            found[:, begin:end] = block[:, at : at + end - begin]
    return found


def experts_here(stack: Tensor) -> range:
    """Return the numbers of the experts of a stack (E, …) that a process computes with: expert parallelism cuts it."""
    if isinstance(stack, DTensor) and "ep" in (stack.device_mesh.mesh_dim_names or ()):
        mesh = stack.device_mesh["ep"]
        ((start, stop),) = chunk(((0, stack.shape[0]),), 1, mesh.size(), mesh.get_local_rank())
        return range(start, stop)
    return range(stack.shape[0])


def _placed(spans: Spans) -> Iterator[tuple[int, int, int]]:
    """Yield spans with where each starts in the piece."""
    starts = accumulate((end - begin for begin, end in spans), initial=0)
    return ((begin, end, at) for (begin, end), at in zip(spans, starts, strict=False))


def _dimension(placement: Any) -> int | None:
    """Return the dimension that a placement cuts, None where it does another thing."""
    known = isinstance(placement, Shard) or hasattr(placement, "split_factor")
    return placement.dim if known else None


@lru_cache(maxsize=1024)
def _all_spans(shape: tuple[int, ...], placements: tuple[Any, ...], sizes: tuple[int, ...]) -> tuple[Any, ...]:
    """Return the spans of each dimension that each process has, in the order of its coordinates along cut dimensions.

    What cuts rows that another dimension of the mesh cuts, as FSDP those of tensor parallelism, comes first in the
    mesh and cuts last: torch marks it as strided.
    """
    dims = [placement.dim % len(shape) for placement in placements]
    last = [
        hasattr(placement, "split_factor") and dims[number] in dims[number + 1 :]
        for number, placement in enumerate(placements)
    ]
    found, order = [], range(len(sizes))
    for coordinate in product(*map(range, sizes)):
        spans: list[Spans] = [((0, size),) for size in shape]
        for number in (*(n for n in order if not last[n]), *(n for n in reversed(order) if last[n])):
            parts = 1 if last[number] else getattr(placements[number], "split_factor", 1)
            spans[dims[number]] = chunk(spans[dims[number]], parts, sizes[number], coordinate[number])
        found.append(tuple(spans))
    return tuple(found)


def chunk(spans: Spans, parts: int, count: int, number: int) -> Spans:
    """Return one of ``count`` chunks of spans, as torch.chunk cuts; where there are several parts, of each of them."""
    if parts > 1:
        return tuple(s for part in range(parts) for s in chunk(chunk(spans, 1, parts, part), 1, count, number))
    total = sum(end - begin for begin, end in spans)
    each = -(-total // count)
    low, high = min(number * each, total), min((number + 1) * each, total)
    found = []
    for begin, end, at in _placed(spans):
        start, stop = max(low, at), min(high, at + end - begin)
        if start < stop:
            found.append((begin + start - at, begin + stop - at))
    return tuple(found)


def _peers(mesh: Any, cut: tuple[int, ...]) -> Peers:
    """Return the processes along the cut dimensions of a mesh, in the order of their coordinates there."""
    if not cut:
        return ALONE
    if len(cut) == 1:
        return Peers(mesh.get_group(cut[0]), mesh.size(cut[0]), mesh.get_local_rank(cut[0]))
    others = [number for number in range(mesh.ndim) if number not in cut]
    size = math.prod(mesh.size(number) for number in cut)
    rows = tuple(map(tuple, mesh.mesh.permute(*others, *cut).reshape(-1, size).tolist()))
    mine = next(row for row in rows if dist.get_rank() in row)
    return Peers(_group_of(dist.group.WORLD, rows), size, mine.index(dist.get_rank()))


@lru_cache(maxsize=64)
def _group_of(world: Any, rows: tuple[tuple[int, ...], ...]) -> Any:
    """Return this process' group, given the ranks of all; the first time, all processes must call it."""
    if rows == (tuple(range(process_count())),):
        return world
    return dist.new_subgroups_by_enumeration([list(row) for row in rows])[0]
