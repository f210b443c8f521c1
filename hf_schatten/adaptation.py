"""When p is re-estimated: the policy that ties probe, criterion and optimizer together."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from .criterion import (
    CRITERIA,
    CURVES,
    NODES,
    Criterion,
    Estimator,
    Inputs,
    Sample,
    gradient_curve,
    maximising_exponent,
    objective_curve,
)
from .distributed import UnsupportedEngineError, mean_over_processes, process_count, sum_over_processes
from .matrix import Matrix
from .optimizer import SchattenP
from .options import SchattenOptions
from .probe import GramSum, InputProbe, RowSample
from .sharded import is_sharded, local, owned_gradients

logger = logging.getLogger(__name__)

_ILLUSTRATED_POINTS = 257  # of the criterion's curve that is kept for a picture
_POWER_ITERATIONS = 20


@dataclass(frozen=True)
class Choice:
    """What the p of one matrix was chosen from, on the host.

    Attributes:
        name: of the matrix.
        step: training step of the estimate.
        gradient_spectrum: singular values of the gradient, (min(m, n),), descending.
        input_spectrum: singular values of the sampled input rows, (min(T, n),), descending.
        exponents: s = 1/p, (K,), ascending.
        objective: the criterion there, (K,), averaged over the estimates so far and the matrix' group.
        chosen: the s that was chosen.
    """

    name: str
    step: int
    gradient_spectrum: Tensor
    input_spectrum: Tensor
    exponents: Tensor
    objective: Tensor
    chosen: float


@dataclass(frozen=True)
class _Measurement:
    """What one process has measured on a due step of L matrices."""

    step: int
    statistics: Tensor  # (L, CURVES, NODES) float64
    valid: Tensor  # (L, CURVES) bool: whether it was measured
    spectra: dict[int, tuple[Tensor, Tensor]]  # of gradient and input, of the illustrated matrices

    @classmethod
    def of_nothing(cls, step: int, count: int, device: torch.device) -> _Measurement:
        statistics = torch.zeros(count, CURVES, NODES, dtype=torch.float64, device=device)
        return cls(step, statistics, torch.zeros(count, CURVES, dtype=torch.bool, device=device), {})


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
        illustrated: how many matrices, evenly spaced, keep what their p was chosen from. Default 0.
        choices: that, of the last estimate, in the order of the matrices.
        updates: stable rank and relative size of the update at the last due step, both scalars, by matrix name.
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
        self.illustrated = 0
        self.choices: list[Choice] = []
        self.updates: dict[str, tuple[Tensor, Tensor]] = {}
        self._options = options
        self._groups = dict(groups)
        self._reported: set[str] = set()
        new_sample = GramSum if options.sync == "gram" else partial(RowSample, options.probe_rows)
        self._probe = InputProbe(model, layers, new_sample)
        self._worker = ThreadPoolExecutor(1, "hf_schatten") if options.p_async else None
        self._pending: Future[_Measurement] | None = None
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

    def observe(self, matrices: Sequence[Matrix], directions: Tensor, factors: Tensor) -> None:
        """Keep stable rank and relative size of the updates of a due step."""
        if not self._probe.armed:
            return
        frobenius = torch.linalg.matrix_norm(directions)  # (B,)
        stable_ranks = (frobenius / _spectral_norm(directions)).square()
        for matrix, stable_rank, size in zip(matrices, stable_ranks, frobenius * factors, strict=True):
            self.updates[matrix.name] = stable_rank, size * matrix.learning_rate / matrix.weight_norm()

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
        matrices = self._adapted(optimizer)
        inputs = self._inputs(matrices)
        self._report_unsampled({matrix.name for matrix in matrices if matrix.input_name not in inputs})
        if self._has_shards(matrices):
            self._learn(optimizer, self._measure_shards(optimizer, matrices, inputs))
            return
        criterion = CRITERIA[self._options.criterion]
        samples = (_sample(criterion, matrix, inputs.get(matrix.input_name)) for matrix in matrices)
        nothing = _Measurement.of_nothing(optimizer.steps_taken() + 1, len(matrices), matrices[0].parameter.device)
        estimator = Estimator.named(self._options.p_estimator)
        measure = partial(
            _measure,
            nothing,
            statistics=lambda sample: criterion.statistics(sample, estimator),
            illustrated=_evenly_spaced(self.illustrated, len(matrices)),
        )
        if self._worker is None:
            self._learn(optimizer, measure(samples))
        elif not self._failed:
            self._pending = self._worker.submit(measure, [sample and sample.copied() for sample in samples])
        else:
            self._pending = Future()
            self._pending.set_result(nothing)

    @staticmethod
    def _has_shards(matrices: Iterable[Matrix]) -> bool:
        return any(is_sharded(matrix.parameter) for matrix in matrices)

    def _measure_shards(
        self, optimizer: SchattenP, matrices: Sequence[Matrix], inputs: Mapping[str, Inputs]
    ) -> _Measurement:
        """Measure the inputs of this process, and the gradients of the parameters whose owner it is.

        Raises:
            UnsupportedEngineError: with an option that needs whole momenta on every process.
        """
        if self._options.criterion != "holder" or self._worker is not None:
            raise UnsupportedEngineError(
                f"criterion={self._options.criterion!r} with p_async={self._options.p_async} is not supported where "
                "FSDP shards the parameters: set criterion=holder and p_async=false, or use DDP."
            )
        estimator = Estimator.named(self._options.p_estimator)
        device = local(matrices[0].parameter).device
        measured = _Measurement.of_nothing(optimizer.steps_taken() + 1, len(matrices), device)
        row_of = {matrix.name: row for row, matrix in enumerate(matrices)}
        measured.statistics.fill_(torch.nan)  # what nobody measures
        for row, matrix in enumerate(matrices):
            if matrix.input_name in inputs:
                measured.statistics[row, 1] = inputs[matrix.input_name].curve(estimator.log_norms)
        for matrix, gradient in owned_gradients(matrices, self._options.buffer_mib):
            measured.statistics[row_of[matrix.name], 0] = gradient_curve(gradient, estimator)
        valid = measured.statistics.isfinite().all(dim=-1)
        return replace(measured, statistics=measured.statistics.nan_to_num(0.0), valid=valid)

    def _inputs(self, matrices: Sequence[Matrix]) -> dict[str, Inputs]:
        """Return what was sampled by name; Gram matrices are first added up over all processes."""
        samples = self._probe.take()
        if self._options.sync == "statistics":
            return {name: Inputs(rows) for name, rows in samples.items()}
        sizes = {matrix.input_name: matrix.shape[1] for matrix in matrices}
        device = local(matrices[0].parameter).device
        grams = [samples.get(name, torch.zeros(n, n, dtype=torch.float64, device=device)) for name, n in sizes.items()]
        total = sum_over_processes(torch.cat([gram.flatten() for gram in grams]))
        pieces = total.split([n * n for n in sizes.values()])
        found = {name: piece.view(n, n) for (name, n), piece in zip(sizes.items(), pieces, strict=True)}
        finite = torch.stack([gram.trace() for gram in found.values()]).tolist()  # one wait for the device
        return {
            name: Inputs.of_gram(gram)
            for (name, gram), trace in zip(found.items(), finite, strict=True)
            if 0 < trace < math.inf
        }

    def _result(self, job: Future[_Measurement]) -> _Measurement | None:
        try:
            return job.result()
        except Exception:
            self._failed = True
            logger.exception(
                "The estimation of p has failed in its worker thread; training goes on with the present p. Set "
                "p_async=false to see the error where it happens."
            )
            return None

    def _learn(self, optimizer: SchattenP, measured: _Measurement | None) -> None:
        """Average over processes and time, and choose p; what no process has measured keeps average and p."""
        matrices = self._adapted(optimizer)
        if measured is None:
            device = matrices[0].parameter.device
            measured = _Measurement.of_nothing(optimizer.steps_taken() + 1, len(matrices), device)
        curves = CRITERIA[self._options.criterion].curves  # the others are zero, and need not travel
        used, known = measured.statistics[:, :curves], measured.valid[:, :curves]
        # Else every process has measured the same, unless a worker has failed.
        if self._options.sync == "statistics" or self._worker is not None or self._has_shards(matrices):
            means, found = mean_over_processes(used.flatten(0, 1), known.flatten())
            used, known = means.view_as(used), found.view_as(known)
        valid = known.all(dim=1)
        statistics = torch.cat([used, torch.zeros_like(measured.statistics[:, curves:])], dim=1)
        statistics = torch.where(valid[:, None, None], statistics, 0.0)  # NaN would pass through a rate of zero
        average = torch.stack([matrix.statistics for matrix in matrices])  # (L, CURVES, NODES)
        weight = torch.stack([matrix.statistics_weight for matrix in matrices])  # (L,)
        rate = valid.to(average.dtype) * (1 - self._options.p_ema_decay)
        average = average.lerp(statistics, rate[:, None, None])
        weight = weight.lerp(torch.ones_like(weight), rate)
        objective = self._objective(average, weight, [self._groups[matrix.name] for matrix in matrices])
        s = maximising_exponent(objective, *self._range)
        p = s.reciprocal().float()
        for row, matrix in enumerate(matrices):
            matrix.statistics.copy_(average[row])
            matrix.statistics_weight.copy_(weight[row])
            matrix.p.copy_(torch.where(valid[row], p[row], matrix.p))
        self.choices = [
            Choice(matrices[row].name, measured.step, *spectra, *self._curve(objective[row]), float(s[row]))
            for row, spectra in measured.spectra.items()
        ]
        self.estimates += 1

    @property
    def _range(self) -> tuple[float, float]:
        return 1 / self._options.largest_p, 1 / self._options.p_min

    def _objective(self, average: Tensor, weight: Tensor, groups: Sequence[int]) -> Tensor:
        """Return the mean criterion of each matrix' group, (L, candidates)."""
        corrected = average / weight[:, None, None]  # an average that starts at zero is too small at first
        own = objective_curve(self._options.criterion, corrected, *self._range)
        known = (weight > 0)[:, None]
        group = torch.tensor(groups, device=average.device)
        total = own.new_zeros(len(groups), own.shape[1] + 1)
        total.index_add_(0, group, torch.cat([torch.where(known, own, 0.0), known.to(own.dtype)], dim=1))
        return (total[:, :-1] / total[:, -1:])[group]

    def _curve(self, objective: Tensor) -> tuple[Tensor, Tensor]:
        """Return exponents and objective at fewer points, on the host."""
        kept = torch.linspace(0, len(objective) - 1, _ILLUSTRATED_POINTS).long()
        exponents = torch.linspace(*self._range, len(objective), dtype=torch.float64)
        return exponents[kept], objective.cpu()[kept]

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
    nothing: _Measurement,
    samples: Iterable[Sample | None],
    *,
    statistics: Callable[[Sample], Tensor],
    illustrated: Collection[int],
) -> _Measurement:
    """Return the statistics of every sample; what is missing, zero or not finite is not measured."""
    rows, spectra = nothing.statistics, {}
    for index, sample in enumerate(samples):
        if sample is None or not sample.is_finite():
            rows[index] = torch.nan
            continue
        rows[index] = statistics(sample)
        if index in illustrated:
            spectra[index] = _spectrum(sample.gradient), _spectrum(sample.inputs.rows)
    measured = rows.isfinite().flatten(1).all(dim=1)
    return replace(nothing, valid=measured[:, None].expand_as(nothing.valid), spectra=spectra)


def _spectrum(X: Tensor) -> Tensor:
    return torch.linalg.svdvals(X.float()).cpu()


def _spectral_norm(X: Tensor) -> Tensor:
    """Return the largest singular value of each matrix (B, m, n) from below, to a few per cent."""
    # Rows and not columns: batched products of a matrix and a column are slow.
    v = torch.ones(X.shape[0], 1, X.shape[2], dtype=X.dtype, device=X.device)
    for _ in range(_POWER_ITERATIONS):
        v = (v @ X.mT) @ X
        v = v / torch.linalg.vector_norm(v, dim=2, keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
    return torch.linalg.vector_norm(v @ X.mT, dim=(1, 2))


def _evenly_spaced(count: int, total: int) -> frozenset[int]:
    return frozenset(torch.linspace(0, total - 1, min(count, total)).round().long().tolist())
