"""Matrices whose parameters are sharded over processes (FSDP version 2): whole on one process, in shards on all.

Each parameter has an owner, chosen by the cost of its update. Every process sends its shard of the momentum to the
owner and gets its shard of the step back, in rounds of bounded size: a parameter's elements cross the network twice a
step, where gathering it on every process would move them once for each process. Momentum and everything else that has
the parameter's shape stays sharded as the parameter is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from .distributed import Peers, UnsupportedEngineError
from .matrix import MOMENTUM, Matrix, if_usable, layout_of
from .work_sharing import Steps, assign, take, update_cost


def local(tensor: Tensor) -> Tensor:
    """Return this process' part of a tensor, which shares its storage; the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """Return a whole tensor, the same on every process, sharded as a reference of its shape is."""
    if not isinstance(reference, DTensor):
        return tensor
    return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)


def is_sharded(parameter: Tensor) -> bool:
    """Return whether a process has rows of the parameter only."""
    return isinstance(parameter, DTensor)


def shards_of(name: str, parameter: Tensor) -> Peers:
    """Return the processes that share a parameter, also where copies of them exist (HSDP).

    Raises:
        UnsupportedEngineError: when the parameter is sharded in another way than FSDP's, as by tensor parallelism.
    """
    assert isinstance(parameter, DTensor)
    by_rows = [number for number, placement in enumerate(parameter.placements) if type(placement) is Shard]
    known = all(type(placement) in (Shard, Replicate) for placement in parameter.placements)
    if not known or len(by_rows) != 1 or parameter.placements[by_rows[0]] != Shard(0):
        raise UnsupportedEngineError(
            f"schatten_p supports parameters that FSDP version 2 shards by rows, and {name!r} has the placements "
            f"{parameter.placements}, as under tensor parallelism. Use FSDP version 2 or DDP without it, or "
            "optim='adamw_torch' with this engine."
        )
    mesh = parameter.device_mesh
    return Peers(mesh.get_group(by_rows[0]), mesh.size(by_rows[0]), mesh.get_local_rank(by_rows[0]))


def update_sharded(matrices: Iterable[Matrix], steps_of: Steps, buffer_mib: int) -> None:
    """Update matrices of sharded parameters: whole on the owner of each parameter, and back in shards.

    Args:
        matrices: those that take a step, in the same order on every process.
        steps_of: computes the steps of matrices whose ``average`` is whole.
        buffer_mib: as in :func:`_rounds`.
    """
    for peers, by_parameter, owned in _rounds(matrices, buffer_mib):
        averages = gather_to_owners(peers, owned, [_look_ahead(by_parameter[parameter][0]) for parameter, _ in owned])
        mine = [parameter for parameter, owner in owned if owner == peers.rank]
        here = {
            parameter: [replace(matrix, average=average) for matrix in by_parameter[parameter]]
            for parameter, average in zip(mine, averages, strict=True)
        }
        steps = steps_of([matrix for of_parameter in here.values() for matrix in of_parameter])
        wholes = [_joined(here[parameter], steps) for parameter in mine]
        rows = scatter_from_owners(peers, owned, wholes, owned[0][0].dtype)
        for (parameter, _), step in zip(owned, rows, strict=True):
            by_parameter[parameter][0].apply_to_shard(local(parameter), step)


def owned_gradients(matrices: Iterable[Matrix], buffer_mib: int) -> Iterator[tuple[Matrix, Tensor]]:
    """Yield those matrices that this process owns with their whole gradients, (out, in); of what is not sharded, all.

    Every process must exhaust it. A matrix without a gradient, or with one that is not finite, is left out.

    Args:
        matrices: in the same order on every process.
        buffer_mib: as in :func:`_rounds`.
    """
    with_gradient = [matrix for matrix in matrices if matrix.parameter.grad is not None]
    for matrix in with_gradient:
        if not is_sharded(matrix.parameter):
            yield from _finite_gradients([matrix], matrix.parameter.grad)  # type: ignore[arg-type]
    sharded = [matrix for matrix in with_gradient if is_sharded(matrix.parameter)]
    for peers, by_parameter, owned in _rounds(sharded, buffer_mib):
        parts = [local(parameter.grad) for parameter, _ in owned]  # type: ignore[arg-type]
        gradients = gather_to_owners(peers, owned, parts)
        mine = [parameter for parameter, owner in owned if owner == peers.rank]
        for parameter, gradient in zip(mine, gradients, strict=True):
            yield from _finite_gradients(by_parameter[parameter], gradient)


def _finite_gradients(matrices: Iterable[Matrix], gradient: Tensor) -> Iterator[tuple[Matrix, Tensor]]:
    """Yield matrices of one parameter with their parts of its gradient, (out, in), that are finite."""
    for matrix in matrices:
        own = layout_of(matrix.group).matrix(gradient, matrix.index)
        if own.isfinite().all():
            yield matrix, own.mT if matrix.group["transposed"] else own


