r"""How long an update is: pinned by a scale rule, or the step of one of Schattor's oracles.

With the direction ``O = U Σ^s Vᵀ`` of the momentum M and s = 1/p, the norms that both ask for come from one inner
product, without a singular value: ``⟨M, O⟩ = Σ σ^{1+s}``, hence the dual norm ``d = ‖M‖_{1+s} = ⟨M, O⟩^{1/(1+s)}`` and
the Schatten norm ``‖O‖_{p+1} = d^s``.

A **pinned** update has a Frobenius norm that a scale rule gives, so that one learning rate serves every p:

``schatten``
    That with which the Schatten-(p + 1) norm, whose steepest descent the update is, is 0.2 √max(m, n) for every
    p ≥ 1. At p = ∞ and beyond, where there is no such norm, it is that of ``match_rms_adamw``, which is never
    exceeded. Updates that are no spectral powers of a momentum are scaled as there.
``match_rms_adamw``
    0.2 √(mn), whatever the exponent: entries as large as AdamW's, so AdamW's learning rate carries over.
``muon``
    √min(m, n) · √max(1, m/n): Muon's original rule, at every exponent.
``interpolate``
    √min(m, n) · κ^s with κ = ρ √max(m, n) / lr_ratio and ρ = √((1 − β₁)/(1 + β₁)): the norm of the polar factor at
    s = 0, the norm of Adam's update under a pure-noise gradient at s = 1.
``none``
    The update's own norm: that of the momentum at s = 1, hence SGD, or Adam where the momentum is preconditioned;
    √min(m, n) at s = 0. The learning rate depends on p and on the size of gradients.

Where gradients are zero for long, as those of an expert without tokens, momenta vanish and lengths must too. A length
that does not depend on the size of the momentum is multiplied by the share of gradients other than zero in it
(:meth:`hf_schatten.optim.momentum.Momenta.presence`), 1 where none is zero.

An **oracle's** update is ``ℓ · O / d^s``, whose Schatten-(p + 1) norm is its length ℓ. The learning rate is the radius
of the ball, or the reciprocal of the penalty. Alone, ℓ is 1 (``ball``) or d (``regularized``);
:mod:`hf_schatten.optim.coupling` has the lengths of coupled matrices.

Sources: T. Massena 2026 (``interpolate``); Liu et al. 2025, "Muon is scalable for LLM training" (``match_rms_adamw``);
B. Ma, J. Zhang and C. He 2026, "Schattor: Schatten-family methods for deep learning optimization", lemma 1. Its
momentum is the moving average of gradients without look-ahead (``nesterov=False``); its bound holds for the
bias-corrected average too, which is a mean of the gradients with weights that fall as fast, and whose first value is
the first gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_schatten.optim.matrix import Matrix
from hf_schatten.option_names import ScaleRule
from hf_schatten.option_text import POWER
from hf_schatten.options import SchattenOptions

# AdamW's updates have a root mean square of about 0.2 to 0.4 on language models (Liu et al. 2025, section 2.2).
ADAMW_RMS = 0.2


@dataclass(frozen=True)
class Update:
    """The updates of a stack before their length is known."""

    matrices: list[Matrix]  # B of one wide shape
    directions: Tensor  # (B, m, n), m <= n, of any length
    exponents: Tensor  # spectral exponents s, (B,)
    products: Tensor  # ⟨M, O⟩ of momenta and their spectral powers, (B,)
    squares: Tensor  # squared Frobenius norms of the directions, (B,)
    presence: Tensor  # shares of gradients other than zero in the momenta, (B,) float64

    @property
    def dual_norms(self) -> Tensor:
        """The dual norms ``‖M‖_{1+s}`` of the momenta, (B,)."""
        return self.products.clamp_min(0.0) ** (1 / (1 + self.exponents))

    def unit_factors(self) -> Tensor:
        """Return what gives the directions the Schatten-(p + 1) norm 1, (B,): ``d^{-s}``, 0 where d is 0."""
        dual = self.dual_norms
        return torch.where(dual > 0, dual**-self.exponents, dual)


class StepRule:
    """How long the updates of a stack are, where every matrix is for itself; this one pins them as AdamW's."""

    def factors(self, update: Update) -> Tensor:
        """Return what the directions are multiplied by, (B,)."""
        own = update.squares.sqrt()  # (B,)
        return torch.where(own > 0, self.norms(update, own) / own, 0.0) * self.share(update)

    def share(self, update: Update) -> Tensor:
        """Return what gradients of zeros leave of a length that does not depend on how large the momentum is, (B,)."""
        return update.presence

    def norms(self, update: Update, own: Tensor) -> Tensor:
        """Return the Frobenius norms (B,) that directions of the Frobenius norms ``own`` (B,) are scaled to."""
        return own.new_full(own.shape, _largest_norm(update))


