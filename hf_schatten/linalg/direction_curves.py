"""What the direction ``O_s = U Σ^s Vᵀ`` of a momentum does, for many exponents s at once: exactly, and without an SVD.

The iterates ``X_0 = M/c, X_1, …, X_K`` of one Newton–Schulz run represent ``O_s ≈ c^s Σ_k w_k(s) X_k`` with weights
that depend on s alone. All that a criterion asks of O_s is linear or quadratic in it, so that (K + 1)(K + 6)/2 inner
products of the iterates answer for every s.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hf_schatten.linalg.iterate_norms import FIT_POINTS, STEP, fit_points, ridge_regression

_STEPS = 8


class DirectionCurves(NamedTuple):
    """Quantities of O_s at K exponents, each (K,) float64, for singular values in some unit that all three share.

    Attributes:
        gain: ⟨G, O_s⟩ / ‖G‖_F.
        log_power_sum: log Σ σ_i^{1+s}.
        energy: ‖A O_sᵀ‖_F² / ‖A‖_F².
    """

    gain: Tensor
    log_power_sum: Tensor
    energy: Tensor


def direction_curves(momentum: Tensor, gradient: Tensor, inputs: Tensor, s: Tensor) -> DirectionCurves:
    """Return the curves at exponents s (K,), float64, from an SVD in float64.

    The momentum M is (m, n), finite, and its singular values below rounding count as zero; the gradient G is (m, n),
    the inputs A are (T, n).
    """
    momentum, gradient, inputs = (X.to(torch.float64) for X in (momentum, gradient, inputs))
    U, sigma, Vh = torch.linalg.svd(momentum, full_matrices=False)
    sigma = sigma / sigma[0]
    present = sigma > torch.finfo(sigma.dtype).eps * max(momentum.shape)
    powers = torch.where(present, torch.where(present, sigma, 1.0) ** s[:, None], 0.0)  # (K, r)
    aligned = ((U.mT @ gradient) * Vh).sum(dim=1)  # (r,) u_iᵀ G v_i
    energies = (inputs @ Vh.mT).square().sum(dim=0)  # (r,) ‖A v_i‖²
    return DirectionCurves(
        powers @ aligned / torch.linalg.matrix_norm(gradient),
        (powers @ sigma).log(),
        powers.square() @ energies / inputs.square().sum(),
    )


def iterate_direction_curves(momentum: Tensor, gradient: Tensor, inputs: Tensor, s: Tensor) -> DirectionCurves:
    """Return the curves as `direction_curves` does, for s in [-0.25, 1], from float32 matrix products alone."""
    momentum, gradient, inputs = (X / X.abs().amax() for X in (momentum.float(), gradient.float(), inputs.float()))
    iterates = _iterates(momentum)
    flat = torch.stack([X.flatten() for X in iterates])  # (iterates, m n)
    outputs = torch.stack([(inputs @ X.mT).flatten() for X in iterates])  # (iterates, T m)
    weights = _weights(tuple(s.tolist())).to(momentum.device)  # (K, iterates)
    gains, power_sums = (flat @ torch.stack([gradient.flatten(), flat[0]], dim=1)).to(torch.float64).unbind(dim=1)
    energies = (outputs @ outputs.mT).to(torch.float64)
    return DirectionCurves(
        weights @ gains / torch.linalg.matrix_norm(gradient),
        (weights @ power_sums).log(),
        ((weights @ energies) * weights).sum(dim=1) / inputs.square().sum(),
    )


def _iterates(momentum: Tensor) -> list[Tensor]:
    """Return X_0 to X_K of a matrix (m, n)."""
    if momentum.shape[0] > momentum.shape[1]:
        return [X.mT for X in _iterates(momentum.mT)]
    gram = momentum @ momentum.mT
    X = momentum / (1.01 * torch.linalg.matrix_norm(gram).sqrt())  # by the Schatten-4 norm
    iterates, (a, b, c) = [X], STEP
    for _ in range(_STEPS):
        gram = X @ X.mT
        X = a * X + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ X
        iterates.append(X)
    return iterates


@lru_cache(maxsize=2)
def _weights(exponents: tuple[float, ...]) -> Tensor:
    """Weights of the iterates, (K, iterates) float64: ridge regression to x^s on a log-uniform grid."""
    x = fit_points()
    design, (a, b, c) = [x], STEP
    for _ in range(_STEPS):
        y = design[-1]
        design.append(y * (a + y**2 * (b + y**2 * c)))
    matrix = torch.stack(design, dim=1) / FIT_POINTS**0.5  # (points, iterates)
    targets = x[:, None] ** torch.tensor(exponents, dtype=torch.float64) / FIT_POINTS**0.5  # (points, K)
    return ridge_regression(matrix, targets).mT