def _rounds(
    matrices: Iterable[Matrix], buffer_mib: int
) -> Iterator[tuple[Peers, dict[Tensor, list[Matrix]], list[tuple[Tensor, int]]]]:
    """Yield rounds: who shares the parameters, the matrices of each, and the parameters with their owners.

    Large parameters come first; those of a round have dtype, device and processes in common.

    Args:
        matrices: in the same order on every process.
        buffer_mib: most memory, in MiB, of the whole parameters of one owner in a round, in float32; a parameter that
            needs more travels alone.
    """
    kinds: dict[Any, dict[Tensor, list[Matrix]]] = {}
    for matrix in matrices:
        parameter: Any = matrix.parameter
        kind = parameter.dtype, parameter.device, parameter.device_mesh, parameter.placements
        kinds.setdefault(kind, {}).setdefault(parameter, []).append(matrix)
    for by_parameter in kinds.values():
        parameters = list(by_parameter)
        peers = shards_of(by_parameter[parameters[0]][0].parameter_name, parameters[0])
        owners = assign([sum(map(update_cost, by_parameter[each])) for each in parameters], peers.size)
        queues: list[list[Tensor]] = [[] for _ in range(peers.size)]
        for each, owner in sorted(zip(parameters, owners, strict=True), key=lambda pair: -pair[0].numel()):
            queues[owner].append(each)
        while any(queues):
            taken = [take(queue, (buffer_mib << 20) // 4, _elements) for queue in queues]
            yield peers, by_parameter, [(each, rank) for rank, of_rank in enumerate(taken) for each in of_rank]


def _elements(parameters: Sequence[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _look_ahead(matrix: Matrix) -> Tensor:
    """Return this process' rows of the average that the parameter's update is made from."""
    momentum = local(matrix.state[MOMENTUM])
    if not matrix.group["nesterov"]:
        return momentum
    assert matrix.usable is not None
    gradient = local(matrix.parameter.grad).to(momentum.dtype)  # type: ignore[arg-type]
    return torch.lerp(momentum, if_usable(matrix.usable, gradient, momentum), 1 - matrix.group["momentum"])


def _joined(matrices: list[Matrix], steps: Mapping[int, Tensor]) -> Tensor:
    """Return the step of a whole parameter from those of its matrices."""
    joined = torch.empty_like(matrices[0].average)  # type: ignore[arg-type]
    for matrix in matrices:
        matrix.write_step(steps[id(matrix)], joined)
    return joined


def gather_to_owners(peers: Peers, owned: Sequence[tuple[Tensor, int]], parts: Sequence[Tensor]) -> list[Tensor]:
    """Return the whole of something that has the parameters' shapes, for the parameters that this process owns.

    Args:
        peers: who shares the parameters.
        owned: parameters and their owners, in the same order on every process.
        parts: this process' rows of that, of each parameter.
    """
    sent = [
        part.flatten()
        for rank in range(peers.size)
        for part, (_, owner) in zip(parts, owned, strict=True)
        if owner == rank
    ]
    mine = [parameter for parameter, owner in owned if owner == peers.rank]
    sizes = [
        sum(_numel(p, peers.size, peers.rank) for p, owner in owned if owner == rank) for rank in range(peers.size)
    ]
    expected = [sum(_numel(p, peers.size, rank) for p in mine) for rank in range(peers.size)]
    received = parts[0].new_empty(sum(expected))
    dist.all_to_all_single(received, torch.cat(sent), expected, sizes, group=peers.group)
    pieces: list[list[Tensor]] = [[] for _ in mine]
    for rank, block in enumerate(received.split(expected)):
        for of_parameter, piece in zip(pieces, block.split([_numel(p, peers.size, rank) for p in mine]), strict=True):
            of_parameter.append(piece)
    return [torch.cat(of_parameter).view(p.shape) for p, of_parameter in zip(mine, pieces, strict=True)]


def scatter_from_owners(
    peers: Peers, owned: Sequence[tuple[Tensor, int]], wholes: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Return this process' rows of what the owners have: the way back of :func:`gather_to_owners`.

    Args:
        peers: who shares the parameters.
        owned: parameters and their owners, in the same order on every process.
        wholes: of the parameters that this process owns, in their order.
        dtype: in which they travel.
    """
    mine = [parameter for parameter, owner in owned if owner == peers.rank]
    rows = [tensor.to(dtype).split(_rows(p, peers.size)) for p, tensor in zip(mine, wholes, strict=True)]
    sent = [of_parameter[rank].flatten() for rank in range(peers.size) for of_parameter in rows]
    sizes = [sum(_numel(p, peers.size, rank) for p in mine) for rank in range(peers.size)]
    expected = [
        sum(_numel(p, peers.size, peers.rank) for p, owner in owned if owner == rank) for rank in range(peers.size)
    ]
    device = local(owned[0][0]).device
    received = torch.empty(sum(expected), dtype=dtype, device=device)
    packed = torch.cat(sent) if sent else torch.empty(0, dtype=dtype, device=device)
    dist.all_to_all_single(received, packed, expected, sizes, group=peers.group)
    parts: list[Tensor | None] = [None] * len(owned)
    for rank, block in enumerate(received.split(expected)):
        numbers = [number for number, (_, owner) in enumerate(owned) if owner == rank]
        pieces = block.split([_numel(owned[number][0], peers.size, peers.rank) for number in numbers])
        for number, piece in zip(numbers, pieces, strict=True):
            parts[number] = piece.view(local(owned[number][0]).shape)
    return [part for part in parts if part is not None]


def _rows(parameter: Tensor, count: int) -> list[int]:
    """Return how many rows each process has: as many as the others, and the last ones fewer or none."""
    rows = parameter.shape[0]
    share = -(-rows // count)
    return [max(0, min(share, rows - rank * share)) for rank in range(count)]


def _numel(parameter: Tensor, count: int, rank: int) -> int:
    return _rows(parameter, count)[rank] * (parameter.numel() // parameter.shape[0])
