"""How large a pinned update is: rules of its norm, so that one learning rate serves every p."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_schatten.options import ScaleRule

# AdamW's updates have a root mean square of about 0.2 to 0.4 on language models
# (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).
ADAMW_RMS = 0.2


class OwnNorms(NamedTuple):
    """Norms of updates before they are scaled.

    Attributes:
        frobenius: of any shape.
        schatten: Schatten-(p + 1) norms, of that shape; None where they are not known, since the update is not
            the spectral power of a matrix.
    """

    frobenius: Tensor
    schatten: Tensor | None = None


def _schatten(m: int, n: int, s: Tensor, rho: float, own: OwnNorms) -> Tensor:
    largest = _match_rms_adamw(m, n, s, rho, own)
    if own.schatten is None:
        return largest
    norms = ADAMW_RMS * math.sqrt(max(m, n)) * own.frobenius / own.schatten
    return torch.where(s > 0, norms.minimum(largest), largest)


def _match_rms_adamw(m: int, n: int, s: Tensor, rho: float, own: OwnNorms) -> Tensor:
    return s.new_full(s.shape, ADAMW_RMS * math.sqrt(m * n))


def _muon(m: int, n: int, s: Tensor, rho: float, own: OwnNorms) -> Tensor:
    return s.new_full(s.shape, math.sqrt(min(m, n) * max(1.0, m / n)))


def _interpolate(m: int, n: int, s: Tensor, rho: float, own: OwnNorms) -> Tensor:
    kappa = rho * math.sqrt(max(m, n))
    return math.sqrt(min(m, n)) * kappa**s


def _none(m: int, n: int, s: Tensor, rho: float, own: OwnNorms) -> Tensor:
    return own.frobenius


_RULES: dict[ScaleRule, Callable[[int, int, Tensor, float, OwnNorms], Tensor]] = {
    "schatten": _schatten,
    "match_rms_adamw": _match_rms_adamw,
    "muon": _muon,
    "interpolate": _interpolate,
    "none": _none,
}


def update_norm(rule: ScaleRule, m: int, n: int, s: Tensor, own: OwnNorms, *, beta1: float, lr_ratio: float) -> Tensor:
    r"""Return the Frobenius norm that the update of an (m, n) matrix is scaled to.

    ``schatten``
        That with which the Schatten-(p + 1) norm, whose steepest descent the update is, is 0.2 √max(m, n) for every
        p ≥ 1. At p = ∞ and beyond, where there is no such norm, it is that of ``match_rms_adamw``, which is never
        exceeded. Updates whose Schatten norms are not known are scaled as there.
    ``match_rms_adamw``
        0.2 √(mn), whatever the exponent: entries as large as AdamW's, so AdamW's learning rate carries over.
    ``muon``
        √min(m, n) · √max(1, m/n): Muon's original rule, at every exponent.
    ``interpolate``
        √min(m, n) · κ^s with κ = ρ √max(m, n) / lr_ratio and ρ = √((1 − β₁)/(1 + β₁)): the norm of the
        polar factor at s = 0, the norm of Adam's update under a pure-noise gradient at s = 1.
    ``none``
        The update's own norm: that of the momentum at s = 1, hence SGD, or Adam where the momentum is
        preconditioned; √min(m, n) at s = 0. The learning rate depends on p and on the size of gradients.

    Args:
        rule: one of the rules above.
        m: output features.
        n: input features.
        s: spectral exponents 1/p, any shape.
        own: norms of the updates as they are, of the shape of ``s``.
        beta1: Adam's first-moment decay.
        lr_ratio: learning rate of the matrices divided by that of AdamW.

    Returns:
        Norms of the shape, dtype and device of ``s``.
    """
    return _RULES[rule](m, n, s, math.sqrt((1 - beta1) / (1 + beta1)) / lr_ratio, own)
