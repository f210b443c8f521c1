"""The momentum of matrices: its moving average, and the look-ahead that updates are made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hf_schatten.distributed.pieces import is_sharded, local
from hf_schatten.linalg.constants import constant
from hf_schatten.linalg.many_matrices import advance_averages
from hf_schatten.linalg.place import Place
from hf_schatten.optim.finite_gradients import FiniteGradients
from hf_schatten.optim.matrix import (
    ABSENCE,
    MOMENTUM,
    SKIPPED,
    STEP,
    Group,
    Matrix,
    State,
    bias_corrections,
    by_device,
)
from hf_schatten.optim.numbers_of import NumbersOf, repeated
from hf_schatten.optim.preconditioning import PRECONDITIONERS


class Momenta:
    """The moving averages of gradients in one step: each is advanced once, when it is asked for.

    A gradient that is not finite leaves its average as it is. What is asked for is what the average would be if the
    gradient came once more; where a group wants no such look-ahead (``nesterov``), the average. Averages start at zero
    and are too small at first: they are divided by the sum of their weights.

    A gradient of zeros, as that of an expert without tokens, makes an average smaller, which a step of fixed length
    does not see. :meth:`presence` is the share of the weights of an average that gradients other than zero have: with
    none for k steps it is β^k. Steps are as much shorter, so that after its last gradient a matrix moves on as far as
    its momentum remembers, and stops.
    """

    def __init__(self, gradients: FiniteGradients) -> None:
        self._gradients = gradients
        self._divisors, self._presence = NumbersOf(), NumbersOf()  # float64

    def count(self, groups: Iterable[Group], states: Mapping[Tensor, State]) -> None:
        """Count a step of the matrices of some groups, and take gradients into what their preconditioners keep."""
        group_of: dict[Tensor, Group] = {}
        for group in groups:
            if "max_momentum" in group:  # torch's schedules of it cycle the first of the betas, which is AdamW's
                group["momentum"] = group["betas"][0]
            preconditioner = PRECONDITIONERS[group["precondition"]]
            for parameter in self._gradients.of(group["params"]):
                group_of[parameter] = group
                preconditioner.advance(group, parameter, states[parameter], self._gradients)
        for device, together in by_device(group_of).items():
            self._count_on(
                device, together, [group_of[each] for each in together], [states[each] for each in together]
            )

    def _count_on(
        self, device: torch.device, parameters: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State]
    ) -> None:
        steps, counters = ([state[key] for state in states] for key in (STEP, SKIPPED))
        torch._foreach_add_(steps, 1.0)
        skipped = torch.stack(counters) + (1 - self._gradients.keeps(parameters))
        torch._foreach_copy_(counters, skipped.unbind())
        decays, ahead = ([group[key] for group in groups] for key in ("momentum", "nesterov"))
        # The bias of a look-ahead is that of one step more.
        divisors = bias_corrections(
            steps, skipped, constant(tuple(decays), device), constant(tuple(ahead), steps[0].device)
        )
        self._divisors.add(parameters, divisors)

        absences = [state[ABSENCE] for state in states]
        counts = list(map(len, absences))  # of matrices
        zero = self._gradients.zeros(parameters, [len(group["parts"]) or 1 for group in groups]).double()
        keep = self._gradients.keeps(parameters)
        rates = [1 - decay for decay in decays]
        rates_ahead = [rate * each for rate, each in zip(rates, ahead, strict=True)]
        rate, rate_ahead = (repeated(keep * constant(tuple(each), device), counts) for each in (rates, rates_ahead))
        absence = torch.cat(absences).lerp(zero, rate)
        torch._foreach_copy_(absences, absence.split(counts))
        absence = absence.lerp(zero, rate_ahead)  # with a gradient more, where the momentum looks ahead
        self._presence.add(parameters, (1 - absence / repeated(divisors, counts)).clamp_min(0.0), counts)

    def presence(self, matrices: Sequence[Matrix]) -> Tensor:
        """Return the share of gradients other than zero in what is asked for of B matrices of one device, (B,)."""
        return self._presence.of([each.parameter for each in matrices], [each.index for each in matrices])

    def divisors(self, matrices: Sequence[Matrix]) -> Tensor:
        """Return what the averages of B matrices of one device are divided by, (B,) float64."""
        return self._divisors.of([matrix.parameter for matrix in matrices])

    def write(self, matrices: Sequence[Matrix], out: Tensor) -> None:
        """Advance whole matrices, and write what is asked for, divided, into ``out`` (B, m, n)."""
        self._advance(matrices, out, self.divisors(matrices))

    def advance(self, matrices: Iterable[Matrix]) -> None:
        """Advance matrices that another process computes with, and the rows that this one has of shards."""
        whole: dict[torch.device, list[Matrix]] = {}
        shards: dict[Tensor, Matrix] = {}
        for matrix in matrices:
            if is_sharded(matrix.parameter):
                shards[matrix.parameter] = matrix
            else:
                whole.setdefault(matrix.parameter.device, []).append(matrix)
        for together in whole.values():
            self._advance(together, None, None)
        for parameter, matrix in shards.items():
            momentum = local(matrix.state[MOMENTUM])
            gradient = self._gradients.gradient(parameter, momentum.dtype, momentum)
            momentum.lerp_(gradient, 1 - matrix.group["momentum"])

    def of_shard(self, matrix: Matrix) -> Tensor:
        """Return what is asked for of the rows of a matrix's parameter that this process has."""
        momentum = local(matrix.state[MOMENTUM])
        if not matrix.group["nesterov"]:
            return momentum
        return look_ahead(momentum, self._gradients.gradient(matrix.parameter, momentum.dtype, momentum), matrix.group)

    def _advance(self, matrices: Sequence[Matrix], out: Tensor | None, divisors: Tensor | None) -> None:
        placed = [_placed(matrix) for matrix in matrices]
        advance_averages(
            [matrix.state[MOMENTUM] for matrix in matrices],
            [matrix.momentum_place for matrix in matrices],
            [gradient for gradient, _ in placed],
            [place for _, place in placed],
            [1 - matrix.group["momentum"] for matrix in matrices],
            [matrix.group["nesterov"] for matrix in matrices],
            self._gradients.keeps([matrix.parameter for matrix in matrices]),
            out,
            divisors,
        )


def _placed(matrix: Matrix) -> tuple[Tensor, Place]:
    """Return the gradient of the parameter, nearly always with its strides, and where the matrix lies in it."""
    gradient = matrix.parameter.grad
    assert gradient is not None
    if gradient.stride() == matrix.parameter.stride():
        return gradient, matrix.place
    try:
        return gradient, matrix.layout.place(gradient, matrix.index)
    except ValueError:  # filters in an order that rows and columns do not have
        gradient = gradient.contiguous()
        return gradient, matrix.layout.place(gradient, matrix.index)


def look_ahead(momentum: Tensor, gradient: Tensor, group: Group) -> Tensor:
    """Return what a moving average would be with one gradient more, of any shape that both have."""
    return torch.lerp(momentum, gradient.to(momentum.dtype), 1 - group["momentum"])
