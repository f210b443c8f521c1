"""When p is re-estimated: the policy that ties probe, criterion and optimizer together."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_schatten.adaptive.criterion import Inputs, maximising_exponent, objective_curve
from hf_schatten.adaptive.measurement import (
    Measurement,
    evenly_spaced,
    has_shards,
    measure,
    measure_shards,
    samples_of,
)
from hf_schatten.adaptive.probe import Probe
from hf_schatten.adaptive.update_sizes import UpdateSizes
from hf_schatten.adaptive.whole_rows import is_computed_here, whole_rows
from hf_schatten.distributed.pieces import local
from hf_schatten.distributed.processes import mean_over_processes
from hf_schatten.exponent import exponent_of, p_of
from hf_schatten.matrices.layout import layer_kind
from hf_schatten.optim.matrix import Matrix
from hf_schatten.optim.policy import Optimized, Policy
from hf_schatten.options import SchattenOptions

logger = logging.getLogger(__name__)

_ILLUSTRATED_POINTS = 257  # of the criterion's curve that is kept for a picture


@dataclass(frozen=True)
class Choice:
    """What the p of one matrix was chosen from, on the host."""

    name: str
    step: int  # of the estimate
    gradient_spectrum: Tensor  # singular values of the gradient, (min(m, n),), descending
    input_spectrum: Tensor  # singular values of the sampled input rows, (min(T, n),), descending
    exponents: Tensor  # s = 1/p, (K,), ascending
    objective: Tensor  # the criterion there, (K,), averaged over the estimates so far
    chosen: float  # the s that was chosen


class Adaptation(Policy):
    """A policy that estimates p of the named matrices on due steps, from the step's own gradient and inputs.

    A policy of :class:`hf_schatten.SchattenP`, so that it needs no Trainer: before the update of a due step, the
    statistics are measured on the gradients that the update uses and the rows that the probe sampled; after every
    step, and after a state is loaded, the probe is armed if the next step is due. Due are ``p_first_step`` and every
    multiple of ``p_interval``, counted from 1 in the optimizer's state. All that is learned is optimizer state, so
    that checkpoints carry it. The gradient is the one the optimizer sees, after clipping, which does not change the
    estimate.

    With ``p_async`` a worker thread measures, on copies of the gradients of all adapted matrices, and a step never
    waits for it. On one process p changes at the first step after the worker is done, and a due step that comes
    earlier is passed over; on several, p changes at the next due step, at which they meet anyway. A checkpoint does
    not hold measurements under way. An error in the worker is logged at the next step; p then stays as it is.

    Args:
        model: the model, whose forward begins a micro-batch.
        layers: the module that owns each parameter, by parameter name.
        matrices: names of the adapted matrices.
        options: estimator, cadence, range and smoothing.

    Attributes:
        illustrated: how many matrices, evenly spaced, keep what their p was chosen from. Default 0.
        choices: that, of the last estimate, in the order of the matrices.
        updates: stable rank and relative size of the update at the last due step, both scalars, by matrix name.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        matrices: Collection[str],
        options: SchattenOptions,
    ) -> None:
        super().__init__(matrices)
        self.illustrated = 0
        self.choices: list[Choice] = []
        self.updates: dict[str, tuple[Tensor, Tensor]] = {}
        self._sizes = UpdateSizes()
        self._observing = False
        self._options = options
        self._range = exponent_of(options.largest_p), exponent_of(options.p_min)
        self._reported: set[str] = set()
        self._probe = Probe(model, layers, options.probe_rows)
        self._failed = False
        self._begin()

    def _begin(self) -> None:
        """Start with nothing under way."""
        self._worker = ThreadPoolExecutor(1, "hf_schatten") if self._options.p_async else None
        self._pending: Future[Measurement] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy keeps: no measurement under way, as a checkpoint."""
        return {key: value for key, value in vars(self).items() if key not in ("_worker", "_pending")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def is_due(self, step: int) -> bool:
        """Return whether p is estimated at this step, counted from 1."""
        return step == self._options.p_first_step or step % self._options.p_interval == 0

    def before_update(self, optimizer: Optimized) -> None:
        """Update p in the optimizer's state if this step is due; every process must take part.

        Args:
            optimizer: has the state of every matrix, and the step's gradients.
        """
        due, alone = self._probe.armed, optimizer.alone
        self._observing = due
        if due:
            self._sizes.begin(optimizer.matrices())
        if self._pending is not None and (self._pending.done() if alone else due):
            self._learn(optimizer, self._adapted(optimizer), self._result(self._pending))
            self._pending = None
        if self._failed and alone:
            optimizer.stop_following()
        elif due and self._pending is None:
            self._estimate(optimizer)

    def observe(self, matrices: Sequence[Matrix], directions: Tensor, factors: Tensor) -> None:
        """Keep the sizes of the updates of a due step."""
        if self._observing:
            self._sizes.observe(matrices, directions, factors)

    def after_update(self, optimizer: Optimized) -> None:
        """Sample the forwards of the next step if that step is due."""
        if self._observing:
            self._observing = False
            self.updates = self._sizes.end(list(optimizer.matrices()), optimizer.alone)
        self._prepare(optimizer)

    def after_load(self, optimizer: Optimized) -> None:
        """Drop what was measured for the state before."""
        self._pending = None
        self._probe.take()
        self._prepare(optimizer)

    def _prepare(self, optimizer: Optimized) -> None:
        self._probe.arm(self.is_due(optimizer.steps_taken() + 1))

    def pause(self) -> None:
        """Sample no forwards until the next update is prepared."""
        self._probe.arm(False)

    def remove(self) -> None:
        """Remove the hooks from the model and end the worker."""
        self._probe.remove()
        if self._worker is not None:
            self._worker.shutdown(wait=False, cancel_futures=True)

    def _adapted(self, optimizer: Optimized) -> list[Matrix]:
        return [matrix for matrix in optimizer.matrices() if matrix.name in self.matrices]

    def _estimate(self, optimizer: Optimized) -> None:
        matrices = self._adapted(optimizer)
        inputs = self._inputs(matrices)
        self._report_unsampled({m.name for m in matrices if m.name not in inputs and is_computed_here(m)})
        nothing = self._of_nothing(optimizer, matrices)
        if has_shards(matrices):
            self._learn(optimizer, matrices, measure_shards(self._options, nothing, matrices, inputs))
            return
        samples = samples_of(matrices, inputs)
        illustrated = evenly_spaced(self.illustrated, len(matrices))
        if self._worker is None:
            self._learn(optimizer, matrices, measure(self._options, nothing, samples, illustrated))
        elif not self._failed:
            copies = [sample and sample.copied() for sample in samples]
            self._pending = self._worker.submit(measure, self._options, nothing, copies, illustrated)
        else:
            self._pending = Future()
            self._pending.set_result(nothing)

    @staticmethod
    def _of_nothing(optimizer: Optimized, matrices: Sequence[Matrix]) -> Measurement:
        device = local(matrices[0].parameter).device
        return Measurement.of_nothing(optimizer.steps_taken() + 1, len(matrices), device)

    def _inputs(self, matrices: Sequence[Matrix]) -> dict[str, Inputs]:
        """Return the inputs of each matrix that has been sampled."""
        sampled = {name: Inputs(rows) for name, rows in whole_rows(self._probe.take(), matrices).items()}
        # Its own where its projection reads several inputs, as cross-attention does.
        found = {matrix.name: sampled.get(matrix.name) or sampled.get(matrix.input_name) for matrix in matrices}
        return {name: inputs for name, inputs in found.items() if inputs is not None}

    def _result(self, job: Future[Measurement]) -> Measurement | None:
        try:
            return job.result()
        except Exception:
            self._failed = True
            logger.exception(
                "The estimation of p has failed in its worker thread; training goes on with the present p. Set "
                "p_async=false to see the error where it happens."
            )
            return None

    def _learn(self, optimizer: Optimized, matrices: Sequence[Matrix], measured: Measurement | None) -> None:
        """Average over processes and time, and choose p; what no process has measured keeps average and p.

        Nothing waits for the device, but for what is illustrated.
        """
        measured = measured or self._of_nothing(optimizer, matrices)
        curves, known = measured.statistics, measured.valid
        means, found = mean_over_processes(curves.flatten(0, 1), known.flatten(), alone=optimizer.alone)
        statistics, valid = means.view_as(curves), found.view_as(known).all(dim=1)
        statistics = torch.where(valid[:, None, None], statistics, 0.0)  # NaN would pass through a rate of zero
        average = torch.stack([matrix.statistics for matrix in matrices])  # (L, CURVES, NODES)
        weight = torch.stack([matrix.statistics_weight for matrix in matrices])  # (L,)
        rate = valid.to(average.dtype) * (1 - self._options.p_ema_decay)
        average = average.lerp(statistics, rate[:, None, None])
        weight = weight.lerp(torch.ones_like(weight), rate)
        corrected = average / weight[:, None, None]  # an average that starts at zero is too small at first
        objective = objective_curve(corrected, *self._range)
        s = maximising_exponent(objective, *self._range)
        p = p_of(s).float()
        p = torch.where(valid, p, torch.stack([matrix.p for matrix in matrices]))
        p = _with_medians(p, weight > 0, matrices)
        learned = ((matrix.statistics, matrix.statistics_weight, matrix.p) for matrix in matrices)
        for kept, new in zip(zip(*learned, strict=True), (average, weight, p), strict=True):
            torch._foreach_copy_(list(kept), new.unbind())
        self.choices = [
            Choice(matrices[row].name, measured.step, *spectra, *self._curve(objective[row]), float(s[row]))
            for row, spectra in measured.spectra.items()
        ]
        self.estimates += 1

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
                "No training input of %d of the routed matrices was seen on a due step: %s. They get the median p of "
                "their kind, but experts without tokens keep theirs. %s",
                len(news),
                ", ".join(news[:5]) + (", …" if len(news) > 5 else ""),
                self._probe.why_unsampled(),
            )


def _with_medians(p: Tensor, ever: Tensor, matrices: Sequence[Matrix]) -> Tensor:
    """Return p (L,) with the median of their kind, or of all, for matrices of parameters that were never measured.

    Those whose parameter has other matrices that were, such as experts without tokens, keep their p.

    Args:
        p: of the matrices.
        ever: whether each was measured, (L,).
        matrices: L of them.
    """
    kinds, kind = _numbered([layer_kind(matrix.name) for matrix in matrices], p.device)
    parameters, parameter = _numbered([matrix.parameter_name for matrix in matrices], p.device)
    s = torch.where(ever, exponent_of(p.double()), torch.nan)  # in the order of s, a negative p lies beyond inf
    of_all = _median(s)
    of_kind = _median(torch.where(kind == torch.arange(kinds, device=p.device)[:, None], s, torch.nan))
    median = p_of(torch.where(of_kind.isnan(), of_all, of_kind))[kind].to(p.dtype)
    measured = s.new_zeros(parameters).index_add_(0, parameter, ever.to(s.dtype))[parameter] > 0
    return torch.where(measured | of_all.isnan(), p, median)


def _numbered(names: Sequence[str], device: torch.device) -> tuple[int, Tensor]:
    """Return how many different names there are, and the number of each among them."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return len(numbers), torch.tensor([numbers[name] for name in names]).to(device, non_blocking=True)


def _median(values: Tensor) -> Tensor:
    """Return the median, one of them, in the last dimension; NaN does not count."""
    return values.nanquantile(0.5, dim=-1, interpolation="lower")
