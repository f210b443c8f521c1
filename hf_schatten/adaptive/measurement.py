"""What is measured of matrices on a due step: the criterion's statistics, and spectra for a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_schatten.adaptive.criterion import Inputs, Sample, finite_rows, gradient_curves, statistics_of
from hf_schatten.distributed.pieces import is_sharded
from hf_schatten.distributed.sharded import on_owners
from hf_schatten.linalg.spectrum import LOG_NORM_ESTIMATORS
from hf_schatten.matrices.engines import UnsupportedEngineError
from hf_schatten.optim.matrix import CURVES, NODES, Matrix
from hf_schatten.options import SchattenOptions


@dataclass(frozen=True)
class Measurement:
    """What one process has measured on a due step of L matrices."""

    step: int  # from 1
    statistics: Tensor  # (L, CURVES, NODES) float64; zero where nothing was measured
    valid: Tensor  # (L, CURVES) bool, whether it was measured
    spectra: dict[int, tuple[Tensor, Tensor]]  # singular values of gradient and input of the illustrated, by number

    @classmethod
    def of_nothing(cls, step: int, count: int, device: torch.device) -> Measurement:
        """Return one in which nothing was measured."""
        statistics = torch.zeros(count, CURVES, NODES, dtype=torch.float64, device=device)
        return cls(step, statistics, torch.zeros(count, CURVES, dtype=torch.bool, device=device), {})


def has_shards(matrices: Iterable[Matrix]) -> bool:
    """Return whether a process has rows only of any of these matrices."""
    return any(is_sharded(matrix.parameter) for matrix in matrices)


def samples_of(matrices: Iterable[Matrix], inputs: Mapping[str, Inputs]) -> Iterable[Sample | None]:
    """Yield what the criterion needs of each matrix, None where its inputs or its gradient are missing."""
    for matrix in matrices:
        gradient, rows = matrix.gradient, inputs.get(matrix.name)
        if gradient is None or rows is None:
            yield None
        else:
            yield Sample(gradient.mT if matrix.group["transposed"] else gradient, rows)


def measure(
    options: SchattenOptions, nothing: Measurement, samples: Iterable[Sample | None], illustrated: Set[int]
) -> Measurement:
    """Return the statistics of every sample; what is missing, zero or not finite is not measured.

    Nothing waits for the device, but for what is illustrated, and for the decompositions of some estimators.
    ``nothing`` is a measurement of as many matrices, which is overwritten.
    """
    statistics = nothing.statistics.fill_(torch.nan)
    some = {index: sample for index, sample in enumerate(samples) if sample is not None}
    if some:
        found = statistics_of(list(some.values()), LOG_NORM_ESTIMATORS[options.p_estimator])
        torch._foreach_copy_([statistics[index] for index in some], found.unbind())
    known = statistics.isfinite().flatten(1).all(dim=1)
    spectra = {
        index: (_spectrum(some[index].gradient), _spectrum(finite_rows(some[index].inputs.rows)))
        for index in sorted(some.keys() & illustrated)
        if known[index]
    }
    return replace(nothing, valid=known[:, None].expand_as(nothing.valid), spectra=spectra)


def measure_shards(
    options: SchattenOptions, nothing: Measurement, matrices: Sequence[Matrix], inputs: Mapping[str, Inputs]
) -> Measurement:
    """Measure the rows of this process, and the gradients of the parameters whose owner it is, into ``nothing``.

    Every process must call it, with the matrices in the same order.

    Raises:
        UnsupportedEngineError: with an option that needs whole gradients on every process.
    """
    if options.p_async:
        raise UnsupportedEngineError(
            "p_async=True is not supported where the parameters are sharded: set p_async=false, or use DDP."
        )
    log_norms = LOG_NORM_ESTIMATORS[options.p_estimator]
    row_of = {matrix.name: row for row, matrix in enumerate(matrices)}
    statistics = nothing.statistics.fill_(torch.nan)  # what nobody measures
    known = [matrix.name for matrix in matrices if matrix.name in inputs]
    Inputs.compute([inputs[name] for name in known], log_norms)
    for name in known:
        statistics[row_of[name], 1] = inputs[name].curve(log_norms)
    with_gradient = [matrix for matrix in matrices if matrix.parameter.grad is not None]
    for matrix, gradient in on_owners(with_gradient, _gradient):
        as_used = gradient.mT if matrix.group["transposed"] else gradient
        statistics[row_of[matrix.name], 0] = gradient_curves([as_used], log_norms)[0]
    valid = statistics.isfinite().all(dim=-1)
    return replace(nothing, statistics=statistics.nan_to_num(0.0), valid=valid)


def evenly_spaced(count: int, total: int) -> frozenset[int]:
    """Return the numbers of ``count`` of ``total`` matrices, the first and the last among them."""
    return frozenset(torch.linspace(0, total - 1, min(count, total)).round().long().tolist())


def _gradient(matrix: Matrix) -> Tensor:
    assert matrix.parameter.grad is not None
    return matrix.parameter.grad


def _spectrum(X: Tensor) -> Tensor:
    return torch.linalg.svdvals(X.float()).cpu()
