"""What may change p during training: the interface of the adaptation, and the schedule that follows the step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from hf_schatten.optim.matrix import Matrix
    from hf_schatten.optim.schatten_p import SchattenP


class Policy(Protocol):
    """Changes the p of an optimizer's matrices; :class:`SchattenP` calls it around every update.

    Attributes:
        matrices: names of those whose p it changes.
        estimates: how often it has measured p.
    """

    matrices: frozenset[str]
    estimates: int

    def before_update(self, optimizer: SchattenP) -> None:
        """Change p, where this step asks for it; every process takes part."""

    def observe(self, matrices: Sequence[Matrix], directions: Tensor, factors: Tensor) -> None:
        """See the updates of a batch of matrices: ``factors`` (B,) times ``directions`` (B, m, n), m <= n."""

    def after_update(self, optimizer: SchattenP) -> None:
        """Prepare the next step."""

    def after_load(self, optimizer: SchattenP) -> None:
        """Prepare the next step after another state has been loaded."""

    def pause(self) -> None:
        """Leave forwards alone until the next update is prepared."""

    def remove(self) -> None:
        """Leave the model as it was."""


class ScheduledP:
    """Moves s = 1/p linearly in the step from ``1/p_start`` to ``1/p_end``, where it then stays.

    Args:
        p_start: p of the first step.
        p_end: p from step ``steps`` on; at most -4 ends beyond Muon.
        steps: number of steps of the schedule. None until a Trainer says how long it trains.
        matrices: names of the matrices that follow the schedule.

    Attributes:
        matrices: those names.
        estimates: 0, since nothing is measured.
    """

    estimates = 0

    def __init__(self, p_start: float, p_end: float, steps: int | None, matrices: Collection[str]) -> None:
        self.steps = steps
        self._exponents = 1 / p_start, 1 / p_end
        self.matrices = frozenset(matrices)

    def exponent(self, step: int) -> float:
        """Return s at a step, counted from 1.

        Raises:
            RuntimeError: when the length of the schedule is unknown.
        """
        if self.steps is None:
            raise RuntimeError(
                "p='schedule' needs the number of training steps: outside a Trainer, set the option p_steps."
            )
        start, end = self._exponents
        progress = min(1.0, (step - 1) / max(1, self.steps - 1))
        return start + progress * (end - start)

    def before_update(self, optimizer: SchattenP) -> None:
        """Set p for the step that is about to be taken."""
        s = self.exponent(optimizer.steps_taken() + 1)
        p = 1 / s if s else float("inf")
        for matrix in optimizer.matrices():
            if matrix.name in self.matrices:
                matrix.p.fill_(p)

    def observe(self, matrices: Sequence[Matrix], directions: Tensor, factors: Tensor) -> None:
        """Nothing to see."""

    def after_update(self, optimizer: SchattenP) -> None:
        """Nothing to prepare."""

    def after_load(self, optimizer: SchattenP) -> None:
        """Nothing to prepare."""

    def pause(self) -> None:
        """Nothing to pause."""

    def remove(self) -> None:
        """Nothing to remove."""
