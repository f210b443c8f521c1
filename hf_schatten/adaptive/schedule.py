"""p that follows the step and is not measured."""

from __future__ import annotations

from collections.abc import Collection

from hf_schatten.exponent import exponent_of, p_of
from hf_schatten.optim.policy import Optimized, Policy


class ScheduledP(Policy):
    """A policy that moves s = 1/p of the named matrices linearly in the step from ``1/start`` to ``1/end``.

    The number of steps is None until a Trainer says how long it trains.
    """

    def __init__(self, start: float, end: float, steps: int | None, matrices: Collection[str]) -> None:
        super().__init__(matrices)
        self.steps = steps
        self._exponents = exponent_of(start), exponent_of(end)

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
