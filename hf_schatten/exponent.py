"""p and s = 1/p: which values exist, their order, and how they are written.

The update is U Σ^{1/p} Vᵀ. In the order of p, which is that of falling s, come 1 (SGD-like), …, inf (Muon, s = 0), and
beyond it …, -5, -4 (s = -0.25). Code computes with s, in which everything is smooth; people read p.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import overload

from torch import Tensor

MIN_EXPONENT, MAX_EXPONENT = -0.25, 1.0  # of s


@overload
def exponent_of(p: float, name: str = "p") -> float: ...
@overload
def exponent_of(p: Tensor, name: str = "p") -> Tensor: ...
def exponent_of(p: float | Tensor, name: str = "p") -> float | Tensor:
    """Return the spectral exponent ``s = 1/p``.

    Args:
        p: at least 1, ``inf``, or at most -4. Of a tensor the values are not checked: nothing waits for the device.
        name: of the argument or option, for the message.

    Raises:
        ValueError: when a number lies outside that range.
    """
    if isinstance(p, Tensor):
        return p.reciprocal()
    if not (p >= 1 / MAX_EXPONENT or p <= 1 / MIN_EXPONENT):  # true of NaN too
        raise ValueError(
            f"{name}={p!r} is not allowed: p is at least 1 (inf for Muon), or at most -4, which lies beyond Muon "
            "(1/p between -0.25 and 0)."
        )
    return 1 / p


@overload
def p_of(s: float) -> float: ...
@overload
def p_of(s: Tensor) -> Tensor: ...
def p_of(s: float | Tensor) -> float | Tensor:
    """Return p = 1/s, ``inf`` at s = 0."""
    if isinstance(s, Tensor):
        return s.reciprocal()
    return 1 / s if s else math.inf


def clamp(p: float, p_min: float, p_max: float) -> float:
    """Return p, or the end of the range [p_min, p_max] that it lies beyond."""
    if exceeds(p_min, p):
        return p_min
    return p_max if exceeds(p, p_max) else p


def is_close(p: float, other: float) -> bool:
    """Return whether two values are one to rounding."""
    return math.isclose(1 / p, 1 / other, rel_tol=1e-9, abs_tol=1e-6)


def exceeds(p: float, other: float) -> bool:
    """Return whether p comes after another one: -4 exceeds ``inf``."""
    return 1 / p < 1 / other


def ascending(values: Iterable[float]) -> list[float]:
    """Return values of p in their order."""
    return sorted(values, key=lambda p: -1 / p)


def p_label(p: float) -> str:
    """Return p as people read it, to three digits."""
    return "∞" if math.isinf(p) else f"{p:.3g}"
