"""A stack: matrices of one wide shape, dtype, device and rule, whose updates are computed by batched operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_schatten.distributed.owners import Write
from hf_schatten.exponent import exponent_of
from hf_schatten.optim.matrix import MOMENTUM, Matrix, P
from hf_schatten.optim.preconditioning import PRECONDITIONERS, Direction, Preconditioner
from hf_schatten.optim.step_rules import StepRule, Update, step_rule_of
from hf_schatten.options import SchattenOptions

# Bytes that one stack may take for momenta and directions: this many, or half of what all momenta take where that is
# more, so that the number of stacks does not grow with the model. A matrix that needs more is a stack of its own.
MEMORY = 512 << 20
SHARE_OF_MOMENTA = 0.5
_RECTANGLES = 2  # a preconditioner has more

# From B matrices to the share of their gradients that are not zero, (B,).
Presence = Callable[[Sequence[Matrix]], Tensor]

# From a shape (m, n), dtype and device to that of momenta where half precision is enough.
MomentaDtype = Callable[[tuple[int, int], torch.dtype, torch.device], torch.dtype]


@dataclass(frozen=True, eq=False)
class Stack:
    """Matrices that are updated together, and the rules that they share."""

    matrices: list[Matrix]  # B of one wide shape, dtype and device
    rule: StepRule
    preconditioner: Preconditioner
    dtype: torch.dtype  # of momenta and directions

    def update(self, write: Write, presence: Presence, direction: Direction) -> Update:
        """Return the updates: one batched direction of (look-ahead) momenta, each matrix with its own p."""
        p = self._p()
        momenta = torch.empty(len(self.matrices), *self.matrices[0].wide_shape, dtype=self.dtype, device=p.device)
        write(self.matrices, momenta)
        found = self.preconditioner.directions(self.matrices, momenta, p, direction)
        exponents = exponent_of(p).to(found.squares.dtype)
        return Update(self.matrices, found.directions, exponents, *found[1:], presence(self.matrices))

    def _p(self) -> Tensor:
        """Return the exponents, (B,), in a number of operations that does not grow with B."""
        states = {id(matrix.state): matrix.state for matrix in self.matrices}
        return torch.cat([state[P] for state in states.values()])[self._positions]

    @cached_property
    def _positions(self) -> Tensor:
        """Return where the exponents of the matrices are among those of their parameters, (B,)."""
        starts, total = {}, 0
        for matrix in self.matrices:
            if id(matrix.state) not in starts:
                starts[id(matrix.state)] = total
                total += len(matrix.state[P])
        positions = [starts[id(matrix.state)] + matrix.index for matrix in self.matrices]
        return torch.tensor(positions).to(self.matrices[0].state[P].device)


def stacks_of(
    matrices: Iterable[Matrix], options_of: Callable[[dict[str, Any]], SchattenOptions], momenta_dtype: MomentaDtype
) -> list[Stack]:
    """Return the stacks that matrices make, given the options of their groups."""
    alike: dict[Any, list[Matrix]] = {}
    total = 0
    for matrix in matrices:
        average, group = matrix.state[MOMENTUM], matrix.group
        rules = group["step_rule"], group["scale"], group["precondition"]
        alike.setdefault((matrix.wide_shape, average.dtype, average.device, rules), []).append(matrix)
        total += matrix.wide_shape[0] * matrix.wide_shape[1] * average.dtype.itemsize
    stacks = []
    for ((m, n), average_dtype, device, _), together in alike.items():
        options = options_of(together[0].group)
        rule, preconditioner = step_rule_of(options), PRECONDITIONERS[options.precondition]
        half = preconditioner.takes_half_precision
        dtype = momenta_dtype((m, n), average_dtype, device) if half else average_dtype
        needed = (_RECTANGLES + preconditioner.rectangles) * m * n * dtype.itemsize
        size = max(1, int(max(MEMORY, SHARE_OF_MOMENTA * total)) // needed)
        stacks += [
            Stack(together[start : start + size], rule, preconditioner, dtype)
            for start in range(0, len(together), size)
        ]
    return stacks
