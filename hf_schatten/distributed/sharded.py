"""Weights that are sharded over processes (FSDP version 2): whole on one process, in shards on all.

What cannot be divided further, a parameter or one expert of a stack of them, has an owner, chosen by the cost of its
update. Every process sends its rows of the momentum to the owner and gets its rows of the update back, in rounds of
bounded size: an element crosses the network twice a step, where gathering parameters on every process would move it
once for each process. Momentum and everything else that has the parameter's shape stays sharded as the parameter is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_schatten.distributed.owners import BUFFER, Compute, Delivered, Delivery, Item, assign, take
from hf_schatten.distributed.processes import Peers
from hf_schatten.linalg.place import Place
from hf_schatten.matrices.engines import UnsupportedEngineError


def local(tensor: Tensor) -> Tensor:
    """Return this process' part of a tensor, which shares its storage; the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """Return a whole tensor, the same on every process, sharded as a reference of its shape."""
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


def expanded(parameter: Tensor, of_rows: Sequence[Tensor]) -> list[Tensor]:
    """Return flags of all experts of a sharded stack, given those of this process' experts; one flag stays one."""
    if parameter.ndim != 3:
        return list(of_rows)
    peers, flag = shards_of("", parameter), of_rows[0]
    here, first = local(parameter).shape[0], peers.rank * _rows_each(parameter, peers.size)
    flags = [torch.ones_like(flag)] * parameter.shape[0]
    flags[first : first + here] = of_rows[:here]
    return flags


class Slab(NamedTuple):
    """Rows of a sharded parameter that are whole on one process, its owner."""

    parameter: Tensor
    start: int  # the first row: of a stack of experts, the expert
    rows: int  # all of the parameter's, or one expert
    items: list[Item]  # those in question that lie there

    @property
    def shape(self) -> torch.Size:
        """The shape of the slab, which is the parameter's but for the number of rows."""
        return torch.Size((self.rows, *self.parameter.shape[1:]))

    def here(self, tensor: Tensor, peers: Peers) -> Tensor:
        """Return those of its rows that this process has, a view of its part of a tensor; there may be none."""
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


class Sharded(Delivery):
    """Updates of sharded weights, each computed by the process that owns it."""

    def __init__(self, items: Sequence[Item], work_of: Callable[[Sequence[Item]], Any]) -> None:
        super().__init__(items, work_of)
        self.elsewhere = list(items)  # what the owner computes with is gathered from all

    def shares(self) -> list[Sequence[Item]]:
        """Return the items of each round that this process owns."""
        self.rounds = list(_rounds(self.items))
        return [[item for slab in _owned_by(peers.rank, owned) for item in slab.items] for peers, owned in self.rounds]

    def deliver(self, compute: Compute, momenta: Any) -> Iterator[Delivered]:
        """Yield the updates of this process' rows."""
        for (peers, owned), work in zip(self.rounds, self.work, strict=True):
            rows = {slab.parameter: momenta.of_shard(slab.items[0]) for slab, _ in owned}
            wholes = gather_to_owners(peers, owned, [slab.here(rows[slab.parameter], peers) for slab, _ in owned])
            del rows
            mine = _owned_by(peers.rank, owned)
            whole_of = {id(item): whole for slab, whole in zip(mine, wholes, strict=True) for item in slab.items}

            def write(items: Sequence[Item], out: Tensor, whole_of: Mapping[int, Tensor] = whole_of) -> None:
                for item, slot, divisor in zip(items, out, momenta.divisors(items), strict=True):
                    average = item.of_expert(whole_of[id(item)])
                    item.stored(slot).copy_(average / divisor.to(average.dtype))

            updates = {id(item): update for each in compute(work, write) for item, update in each.scaled()}
            joined = [
                _joined(slab.items, updates, torch.empty_like(whole)) for slab, whole in zip(mine, wholes, strict=True)
            ]
            arrived = scatter_from_owners(peers, owned, joined, owned[0][0].parameter.dtype)
            weights = [slab.here(local(slab.parameter), peers) for slab, _ in owned]
            yield Delivered(
                [slab.items[0] for slab, _ in owned],
                weights,
                [Place.of(part.view(1, -1), 1, part) for part in weights],
                [update.view(1, -1) for update in arrived],
                torch.ones(len(owned), device=arrived[0].device),
            )


