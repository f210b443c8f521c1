"""From the spectra of gradient, momentum and input to the spectral exponent s = 1/p of each matrix.

With G the gradient (m, n), M its momentum with singular triplets (u_i, σ_i, v_i), O_s = U Σ^s Vᵀ of M, A the layer's
input and D the gradient of its output, one row for each of T tokens, a criterion is a function of s that is maximised:

``kronecker``
    log ‖G‖_{1+s} − log ‖A‖_{2k} − log ‖D‖_{2k},  k = 2(1 + s)/(1 − s): the guaranteed decrease where the curvature has
    the Kronecker factors AᵀA and DᵀD. Where D is not known, in mixtures of experts, it is taken for even: ``holder``.
``holder``
    log ‖G‖_{1+s} − log ‖A‖_{k},  k = 2(1 + s)/(1 − s): the guaranteed decrease of a one-step random-feature model
    (T. Massena 2026, "Using Schatten-p norms to dynamically interpolate between Adam and Muon").
``alignment``
    2 log ⟨G, O_s⟩ − 2 log ‖A‖_k − 2s/(1 + s) · log Σ σ_i^{1+s}: the same bound for the update that is really taken,
    along the momentum.
``decrease``
    2 log ⟨G, O_s⟩ − log tr(O_s Γ O_sᵀ), Γ = AᵀA/T: the decrease of the quadratic model itself, without a bound.

All terms are smooth in s, also at s = 1, where k is infinite, and at s = 0. A matrix's statistics are a few curves at
fixed nodes in s: small, independent of the matrix's size, and linear to average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from hf_schatten.exponent import MAX_EXPONENT, MIN_EXPONENT
from hf_schatten.linalg.direction_curves import DirectionCurves, direction_curves, iterate_direction_curves
from hf_schatten.linalg.spectrum import LOG_NORM_ESTIMATORS, LogNormEstimator
from hf_schatten.optim.finite_gradients import are_finite
from hf_schatten.optim.matrix import CURVES, NODES
from hf_schatten.option_names import CriterionName, EstimatorName

_CANDIDATES = 2049  # of s within [1/p_max, 1/p_min]; refined by a parabola afterwards

# Of equally shaped matrices whose norms an accelerator estimates together: one by one, launches would take most of it.
_TOGETHER_BYTES = 256 << 20


class Factor:
    """Sampled rows whose Gram matrix is one factor of a layer's curvature: its inputs, or its outputs' gradients.

    Curves of its norms are computed once for all matrices that share it.

    Args:
        rows: (T, n).
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._curves: dict[int, Tensor] = {}

    def curve(self, log_norms: LogNormEstimator, factors: int = 1) -> Tensor:
        """Return the logarithm of a norm of the rows at :func:`exponent_nodes`, (NODES,), relative to order ∞.

        The order of the norm is k times the number of ``factors`` that the curvature has.
        """
        if factors not in self._curves:
            self.compute([self], log_norms, factors)
        return self._curves[factors]

    @staticmethod
    def compute(those: Iterable[Factor], log_norms: LogNormEstimator, factors: int = 1) -> None:
        """Compute the curves of several on one device, on an accelerator together; :meth:`curve` then returns them."""
        missing = list({id(each): each for each in those if factors not in each._curves}.values())
        if not missing:
            return
        s = exponent_nodes().to(missing[0].rows.device)
        inverse_orders = (1 - s) / (2 * (1 + s)) / factors
        curves = _norm_curves([each.rows for each in missing], log_norms, inverse_orders)
        for each, curve in zip(missing, curves, strict=True):
            each._curves[factors] = curve - curve[-1]


@dataclass(frozen=True)
class Sample:
    """What is known of one matrix (m, n) on a step at which p is estimated."""

    gradient: Tensor  # G, (m, n)
    momentum: Tensor | None  # M, (m, n), with the gradient in it; None for a criterion that does without
    inputs: Factor  # A, sampled input rows, (T, n)
    outputs: Factor | None = None  # D, sampled rows of the outputs' gradient, (T, m), where known and needed

    def is_finite(self) -> Tensor:
        """Return whether all of it is finite, a bool scalar on its device."""
        rows = [factor.rows for factor in (self.inputs, self.outputs) if factor is not None]
        tensors = [self.gradient, self.momentum, *rows]
        return torch.stack(are_finite([tensor for tensor in tensors if tensor is not None])).all()

    def copied(self) -> Sample:
        """Return a sample whose gradient nobody else writes to."""
        return replace(self, gradient=self.gradient.clone())


