"""The momentum of matrices: its moving average, and the look-ahead that updates are made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hf_schatten.distributed.sharded import local
from hf_schatten.linalg.many_matrices import advance_averages
from hf_schatten.linalg.place import flat
from hf_schatten.optim.finite_gradients import FiniteGradients
from hf_schatten.optim.matrix import MOMENTUM, SKIPPED, STEP, Group, Matrix, State
from hf_schatten.optim.preconditioning import PRECONDITIONERS


def count_steps(
    group: Group, parameters: Sequence[Tensor], states: Mapping[Tensor, State], gradients: FiniteGradients
) -> None:
    """Count a step of the parameters of a group, and take their gradients into what the preconditioner keeps."""
    if not parameters:
        return
    torch._foreach_add_([states[parameter][STEP] for parameter in parameters], 1.0)
    gradients.count_skipped(parameters, [states[parameter][SKIPPED] for parameter in parameters])
    preconditioner = PRECONDITIONERS[group["precondition"]]
    for parameter in parameters:
        preconditioner.advance(group, parameter, states[parameter], gradients)


class Momenta:
    """The moving averages of gradients in one step: each is advanced once, when it is asked for.

    A gradient that is not finite leaves its average as it is. What is asked for is what the average would be if the
    gradient came once more; where a group wants no such look-ahead (``nesterov``), the average.
    """

    def __init__(self, gradients: FiniteGradients) -> None:
        self._gradients = gradients

    def write(self, matrices: Sequence[Matrix], out: Tensor, divisors: Tensor) -> None:
        """Advance whole matrices, and write what is asked for, over ``divisors`` (B,), into ``out`` (B, m, n)."""
        self._advance(matrices, out, divisors)

    def advance(self, matrices: Iterable[Matrix]) -> None:
        """Advance matrices that another process computes with, and the rows that this one has of shards."""
        alike: dict[torch.device, list[Matrix]] = {}
        shards: dict[Tensor, Matrix] = {}
        for matrix in matrices:
            if self._gradients.is_sharded(matrix.parameter):
                shards[matrix.parameter] = matrix
            else:
                alike.setdefault(matrix.parameter.device, []).append(matrix)
        for together in alike.values():
            self._advance(together, None, None)
        for parameter, matrix in shards.items():
            momentum = local(matrix.state[MOMENTUM])
            gradient = self._gradients.gradient(parameter, momentum.dtype, momentum)
            momentum.lerp_(gradient, 1 - matrix.group["momentum"])

    def of_shard(self, matrix: Matrix) -> Tensor:
        """Return what is asked for of the rows of a matrix' parameter that this process has."""
        momentum = local(matrix.state[MOMENTUM])
        if not matrix.group["nesterov"]:
            return momentum
        return look_ahead(momentum, self._gradients.gradient(matrix.parameter, momentum.dtype, momentum), matrix.group)

    def _advance(self, matrices: Sequence[Matrix], out: Tensor | None, divisors: Tensor | None) -> None:
        advance_averages(
            [matrix.state[MOMENTUM] for matrix in matrices],
            flat([matrix.momentum_place for matrix in matrices]),
            [self._gradients.whole(matrix.parameter) for matrix in matrices],
            flat([matrix.place for matrix in matrices]),
            [1 - matrix.group["momentum"] for matrix in matrices],
            [matrix.group["nesterov"] for matrix in matrices],
            self._gradients.keeps([matrix.parameter for matrix in matrices]),
            out,
            divisors,
        )


def look_ahead(momentum: Tensor, gradient: Tensor, group: Group) -> Tensor:
    """Return what a moving average would be with one gradient more, of any shape that both have."""
    return torch.lerp(momentum, gradient.to(momentum.dtype), 1 - group["momentum"])
