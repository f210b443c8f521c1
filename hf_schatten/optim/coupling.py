"""Whether the lengths of all matrices' updates depend on each other.

Coupled, the norm of all updates together is ``(Σ (w ‖T‖)^a)^{1/a}``, with the order a and a weight w for each matrix:
the balls of :mod:`hf_schatten.optim.step_rules` are one ball of this norm, and the penalties one penalty. With
``c = coupling_factors(d)`` of the dual norms d, an update has the length c (``ball``) or c Σ d c (``regularized``).

Source: B. Ma, J. Zhang and C. He 2026, "Schattor: Schatten-family methods for deep learning optimization", lemma 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hf_schatten.distributed.owners import Delivery, Write
from hf_schatten.linalg.oracles import coupling_factors
from hf_schatten.optim.matrix import Matrix
from hf_schatten.optim.momentum import Momenta
from hf_schatten.optim.preconditioning import Direction
from hf_schatten.optim.stack import Stack
from hf_schatten.optim.step_rules import ORACLES, Ball, Update
from hf_schatten.option_names import CouplingWeights
from hf_schatten.options import SchattenOptions, WeightFunction

# From stacks, and what writes their momenta, to their updates and what the directions are multiplied by, (B,).
ScaledUpdates = Callable[[Sequence[Stack], Write], Iterator[tuple[Update, Tensor]]]

# Of a matrix (m, n) = (out, in).
COUPLING_WEIGHTS: dict[CouplingWeights, WeightFunction] = {
    "uniform": lambda name, shape: 1.0,
    "sqrt_m_over_n": lambda name, shape: math.sqrt(shape[0] / shape[1]),
    # At p = inf, w ‖T‖ is then the operator norm between root mean squares of inputs and of outputs
    # (Yang, Simon and Bernstein 2023, "A spectral condition for feature learning").
    "sqrt_n_over_m": lambda name, shape: math.sqrt(shape[1] / shape[0]),
}


class Independent:
    """Every matrix for itself: a stack's updates are computed when they are asked for."""

    def start(self, delivery: Delivery, momenta: Momenta, direction: Direction) -> ScaledUpdates:
        """Begin a step with a delivery of all its matrices, their momenta, and what makes directions of these."""

        def scaled(stacks: Sequence[Stack], write: Write) -> Iterator[tuple[Update, Tensor]]:
            for stack in stacks:
                update = stack.update(write, momenta.presence, direction)
                yield update, stack.rule.factors(update)

        return scaled


class Coupled(Independent):
    """All matrices together, by one oracle: their directions, one copy of the matrices, are kept until all are known.

    Nothing waits for the device. The weights are a name, or a function of a matrix's name and its (out, in).
    """

    def __init__(self, rule: Ball, order: float, weights: CouplingWeights | WeightFunction) -> None:
        self.rule = rule
        self.order = order
        self.weight_of = weights if callable(weights) else COUPLING_WEIGHTS[weights]

    def start(self, delivery: Delivery, momenta: Momenta, direction: Direction) -> ScaledUpdates:  # noqa: D102
        stacks = [stack for work in delivery.work for stack in work]
        updates = [stack.update(momenta.write, momenta.presence, direction) for stack in stacks]
        scaled = {
            id(stack): (update, length.to(update.exponents) * self.rule.of_length_one(update))
            for stack, update, length in zip(stacks, updates, self._lengths(updates, delivery), strict=True)
        }
        return lambda some, write: (scaled[id(stack)] for stack in some)

    def _lengths(self, updates: Sequence[Update], delivery: Delivery) -> Sequence[Tensor]:
        """Return the lengths of each update's matrices, (B,).

        Raises:
            ValueError: when a weight is not above 0.
        """
        matrices, peers = delivery.items, delivery.peers
        position = {id(matrix): number for number, matrix in enumerate(matrices)}
        numbers = [position[id(matrix)] for update in updates for matrix in update.matrices]
        index = torch.tensor(numbers, dtype=torch.long).to(matrices[0].momentum.device, non_blocking=True)
        duals = matrices[0].momentum.new_zeros(len(matrices))
        if updates:
            duals[index] = torch.cat([update.dual_norms.to(duals) for update in updates])
        if peers.size > 1:
            dist.all_reduce(duals, group=peers.group)
        weights = torch.tensor([self._weight(matrix) for matrix in matrices], dtype=duals.dtype)
        factors = coupling_factors(duals, self.order, weights.to(duals.device, non_blocking=True))
        lengths = self.rule.coupled_lengths(factors, duals)
        return lengths[index].split([len(update.matrices) for update in updates])

    def _weight(self, matrix: Matrix) -> float:
        weight = self.weight_of(matrix.name, matrix.shape)
        if not 0 < weight < math.inf:
            raise ValueError(f"coupling_weights gives {matrix.name!r} the weight {weight!r}: return a number above 0.")
        return weight


def coupling_of(options: SchattenOptions) -> Independent:
    """Return the coupling that options ask for."""
    if options.coupling_order is None:
        return Independent()
    return Coupled(ORACLES[options.step_rule], options.coupling_order, options.coupling_weights)
