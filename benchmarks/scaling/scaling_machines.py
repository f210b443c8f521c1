"""Machines of the scaling model: how fast a rank computes, and how long a collective of ranks takes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Cost:
    """What work asks of a device.

    Attributes:
        flops: Floating-point operations of its matrix products.
        moved: Bytes that everything else reads and writes.
        kernels: How many operations are launched.
    """

    flops: float = 0.0
    moved: float = 0.0
    kernels: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.moved + other.moved, self.kernels + other.kernels)

    def __sub__(self, other: "Cost") -> "Cost":
        return self + other * -1

    def __mul__(self, factor: float) -> "Cost":
        return Cost(self.flops * factor, self.moved * factor, self.kernels * factor)


@dataclass(frozen=True)
class Link:
    """What connects ranks, for one rank and one direction.

    Attributes:
        bandwidth: Line rate, bytes a second.
        efficiency: Share of it that collectives reach.
        ring_seconds: Latency of one step of a ring.
        tree_seconds: Latency of one step of a tree; infinite where the library has none.
    """

    bandwidth: float
    efficiency: float
    ring_seconds: float
    tree_seconds: float = math.inf

    @property
    def rate(self) -> float:
        """Bytes a second that collectives reach."""
        return self.bandwidth * self.efficiency


@dataclass(frozen=True)
class Machine:
    """A cluster of equal nodes, described by one of its ranks.

    Attributes:
        name: For tables.
        node_ranks: Ranks in a node.
        peak: Matrix products, operations a second.
        training_efficiency: Share of the peak that the products of forward and backward reach.
        update_efficiency: Share of the peak that the optimizer's products reach.
        memory_rate: Bytes a second that element-wise work reaches.
        memory: Bytes of a rank's memory.
        kernel_seconds: To launch one operation.
        queued: Whether operations are launched ahead, so that launches and work overlap, as on a GPU.
        node: Link between the ranks of a node.
        network: Link between nodes.
        collective_seconds: To launch one collective.
        overlaps: Whether a rank computes while a collective travels.
        spectrum_seconds: To estimate the norms of one gradient or input on a due step.
        layer_seconds: Of forward and backward of a layer, beside its products.
        sources: Where each number is from, by attribute.
    """

    name: str
    node_ranks: int
    peak: float
    training_efficiency: float
    update_efficiency: float
    memory_rate: float
    memory: float
    kernel_seconds: float
    queued: bool
    node: Link
    network: Link
    collective_seconds: float
    overlaps: bool
    spectrum_seconds: float
    layer_seconds: float = 0.0
    sources: Mapping[str, str] = field(default_factory=dict, repr=False)

    def seconds(self, cost: Cost) -> float:
        """Time of an optimizer's work."""
        working = cost.flops / (self.peak * self.update_efficiency) + cost.moved / self.memory_rate
        launching = cost.kernels * self.kernel_seconds
        return max(working, launching) if self.queued else working + launching

    def all_reduce_seconds(self, ranks: int, size: float) -> float:
        """Time to add up ``size`` bytes over ranks: the faster of ring and tree."""
        if ranks == 1:
            return 0.0
        nodes, local = self._nodes(ranks), min(ranks, self.node_ranks)
        ring = 2 * ((ranks - nodes) * self.node.ring_seconds + (nodes - 1) * self.network.ring_seconds)
        tree = 2 * ((local - 1) * self.node.tree_seconds if local > 1 else 0.0)
        tree += 2 * math.ceil(math.log2(nodes)) * self.network.tree_seconds if nodes > 1 else 0.0
        return self.collective_seconds + min(ring, tree) + all_reduce_bytes(ranks, size) / self._ring_rate(ranks)

    def all_gather_seconds(self, ranks: int, size: float) -> float:
        """Time until every rank has the ``size`` bytes of every other, by a ring."""
        return self._once_round(ranks, all_gather_bytes(ranks, size))

    def broadcast_seconds(self, ranks: int, size: float) -> float:
        """Time until every rank has the ``size`` bytes of one, by a ring."""
        return self._once_round(ranks, size)

    def _once_round(self, ranks: int, passing: float) -> float:
        """Time of a ring in which so many bytes pass by every rank."""
        if ranks == 1:
            return 0.0
        nodes = self._nodes(ranks)
        ring = (ranks - nodes) * self.node.ring_seconds + (nodes - 1) * self.network.ring_seconds
        return self.collective_seconds + ring + passing / self._ring_rate(ranks)

    def network_bytes(self, ranks: int, sent: float) -> float:
        """Of the bytes that a rank sends in a ring, those that leave its node, divided evenly among a node's ranks."""
        return 0.0 if self._nodes(ranks) == 1 else sent / min(ranks, self.node_ranks)

    def _nodes(self, ranks: int) -> int:
        return math.ceil(ranks / self.node_ranks)

    def _ring_rate(self, ranks: int) -> float:
        """Bytes a second of a ring: its data leave a node through all network links of the node at once."""
        local = min(ranks, self.node_ranks)
        rates = [self.node.rate] if local > 1 else []
        return min([*rates, local * self.network.rate] if self._nodes(ranks) > 1 else rates)


