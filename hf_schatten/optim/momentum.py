"""The momentum of matrices: its moving average, and the look-ahead that updates are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_schatten.distributed.sharded import local
from hf_schatten.optim.finite_gradients import FiniteGradients
from hf_schatten.optim.matrix import MOMENTUM, SKIPPED, STEP, Group, Matrix, State
from hf_schatten.optim.preconditioning import PRECONDITIONERS


def advance_moments(
    group: Group, parameters: Sequence[Tensor], states: Mapping[Tensor, State], gradients: FiniteGradients
) -> None:
    """Take the gradients of parameters into their momentum, and into what the preconditioner keeps.

    A gradient that is not finite leaves the averages as they are, and is counted.
    """
    preconditioner = PRECONDITIONERS[group["precondition"]]
    gradients.count_skipped(parameters, [states[parameter][SKIPPED] for parameter in parameters])
    for parameter in parameters:
        state, momentum = states[parameter], local(states[parameter][MOMENTUM])
        state[STEP].add_(1)
        momentum.lerp_(gradients.gradient(parameter, momentum.dtype, momentum), 1 - group["momentum"])
        preconditioner.advance(group, parameter, state, gradients)


class LookAhead:
    """What the moving averages would be if the gradients came once more; where a group wants none, the averages.

    A gradient that is not finite leaves its average as it is.
    """

    def __init__(self, gradients: FiniteGradients) -> None:
        self._gradients = gradients

    def write(self, matrix: Matrix, wide: Tensor) -> None:
        """Write that of a matrix into ``wide`` (m, n), still with the bias of a start at zero."""
        out, momentum = matrix.stored(wide), matrix.momentum
        if not matrix.group["nesterov"]:
            out.copy_(momentum)
            return
        assert matrix.gradient is not None
        gradient = self._gradients.where(matrix.parameter, matrix.gradient.to(momentum.dtype), momentum)
        look_ahead(momentum, gradient, matrix.group, out=out)

    def of_shard(self, matrix: Matrix) -> Tensor:
        """Return that of the rows of a matrix' parameter that this process has."""
        momentum = local(matrix.state[MOMENTUM])
        if not matrix.group["nesterov"]:
            return momentum
        return look_ahead(momentum, self._gradients.gradient(matrix.parameter, momentum.dtype, momentum), matrix.group)


def look_ahead(momentum: Tensor, gradient: Tensor, group: Group, out: Tensor | None = None) -> Tensor:
    """Return what a moving average would be with one gradient more, of any shape that both have."""
    return torch.lerp(momentum, gradient.to(momentum.dtype), 1 - group["momentum"], out=out)
