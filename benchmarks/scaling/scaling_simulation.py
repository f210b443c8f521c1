"""One step of training on N ranks: what it takes, and what it sends."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.scaling.scaling_machines import Cost, Machine, all_gather_bytes, all_reduce_bytes, broadcast_bytes
from benchmarks.scaling.scaling_pipelines import exchange, gradients_exposed
from benchmarks.scaling.scaling_workload import Workload
from hf_schatten.distributed.owners import assign, elements, sharing_groups
from hf_schatten.distributed.replicated import Round, fits, rounds_of

BUCKET_BYTES = 25 << 20  # of DDP
_BACKWARD = 2 / 3  # of the training


@dataclass(frozen=True)
class Step:
    """One step, in seconds and bytes of one rank.

    Attributes:
        ranks: Of the run.
        sharing: Ranks that share the updates of matrices with each other, in the smallest of the groups.
        training: Forward and backward.
        gradients: The gradients' all-reduce, where nothing hides it.
        optimizer: Computation of the optimizer.
        updates: The exchange of updates, where nothing hides it.
        statistics: The estimate of p, spread over the steps between two.
        gradient_bytes: That a rank sends for the gradients, by a ring.
        update_bytes: That a rank sends for the updates, padding included.
        memory: Of weights, gradients, state and receiving buffers.
        buffers: Of that, the two receiving buffers.
    """

    ranks: int
    training: float
    gradients: float
    sharing: int = 1
    optimizer: float = 0.0
    updates: float = 0.0
    statistics: float = 0.0
    gradient_bytes: float = 0.0
    update_bytes: float = 0.0
    memory: float = 0.0
    buffers: float = 0.0

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.training + self.gradients + self.optimizer + self.updates + self.statistics


# Of a workload, a machine, steps between two estimates of p, and ranks.
Variant = Callable[[Workload, Machine, int, int], Step]


def adamw(workload: Workload, machine: Machine, interval: int, ranks: int) -> Step:
    """Fused AdamW for all parameters, on every rank."""
    return _with_optimizer(workload, machine, ranks, workload.adamw, "adamw")


def muon(workload: Workload, machine: Machine, interval: int, ranks: int) -> Step:
    """``torch.optim.Muon`` for all matrices on every rank, and fused AdamW for the rest."""
    return _with_optimizer(workload, machine, ranks, workload.muon, "muon")


def replicated(workload: Workload, machine: Machine, interval: int, ranks: int) -> Step:
    """`SchattenP` with ``share_work=false``."""
    step = _with_optimizer(workload, machine, ranks, workload.replicated, "schatten_p")
    return replace(step, statistics=statistics_seconds(workload, machine, interval, ranks))


def shared(workload: Workload, machine: Machine, interval: int, ranks: int) -> Step:
    """`SchattenP` with ``share_work=true``: each update is computed by one rank of each group."""
    alone = replicated(workload, machine, interval, ranks)
    groups = sharing_groups(workload.matrices, ranks)
    if groups == ranks:
        return alone
    sharing = ranks // groups
    rounds = travels(workload, machine, sharing, math.ceil(ranks / groups) - sharing)
    computing = [
        [machine.seconds(workload.updates(sent)) if sent else 0.0 for sent in travel.matrices] for travel in rounds
    ]
    # Before the first round, each rank advances the momenta with which the others compute.
    for rank in range(sharing):
        own = {id(matrix) for travel in rounds for matrix in travel.matrices[rank]}
        elsewhere = [matrix for matrix in workload.matrices if id(matrix) not in own]
        computing[0][rank] += machine.seconds(workload.advance(elsewhere))
    applying = [
        sum(machine.seconds(workload.apply(matrices)) for matrices in travel.arriving if matrices) for travel in rounds
    ]
    exchanged = exchange(computing, [travel.seconds for travel in rounds], applying, machine.overlaps)
    buffers = sum(sorted(travel.buffer for travel in rounds)[-2:])
    return replace(
        alone,
        sharing=sharing,
        optimizer=machine.seconds(workload.rest) + exchanged.computing,
        updates=exchanged.exposed,
        update_bytes=sum(travel.sent for travel in rounds),
        memory=alone.memory + buffers,
        buffers=buffers,
    )


VARIANTS: dict[str, Variant] = {
    "AdamW": adamw,
    "Muon": muon,
    "ours, replicated": replicated,
    "ours, shared": shared,
}


def statistics_seconds(workload: Workload, machine: Machine, interval: int, ranks: int) -> float:
    """The estimate of p and its all-reduce, spread over ``p_interval`` steps."""
    travelling = machine.all_reduce_seconds(ranks, workload.statistics_bytes())
    return (workload.spectra * machine.spectrum_seconds + travelling) / interval


def crossover(ranks: Sequence[int], sharing: Sequence[Step], alone: Sequence[Step]) -> int | None:
    """The smallest number of ranks from which on sharing the work is slower than not sharing it, None where none is.

    Args:
        ranks: Ascending.
        sharing: A step for each.
        alone: The same without sharing.
    """
    slower = [shared.seconds > own.seconds for shared, own in zip(sharing, alone, strict=True)]
    first = next((index for index in range(len(ranks)) if all(slower[index:])), None)
    return None if first is None else ranks[first]


@dataclass(frozen=True)
class Travel:
    """One round of updates among the ranks that share them.

    Attributes:
        matrices: The round: those that each rank sends.
        seconds: Until every rank has all of them.
        sent: Bytes that a rank sends.
        buffer: Bytes of its receiving buffer.
        arriving: Matrices whose updates arrive, and are applied, together.
    """

    matrices: Round
    seconds: float
    sent: float
    buffer: int
    arriving: Round


def travels(workload: Workload, machine: Machine, sharing: int, receivers: int = 0) -> list[Travel]:
    """Return the rounds in which ``sharing`` ranks exchange their updates, and send them to some receivers too."""
    group = sharing + receivers
    owners = assign([matrix.cost for matrix in workload.matrices], sharing)
    found = []
    for current in rounds_of(workload.matrices, owners, sharing):
        sizes = [workload.itemsize * elements(matrices) for matrices in current]
        largest = max(sizes)
        if fits(current):
            seconds, sent = machine.all_gather_seconds(group, largest), all_gather_bytes(group, largest)
            together = [matrix for matrices in current for matrix in matrices]
            found.append(Travel(current, seconds, sent, group * largest, [together]))
        else:
            seconds = sum(machine.broadcast_seconds(group, size) for size in sizes if size)
            found.append(Travel(current, seconds, broadcast_bytes(group, sum(sizes)), largest, current))
    return found


def _with_training(workload: Workload, machine: Machine, ranks: int) -> Step:
    products = workload.training_flops / (machine.peak * machine.training_efficiency)
    training = products + workload.layers * machine.layer_seconds
    size = workload.itemsize * workload.parameters
    buckets = math.ceil(size / BUCKET_BYTES)
    travelling = [machine.all_reduce_seconds(ranks, size / buckets)] * buckets
    exposed = gradients_exposed(_BACKWARD * training, travelling) if machine.overlaps else sum(travelling)
    return Step(ranks, training, exposed, gradient_bytes=all_reduce_bytes(ranks, size))


def _with_optimizer(workload: Workload, machine: Machine, ranks: int, cost: Cost, optimizer: str) -> Step:
    return replace(
        _with_training(workload, machine, ranks),
        optimizer=machine.seconds(cost),
        memory=workload.memory(optimizer, ranks),
    )
