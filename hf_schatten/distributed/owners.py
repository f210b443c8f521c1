"""Which process computes what: items with a shape and a cost, shared out once, and the rounds in which they travel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from hf_schatten.distributed.processes import ALONE, Peers, process_count, process_rank

T = TypeVar("T")

# Bytes of a buffer that receives what other processes have computed, more where one item needs more; two at most.
BUFFER = 256 << 20
# Most processes that share with each other, neighbours by their number: a large group would save little more, and
# wait longer for what it exchanges.
MOST_SHARING = 16
# Most elements that the processes of a group send together, padding included, over those of all items.
_MOST_SENT = 1.5


class Item(Protocol):
    """A matrix, as far as its way between processes is concerned.

    Attributes:
        parameter: that it is a part of; its dtype is that in which updates travel.
        parameter_name: of the parameter, for messages.
        expert: number of its expert, as text; "" where the parameter has no experts.
        wide_shape: (m, n) with m <= n.
        cost: of its update.
        weights: a view of the parameter.
    """

    @property
    def parameter(self) -> Tensor: ...  # noqa: D102
    @property
    def parameter_name(self) -> str: ...  # noqa: D102
    @property
    def expert(self) -> str: ...  # noqa: D102
    @property
    def wide_shape(self) -> tuple[int, int]: ...  # noqa: D102
    @property
    def cost(self) -> int: ...  # noqa: D102
    @property
    def weights(self) -> Tensor: ...  # noqa: D102
    def stored(self, wide: Tensor) -> Tensor: ...  # noqa: D102
    def of(self, tensor: Tensor) -> Tensor: ...  # noqa: D102
    def of_expert(self, tensor: Tensor) -> Tensor: ...  # noqa: D102
    def place_in_expert(self, tensor: Tensor) -> Tensor: ...  # noqa: D102


AnyItem = TypeVar("AnyItem", bound=Item)


class Computed(NamedTuple):
    """What a process has computed of an item: an update is ``factor * direction``.

    Attributes:
        item: the item.
        direction: (m, n), of its wide shape.
        factor: a scalar.
    """

    item: Any
    direction: Tensor
    factor: Tensor


class Delivered(NamedTuple):
    """An update where its weights are.

    Attributes:
        item: the item; one of them where several lie in one piece of a parameter.
        weights: what this process has of the weights, a view of the parameter.
        update: of their shape; to be multiplied by ``factor``.
        factor: a scalar.
    """

    item: Any
    weights: Tensor
    update: Tensor
    factor: Tensor


Write = Callable[[Any, Tensor], None]  # of an item's momentum into (m, n)
Compute = Callable[[Any, Write], Iterable[Computed]]  # of one piece of work


class Delivery(Protocol):
    """How updates reach the weights. One process, replicas and shards differ in this alone.

    Attributes:
        items: all of them, in the same order on every process.
        work: what this process computes, in the order of rounds; made of items by the function that it was given.
        peers: the processes that share the work.
    """

    items: Sequence[Any]
    work: list[Any]
    peers: Peers

    def deliver(self, compute: Compute, momenta: Momenta) -> Iterator[Delivered]:
        """Yield all updates of this process' weights; every process must exhaust it.

        Args:
            compute: the updates of one piece of work, and what writes the momenta of its items.
            momenta: of this process.
        """


class Momenta(Protocol):
    """The (look-ahead) momenta that a process has, as stored and still with the bias of a start at zero."""

    def write(self, item: Any, wide: Tensor) -> None:
        """Write that of an item that is whole on this process into (m, n)."""

    def of_shard(self, item: Any) -> Tensor:
        """Return the rows that this process has of the momentum of an item's parameter."""


class OnOneProcess:
    """Updates of weights that this process has, and nobody else computes.

    Args:
        items: all of them.
        work_of: makes a piece of work.
    """

    def __init__(self, items: Sequence[AnyItem], work_of: Callable[[Sequence[AnyItem]], Any]) -> None:
        self.items, self.peers = items, ALONE
        self.work = [work_of(items)]

    def deliver(self, compute: Compute, momenta: Momenta) -> Iterator[Delivered]:
        """Yield them as they are computed."""
        for item, direction, factor in compute(self.work[0], momenta.write):
            weights = item.weights
            yield Delivered(item, weights, item.stored(direction).reshape(weights.shape), factor)


def assign(costs: Sequence[int], processes: int) -> list[int]:
    """Return the process of each task: the most costly first, each to the process with the least cost so far."""
    loads = [0] * processes
    owners = [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        owners[task] = loads.index(min(loads))
        loads[owners[task]] += costs[task]
    return owners


def sharing_groups(items: Sequence[Item], processes: int) -> int:
    """Return in how many groups processes share the updates of items.

    In as few as possible, with which the items go round: what is sent is at most half padding of what it must be.
    But in groups of one size, which fit into nodes, where there are less than twice as many of them.

    Args:
        items: all of them.
        processes: those that train together.
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

    Args:
        items: as in :func:`sharing_groups`.
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
