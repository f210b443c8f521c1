"""When p is re-estimated: the cadence that ties probe, criterion and optimizer together."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from .criterion import NODES, holder_exponent, holder_statistics
from .distributed import mean_over_processes
from .linalg.spectrum import exact_log_spectrum
from .optimizer import STATISTICS, P, SchattenP
from .options import SchattenOptions
from .probe import InputProbe

logger = logging.getLogger(__name__)


class Adaptation:
    """Re-estimates p of every routed matrix on due steps, from the step's own gradient and inputs.

    :class:`SchattenP` calls it in its own ``step``, so that it needs no Trainer: before the update of a due step, p is
    estimated from the gradients that the update uses and the rows that the probe sampled; after every step, and after
    a state is loaded, the probe is armed if the next step is due. A step is due when its number (counted from 1, and
    kept in the optimizer's state) is ``p_first_step`` or a multiple of ``p_interval``. All that is learned is
    optimizer state, so that checkpoints carry it.

    The gradient is the one the optimizer sees, after clipping, which does not change the estimate.

    Args:
        model: the model, whose forward begins a micro-batch.
        layers: the module that owns each matrix, by parameter name.
        options: cadence, range and smoothing.

    Attributes:
        estimates: how often p was estimated by this object.
    """

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module], options: SchattenOptions) -> None:
        self.estimates = 0
        self._options = options
        self._reported: set[str] = set()
        self._probe = InputProbe(model, layers, capacity=options.probe_rows)

    def is_due(self, step: int) -> bool:
        """Return whether p is estimated at this step, counted from 1."""
        return step == self._options.p_first_step or step % self._options.p_interval == 0

    def arm(self, optimizer: SchattenP) -> None:
        """Sample the forwards of the next step if that step is due."""
        self._probe.armed = self.is_due(optimizer.steps_taken() + 1)

    def remove(self) -> None:
        """Remove the hooks from the model."""
        self._probe.remove()

    def estimate(self, optimizer: SchattenP) -> None:
        """Update p in the optimizer's state if this step is due; every process must take part.

        Args:
            optimizer: has the state of every matrix, and the step's gradients.
        """
        if not self._probe.armed:
            return
        samples = self._probe.take()
        matrices = dict(optimizer.matrices())
        device = next(iter(matrices.values())).device
        statistics = torch.zeros(len(matrices), 2, NODES, dtype=torch.float64, device=device)
        for row, (name, matrix) in zip(statistics, matrices.items(), strict=True):
            row.copy_(_sampled_statistics(matrix.grad, samples.get(name)))
        measured = statistics.isfinite().flatten(1).all(dim=1)  # (L,)
        statistics, measured = mean_over_processes(statistics, measured)
        self._report_unsampled({name for name in matrices if name not in samples})
        self._learn(optimizer, list(matrices.values()), statistics, measured)
        self.estimates += 1

    def _learn(self, optimizer: SchattenP, matrices: list[Tensor], statistics: Tensor, measured: Tensor) -> None:
        """Update the moving averages of the measured matrices, and their p; the others keep both."""
        states = [optimizer.state[matrix] for matrix in matrices]
        average = torch.stack([state[STATISTICS].to(statistics.device) for state in states])  # (L, 2, NODES)
        p = torch.stack([state[P].to(statistics.device) for state in states])  # (L,)
        average = average.lerp(statistics, 1 - self._options.p_ema_decay)
        s = holder_exponent(average, 1 / self._options.p_max, 1 / self._options.p_min)
        p = torch.where(measured, s.reciprocal().to(p.dtype), p)
        for row, state in enumerate(states):
            state[STATISTICS].copy_(torch.where(measured[row], average[row], state[STATISTICS]))
            state[P].copy_(p[row])

    def _report_unsampled(self, names: set[str]) -> None:
        news = sorted(names - self._reported)
        if news:
            self._reported.update(news)
            logger.warning(
                "No training input of %d of the routed layers was seen on a due step, so their p stays as it is: %s. "
                "Their modules' forward is not called, or the model is in evaluation mode.",
                len(news),
                ", ".join(news[:5]) + (", …" if len(news) > 5 else ""),
            )


def _sampled_statistics(gradient: Tensor | None, rows: Tensor | None) -> Tensor:
    """Return the (2, NODES) statistics of one layer; not finite where gradient or input is missing or zero."""
    if gradient is None or rows is None:
        return torch.full((2, NODES), torch.nan, dtype=torch.float64)
    return holder_statistics(exact_log_spectrum(gradient), exact_log_spectrum(rows))