def all_reduce_bytes(ranks: int, size: float) -> float:
    """Bytes that each rank sends to add up ``size`` bytes by a ring: reduce-scatter, then all-gather."""
    return 2 * (ranks - 1) / ranks * size


def all_gather_bytes(ranks: int, size: float) -> float:
    """Bytes that each rank sends so that all have the ``size`` bytes of each, by a ring."""
    return (ranks - 1) * size


def broadcast_bytes(ranks: int, size: float) -> float:
    """Bytes that a rank sends, on the average, so that all have the ``size`` bytes of one, by a ring."""
    return (ranks - 1) / ranks * size


def with_network(machine: Machine, gigabits: float) -> Machine:
    """The machine with another line rate of its network, in Gb/s for each rank."""
    return replace(machine, network=replace(machine.network, bandwidth=gigabits / 8 * 1e9))


_NCCL = "NCCL's cost model, src/graph/tuning.cc: protocol Simple"
_ASSUMED = "assumed"
_FITTED = "fitted to two steps of one with Muon, not compiled: step_overhead.py, scaling_gpu.py"

H100 = Machine(
    name="nodes of 8 H100 SXM",
    node_ranks=8,
    peak=989e12,
    training_efficiency=0.258,
    update_efficiency=0.5,
    memory_rate=0.8 * 3.35e12,
    memory=80e9,
    kernel_seconds=10e-6,
    queued=True,
    node=Link(450e9, 0.83, 3.4e-6, 4.0e-6),
    network=Link(50e9, 0.9, 14e-6, 14e-6),
    collective_seconds=8.4e-6,
    overlaps=True,
    spectrum_seconds=1.1e-3,
    layer_seconds=4.16e-3,
    sources={
        "peak": "NVIDIA H100 data sheet: bfloat16, dense",
        "training_efficiency": _FITTED,
        "layer_seconds": _FITTED,
        "update_efficiency": _ASSUMED,
        "memory_rate": "NVIDIA H100 data sheet: 3.35 TB/s; 0.8 of it assumed",
        "memory": "NVIDIA H100 data sheet",
        "kernel_seconds": f"{_ASSUMED}, with the Python around it; none is queued when the optimizer begins, since "
        "Trainer waits for the loss (logging_nan_inf_filter)",
        "node.bandwidth": "NVIDIA H100 data sheet: NVLink 900 GB/s, both directions together",
        "node.efficiency": "NCCL issue 1264: 376 to 380 of 450 GB/s in point-to-point tests",
        "network.bandwidth": "NVIDIA DGX H100 data sheet: eight ConnectX-7 of 400 Gb/s",
        "network.efficiency": _ASSUMED,
        "node.ring_seconds": _NCCL,
        "node.tree_seconds": _NCCL,
        "network.ring_seconds": _NCCL,
        "network.tree_seconds": _NCCL,
        "collective_seconds": _NCCL,
        "overlaps": f"{_ASSUMED}: a collective takes nothing from the compute beside it",
        "spectrum_seconds": "measured on one H200, width 768: adaptation_overhead.py, 0.131 s more for 120 spectra",
    },
)
