"""Weights that are sharded over processes: whole on one process, in pieces on all.

What cannot be divided further, a parameter or one expert of a stack of them, has an owner, chosen by the cost of its
update. Every process sends its piece of the momentum to the owner and gets its piece of the update back, in rounds of
bounded size: an element crosses the network twice a step, where gathering parameters on every process would move it
once for each process. Momentum and everything else that has the parameter's shape stays sharded as the parameter is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_schatten.distributed.owners import BUFFER, Compute, Delivered, Delivery, Item, assign, take
from hf_schatten.distributed.pieces import Box, Pieces, is_sharded, local, pieces_of
from hf_schatten.distributed.processes import Peers
from hf_schatten.linalg.place import Place


def of_experts(parameter: Tensor, tensor: Tensor) -> tuple[list[int], list[Tensor]]:
    """Return the numbers of the experts of which this process has anything, and what it has of them.

    Args:
        parameter: a stack of experts (E, r, c), sharded or whole.
        tensor: what this process has of a tensor of its shape.
    """
    if not is_sharded(parameter):
        return list(range(len(tensor))), list(tensor.unbind())
    pieces = pieces_of("", parameter)
    spans = pieces.spans[pieces.peers.rank][0]
    if not tensor.numel():
        return [], []
    if len(pieces.shape) > 1:
        return [expert for span in spans for expert in range(*span)], list(tensor.unbind())
    each, ((begin, end),) = parameter.shape[1:].numel(), spans
    numbers = list(range(begin // each, -(-end // each)))
    sizes = [min(end, (expert + 1) * each) - max(begin, expert * each) for expert in numbers]
    return numbers, list(tensor.split(sizes))


def expanded(parameter: Tensor, numbers: Iterable[int], flags: Iterable[Tensor], otherwise: Tensor) -> list[Tensor]:
    """Return flags of all experts of a stack, given those of the experts with these numbers."""
    of_all = [otherwise] * parameter.shape[0]
    for number, flag in zip(numbers, flags, strict=True):
        of_all[number] = flag
    return of_all


class Slab(NamedTuple):
    """Rows of a sharded parameter that are whole on one process, its owner."""

    parameter: Tensor
    pieces: Pieces  # of the parameter
    start: int  # the first row: of a stack of experts, the expert
    rows: int  # all of the parameter's, or one expert
    items: list[Item]  # those in question that lie there

    @property
    def shape(self) -> torch.Size:
        """The shape of the slab, which is the parameter's but for the number of rows."""
        return torch.Size((self.rows, *self.parameter.shape[1:]))

    @property
    def _range(self) -> tuple[int, int]:
        """Where its rows lie in the first dimension of what is cut."""
        each = 1 if len(self.pieces.shape) > 1 else self.parameter.shape[1:].numel()
        return self.start * each, (self.start + self.rows) * each

    def boxes(self, rank: int) -> Iterator[Box]:
        """Yield where the parts of it that a process has lie in it, as it is cut, and in the process' piece."""
        return self.pieces.boxes(rank, *self._range)

    def here(self, piece: Tensor) -> list[Tensor]:
        """Return the parts of it that this process has, views of its piece of a tensor; there may be none."""
        return [piece[of_piece] for _, of_piece in self.boxes(self.pieces.peers.rank)]

    def of(self, rank: int, whole: Tensor) -> list[Tensor]:
        """Return the parts of it that a process has, views of the whole of it."""
        start, stop = self._range
        cut = whole.view(stop - start, *self.pieces.shape[1:])
        return [cut[of_whole] for of_whole, _ in self.boxes(rank)]

    def numel_of(self, rank: int) -> int:
        """Return how many elements of it a process has."""
        return self.pieces.numel(rank, *self._range)


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
            parts = [slab.here(rows[slab.parameter]) for slab, _ in owned]
            wholes = gather_to_owners(peers, owned, parts, rows[owned[0][0].parameter].dtype)
            del rows, parts
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
            pairs = [
                (slab.items[0], *_as_matrices(weights, update))
                for (slab, _), updates_here in zip(owned, arrived, strict=True)
                for weights, update in zip(slab.here(local(slab.parameter)), updates_here, strict=True)
            ]
            if pairs:
                items, weights, their_updates = map(list, zip(*pairs, strict=True))
                yield Delivered(
                    items,
                    weights,
                    [Place.of(part, 1, part) for part in weights],
                    their_updates,
                    torch.ones(len(items), device=weights[0].device),
                )


