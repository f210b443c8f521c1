"""From the spectra of gradient and input to the spectral exponent s = 1/p of each matrix.

With G the gradient (m, n) and A the layer's input, one row for each of T tokens, the criterion is

    log ‖G‖_{1+s} − log ‖A‖_k,  k = 2(1 + s)/(1 − s),

the guaranteed decrease of a one-step random-feature model, whose maximiser is the estimate of s (T. Massena 2026,
"Using Schatten-p norms to dynamically interpolate between Adam and Muon"). Both terms are smooth in s, also at s = 1,
where k is infinite, and at s = 0. A matrix's statistics are the two curves at fixed nodes in s: small, independent of
the matrix's size, and linear to average.

Other criteria were measured and are gone: docs/negative_results.md has the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from hf_schatten.exponent import MAX_EXPONENT, MIN_EXPONENT
from hf_schatten.linalg.spectrum import LogNormEstimator
from hf_schatten.optim.matrix import NODES

_CANDIDATES = 2049  # of s within [1/p_max, 1/p_min]; refined by a parabola afterwards

# Of equally shaped matrices whose norms an accelerator estimates together: one by one, launches would take most of it.
_TOGETHER_BYTES = 256 << 20


class Inputs:
    """Sampled input rows of a layer, whose curve is computed once for all matrices that share them.

    Args:
        rows: A, (T, n).
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._curve: Tensor | None = None

    def curve(self, log_norms: LogNormEstimator) -> Tensor:
        """Return log ‖A‖_k at :func:`exponent_nodes`, (NODES,), relative to k = ∞."""
        if self._curve is None:
            self.compute([self], log_norms)
        assert self._curve is not None
        return self._curve

    @staticmethod
    def compute(those: Iterable[Inputs], log_norms: LogNormEstimator) -> None:
        """Compute the curves of several on one device, on an accelerator together; :meth:`curve` then returns them."""
        missing = list({id(each): each for each in those if each._curve is None}.values())
        s = exponent_nodes()
        curves = _norm_curves(
            [each.rows for each in missing],
            lambda rows, inverse_orders: log_norms(finite_rows(rows), inverse_orders),
            (1 - s) / (2 * (1 + s)),
        )
        for each, curve in zip(missing, curves, strict=True):
            each._curve = curve


@dataclass(frozen=True)
class Sample:
    """What is known of one matrix (m, n) on a step at which p is estimated."""

    gradient: Tensor  # G, (m, n)
    inputs: Inputs

    def copied(self) -> Sample:
        """Return a sample whose gradient nobody else writes to."""
        return replace(self, gradient=self.gradient.clone())


def finite_rows(rows: Tensor) -> Tensor:
    """Return rows (..., n) with zeros, which change no norm, for those that are not finite.

    Rows of a step that a loss scaler skips are sampled too. Nothing waits for the device.
    """
    return torch.where(rows.isfinite().all(dim=-1, keepdim=True), rows, 0.0)


def maximising_exponent(objective: Tensor, s_min: float, s_max: float) -> Tensor:
    """Return the s in [s_min, s_max] at which each objective (..., candidates) is largest, (...) float64.

    The objectives are those of :func:`objective_curve` for the same range.
    """
    candidates = _candidates(s_min, s_max, objective.device)
    best = objective.argmax(dim=-1, keepdim=True)
    inner = best.clamp(1, _CANDIDATES - 2)
    left, middle, right = (objective.gather(-1, inner + offset) for offset in (-1, 0, 1))
    curvature = left - 2 * middle + right
    # Vertex of the parabola through three neighbours, in steps; none where the maximum is at an end or flat.
    is_peak = (best == inner) & (curvature < 0) & curvature.isfinite()
    offset = torch.where(is_peak, 0.5 * (left - right) / curvature, 0.0)
    step = (s_max - s_min) / (_CANDIDATES - 1)
    return (candidates[best] + offset * step).clamp(s_min, s_max).squeeze(-1)