@dataclass(frozen=True)
class Estimator:
    """How the norms of gradient and inputs, and what a direction O_s of the momentum does, are computed."""

    log_norms: LogNormEstimator
    direction_curves: Callable[[Tensor, Tensor, Tensor, Tensor], DirectionCurves] = direction_curves

    @classmethod
    def named(cls, name: EstimatorName) -> Estimator:
        """Return the estimator of an option's value; only ``iterates`` does without the momentum's SVD."""
        return cls(LOG_NORM_ESTIMATORS[name], iterate_direction_curves if name == "iterates" else direction_curves)


@dataclass(frozen=True)
class Criterion:
    """A criterion in two halves, between which statistics are averaged over processes and time.

    Attributes:
        curves: how many curves it has.
        needs_momentum: whether its samples need the momentum.
        needs_outputs: whether its samples need the outputs' gradients.
        statistics: from samples on one device to (samples, CURVES, NODES) float64 curves at :func:`exponent_nodes`;
            not finite where gradient or input is zero.
        objective: from curves (..., CURVES, K) to (..., K), and -inf where its logarithm does not exist.
    """

    curves: int
    needs_momentum: bool
    needs_outputs: bool
    statistics: Callable[[Sequence[Sample], Estimator], Tensor]
    objective: Callable[[Tensor], Tensor]


def maximising_exponent(objective: Tensor, s_min: float, s_max: float) -> Tensor:
    """Return the s in [s_min, s_max] at which each objective (..., candidates) is largest, (...) float64.

    The objectives are those of :func:`objective_curve` for the same range.
    """
    candidates = torch.linspace(s_min, s_max, _CANDIDATES, dtype=torch.float64).to(objective.device)
    best = objective.argmax(dim=-1, keepdim=True)
    inner = best.clamp(1, _CANDIDATES - 2)
    left, middle, right = (objective.gather(-1, inner + offset) for offset in (-1, 0, 1))
    curvature = left - 2 * middle + right
    # Vertex of the parabola through three neighbours, in steps; none where the maximum is at an end or flat.
    is_peak = (best == inner) & (curvature < 0) & curvature.isfinite()
    offset = torch.where(is_peak, 0.5 * (left - right) / curvature, 0.0)
    step = (s_max - s_min) / (_CANDIDATES - 1)
    return (candidates[best] + offset * step).clamp(s_min, s_max).squeeze(-1)


def objective_curve(criterion: CriterionName, statistics: Tensor, s_min: float, s_max: float) -> Tensor:
    """Return the criterion's objective at equally spaced exponents from s_min to s_max, (..., candidates) float64.

    The statistics (..., CURVES, NODES) float64 are a sample's, or a bias-corrected average of such.
    """
    curves = statistics @ _interpolation_matrix(s_min, s_max).to(statistics.device).mT  # (..., CURVES, candidates)
    return CRITERIA[criterion].objective(curves)


@lru_cache(maxsize=1)
def exponent_nodes() -> Tensor:
    """Return the (NODES,) float64 Chebyshev nodes in [-0.25, 1] at which the statistics are taken, ascending.

    The curves are analytic in s, but the norm of A bends within about 1/k of s = 1 when the gap below the largest
    singular value is small: 63 nodes keep the maximiser within 1e-3 of the brute-force one, and two curves with a flag
    of validity each are 1024 bytes.
    """
    angles = torch.arange(NODES, dtype=torch.float64) * (math.pi / (NODES - 1))
    center, radius = (MAX_EXPONENT + MIN_EXPONENT) / 2, (MAX_EXPONENT - MIN_EXPONENT) / 2
    return center - radius * torch.cos(angles)


def gradient_curves(gradients: Sequence[Tensor], estimator: Estimator) -> list[Tensor]:
    """Return log ‖G‖_{1+s} of gradients (m, n) at :func:`exponent_nodes`, (NODES,) each, relative to s = 1."""
    if not gradients:
        return []
    s = exponent_nodes().to(gradients[0].device)
    return [curve - curve[-1] for curve in _norm_curves(gradients, estimator.log_norms, 1 / (1 + s))]


