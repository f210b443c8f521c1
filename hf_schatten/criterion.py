"""From the spectra of gradient and input to the spectral exponent s = 1/p of each layer.

The ``holder`` criterion (seed of the method: T. Massena 2026, "Using Schatten-p norms to dynamically interpolate
between Adam and Muon") maximises, over p,

    log ‖G‖_{1 + 1/p}  −  log ‖A‖_{k(p)},        k(p) = 2(p + 1)/(p − 1),

the guaranteed decrease of a one-step random-feature model: G is the layer's gradient and A its input, one row
per token. In the exponent s = 1/p the orders are 1 + s and 2(1 + s)/(1 − s); both curves are smooth in s, also
at s = 1, where k is infinite, and at s = 0. A layer's statistics are these two curves at fixed nodes: small,
independent of the layer's size, and linear to average.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from .linalg.coefficient_table import MAX_EXPONENT, MIN_EXPONENT
from .linalg.spectrum import log_schatten_norm

# Chebyshev nodes in s. The curves are analytic in s, but the norm of A bends within about 1/k of s = 1 when the
# gap below the largest singular value is small: 64 nodes keep the maximiser within 1e-3 of the brute-force one.
NODES = 64
_CANDIDATES = 2049  # of s within [1/p_max, 1/p_min]; refined by a parabola afterwards


@lru_cache(maxsize=1)
def exponent_nodes() -> Tensor:
    """Return the (NODES,) float64 Chebyshev nodes in [-0.25, 1] at which the statistics are taken, ascending."""
    angles = torch.arange(NODES, dtype=torch.float64) * (math.pi / (NODES - 1))
    center, radius = (MAX_EXPONENT + MIN_EXPONENT) / 2, (MAX_EXPONENT - MIN_EXPONENT) / 2
    return center - radius * torch.cos(angles)


def holder_statistics(gradient_log_spectrum: Tensor, input_log_spectrum: Tensor) -> Tensor:
    """Return the two norm curves that the ``holder`` criterion needs.

    Args:
        gradient_log_spectrum: (..., r) log singular values of the gradient.
        input_log_spectrum: (..., t) log singular values of the sampled input rows.

    Returns:
        (..., 2, NODES) float64: log ‖G‖_{1+s}/‖G‖_2 and log ‖A‖_{2(1+s)/(1−s)}/‖A‖_∞ at
        :func:`exponent_nodes`. Relative to their value at s = 1, so that the scale of gradient and input,
        which does not move the maximum, cannot dominate an average. Not finite for a zero matrix.
    """
    s = exponent_nodes().to(gradient_log_spectrum.device)
    gradient_curve = log_schatten_norm(gradient_log_spectrum, 1 / (1 + s))
    input_curve = log_schatten_norm(input_log_spectrum, (1 - s) / (2 * (1 + s)))
    curves = torch.stack([gradient_curve, input_curve], dim=-2)
    return curves - curves[..., -1:]


def holder_exponent(statistics: Tensor, s_min: float, s_max: float) -> Tensor:
    """Return the exponent s in [s_min, s_max] that maximises the ``holder`` criterion, one per layer.

    A common factor of the statistics does not move the maximum, so that a moving average which starts at zero
    needs no bias correction here.

    Args:
        statistics: (..., 2, NODES) float64, from :func:`holder_statistics` or an average of such.
        s_min: smallest exponent, 1/p_max.
        s_max: largest exponent, 1/p_min.

    Returns:
        (...) float64 exponents.
    """
    objective = statistics[..., 0, :] - statistics[..., 1, :]  # (..., NODES)
    candidates = torch.linspace(s_min, s_max, _CANDIDATES, dtype=torch.float64)
    interpolation = _interpolation_matrix(s_min, s_max).to(objective.device)
    values = objective @ interpolation.mT  # (..., candidates)
    best = values.argmax(dim=-1, keepdim=True)
    inner = best.clamp(1, _CANDIDATES - 2)
    left, middle, right = (values.gather(-1, inner + offset) for offset in (-1, 0, 1))
    curvature = left - 2 * middle + right
    # Vertex of the parabola through three neighbours, in steps; none where the maximum is at an end or flat.
    is_peak = (best == inner) & (curvature < 0)
    offset = torch.where(is_peak, 0.5 * (left - right) / curvature, 0.0)
    step = (s_max - s_min) / (_CANDIDATES - 1)
    refined = candidates.to(objective.device)[best] + offset * step
    return refined.clamp(s_min, s_max).squeeze(-1)


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
