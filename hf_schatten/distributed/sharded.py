"""Matrices whose parameters are sharded over processes (FSDP version 2): whole on one process, in shards on all.

What cannot be divided further, a parameter or one expert of a stack of them, has an owner, chosen by the cost of its
update. Every process sends its rows of the momentum to the owner and gets its rows of the step back, in rounds of
bounded size: an element crosses the network twice a step, where gathering parameters on every process would move it
once for each process. Momentum and everything else that has the parameter's shape stays sharded as the parameter is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_schatten.distributed.processes import Peers, UnsupportedEngineError
from hf_schatten.distributed.replicated import Steps, assign, take, update_cost
from hf_schatten.optim.matrix import MOMENTUM, Matrix, if_usable


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


class Slab(NamedTuple):
    """Rows of a sharded parameter that are whole on one process, its owner.

    Attributes:
        parameter: the parameter.
        start: the first row: of a stack of experts, the expert.
        rows: how many: all of the parameter's, or one expert.
        matrices: the matrices in question that lie there.
    """

    parameter: Tensor
    start: int
    rows: int
    matrices: list[Matrix]

    @property
    def shape(self) -> torch.Size:
        """The shape of the slab, which is the parameter's but for the number of rows."""
        return torch.Size((self.rows, *self.parameter.shape[1:]))

    def here(self, tensor: Tensor, peers: Peers) -> Tensor:
        """Return those of its rows that this process has, a view; there may be none.

        Args:
            tensor: this process' part of a tensor of the parameter's shape.
            peers: who shares the parameter.
        """
        first = peers.rank * _rows_each(self.parameter, peers.size)
        start = min(max(self.start - first, 0), tensor.shape[0])
        return tensor.narrow(0, start, self.rows_of(peers.rank, peers.size))

    def rows_of(self, rank: int, count: int) -> int:
        """Return how many of its rows a process has, of ``count`` that share the parameter."""
        share = _rows_each(self.parameter, count)
        return max(0, min((rank + 1) * share, self.start + self.rows) - max(rank * share, self.start))

    def numel_of(self, rank: int, count: int) -> int:
        """Return how many elements of it a process has."""
        return self.rows_of(rank, count) * self.shape[1:].numel()


