"""How far the matrices go where the step is one of Schattor's oracles, alone or coupled.

With ``O = U Σ^s Vᵀ`` of the momentum M and s = 1/p, the norms that the oracles ask for come from one inner product,
without a singular value: ``⟨M, O⟩ = Σ σ^{1+s}``, hence the dual norm ``d = ‖M‖_{1+s} = ⟨M, O⟩^{1/(1+s)}`` and
``‖O‖_{p+1} = d^s``. A matrix goes ``lr · ℓ · O / d^s``, whose Schatten-(p + 1) norm is ``lr · ℓ``, with the length ℓ

=============  ==========  =======================================================
``step_rule``  alone       coupled, with c = ``coupling_factors(d)`` and D = Σ d c
=============  ==========  =======================================================
ball           1           c
regularized    d           D c
=============  ==========  =======================================================

lr is the radius of the ball, or the reciprocal of the penalty. Coupled, the norm of all steps together is
``(Σ (w ‖T‖)^a)^{1/a}``, with ``coupling_order`` a and a weight w for each matrix: the balls are one ball of this norm,
and the penalties one penalty.

Source: B. Ma, J. Zhang and C. He 2026, "Schattor: Schatten-family methods for deep learning optimization", lemmas 1
and 2. Its momentum is the moving average of gradients without look-ahead (``nesterov=False``); its bound holds for the
bias-corrected average too, which is a mean of the gradients with weights that fall as fast, and whose first value is
the first gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_schatten.linalg import coupling_factors
from hf_schatten.options import CouplingWeights, StepRule

WeightFunction = Callable[[str, tuple[int, int]], float]

# Of a matrix (m, n) = (out, in).
COUPLING_WEIGHTS: dict[CouplingWeights, WeightFunction] = {
    "uniform": lambda name, shape: 1.0,
    "sqrt_m_over_n": lambda name, shape: math.sqrt(shape[0] / shape[1]),
    # At p = inf, w ‖T‖ is then the operator norm between root mean squares of inputs and of outputs
    # (Yang, Simon and Bernstein 2023, "A spectral condition for feature learning").
    "sqrt_n_over_m": lambda name, shape: math.sqrt(shape[1] / shape[0]),
}


def dual_norms(products: Tensor, s: Tensor) -> Tensor:
    """Return ``‖M‖_{1+s}`` from ``⟨M, O⟩`` and the spectral exponents s, tensors of one shape."""
    return products.clamp_min(0.0) ** (1 / (1 + s))


def unit_factors(dual: Tensor, s: Tensor) -> Tensor:
    """Return what O is multiplied by to have the Schatten-(p + 1) norm 1: ``d^{-s}``, 0 where d is 0."""
    return torch.where(dual > 0, dual**-s, dual)


def lengths_alone(rule: StepRule, dual: Tensor) -> Tensor:
    """Return ℓ of matrices that do not know of each other, of the shape of their dual norms."""
    return dual if rule == "regularized" else torch.ones_like(dual)


def lengths_coupled(rule: StepRule, dual: Tensor, order: float, weights: Tensor) -> Tensor:
    """Return ℓ of all matrices together.

    Args:
        rule: of the step.
        dual: dual norms (matrices,). One NaN or inf makes all lengths NaN.
        order: of the norm of all steps, in [1, inf].
        weights: (matrices,), above 0.

    Returns:
        (matrices,), 0 for a matrix of dual norm 0.
    """
    factors = coupling_factors(dual, order, weights)
    return factors * (dual * factors).sum() if rule == "regularized" else factors
