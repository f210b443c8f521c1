"""Which process computes the update of which matrix, and how processes exchange what they have computed.

In data-parallel training every process has all gradients and all momenta, so that each matrix' update needs to be
computed by one process only. Matrices are given to processes by the cost of their update, the dearest first, each to
the process that has the least so far. Updates travel in rounds: in each, every process sends a few of its own, and the
buffer that receives those of all processes has a bounded size. While a round travels, the next one is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .matrix import Matrix

T = TypeVar("T")

# Torch renames it: the old name warns from 2.13 on.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"

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
            yield [take(queue, limit, _elements) for queue in queues]


def take(queue: list[T], limit: int, elements: Callable[[Sequence[T]], int]) -> list[T]:
    """Remove what has at most ``limit`` elements together, but one item at least, from the head of a queue."""
    taken: list[T] = []
    while queue and (not taken or elements([*taken, queue[0]]) <= limit):
        taken.append(queue.pop(0))
    return taken


def exchange(rounds: Iterable[Round], rank: int, steps_of: Steps) -> Iterator[tuple[Matrix, Tensor]]:
    """Yield every matrix of every round with its step, (m, n) with m <= n, in the same order on every process.

    Args:
        rounds: from :func:`rounds_of`.
        rank: this process.
        steps_of: computes the steps of this process' matrices of a round. They travel in the parameter's dtype.
    """
    under_way: tuple[Round, Tensor, Any] | None = None
    for current in rounds:
        size = max(_elements(matrices) for matrices in current)
        like = next(matrix.parameter for matrices in current for matrix in matrices)
        sent = torch.zeros(size, dtype=like.dtype, device=like.device)
        steps = steps_of(current[rank])
        for matrix, slot in zip(current[rank], _slots(sent, current[rank]), strict=True):
            slot.copy_(steps[id(matrix)])
        received = torch.empty(len(current) * size, dtype=like.dtype, device=like.device)
        work = getattr(dist, _ALL_GATHER)(received, sent, async_op=True)
        if under_way is not None:
            yield from _arrived(*under_way)
        under_way = current, received.view(len(current), size), work
    if under_way is not None:
        yield from _arrived(*under_way)


def _arrived(current: Round, received: Tensor, work: Any) -> Iterator[tuple[Matrix, Tensor]]:
    work.wait()
    for matrices, buffer in zip(current, received, strict=True):
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
