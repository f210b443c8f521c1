"""p that follows the step and is not measured."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from hf_schatten.exponent import exponent_of, p_of
from hf_schatten.optim.matrix import Matrix
from hf_schatten.optim.policy import Optimized


class ScheduledP:
    """Moves s = 1/p linearly in the step from ``1/start`` to ``1/end``, where it then stays.

    Args:
        start: p of the first step.
        end: p from step ``steps`` on; at most -4 ends beyond Muon.
        steps: number of steps of the schedule. None until a Trainer says how long it trains.
        matrices: names of the matrices that follow the schedule.

    Attributes:
        matrices: those names.
        estimates: 0, since nothing is measured.
    """

    estimates = 0

    def __init__(self, start: float, end: float, steps: int | None, matrices: Collection[str]) -> None:
        self.steps = steps
        self._exponents = exponent_of(start), exponent_of(end)
        self.matrices = frozenset(matrices)

    def exponent(self, step: int) -> float:
        """Return s at a step, counted from 1.

        Raises:
            RuntimeError: when the length of the schedule is unknown.
        """
        if self.steps is None:
            raise RuntimeError(
                "p='schedule' needs the number of training steps: outside a Trainer, write it into the option "
                "p_schedule, as p_schedule=4:inf:1000."
            )
        start, end = self._exponents
        progress = min(1.0, (step - 1) / max(1, self.steps - 1))
        return start + progress * (end - start)

    def before_update(self, optimizer: Optimized) -> None:
        """Set p for the step that is about to be taken."""
        p = p_of(self.exponent(optimizer.steps_taken() + 1))
        for matrix in optimizer.matrices():
            if matrix.name in self.matrices:
                matrix.p.fill_(p)

    def observe(self, matrices: Sequence[Matrix], directions: Tensor, factors: Tensor) -> None:
        """Nothing to see."""

    def after_update(self, optimizer: Optimized) -> None:
        """Nothing to prepare."""

    def after_load(self, optimizer: Optimized) -> None:
        """Nothing to prepare."""

    def pause(self) -> None:
        """Nothing to pause."""

    def remove(self) -> None:
        """Nothing to remove."""