def objective_curve(statistics: Tensor, s_min: float, s_max: float) -> Tensor:
    """Return the criterion at equally spaced exponents from s_min to s_max, (..., candidates) float64.

    The statistics (..., CURVES, NODES) float64 are a sample's, or a bias-corrected average of such.
    """
    curves = statistics @ _interpolation_matrix(s_min, s_max, statistics.device).mT  # (..., CURVES, candidates)
    return curves[..., 0, :] - curves[..., 1, :]


@lru_cache(maxsize=1)
def exponent_nodes() -> Tensor:
    """Return the (NODES,) float64 Chebyshev nodes in [-0.25, 1] at which the statistics are taken, ascending.

    The curves are analytic in s, but the norm of A bends within about 1/k of s = 1 when the gap below the largest
    singular value is small: 63 nodes keep the maximiser within 1e-3 of the brute-force one, and two curves with a flag
    of validity each are 1024 bytes.
    """
    angles = torch.arange(NODES, dtype=torch.float64) * (math.pi / (NODES - 1))
    centre, radius = (MAX_EXPONENT + MIN_EXPONENT) / 2, (MAX_EXPONENT - MIN_EXPONENT) / 2
    return centre - radius * torch.cos(angles)


def gradient_curves(gradients: Sequence[Tensor], log_norms: LogNormEstimator) -> list[Tensor]:
    """Return log ‖G‖_{1+s} of gradients (m, n) at :func:`exponent_nodes`, (NODES,) each, relative to s = 1."""
    return _norm_curves(gradients, log_norms, 1 / (1 + exponent_nodes()))


def _norm_curves(matrices: Sequence[Tensor], log_norms: LogNormEstimator, inverse_orders: Tensor) -> list[Tensor]:
    """Return the log norms of each matrix relative to the last of them, (k,).

    On a CPU they are computed one by one: a stack would be one copy more.
    """
    alike: dict[object, list[int]] = {}
    for number, X in enumerate(matrices):
        alike.setdefault(number if X.device.type == "cpu" else (X.shape, X.dtype), []).append(number)
    curves: dict[int, Tensor] = {}
    for numbers in alike.values():
        size = max(1, _TOGETHER_BYTES // (matrices[numbers[0]].numel() * torch.float32.itemsize))
        for start in range(0, len(numbers), size):
            own = numbers[start : start + size]
            stack = matrices[own[0]][None] if len(own) == 1 else torch.stack([matrices[number] for number in own])
            found = log_norms(stack, inverse_orders)
            curves.update(zip(own, (found - found[:, -1:]).unbind(), strict=True))
    return [curves[number] for number in range(len(matrices))]


def statistics_of(samples: Sequence[Sample], log_norms: LogNormEstimator) -> Tensor:
    """Return the curves of samples on one device at :func:`exponent_nodes`, (samples, CURVES, NODES) float64.

    Both are relative to their value at s = 1: the scale of gradient and input, which does not move the maximum, cannot
    dominate an average. They are not finite where gradient or input is zero.
    """
    gradients = gradient_curves([sample.gradient for sample in samples], log_norms)
    Inputs.compute([sample.inputs for sample in samples], log_norms)
    inputs = [sample.inputs.curve(log_norms) for sample in samples]
    return torch.stack([torch.stack(gradients), torch.stack(inputs)], dim=1)


@lru_cache(maxsize=8)
def _candidates(s_min: float, s_max: float, device: torch.device) -> Tensor:
    return torch.linspace(s_min, s_max, _CANDIDATES, dtype=torch.float64).to(device)


@lru_cache(maxsize=8)
def _interpolation_matrix(s_min: float, s_max: float, device: torch.device) -> Tensor:
    """Return the (candidates, NODES) barycentric Chebyshev interpolation from the nodes to the candidates."""
    nodes, candidates = exponent_nodes(), _candidates(s_min, s_max, torch.device("cpu"))
    weights = torch.ones(NODES, dtype=torch.float64)
    weights[1::2] = -1
    weights[[0, -1]] *= 0.5
    difference = candidates[:, None] - nodes
    exact = difference == 0
    terms = weights / torch.where(exact, 1.0, difference)
    matrix = terms / terms.sum(dim=-1, keepdim=True)
    on_node = exact.any(dim=-1, keepdim=True)
    return torch.where(on_node, exact.to(matrix.dtype), matrix).to(device)
