"""When p is re-estimated: the policy that ties probe, criterion and optimizer together."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from .criterion import CRITERIA, CURVES, NODES, Criterion, Inputs, Sample, maximising_exponent, objective_curve
from .distributed import mean_over_processes, process_count
from .linalg.spectrum import LogNormEstimator, exact_log_norms
from .optimizer import Matrix, SchattenP
from .options import SchattenOptions
from .probe import InputProbe

logger = logging.getLogger(__name__)
LOG_NORM_ESTIMATORS = {"exact": exact_log_norms}

Statistics = tuple[Tensor, Tensor]  # (L, CURVES, NODES) float64, and (L,) bool: whether it was measured


class Adaptation:
    """Re-estimates p of routed matrices on due steps, from the step's own gradient and inputs.

    A policy of :class:`SchattenP`, so that it needs no Trainer: before the update of a due step, the statistics are
    measured on the gradients that the update uses and the rows that the probe sampled; after every step, and after a
    state is loaded, the probe is armed if the next step is due. Steps are counted from 1, in the optimizer's state.
    Due are ``p_first_step``, and ``p_interval`` and whatever follows it at distances that grow by
    ``p_interval_growth``. All that is learned is optimizer state, so that checkpoints carry it.

    The gradient is the one the optimizer sees, after clipping, which does not change the estimate.

    With ``p_async`` a worker thread measures, on copies of the gradients of all adapted matrices, and a step never
    waits for it. On one process p changes at the first step after the worker is done, and a due step that comes
    earlier is passed over; on several, p changes at the next due step, at which they meet anyway. A checkpoint does
    not hold measurements under way. An error in the worker is logged at the next step; p then stays as it is.

    Args:
        model: the model, whose forward begins a micro-batch.
        layers: the module that owns each parameter, by parameter name.
        groups: number of the group that each adapted matrix belongs to, by matrix name: a group shares one p, which
            maximises the mean of its matrices' criteria.
        options: criterion, estimator, cadence, range and smoothing.

    Attributes:
        matrices: names of the adapted matrices.
        estimates: how often p was estimated by this object.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        groups: Mapping[str, int],
        options: SchattenOptions,
    ) -> None:
        self.matrices = frozenset(groups)
        self.estimates = 0
        self._options = options
        self._groups = dict(groups)
        self._reported: set[str] = set()
        self._probe = InputProbe(model, layers, capacity=options.probe_rows)
        self._worker = ThreadPoolExecutor(1, "hf_schatten") if options.p_async else None
        self._pending: Future[Statistics] | None = None
        self._failed = False

    def is_due(self, step: int) -> bool:
        """Return whether p is estimated at this step, counted from 1."""
        if step == self._options.p_first_step:
            return True
        if self._options.p_interval_growth == 1:
            return step % self._options.p_interval == 0
        due, interval = self._options.p_interval, float(self._options.p_interval)
        while due < step:
            interval *= self._options.p_interval_growth
            due += round(interval)
        return due == step

    def before_update(self, optimizer: SchattenP) -> None:
        """Update p in the optimizer's state if this step is due; every process must take part.

        Args:
            optimizer: has the state of every matrix, and the step's gradients.
        """
        due, alone = self._probe.armed, process_count() == 1
        if self._pending is not None and (self._pending.done() if alone else due):
            self._learn(optimizer, self._result(self._pending))
            self._pending = None
        if self._failed and alone:
            optimizer.stop_following()
        elif due and self._pending is None:
            self._estimate(optimizer)

    def after_update(self, optimizer: SchattenP) -> None:
        """Sample the forwards of the next step if that step is due."""
        self._probe.arm(self.is_due(optimizer.steps_taken() + 1))

    def after_load(self, optimizer: SchattenP) -> None:
        """Drop what was measured for the state before."""
        self._pending = None
        self._probe.take()
        self.after_update(optimizer)

    def pause(self) -> None:
        """Sample no forwards until the next update is prepared."""
        self._probe.arm(False)

    def remove(self) -> None:
        """Remove the hooks from the model and end the worker."""
        self._probe.remove()
        if self._worker is not None:
            self._worker.shutdown(wait=False, cancel_futures=True)

    def _adapted(self, optimizer: SchattenP) -> list[Matrix]:
        return [matrix for matrix in optimizer.matrices() if matrix.name in self._groups]

    def _estimate(self, optimizer: SchattenP) -> None:
        inputs = {name: Inputs(rows) for name, rows in self._probe.take().items()}
        matrices = self._adapted(optimizer)
        self._report_unsampled({matrix.name for matrix in matrices if matrix.input_name not in inputs})
        criterion, estimator = CRITERIA[self._options.criterion], LOG_NORM_ESTIMATORS[self._options.p_estimator]
        samples = (_sample(criterion, matrix, inputs.get(matrix.input_name)) for matrix in matrices)
        device = matrices[0].parameter.device
        if self._worker is None:
            self._learn(optimizer, _measure(criterion, estimator, samples, len(matrices), device))
        elif not self._failed:
            copies = [sample and sample.copied() for sample in samples]
            self._pending = self._worker.submit(_measure, criterion, estimator, copies, len(matrices), device)
        else:
            self._pending = Future()
            self._pending.set_result(_nothing_measured(len(matrices), device))

    def _result(self, job: Future[Statistics]) -> Statistics | None:
        try:
            return job.result()
        except Exception:
            self._failed = True
            logger.exception(
                "The estimation of p has failed in its worker thread; training goes on with the present p. Set "
                "p_async=false to see the error where it happens."
            )
            return None

    def _learn(self, optimizer: SchattenP, measured: Statistics | None) -> None:
        """Average over processes and time, and choose p; what no process has measured keeps average and p."""
        matrices = self._adapted(optimizer)
        device = matrices[0].parameter.device
        statistics, valid = mean_over_processes(*(measured or _nothing_measured(len(matrices), device)))
        average = torch.stack([matrix.statistics for matrix in matrices])  # (L, CURVES, NODES)
        weight = torch.stack([matrix.statistics_weight for matrix in matrices])  # (L,)
        rate = valid.to(average.dtype) * (1 - self._options.p_ema_decay)
        average = average.lerp(statistics, rate[:, None, None])
        weight = weight.lerp(torch.ones_like(weight), rate)
        p = self._choose(average, weight, [self._groups[matrix.name] for matrix in matrices])
        for row, matrix in enumerate(matrices):
            matrix.statistics.copy_(average[row])
            matrix.statistics_weight.copy_(weight[row])
            matrix.p.copy_(torch.where(valid[row], p[row], matrix.p))
        self.estimates += 1

    def _choose(self, average: Tensor, weight: Tensor, groups: Sequence[int]) -> Tensor:
        """Return the p (L,) that maximises the mean criterion of each matrix's group."""
        options = self._options
        s_min, s_max = 1 / options.p_max, 1 / options.p_min
        known = (weight > 0)[:, None]
        corrected = average / weight[:, None, None]  # an average that starts at zero is too small at first
        objective = objective_curve(options.criterion, corrected, s_min, s_max)  # (L, candidates)
        group = torch.tensor(groups, device=average.device)
        total = objective.new_zeros(len(groups), objective.shape[1])
        total.index_add_(0, group, torch.where(known, objective, 0.0))
        return maximising_exponent(total[group], s_min, s_max).reciprocal().float()

    def _report_unsampled(self, names: set[str]) -> None:
        news = sorted(names - self._reported)
        if news:
            self._reported.update(news)
            logger.warning(
                "No training input of %d of the routed matrices was seen on a due step, so their p stays as it is: "
                "%s. Their modules' forward is not called, or the model is in evaluation mode.",
                len(news),
                ", ".join(news[:5]) + (", …" if len(news) > 5 else ""),
            )


def _sample(criterion: Criterion, matrix: Matrix, inputs: Inputs | None) -> Sample | None:
    if inputs is None or matrix.gradient is None:
        return None
    gradient, momentum = matrix.gradient, matrix.look_ahead() if criterion.needs_momentum else None
    if matrix.group["transposed"]:
        gradient, momentum = gradient.mT, None if momentum is None else momentum.mT
    return Sample(gradient, momentum, inputs)


def _measure(
    criterion: Criterion,
    estimator: LogNormEstimator,
    samples: Iterable[Sample | None],
    count: int,
    device: torch.device,
) -> Statistics:
    """Return the statistics of ``count`` samples; what is missing, zero or not finite is not measured."""
    statistics = _nothing_measured(count, device)[0]
    for row, sample in zip(statistics, samples, strict=True):
        if sample is not None and sample.is_finite():
            row.copy_(criterion.statistics(sample, estimator))
        else:
            row.fill_(torch.nan)
    return statistics, statistics.isfinite().flatten(1).all(dim=1)


def _nothing_measured(count: int, device: torch.device) -> Statistics:
    statistics = torch.zeros(count, CURVES, NODES, dtype=torch.float64, device=device)
    return statistics, torch.zeros(count, dtype=torch.bool, device=device)
