"""Which process computes the update of which matrix, and how processes exchange what they have computed.

In data-parallel training every process has all gradients and all momenta, so that each matrix' update needs to be
computed by one process only. Matrices are given to processes by the cost of their update, the dearest first, each to
the process that has the least so far. Updates travel in rounds: in each, every process sends a few of its own, and the
buffer that receives those of all processes has a bounded size. While a round travels, the next one is computed.

Many processes share within groups of neighbours, each of which computes all matrices: a large group would save little
more, and wait longer for what it exchanges. Where groups differ in size, the one process more of the larger ones only
receives: every group computes the same batches, without which the bits of its weights could differ from another's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from hf_schatten.distributed.processes import ALONE, Peers, process_count, process_rank
from hf_schatten.optim.matrix import Matrix

T = TypeVar("T")

# Torch renames it: the old name warns from 2.13 on.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"

# Most elements that the processes of a group send together, padding included, over those of all matrices.
_MOST_SENT = 1.5

Round = list[list[Matrix]]  # the matrices that each process sends
Steps = Callable[[list[Matrix]], Mapping[int, Tensor]]  # steps (m, n), m <= n, by the identity of the matrix


def update_cost(matrix: Matrix) -> int:
    """Return the cost of a matrix' update, proportional to its matrix products' operations: m² n for m <= n."""
    m, n = matrix.wide_shape
    return m * m * n


def assign(costs: Sequence[int], processes: int) -> list[int]:
    """Return the process of each task: the dearest tasks first, each to the process with the least cost so far."""
    loads = [0] * processes
    owners = [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        owners[task] = loads.index(min(loads))
        loads[owners[task]] += costs[task]
    return owners


def sharing_groups(matrices: Sequence[Matrix], processes: int, most: int) -> int:
    """Return in how many groups processes share the updates of matrices.

    In as few as possible, with which the matrices go round: what is sent is at most half padding of what it must be.
    But in groups of one size, which fit into nodes, where there are less than twice as many of them.

    Args:
        matrices: all of them.
        processes: those that train together.
        most: at most so many in a group.
    """
    costs = [update_cost(matrix) for matrix in matrices]
    sizes = [_elements([matrix]) for matrix in matrices]

    def go_round(groups: int) -> bool:
        size, largest = processes // groups, -(-processes // groups)
        if largest > most:
            return False
        sent = [0] * size
        for owner, elements in zip(assign(costs, size), sizes, strict=True):
            sent[owner] += elements
        return largest * max(sent) <= _MOST_SENT * sum(sizes)

    fewest = next(groups for groups in range(1, processes + 1) if go_round(groups))
    of_one_size = (groups for groups in range(fewest, 2 * fewest) if processes % groups == 0 and go_round(groups))
    return next(of_one_size, fewest)


def sharing_peers(matrices: Sequence[Matrix], most: int) -> Peers:
    """Return the processes with which this one shares the updates of matrices: neighbours, by their number.

    All processes must call it at the same time, since it may create process groups.

    Args:
        matrices: as in :func:`sharing_groups`.
        most: as in :func:`sharing_groups`.
    """
    processes, rank = process_count(), process_rank()
    count = sharing_groups(matrices, processes, most)
    if count == processes:
        return ALONE
    groups = [list(range(*ends)) for ends in pairwise(number * processes // count for number in range(count + 1))]
    group = dist.group.WORLD if count == 1 else dist.new_subgroups_by_enumeration(groups)[0]
    own, size = next(ranks for ranks in groups if rank in ranks), processes // count
    return Peers(group, size, own.index(rank), len(own) - size)


def rounds_of(matrices: Sequence[Matrix], owners: Sequence[int], processes: int, buffer_mib: int) -> Iterator[Round]:
    """Yield the rounds in which the updates of matrices travel, large ones first.

    Those of a round have one dtype and one device.

    Args:
        matrices: all of them, in the same order on every process.
        owners: process of each.
        processes: how many there are.
        buffer_mib: most memory of a round's receiving buffer, in MiB; a matrix that needs more travels alone.
    """
    alike: dict[Any, list[list[Matrix]]] = {}
    for matrix, owner in zip(matrices, owners, strict=True):
        kind = matrix.parameter.dtype, matrix.parameter.device
        alike.setdefault(kind, [[] for _ in range(processes)])[owner].append(matrix)
    for (dtype, _), queues in alike.items():
        limit = (buffer_mib << 20) // (processes * dtype.itemsize)
        for queue in queues:
            queue.sort(key=lambda matrix: -_elements([matrix]))
        while any(queues):
            yield [take(queue, limit, lambda matrix: _elements([matrix])) for queue in queues]


def take(queue: list[T], limit: int, elements: Callable[[T], int]) -> list[T]:
    """Remove what has at most ``limit`` elements together, but one item at least, from the head of a queue."""
    taken: list[T] = []
    room = limit
    while queue and (not taken or elements(queue[0]) <= room):
        room -= elements(queue[0])
        taken.append(queue.pop(0))
    return taken


def fits(current: Round, buffer_mib: int) -> bool:
    """Return whether the parts of a round, filled up to one size, go into a buffer together."""
    itemsize = next(matrix.parameter.itemsize for matrices in current for matrix in matrices)
    return len(current) * max(map(_elements, current)) * itemsize <= buffer_mib << 20


def exchange(
    rounds: Iterable[Round], peers: Peers, steps_of: Steps, buffer_mib: int
) -> Iterator[tuple[Matrix, Tensor]]:
    """Yield every matrix of every round with its step, (m, n) with m <= n, in the same order on every process.

    Args:
        rounds: from :func:`rounds_of`.
        peers: the processes that exchange.
        steps_of: computes the steps of this process' matrices of a round. They travel in the parameter's dtype.
        buffer_mib: as in :func:`rounds_of`. The parts of a round that needs more travel one after another.
    """
    under_way: _Transfer | None = None
    for current in rounds:
        like = next(matrix.parameter for matrices in current for matrix in matrices)
        own = current[peers.rank] if peers.rank < peers.size else []
        steps = steps_of(own)
        together = fits(current, buffer_mib)
        sent = like.new_zeros(max(map(_elements, current)) if together else _elements(own))
        for matrix, slot in zip(own, _slots(sent, own), strict=True):
            slot.copy_(steps[id(matrix)])
        del steps
        transfers = _gather(current, sent, peers) if together else _broadcasts(current, sent, peers)
        for transfer in transfers:
            if under_way is not None:
                yield from _arrived(*under_way)
            under_way = transfer
    if under_way is not None:
        yield from _arrived(*under_way)


_Transfer = tuple[Any, Round, Sequence[Tensor]]  # what to wait for; matrices, and the buffer of their steps, by sender


def _gather(current: Round, sent: Tensor, peers: Peers) -> Iterator[_Transfer]:
    """Send the parts of a round all at once, filled up to one size."""
    received = sent.new_empty(peers.size + peers.receivers, sent.numel())
    work = getattr(dist, _ALL_GATHER)(received.view(-1), sent, group=peers.group, async_op=True)
    yield work, current, received[: peers.size].unbind()


def _broadcasts(current: Round, sent: Tensor, peers: Peers) -> Iterator[_Transfer]:
    """Send the parts of a round one after another."""
    for sender, matrices in enumerate(current):
        if matrices:
            buffer = sent if sender == peers.rank else sent.new_empty(_elements(matrices))
            work = dist.broadcast(buffer, group=peers.group, group_src=sender, async_op=True)
            yield work, [matrices], [buffer]


def _arrived(work: Any, current: Round, buffers: Sequence[Tensor]) -> Iterator[tuple[Matrix, Tensor]]:
    work.wait()
    for matrices, buffer in zip(current, buffers, strict=True):
        yield from zip(matrices, _slots(buffer, matrices), strict=True)


def _slots(buffer: Tensor, matrices: Sequence[Matrix]) -> Iterator[Tensor]:
    """Yield the views (m, n) of a flat buffer that belong to matrices, one after another."""
    start = 0
    for matrix in matrices:
        m, n = matrix.wide_shape
        yield buffer[start : start + m * n].view(m, n)
        start += m * n


def _elements(matrices: Sequence[Matrix]) -> int:
    return sum(matrix.wide_shape[0] * matrix.wide_shape[1] for matrix in matrices)