def _as_matrices(weights: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """Return a part of a piece and its update, as updates are delivered: as rows where it is contiguous."""
    if weights.is_contiguous():
        return weights.view(1, -1), update.view(1, -1)
    if len(weights) == 1:  # an expert
        weights, update = weights[0], update[0]
    weights, update = weights.flatten(1), update.flatten(1)
    return weights, update if weights.shape[0] <= weights.shape[1] else update.mT.contiguous()


def on_owners(items: Iterable[Item], tensor_of: Callable[[Item], Tensor]) -> Iterator[tuple[Item, Tensor]]:
    """Yield those items that this process owns with something whole, (r, c) as stored; of what is not sharded, all.

    Every process must exhaust it, with items in the same order. ``tensor_of`` an item has the shape of its parameter
    and is sharded as that is; it travels in the dtype of the parameter.
    """
    sharded: list[Item] = []
    for item in items:
        if is_sharded(item.parameter):
            sharded.append(item)
        else:
            yield item, item.of(tensor_of(item))
    for peers, owned in _rounds(sharded):
        pieces = [local(tensor_of(slab.items[0])) for slab, _ in owned]
        parts = [slab.here(piece) for (slab, _), piece in zip(owned, pieces, strict=True)]
        wholes = gather_to_owners(peers, owned, parts, owned[0][0].parameter.dtype)
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
    pieces: dict[Tensor, Pieces] = {}
    for item in items:
        parameter: Any = item.parameter
        if parameter not in pieces:
            pieces[parameter] = pieces_of(item.parameter_name, parameter)
        kind = parameter.dtype, parameter.device, pieces[parameter].peers
        kinds.setdefault(kind, {}).setdefault(parameter, []).append(item)
    for (_, _, peers), by_parameter in kinds.items():
        slabs = [slab for each, its in by_parameter.items() for slab in _slabs(each, pieces[each], its)]
        owners = assign([sum(item.cost for item in slab.items) for slab in slabs], peers.size)
        queues: list[list[Slab]] = [[] for _ in range(peers.size)]
        for slab, owner in sorted(zip(slabs, owners, strict=True), key=lambda pair: -pair[0].shape.numel()):
            queues[owner].append(slab)
        while any(queues):
            taken = [take(queue, BUFFER // 4, lambda slab: slab.shape.numel()) for queue in queues]
            yield peers, [(slab, rank) for rank, of_rank in enumerate(taken) for slab in of_rank]


def _slabs(parameter: Tensor, pieces: Pieces, items: Sequence[Item]) -> Iterator[Slab]:
    """Yield the slabs of a parameter in which any of these items lies: one, or one for each expert.

    Experts of different processes follow one another, so that most are given to the process that has them.
    """
    by_expert: dict[str, list[Item]] = {}
    for item in items:
        by_expert.setdefault(item.expert, []).append(item)
    if "" in by_expert:
        yield Slab(parameter, pieces, 0, parameter.shape[0], by_expert[""])
        return
    share = -(-parameter.shape[0] // pieces.peers.size)
    for expert in sorted(map(int, by_expert), key=lambda expert: (expert % share, expert)):
        yield Slab(parameter, pieces, expert, 1, by_expert[str(expert)])


def _joined(items: list[Any], updates: Mapping[int, Tensor], out: Tensor) -> Tensor:
    """Write the updates (m, n) of all the items of a slab into ``out``, of the slab's shape."""
    for item in items:
        place = item.place_in_expert(out)
        place.copy_(item.stored(updates[id(item)]).reshape(place.shape))
    return out


def gather_to_owners(
    peers: Peers, owned: _Owned, parts: Sequence[Sequence[Tensor]], dtype: torch.dtype
) -> list[Tensor]:
    """Return the whole of something for the slabs that this process owns, given its parts of that of each slab."""
    mine = _owned_by(peers.rank, owned)
    sent: list[list[Tensor]] = [[] for _ in range(peers.size)]
    for (_, owner), of_slab in zip(owned, parts, strict=True):
        sent[owner] += of_slab
    device = local(owned[0][0].parameter).device
    wholes = [torch.empty(slab.shape, dtype=dtype, device=device) for slab in mine]
    arriving = [
        [part for slab, whole in zip(mine, wholes, strict=True) for part in slab.of(rank, whole)]
        for rank in range(peers.size)
    ]
    _exchange(peers, sent, arriving, dtype, device)
    return wholes


def scatter_from_owners(
    peers: Peers, owned: _Owned, wholes: Sequence[Tensor], dtype: torch.dtype
) -> list[list[Tensor]]:
    """Return this process' parts of what the owners have, in a dtype: the way back of :func:`gather_to_owners`."""
    mine = _owned_by(peers.rank, owned)
    sent = [
        [part for slab, whole in zip(mine, wholes, strict=True) for part in slab.of(rank, whole)]
        for rank in range(peers.size)
    ]
    device = local(owned[0][0].parameter).device
    found = [
        [torch.empty(part.shape, dtype=dtype, device=device) for part in slab.here(local(slab.parameter))]
        for slab, _ in owned
    ]
    arriving: list[list[Tensor]] = [[] for _ in range(peers.size)]
    for (_, owner), parts in zip(owned, found, strict=True):
        arriving[owner] += parts
    _exchange(peers, sent, arriving, dtype, device)
    return found


def _exchange(
    peers: Peers,
    sent: Sequence[Sequence[Tensor]],
    arriving: Sequence[Sequence[Tensor]],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Send tensors to each process, and write what each sends into tensors, of the same sizes, in one exchange."""
    sizes, expected = ([sum(part.numel() for part in each) for each in parts] for parts in (sent, arriving))
    packed = _packed([part for each in sent for part in each], dtype, device)
    if peers.size > 1:
        received = torch.empty(sum(expected), dtype=dtype, device=device)
        dist.all_to_all_single(received, packed, expected, sizes, group=peers.group)
    else:
        received = packed
    targets = [part for each in arriving for part in each]
    if targets:
        blocks = received.split([part.numel() for part in targets])
        shaped = [block.view(part.shape) for block, part in zip(blocks, targets, strict=True)]
        torch._foreach_copy_(targets, shaped)


def _packed(parts: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    packed = torch.empty(sum(part.numel() for part in parts), dtype=dtype, device=device)
    if parts:
        slots = packed.split([part.numel() for part in parts])
        torch._foreach_copy_([slot.view(part.shape) for slot, part in zip(slots, parts, strict=True)], list(parts))
    return packed
