"""Weights that every process has, as under DDP: each update is computed by one process and sent to the others.

Every process has all gradients and all momenta. Items are given to processes by the cost of their update. Updates
travel in rounds: in each, every process sends a few of its own, and the buffer that receives those of all processes
has a bounded size. While a round travels, the next one is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_schatten.distributed.agreement import naming_the_missing
from hf_schatten.distributed.owners import (
    BUFFER,
    Compute,
    Delivered,
    Delivery,
    Item,
    assign,
    at_parameters,
    elements,
    take,
)
from hf_schatten.distributed.processes import Peers

# Torch renames it: the old name warns from 2.13 on.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"

Round = list[list[Any]]  # the items that each process sends
_Transfer = tuple[Any, Round, Sequence[Tensor]]  # what to wait for; items, and the buffer of their updates, by sender


class Replicated(Delivery):
    """Updates that processes with the same gradients share."""

    def shares(self) -> list[Sequence[Item]]:
        """Return the items of each round that this process computes; a receiver has none."""
        owners = assign([item.cost for item in self.items], self.peers.size)
        self.rounds = list(rounds_of(self.items, owners, self.peers.size))
        return [current[self.peers.rank] if self.peers.rank < self.peers.size else [] for current in self.rounds]

    def deliver(self, compute: Compute, momenta: Any) -> Iterator[Delivered]:
        """Yield all updates, in the same order on every process."""
        for arrived in self._exchanged(compute, momenta):
            items, updates = zip(*arrived, strict=True)
            yield at_parameters(items, list(updates), torch.ones(len(items), device=updates[0].device))

    def _exchanged(self, compute: Compute, momenta: Any) -> Iterator[list[tuple[Any, Tensor]]]:
        """Yield items with their updates (m, n), in the parameter's dtype, as they arrive."""
        under_way: _Transfer | None = None
        for current, work in zip(self.rounds, self.work, strict=True):
            for transfer in self._transfers(current, self._own(current, compute(work, momenta.write))):
                if under_way is not None:
                    yield _arrived(*under_way)
                under_way = transfer
        if under_way is not None:
            yield _arrived(*under_way)

    def _own(self, current: Round, computed: Any) -> Tensor:
        """Return this process' updates of a round, one after another, filled up where all travel at once."""
        like = next(item.parameter for items in current for item in items)
        own = current[self.peers.rank] if self.peers.rank < self.peers.size else []
        sent = like.new_zeros(max(map(elements, current)) if fits(current) else elements(own))
        slots = {id(item): slot for item, slot in _slots(sent, own)}
        for each in computed:
            for item, update in each.scaled():
                slots[id(item)].copy_(update)
        return sent

    def _transfers(self, current: Round, sent: Tensor) -> Iterator[_Transfer]:
        return (_gather if fits(current) else _broadcasts)(current, sent, self.peers)


def rounds_of(items: Sequence[Item], owners: Sequence[int], processes: int) -> Iterator[Round]:
    """Yield the rounds in which the updates of items travel, large ones first, within :data:`BUFFER`.

    Those of a round have one dtype and one device. An item that needs more travels alone.
    """
    alike: dict[Any, Round] = {}
    for item, owner in zip(items, owners, strict=True):
        kind = item.parameter.dtype, item.parameter.device
        alike.setdefault(kind, [[] for _ in range(processes)])[owner].append(item)
    for (dtype, _), queues in alike.items():
        limit = BUFFER // (processes * dtype.itemsize)
        for queue in queues:
            queue.sort(key=lambda item: -elements([item]))
        while any(queues):
            yield [take(queue, limit, lambda item: elements([item])) for queue in queues]


def fits(current: Round) -> bool:
    """Return whether the parts of a round, filled up to one size, go into a buffer together."""
    itemsize = next(item.parameter.itemsize for items in current for item in items)
    return len(current) * max(map(elements, current)) * itemsize <= BUFFER


def _gather(current: Round, sent: Tensor, peers: Peers) -> Iterator[_Transfer]:
    """Send the parts of a round all at once, filled up to one size."""
    received = sent.new_empty(peers.size + peers.receivers, sent.numel())
    work = getattr(dist, _ALL_GATHER)(received.view(-1), sent, group=peers.group, async_op=True)
    yield work, current, received[: peers.size].unbind()


def _broadcasts(current: Round, sent: Tensor, peers: Peers) -> Iterator[_Transfer]:
    """Send the parts of a round one after another."""
    for sender, items in enumerate(current):
        if items:
            buffer = sent if sender == peers.rank else sent.new_empty(elements(items))
            work = dist.broadcast(buffer, group=peers.group, group_src=sender, async_op=True)
            yield work, [items], [buffer]


def _arrived(work: Any, current: Round, buffers: Sequence[Tensor]) -> list[tuple[Any, Tensor]]:
    with naming_the_missing("the present one"):
        work.wait()
    return [pair for items, buffer in zip(current, buffers, strict=True) for pair in _slots(buffer, items)]


def _slots(buffer: Tensor, items: Sequence[Item]) -> Iterator[tuple[Any, Tensor]]:
    """Yield the items and their views (m, n) of a flat buffer, one after another."""
    start = 0
    for item in items:
        m, n = item.wide_shape
        yield item, buffer[start : start + m * n].view(m, n)
        start += m * n
