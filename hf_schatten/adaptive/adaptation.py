"""When p is re-estimated: the policy that ties probe, criterion and optimizer together."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from hf_schatten.adaptive.criterion import (
    CRITERIA,
    CURVES,
    NODES,
    Criterion,
    Estimator,
    Factor,
    Sample,
    curvature_curves,
    gradient_curves,
    maximising_exponent,
    objective_curve,
)
from hf_schatten.adaptive.probe import GramSum, Probe, RowSample
from hf_schatten.distributed.processes import (
    UnsupportedEngineError,
    mean_over_processes,
    process_count,
    sum_over_processes,
)
from hf_schatten.distributed.sharded import is_sharded, local, owned_gradients
from hf_schatten.optim.matrix import Matrix, layout_of
from hf_schatten.optim.schatten_p import SchattenP
from hf_schatten.options import SchattenOptions

logger = logging.getLogger(__name__)

_Curvature = tuple[Factor, Factor | None]  # of inputs, and of outputs' gradients where they are sampled

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
        self._probe = Probe(model, layers, new_sample, outputs=CRITERIA[options.criterion].needs_outputs)
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
        curvature = self._curvature(matrices)
        self._report_unsampled({matrix.name for matrix in matrices if matrix.name not in curvature})
        if self._has_shards(matrices):
            self._learn(optimizer, self._measure_shards(optimizer, matrices, curvature))
            return
        criterion = CRITERIA[self._options.criterion]
        samples = (_sample(criterion, matrix, curvature.get(matrix.name)) for matrix in matrices)
        nothing = _Measurement.of_nothing(optimizer.steps_taken() + 1, len(matrices), matrices[0].parameter.device)
        estimator = Estimator.named(self._options.p_estimator)
        measure = partial(
            _measure,
            nothing,
            statistics=lambda some: criterion.statistics(some, estimator),
            at_once=1 if criterion.needs_momentum else len(matrices),
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
        self, optimizer: SchattenP, matrices: Sequence[Matrix], curvature: Mapping[str, _Curvature]
    ) -> _Measurement:
        """Measure the rows of this process, and the gradients of the parameters whose owner it is.

        Raises:
            UnsupportedEngineError: with an option that needs whole momenta on every process.
        """
        if CRITERIA[self._options.criterion].needs_momentum or self._worker is not None:
            raise UnsupportedEngineError(
                f"criterion={self._options.criterion!r} with p_async={self._options.p_async} is not supported where "
                "FSDP shards the parameters: set criterion=kronecker or holder and p_async=false, or use DDP."
            )
        estimator = Estimator.named(self._options.p_estimator)
        device = local(matrices[0].parameter).device
        measured = _Measurement.of_nothing(optimizer.steps_taken() + 1, len(matrices), device)
        row_of = {matrix.name: row for row, matrix in enumerate(matrices)}
        measured.statistics.fill_(torch.nan)  # what nobody measures
        known = [matrix.name for matrix in matrices if matrix.name in curvature]
        for name, curve in zip(known, curvature_curves([curvature[n] for n in known], estimator), strict=True):
            measured.statistics[row_of[name], 1] = curve
        for matrix, gradient in owned_gradients(matrices, self._options.buffer_mib):
            measured.statistics[row_of[matrix.name], 0] = gradient_curves([gradient], estimator)[0]
        valid = measured.statistics.isfinite().all(dim=-1)
        return replace(measured, statistics=measured.statistics.nan_to_num(0.0), valid=valid)

    def _curvature(self, matrices: Sequence[Matrix]) -> dict[str, _Curvature]:
        """Return the factors of each matrix whose input was sampled; Gram matrices are added up over all processes."""
        sampled = self._probe.take()
        cut = _of_part if self._options.sync == "statistics" else _gram_of_part
        outputs = {
            matrix.name: cut(sampled.outputs[matrix.parameter_name], matrix)
            for matrix in matrices
            if matrix.parameter_name in sampled.outputs
        }
        if self._options.sync == "statistics":
            of_inputs = {name: Factor(rows) for name, rows in sampled.inputs.items()}
            of_outputs = {name: Factor(rows) for name, rows in outputs.items()}
        else:
            of_inputs, of_outputs = self._summed(matrices, (sampled.inputs, outputs))
        return {
            matrix.name: (of_inputs[matrix.input_name], of_outputs.get(matrix.name))
            for matrix in matrices
            if matrix.input_name in of_inputs
        }

    def _summed(
        self, matrices: Sequence[Matrix], grams: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
    ) -> tuple[dict[str, Factor], dict[str, Factor]]:
        """Return the factors of Gram matrices (n, n) of inputs and outputs, added up over all processes at once.

        Those that are not finite, or zero, are left out.
        """
        needed = CRITERIA[self._options.criterion].needs_outputs
        # Of what any process may have sampled, in one order: experts' outputs are not.
        sizes = [
            {matrix.input_name: matrix.shape[1] for matrix in matrices},
            {matrix.name: matrix.shape[0] for matrix in matrices if needed and matrix.parameter.ndim != 3},
        ]
        keys = [(side, name, n) for side in (0, 1) for name, n in sizes[side].items()]
        device = local(matrices[0].parameter).device
        nothing = torch.zeros(1, dtype=torch.float64, device=device)
        own = [grams[side].get(name, nothing.expand(n, n)).flatten() for side, name, n in keys]
        pieces = sum_over_processes(torch.cat(own)).split([n * n for _, _, n in keys])
        found = [piece.view(n, n) for (_, _, n), piece in zip(keys, pieces, strict=True)]
        traces = torch.stack([gram.trace() for gram in found]).tolist()  # one wait for the device
        factors: tuple[dict[str, Factor], dict[str, Factor]] = {}, {}
        for (side, name, _), gram, trace in zip(keys, found, traces, strict=True):
            if 0 < trace < math.inf:
                factors[side][name] = Factor.of_gram(gram)
        return factors

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


def _of_part(rows: Tensor, matrix: Matrix) -> Tensor:
    """Return the columns of output rows (T, out) that belong to one matrix of a parameter."""
    layout = replace(layout_of(matrix.group), transposed=False)
    return layout.matrix(rows.mT, matrix.index).mT


def _gram_of_part(gram: Tensor, matrix: Matrix) -> Tensor:
    return _of_part(_of_part(gram, matrix).mT, matrix)


def _sample(criterion: Criterion, matrix: Matrix, curvature: _Curvature | None) -> Sample | None:
    if curvature is None or matrix.gradient is None:
        return None
    gradient, momentum = matrix.gradient, matrix.look_ahead() if criterion.needs_momentum else None
    if matrix.group["transposed"]:
        gradient, momentum = gradient.mT, None if momentum is None else momentum.mT
    return Sample(gradient, momentum, *curvature)


def _measure(
    nothing: _Measurement,
    samples: Iterable[Sample | None],
    *,
    statistics: Callable[[Sequence[Sample]], Tensor],
    at_once: int,
    illustrated: Collection[int],
) -> _Measurement:
    """Return the statistics of every sample; what is missing, zero or not finite is not measured.

    ``at_once`` samples are in memory together.
    """
    rows, spectra = nothing.statistics.fill_(torch.nan), {}
    numbered = ((index, sample) for index, sample in enumerate(samples) if sample is not None)
    while some := list(islice(numbered, at_once)):
        finite = torch.stack([sample.is_finite() for _, sample in some]).tolist()  # one wait for the device
        measured = [pair for pair, usable in zip(some, finite, strict=True) if usable]
        if measured:
            for (index, _), curves in zip(measured, statistics([sample for _, sample in measured]), strict=True):
                rows[index] = curves
        for index, sample in measured:
            if index in illustrated:
                spectra[index] = _spectrum(sample.gradient), _spectrum(sample.inputs.rows)
    known = rows.isfinite().flatten(1).all(dim=1)
    return replace(nothing, valid=known[:, None].expand_as(nothing.valid), spectra=spectra)


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