def on_owners(items: Iterable[Item], tensor_of: Callable[[Item], Tensor]) -> Iterator[tuple[Item, Tensor]]:
    """Yield those items that this process owns with something whole, (r, c) as stored; of what is not sharded, all.

    Every process must exhaust it, with items in the same order. ``tensor_of`` an item has the shape of its parameter
    and is sharded as that is.
    """
    sharded: list[Item] = []
    for item in items:
        if is_sharded(item.parameter):
            sharded.append(item)
        else:
            yield item, item.of(tensor_of(item))
    for peers, owned in _rounds(sharded):
        parts = [slab.here(local(tensor_of(slab.items[0])), peers) for slab, _ in owned]
        wholes = gather_to_owners(peers, owned, parts)
        for slab, whole in zip(_owned_by(peers.rank, owned), wholes, strict=True):
            for item in slab.items:
                yield item, item.of_expert(whole)


def _owned_by(rank: int, owned: _Owned) -> list[Slab]:
    return [slab for slab, owner in owned if owner == rank]


def _rounds(items: Iterable[Item]) -> Iterator[tuple[Peers, _Owned]]:
    """Yield rounds: who shares the parameters, and what of them is whole where.

    What is large comes first; parameters of a round have dtype, device and processes in common. What one owner has
    whole in a round takes :data:`BUFFER` in float32 at most; a slab that needs more travels alone.
    """
    kinds: dict[Any, dict[Tensor, list[Item]]] = {}
    for item in items:
        parameter: Any = item.parameter
        kind = parameter.dtype, parameter.device, parameter.device_mesh, parameter.placements
        kinds.setdefault(kind, {}).setdefault(parameter, []).append(item)
    for by_parameter in kinds.values():
        parameter, of_parameter = next(iter(by_parameter.items()))
        peers = shards_of(of_parameter[0].parameter_name, parameter)
        slabs = [slab for each, its in by_parameter.items() for slab in _slabs(each, its, peers.size)]
        owners = assign([sum(item.cost for item in slab.items) for slab in slabs], peers.size)
        queues: list[list[Slab]] = [[] for _ in range(peers.size)]
        for slab, owner in sorted(zip(slabs, owners, strict=True), key=lambda pair: -pair[0].shape.numel()):
            queues[owner].append(slab)
        while any(queues):
            taken = [take(queue, BUFFER // 4, lambda slab: slab.shape.numel()) for queue in queues]
            yield peers, [(slab, rank) for rank, of_rank in enumerate(taken) for slab in of_rank]


def _slabs(parameter: Tensor, items: Sequence[Item], count: int) -> Iterator[Slab]:
    """Yield the slabs of a parameter in which any of these items lies: one, or one for each expert.

    Experts of different processes follow one another, so that most are given to the process that has them.
    """
    by_expert: dict[str, list[Item]] = {}
    for item in items:
        by_expert.setdefault(item.expert, []).append(item)
    if "" in by_expert:
        yield Slab(parameter, 0, parameter.shape[0], by_expert[""])
        return
    share = _rows_each(parameter, count)
    for expert in sorted(map(int, by_expert), key=lambda expert: (expert % share, expert)):
        yield Slab(parameter, expert, 1, by_expert[str(expert)])


def _joined(items: list[Any], updates: Mapping[int, Tensor], out: Tensor) -> Tensor:
    """Write the updates (m, n) of all the items of a slab into ``out``, of the slab's shape."""
    for item in items:
        place = item.place_in_expert(out)
        place.copy_(item.stored(updates[id(item)]).reshape(place.shape))
    return out


def gather_to_owners(peers: Peers, owned: _Owned, parts: Sequence[Tensor]) -> list[Tensor]:
    """Return the whole of something for the slabs that this process owns, given its rows of that of each slab."""
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
    """Return this process' rows of what the owners have, in a dtype: the way back of :func:`gather_to_owners`."""
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
