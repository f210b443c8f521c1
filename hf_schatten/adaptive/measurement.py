"""What is measured of matrices on a due step: the statistics of a criterion, and spectra for a picture."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from hf_schatten.adaptive.criterion import CRITERIA, Estimator, Factor, Sample, curvature_curves, gradient_curves
from hf_schatten.distributed.pieces import is_sharded
from hf_schatten.distributed.sharded import on_owners
from hf_schatten.matrices.engines import UnsupportedEngineError
from hf_schatten.optim.matrix import CURVES, NODES, Matrix
from hf_schatten.optim.momentum import look_ahead
from hf_schatten.options import SchattenOptions

Curvature = tuple[Factor, Factor | None]  # of inputs, and of outputs' gradients where they are sampled


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


def samples_of(
    options: SchattenOptions, matrices: Iterable[Matrix], curvature: Mapping[str, Curvature]
) -> Iterable[Sample | None]:
    """Yield what a criterion needs of each matrix, None where its inputs or its gradient are missing."""
    needs_momentum = CRITERIA[options.criterion].needs_momentum
    for matrix in matrices:
        gradient, factors = matrix.gradient, curvature.get(matrix.name)
        if gradient is None or factors is None:
            yield None
            continue
        momentum = look_ahead(matrix.momentum, gradient, matrix.group) if needs_momentum else None
        if matrix.group["transposed"]:
            gradient, momentum = gradient.mT, None if momentum is None else momentum.mT
        yield Sample(gradient, momentum, *factors)


def measure(
    options: SchattenOptions, nothing: Measurement, samples: Iterable[Sample | None], illustrated: Collection[int]
) -> Measurement:
    """Return the statistics of every sample; what is missing, zero or not finite is not measured.

    ``nothing`` is a measurement of as many matrices, which is overwritten.
    """
    criterion, estimator = CRITERIA[options.criterion], Estimator.named(options.p_estimator)
    at_once = 1 if criterion.needs_momentum else len(nothing.statistics)  # momenta are copies
    statistics = nothing.statistics.fill_(torch.nan)
    spectra: dict[int, tuple[Tensor, Tensor]] = {}
    numbered = ((index, sample) for index, sample in enumerate(samples) if sample is not None)
    while some := list(islice(numbered, at_once)):
        finite = torch.stack([sample.is_finite() for _, sample in some]).tolist()  # one wait for the device
        measured = [pair for pair, is_finite in zip(some, finite, strict=True) if is_finite]
        if measured:
            curves = criterion.statistics([sample for _, sample in measured], estimator)
            for (index, _), of_sample in zip(measured, curves, strict=True):
                statistics[index] = of_sample
        for index, sample in measured:
            if index in illustrated:
                spectra[index] = _spectrum(sample.gradient), _spectrum(sample.inputs.rows)
    known = statistics.isfinite().flatten(1).all(dim=1)
    return replace(nothing, valid=known[:, None].expand_as(nothing.valid), spectra=spectra)


def measure_shards(
    options: SchattenOptions, nothing: Measurement, matrices: Sequence[Matrix], curvature: Mapping[str, Curvature]
) -> Measurement:
    """Measure the rows of this process, and the gradients of the parameters whose owner it is, into ``nothing``.

    Every process must call it, with the matrices in the same order.

    Raises:
        UnsupportedEngineError: with an option that needs whole momenta on every process.
    """
    if CRITERIA[options.criterion].needs_momentum or options.p_async:
        raise UnsupportedEngineError(
            f"criterion={options.criterion!r} with p_async={options.p_async} is not supported where the parameters "
            "are sharded: set criterion=kronecker or holder and p_async=false, or use DDP."
        )
    estimator = Estimator.named(options.p_estimator)
    row_of = {matrix.name: row for row, matrix in enumerate(matrices)}
    statistics = nothing.statistics.fill_(torch.nan)  # what nobody measures
    known = [matrix.name for matrix in matrices if matrix.name in curvature]
    for name, curve in zip(known, curvature_curves([curvature[n] for n in known], estimator), strict=True):
        statistics[row_of[name], 1] = curve
    with_gradient = [matrix for matrix in matrices if matrix.parameter.grad is not None]
    for matrix, gradient in on_owners(with_gradient, _gradient):
        if gradient.isfinite().all():
            as_used = gradient.mT if matrix.group["transposed"] else gradient
            statistics[row_of[matrix.name], 0] = gradient_curves([as_used], estimator)[0]
    valid = statistics.isfinite().all(dim=-1)
    return replace(nothing, statistics=statistics.nan_to_num(0.0), valid=valid)


def of_part(rows: Tensor, matrix: Matrix) -> Tensor:
    """Return the columns of output rows (T, out) that belong to one matrix of a parameter."""
    layout = replace(matrix.layout, transposed=False)
    return layout.matrix(rows.mT, matrix.index).mT


def evenly_spaced(count: int, total: int) -> frozenset[int]:
    """Return the numbers of ``count`` of ``total`` matrices, the first and the last among them."""
    return frozenset(torch.linspace(0, total - 1, min(count, total)).round().long().tolist())


def _gradient(matrix: Matrix) -> Tensor:
    assert matrix.parameter.grad is not None
    return matrix.parameter.grad


def _spectrum(X: Tensor) -> Tensor:
    return torch.linalg.svdvals(X.float()).cpu()
