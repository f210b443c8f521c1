"""Which process computes what: items with a shape and a cost, shared out once, and the rounds in which they travel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor

from hf_schatten.distributed.processes import ALONE, Peers, process_count, process_rank
from hf_schatten.linalg.place import Place

T = TypeVar("T")

# Bytes of a buffer that receives what others have computed, more where one item needs more; there are two at most.
BUFFER = 256 << 20
# Most processes that share with each other, neighbours by their number: a large group would save little more, and
# wait longer for what it exchanges.
MOST_SHARING = 16
# Most elements that the processes of a group send together, padding included, over those of all items.
_MOST_SENT = 1.5


# What is computed on one process: a matrix, as :class:`hf_schatten.optim.matrix.Matrix` is. Of it are needed here its
# shape, dtype and cost, and where it lies in its parameter.
Item = Any


class Computed(NamedTuple):
    """Updates of items of one wide shape, as a process has computed them: ``factors`` times ``directions``."""

    items: Sequence[Item]  # B
    directions: Tensor  # (B, m, n)
    factors: Tensor  # (B,)

    def scaled(self) -> Iterator[tuple[Item, Tensor]]:
        """Yield each item with its update (m, n), in the dtype of the factors: it is rounded where it goes to."""
        for item, direction, factor in zip(*self, strict=True):
            yield item, direction.to(factor.dtype).mul(factor)


class Delivered(NamedTuple):
    """Updates where their weights are: ``factors`` times ``updates``."""

    items: Sequence[Item]  # one of them where several lie in one piece of a parameter
    weights: list[Tensor]  # tensors in which the weights lie
    places: list[Place]  # of the weights in them
    updates: list[Tensor]  # (m, n), m <= n, contiguous, transposed where the weights are tall
    factors: Tensor  # one for each


Write = Callable[[Sequence[Any], Tensor], None]  # of the momenta of items into (B, m, n)
Compute = Callable[[Any, Write], Iterable[Computed]]  # of one piece of work


class Delivery:
    """How updates reach weights that are whole on this process, and that nobody else computes.

    Replicas and shards differ from it in :meth:`deliver` alone.

    Args:
        items: all of them, in the same order on every process.
        work_of: makes a piece of work from some of them.
        peers: the processes that share the work. Default this one alone.

    Attributes:
        work: what this process computes, in the order of rounds.
        elsewhere: the items whose momenta this process keeps and does not compute with.
    """

    def __init__(self, items: Sequence[Item], work_of: Callable[[Sequence[Item]], Any], peers: Peers = ALONE) -> None:
        self.items, self.peers = items, peers
        shares = self.shares()
        self.work = [work_of(mine) for mine in shares]
        mine = {id(item) for share in shares for item in share}
        self.elsewhere = [item for item in items if id(item) not in mine]

    def shares(self) -> list[Sequence[Item]]:
        """Return the items that this process computes in each round."""
        return [self.items]

    def deliver(self, compute: Compute, momenta: Any) -> Iterator[Delivered]:
        """Yield all updates of this process' weights; every process must exhaust it.

        Args:
            compute: the updates of one piece of work, given what writes the momenta of its items.
            momenta: of this process, with ``write(items, out)``, ``of_shard(item)`` and ``divisors(items)``; see
                :class:`hf_schatten.optim.momentum.Momenta`.
        """
        for items, directions, factors in compute(self.work[0], momenta.write):
            yield at_parameters(items, list(directions.unbind()), factors)


def at_parameters(items: Sequence[Item], updates: list[Tensor], factors: Tensor) -> Delivered:
    """Return updates (m, n) of items whose parameters are whole on this process."""
    return Delivered(items, [item.parameter for item in items], [item.place for item in items], updates, factors)


def assign(costs: Sequence[int], processes: int) -> list[int]:
    """Return the process of each task: the most costly first, each to the process with the least cost so far."""
    loads = [0] * processes
    owners = [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        owners[task] = loads.index(min(loads))
        loads[owners[task]] += costs[task]
    return owners


def sharing_groups(items: Sequence[Item], processes: int) -> int:
    """Return in how many groups the processes that train together share the updates of all items.

    In as few as possible, with which the items go round: what is sent is at most half padding of what it must be.
    But in groups of one size, which fit into nodes, where there are less than twice as many of them.
    """
    costs = [item.cost for item in items]
    sizes = [elements([item]) for item in items]

    def go_round(groups: int) -> bool:
        size, largest = processes // groups, -(-processes // groups)
        if largest > MOST_SHARING:
            return False
        sent = [0] * size
        for owner, count in zip(assign(costs, size), sizes, strict=True):
            sent[owner] += count
        return largest * max(sent) <= _MOST_SENT * sum(sizes)

    fewest = next(groups for groups in range(1, processes + 1) if go_round(groups))
    of_one_size = (groups for groups in range(fewest, 2 * fewest) if processes % groups == 0 and go_round(groups))
    return next(of_one_size, fewest)


def sharing_peers(items: Sequence[Item]) -> Peers:
    """Return the processes with which this one shares the updates of items: neighbours, by their number.

    All processes must call it at the same time, since it may create process groups. Where groups differ in size, the
    one process more of the larger ones only receives: every group computes the same stacks, without which the bits of
    its weights could differ from another's.
    """
    processes, rank = process_count(), process_rank()
    count = sharing_groups(items, processes)
    if count == processes:
        return ALONE
    groups = [list(range(*ends)) for ends in pairwise(number * processes // count for number in range(count + 1))]
    group = dist.group.WORLD if count == 1 else dist.new_subgroups_by_enumeration(groups)[0]
    own, size = next(ranks for ranks in groups if rank in ranks), processes // count
    return Peers(group, size, own.index(rank), len(own) - size)


def take(queue: list[T], limit: int, elements: Callable[[T], int]) -> list[T]:
    """Remove what has at most ``limit`` elements together, but one item at least, from the head of a queue."""
    taken: list[T] = []
    room = limit
    while queue and (not taken or elements(queue[0]) <= room):
        room -= elements(queue[0])
        taken.append(queue.pop(0))
    return taken


def elements(items: Iterable[Item]) -> int:
    """Return how many elements items have together."""
    return sum(item.wide_shape[0] * item.wide_shape[1] for item in items)