def _rows_each(parameter: Tensor, count: int) -> int:
    """Return how many rows each of ``count`` processes has, the last ones fewer or none."""
    return -(-parameter.shape[0] // count)


_Owned = Sequence[tuple[Slab, int]]  # slabs and their owners, in the same order on every process


def update_sharded(matrices: Iterable[Matrix], steps_of: Steps, buffer_mib: int) -> None:
    """Update matrices of sharded parameters: whole on their owners, and back in shards.

    Args:
        matrices: those that take a step, in the same order on every process.
        steps_of: computes the steps of matrices whose ``average`` is whole.
        buffer_mib: as in :func:`_rounds`.
    """
    for peers, owned in _rounds(matrices, buffer_mib):
        look_ahead = {slab.parameter: _look_ahead(slab.matrices[0]) for slab, _ in owned}
        averages = gather_to_owners(peers, owned, [slab.here(look_ahead[slab.parameter], peers) for slab, _ in owned])
        mine = [slab for slab, owner in owned if owner == peers.rank]
        whole_here = [
            [replace(matrix, average=matrix.of_expert(average)) for matrix in slab.matrices]
            for slab, average in zip(mine, averages, strict=True)
        ]
        steps = steps_of([matrix for of_slab in whole_here for matrix in of_slab])
        joined = [
            _joined(of_slab, steps, torch.empty_like(average))
            for of_slab, average in zip(whole_here, averages, strict=True)
        ]
        rows = scatter_from_owners(peers, owned, joined, owned[0][0].parameter.dtype)
        for (slab, _), step in zip(owned, rows, strict=True):
            slab.matrices[0].apply_to_shard(slab.here(local(slab.parameter), peers), step)


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
            yield from _if_finite(matrix, matrix.gradient)
    sharded = [matrix for matrix in with_gradient if is_sharded(matrix.parameter)]
    for peers, owned in _rounds(sharded, buffer_mib):
        parts = [slab.here(local(slab.parameter.grad), peers) for slab, _ in owned]  # type: ignore[arg-type]
        gradients = gather_to_owners(peers, owned, parts)
        mine = [slab for slab, owner in owned if owner == peers.rank]
        for slab, gradient in zip(mine, gradients, strict=True):
            for matrix in slab.matrices:
                yield from _if_finite(matrix, matrix.of_expert(gradient))


def _if_finite(matrix: Matrix, gradient: Tensor | None) -> Iterator[tuple[Matrix, Tensor]]:
    """Yield a matrix with its gradient (r, c), as (out, in), if that is finite."""
    if gradient is not None and gradient.isfinite().all():
        yield matrix, gradient.mT if matrix.group["transposed"] else gradient


def _rounds(matrices: Iterable[Matrix], buffer_mib: int) -> Iterator[tuple[Peers, _Owned]]:
    """Yield rounds: who shares the parameters, and what of them is whole where.

    What is large comes first; parameters of a round have dtype, device and processes in common.

    Args:
        matrices: in the same order on every process.
        buffer_mib: most memory, in MiB, of what one owner has whole in a round, in float32; a slab that needs more
            travels alone.
    """
    kinds: dict[Any, dict[Tensor, list[Matrix]]] = {}
    for matrix in matrices:
        parameter: Any = matrix.parameter
        kind = parameter.dtype, parameter.device, parameter.device_mesh, parameter.placements
        kinds.setdefault(kind, {}).setdefault(parameter, []).append(matrix)
    for by_parameter in kinds.values():
        parameter, of_parameter = next(iter(by_parameter.items()))
        peers = shards_of(of_parameter[0].parameter_name, parameter)
        slabs = [slab for each, its in by_parameter.items() for slab in _slabs(each, its, peers.size)]
        owners = assign([sum(map(update_cost, slab.matrices)) for slab in slabs], peers.size)
        queues: list[list[Slab]] = [[] for _ in range(peers.size)]
        for slab, owner in sorted(zip(slabs, owners, strict=True), key=lambda pair: -pair[0].shape.numel()):
            queues[owner].append(slab)
        while any(queues):
            taken = [take(queue, (buffer_mib << 20) // 4, lambda slab: slab.shape.numel()) for queue in queues]
            yield peers, [(slab, rank) for rank, of_rank in enumerate(taken) for slab in of_rank]


def _slabs(parameter: Tensor, matrices: Sequence[Matrix], count: int) -> Iterator[Slab]:
    """Yield the slabs of a parameter in which any of these matrices lies: one, or one for each expert.

    Experts of different processes follow one another, so that most are given to the process that has them.
    """
    by_expert: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        by_expert.setdefault(matrix.expert, []).append(matrix)
    if parameter.ndim != 3:
        yield Slab(parameter, 0, parameter.shape[0], by_expert[""])
        return
    share = _rows_each(parameter, count)
    for expert in sorted(map(int, by_expert), key=lambda expert: (expert % share, expert)):
        yield Slab(parameter, expert, 1, by_expert[str(expert)])


def _look_ahead(matrix: Matrix) -> Tensor:
    """Return this process' rows of the average that the parameter's update is made from."""
    momentum = local(matrix.state[MOMENTUM])
    if not matrix.group["nesterov"]:
        return momentum
    assert matrix.usable is not None
    gradient = local(matrix.parameter.grad).to(momentum.dtype)  # type: ignore[arg-type]
    return torch.lerp(momentum, if_usable(matrix.usable, gradient, momentum), 1 - matrix.group["momentum"])


def _joined(matrices: list[Matrix], steps: Mapping[int, Tensor], out: Tensor) -> Tensor:
    """Write the steps of all the matrices of a slab into ``out``, of the slab's shape."""
    for matrix in matrices:
        matrix.write_step(steps[id(matrix)], out)
    return out


def gather_to_owners(peers: Peers, owned: _Owned, parts: Sequence[Tensor]) -> list[Tensor]:
    """Return the whole of something that has the slabs' shapes, for the slabs that this process owns.

    Args:
        peers: who shares the parameters.
        owned: slabs and their owners, in the same order on every process.
        parts: this process' rows of that, of each slab.
    """
    sent: list[list[Tensor]] = [[] for _ in range(peers.size)]
    for (_, owner), part in zip(owned, parts, strict=True):
        sent[owner].append(part.flatten())
    mine = [slab for slab, owner in owned if owner == peers.rank]
    sizes = [sum(part.numel() for part in to_rank) for to_rank in sent]
    shares = [[slab.numel_of(rank, peers.size) for slab in mine] for rank in range(peers.size)]
    expected = list(map(sum, shares))
    received = parts[0].new_empty(sum(expected))
    packed = torch.cat([part for to_rank in sent for part in to_rank])
    dist.all_to_all_single(received, packed, expected, sizes, group=peers.group)
    pieces: list[list[Tensor]] = [[] for _ in mine]
    for block, share in zip(received.split(expected), shares, strict=True):
        for of_slab, piece in zip(pieces, block.split(share), strict=True):
            of_slab.append(piece)
    return [torch.cat(of_slab).view(slab.shape) for slab, of_slab in zip(mine, pieces, strict=True)]


def scatter_from_owners(peers: Peers, owned: _Owned, wholes: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return this process' rows of what the owners have: the way back of :func:`gather_to_owners`.

    Args:
        peers: who shares the parameters.
        owned: slabs and their owners, in the same order on every process.
        wholes: of the slabs that this process owns, in their order.
        dtype: in which they travel.
    """
    mine = [slab for slab, owner in owned if owner == peers.rank]
    ranks = range(peers.size)
    rows = [
        tensor.to(dtype).split([slab.rows_of(rank, peers.size) for rank in ranks])
        for slab, tensor in zip(mine, wholes, strict=True)
    ]
    sent = [of_slab[rank].flatten() for rank in ranks for of_slab in rows]
    sizes = [sum(slab.numel_of(rank, peers.size) for slab in mine) for rank in ranks]
    numbers: list[list[int]] = [[] for _ in ranks]  # of the slabs of each owner
    for number, (_, owner) in enumerate(owned):
        numbers[owner].append(number)
    shares = [[owned[number][0].numel_of(peers.rank, peers.size) for number in of_owner] for of_owner in numbers]
    expected = list(map(sum, shares))
    device = local(owned[0][0].parameter).device
    received = torch.empty(sum(expected), dtype=dtype, device=device)
    packed = torch.cat(sent) if sent else torch.empty(0, dtype=dtype, device=device)
    dist.all_to_all_single(received, packed, expected, sizes, group=peers.group)
    found: dict[int, Tensor] = {}
    for of_owner, block, share in zip(numbers, received.split(expected), shares, strict=True):
        found.update(zip(of_owner, block.split(share), strict=True))
    return [found[number].view(-1, *slab.shape[1:]) for number, (slab, _) in enumerate(owned)]