class Schatten(StepRule):  # noqa: D101 - the module's docstring has the rules
    def norms(self, update: Update, own: Tensor) -> Tensor:  # noqa: D102
        largest, s = _largest_norm(update), update.exponents
        schatten = update.dual_norms**s  # ‖O‖_{p+1}
        norms = ADAMW_RMS * math.sqrt(max(update.matrices[0].shape)) * own / schatten
        return torch.where(s > 0, norms.clamp_max(largest), largest)


class Muon(StepRule):  # noqa: D101
    def norms(self, update: Update, own: Tensor) -> Tensor:  # noqa: D102
        return _numbers(update, lambda matrix, m, n: math.sqrt(min(m, n) * max(1.0, m / n)), own)


class Interpolate(StepRule):  # noqa: D101
    def norms(self, update: Update, own: Tensor) -> Tensor:  # noqa: D102
        def kappa(matrix: Matrix, m: int, n: int) -> float:
            beta1 = matrix.group["betas"][0]
            return math.sqrt((1 - beta1) / (1 + beta1)) / matrix.group["lr_ratio"] * math.sqrt(max(m, n))

        return math.sqrt(min(update.matrices[0].shape)) * _numbers(update, kappa, own) ** update.exponents


class Own(StepRule):  # noqa: D101
    def norms(self, update: Update, own: Tensor) -> Tensor:  # noqa: D102
        return own

    def share(self, update: Update) -> Tensor:  # noqa: D102
        return update.presence ** (1 - update.exponents)  # the norm is the momentum's to the power s


def _largest_norm(update: Update) -> float:
    """Return the Frobenius norm of ``match_rms_adamw``."""
    m, n = update.matrices[0].wide_shape
    return ADAMW_RMS * math.sqrt(m * n)


def _numbers(update: Update, number: Callable[[Matrix, int, int], float], like: Tensor) -> Tensor:
    """Return a number for each matrix and its (out, in), (B,), of a tensor's dtype and device."""
    numbers = [number(matrix, *matrix.shape) for matrix in update.matrices]
    return torch.tensor(numbers, dtype=like.dtype).to(like.device, non_blocking=True)


class Ball(StepRule):
    """Updates of length 1: the minimum of ``⟨M, T⟩`` over a ball whose radius is the learning rate."""

    def factors(self, update: Update) -> Tensor:  # noqa: D102
        return self.of_length_one(update)

    def of_length_one(self, update: Update) -> Tensor:
        """Return what gives updates the length 1, less where gradients are zero, (B,)."""
        return update.unit_factors() * self.share(update)

    def coupled_lengths(self, factors: Tensor, duals: Tensor) -> Tensor:
        """Return the lengths (N,) of matrices that are coupled by these factors (N,) and have dual norms (N,)."""
        return factors


class Regularized(Ball):
    """Updates as long as the dual norm: the minimum of ``⟨M, T⟩ + ‖T‖²/2``, divided by the penalty."""

    def factors(self, update: Update) -> Tensor:  # noqa: D102
        return update.dual_norms * self.of_length_one(update)

    def share(self, update: Update) -> Tensor:  # noqa: D102
        return torch.ones_like(update.presence)  # the dual norm is as small as the momentum

    def coupled_lengths(self, factors: Tensor, duals: Tensor) -> Tensor:  # noqa: D102
        return factors * (duals * factors).sum()


_PINNED: dict[ScaleRule, StepRule] = {
    "schatten": Schatten(),
    "match_rms_adamw": StepRule(),
    "muon": Muon(),
    "interpolate": Interpolate(),
    "none": Own(),
}
ORACLES = {"ball": Ball(), "regularized": Regularized()}


def step_rule_of(options: SchattenOptions) -> StepRule:
    """Return the rule that options ask for."""
    if options.step_rule in ORACLES:
        return ORACLES[options.step_rule]
    # The Schatten norm of a direction is known where that is the spectral power of a momentum.
    known = options.target == POWER and options.precondition == "none"
    return _PINNED[options.scale if known or options.scale != "schatten" else "match_rms_adamw"]