def _norm_curves(matrices: Sequence[Tensor], log_norms: LogNormEstimator, inverse_orders: Tensor) -> list[Tensor]:
    """Return the logarithms of each matrix' norms, (k,); one by one on a CPU, where a stack would be one copy more."""
    alike: dict[object, list[int]] = {}
    for number, X in enumerate(matrices):
        alike.setdefault(number if X.device.type == "cpu" else (X.shape, X.dtype), []).append(number)
    curves: dict[int, Tensor] = {}
    for numbers in alike.values():
        size = max(1, _TOGETHER_BYTES // (matrices[numbers[0]].numel() * torch.float32.itemsize))
        for start in range(0, len(numbers), size):
            own = numbers[start : start + size]
            if len(own) == 1:
                curves[own[0]] = log_norms(matrices[own[0]], inverse_orders)
            else:
                stack = torch.stack([matrices[number] for number in own])
                curves.update(zip(own, log_norms(stack, inverse_orders), strict=True))
    return [curves[number] for number in range(len(matrices))]


def curvature_curves(curvatures: Sequence[tuple[Factor, Factor | None]], estimator: Estimator) -> list[Tensor]:
    """Return logarithms of the curvature's bound at :func:`exponent_nodes`, (NODES,) each, relative to s = 1.

    Given are inputs A and outputs D of each matrix, all on one device; None for a curvature without D.
    """
    norms = estimator.log_norms
    Factor.compute([A for A, D in curvatures if D is None], norms)
    Factor.compute([factor for A, D in curvatures if D is not None for factor in (A, D)], norms, 2)
    return [A.curve(norms) if D is None else A.curve(norms, 2) + D.curve(norms, 2) for A, D in curvatures]


def _bound_statistics(samples: Sequence[Sample], estimator: Estimator) -> Tensor:
    """Log-norms of gradient and curvature, relative to their value at s = 1.

    So the scale of gradient and input, which does not move the maximum, cannot dominate an average.
    """
    gradients = gradient_curves([sample.gradient for sample in samples], estimator)
    curvatures = curvature_curves([(sample.inputs, sample.outputs) for sample in samples], estimator)
    return torch.stack([_curves(*curves) for curves in zip(gradients, curvatures, strict=True)])


def _alignment_statistics(samples: Sequence[Sample], estimator: Estimator) -> Tensor:
    """⟨G, O_s⟩ / ‖G‖_F, the input's log-norm, and s/(1 + s) · log Σ σ^{1+s}."""
    Factor.compute([sample.inputs for sample in samples], estimator.log_norms)
    curves = []
    for sample in samples:
        s, direction = _direction(sample, estimator)
        bound = s / (1 + s) * direction.log_power_sum
        curves.append(_curves(direction.gain, sample.inputs.curve(estimator.log_norms), bound))
    return torch.stack(curves)


def _decrease_statistics(samples: Sequence[Sample], estimator: Estimator) -> Tensor:
    """⟨G, O_s⟩ / ‖G‖_F and tr(O_s Γ O_sᵀ) / tr Γ."""
    directions = [_direction(sample, estimator)[1] for sample in samples]
    return torch.stack([_curves(direction.gain, direction.energy) for direction in directions])


def _direction(sample: Sample, estimator: Estimator) -> tuple[Tensor, DirectionCurves]:
    assert sample.momentum is not None
    s = exponent_nodes().to(sample.gradient.device)
    return s, estimator.direction_curves(sample.momentum, sample.gradient, sample.inputs.rows, s)


def _curves(*curves: Tensor) -> Tensor:
    """Stack curves (NODES,) to (CURVES, NODES), the missing ones zero."""
    return torch.stack([*curves, *[torch.zeros_like(curves[0])] * (CURVES - len(curves))])


def _log_positive(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, 0.0).log()


def _bound(curves: Tensor) -> Tensor:
    return curves[..., 0, :] - curves[..., 1, :]


def _alignment(curves: Tensor) -> Tensor:
    return 2 * (_log_positive(curves[..., 0, :]) - curves[..., 1, :] - curves[..., 2, :])


def _decrease(curves: Tensor) -> Tensor:
    return 2 * _log_positive(curves[..., 0, :]) - curves[..., 1, :].clamp_min(1e-300).log()


# By name, as in the options.
CRITERIA: dict[CriterionName, Criterion] = {
    "kronecker": Criterion(2, False, True, _bound_statistics, _bound),
    "holder": Criterion(2, False, False, _bound_statistics, _bound),
    "alignment": Criterion(3, True, False, _alignment_statistics, _alignment),
    "decrease": Criterion(2, True, False, _decrease_statistics, _decrease),
}


@lru_cache(maxsize=8)
def _interpolation_matrix(s_min: float, s_max: float) -> Tensor:
    """Return the (candidates, NODES) barycentric Chebyshev interpolation from the nodes to the candidates."""
    nodes = exponent_nodes()
    candidates = torch.linspace(s_min, s_max, _CANDIDATES, dtype=torch.float64)
    weights = torch.ones(NODES, dtype=torch.float64)
    weights[1::2] = -1
    weights[[0, -1]] *= 0.5
    difference = candidates[:, None] - nodes
    exact = difference == 0
    terms = weights / torch.where(exact, 1.0, difference)
    matrix = terms / terms.sum(dim=-1, keepdim=True)
    on_node = exact.any(dim=-1, keepdim=True)
    return torch.where(on_node, exact.to(matrix.dtype), matrix)
