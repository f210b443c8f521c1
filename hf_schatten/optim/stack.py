"""A stack: matrices of one wide shape, dtype, device and rule, whose updates are computed by batched operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_schatten.distributed.sharded import local
from hf_schatten.exponent import exponent_of
from hf_schatten.optim.matrix import MOMENTUM, Matrix, bias_corrections
from hf_schatten.optim.preconditioning import PRECONDITIONERS, Direction, Preconditioner
from hf_schatten.optim.step_rules import StepRule, Update, step_rule_of
from hf_schatten.options import SchattenOptions

WriteMomentum = Callable[[Matrix, Tensor], None]  # into (m, n), still with the bias of a start at zero

# Bytes that one stack may take for its temporaries; a matrix that needs more is a stack of its own.
WORKSPACE = 512 << 20
# Temporaries of a matrix (m, n), m <= n, while its stack is updated: momentum, normalised momentum, iterate, product
# and weighted sum; Gram matrices and polynomials of them. A preconditioner has rectangles of its own.
_RECTANGLES, _SQUARES = 5, 4


@dataclass(frozen=True, eq=False)
class Stack:
    """Matrices that are updated together, and the rules that they share."""

    matrices: list[Matrix]  # B of one wide shape, dtype and device
    rule: StepRule
    preconditioner: Preconditioner

    def update(self, write_momentum: WriteMomentum, direction: Direction) -> Update:
        """Return the updates: one batched direction of (look-ahead) momenta, each matrix with its own p."""
        average = local(self.matrices[0].state[MOMENTUM])
        momenta = average.new_empty(len(self.matrices), *self.matrices[0].wide_shape)
        for matrix, slot in zip(self.matrices, momenta, strict=True):
            write_momentum(matrix, slot)
        # The bias of a look-ahead is that of one step more.
        averages = [(matrix.group["momentum"], matrix.group["nesterov"]) for matrix in self.matrices]
        momenta.div_(bias_corrections(self.matrices, averages).to(momenta.dtype))
        p = torch.stack([matrix.p for matrix in self.matrices])  # (B,)
        found = self.preconditioner.directions(self.matrices, momenta, p, direction, self.rule.measure)
        return Update(self.matrices, found.directions, exponent_of(p).to(momenta.dtype), found.products)


def stacks_of(matrices: Iterable[Matrix], options_of: Callable[[dict[str, Any]], SchattenOptions]) -> list[Stack]:
    """Return the stacks that matrices make, each within :data:`WORKSPACE`, given the options of their groups."""
    alike: dict[Any, list[Matrix]] = {}
    for matrix in matrices:
        average, group = matrix.state[MOMENTUM], matrix.group
        rules = group["step_rule"], group["scale"], group["precondition"]
        alike.setdefault((matrix.wide_shape, average.dtype, average.device, rules), []).append(matrix)
    stacks = []
    for ((m, n), dtype, *_), together in alike.items():
        options = options_of(together[0].group)
        rule, preconditioner = step_rule_of(options), PRECONDITIONERS[options.precondition]
        needed = ((_RECTANGLES + preconditioner.rectangles) * m * n + _SQUARES * m * m) * dtype.itemsize
        size = max(1, WORKSPACE // needed)
        stacks += [
            Stack(together[start : start + size], rule, preconditioner) for start in range(0, len(together), size)
        ]
    return stacks
