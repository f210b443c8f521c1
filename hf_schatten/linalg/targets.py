"""Targets: what an update makes of the singular values, as named families or any function, with stated accuracy.

A target f turns ``U Σ Vᵀ`` into ``U f(Σ/c) Vᵀ``, where c is the matrix' Schatten-8 norm, at least its largest singular
value ("Interpolating Between SGD and Muon"). Functions become polynomials that are fitted once; ``top_k``, which no
polynomial of that degree is, becomes subspace iteration.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_schatten.linalg.coefficient_table import Coefficients
from hf_schatten.linalg.multiscale_fit import Array, least_squares
from hf_schatten.linalg.spectral_power import spectral_function, spectral_power
from hf_schatten.linalg.top_directions import top_k_direction, top_singular_direction
from hf_schatten.option_text import POWER, function_name, json_ready, parse_target
from hf_schatten.options import TargetFunction

_ACCURACY_POINTS = 1000
_STEP_SHARPNESS = 8


@dataclass(frozen=True)
class FittedTarget:
    """A target as a polynomial iteration, and how far that is from it.

    Attributes:
        coefficients: what `spectral_function` takes.
        lowest: the fit covers singular values in [lowest, 1], relative to the Schatten-8 norm.
        max_error: largest absolute error there.
        relative_error: root mean square of the error over log x, relative to the target's.
    """

    coefficients: Coefficients
    lowest: float
    max_error: float
    relative_error: float

    def __str__(self) -> str:
        return (
            f"largest error {self.max_error:.2g}, relative error {self.relative_error:.2%}, for singular values from "
            f"{self.lowest:g} to 1 of the Schatten-8 norm ({self.coefficients.steps} Newton–Schulz steps)"
        )


@functools.lru_cache(maxsize=64)
def fit_target(f: TargetFunction, steps: int = 5, lowest: float = 0.01) -> FittedTarget:
    """Fit a target by `least_squares`, once for each function and number of steps: seconds, then from memory.

    Args:
        f: takes an array of singular values in (0, 1], relative to the Schatten-8 norm, and returns as many numbers,
            or one. Hashable, as functions are.
        steps: Newton–Schulz steps K, 3 to 8.
        lowest: the fit covers [lowest, 1].

    Returns:
        The coefficients and their errors on 1000 log-uniform points.

    Raises:
        ValueError: when f is not finite or zero everywhere on [lowest, 1], or as `least_squares`.
    """
    x = np.geomspace(lowest, 1, _ACCURACY_POINTS)
    target = _values(f, x)
    coefficients = least_squares(lambda points: _values(f, points), steps, lowest=lowest)
    error = coefficients.transfer(x) - target
    return FittedTarget(
        coefficients, lowest, float(np.abs(error).max()), float(np.linalg.norm(error) / np.linalg.norm(target))
    )


def _values(f: TargetFunction, x: Array) -> Array:
    values = np.broadcast_to(np.asarray(f(x), dtype=np.float64), x.shape)
    if not np.isfinite(values).all():
        raise ValueError(
            f"the target {function_name(f)} is {values[~np.isfinite(values)][0]} at the relative singular value "
            f"{x[~np.isfinite(values)][0]:.3g}: return finite numbers on (0, 1]"
        )
    if not values.any():
        raise ValueError(f"the target {function_name(f)} is 0 on all of [{x.min():g}, 1]: no update would be left")
    return values


@dataclass(frozen=True)
class Power:
    """x^{1/p}, by the stored tables.

    Every target has a name, as the option has it (of a Python function, ``function:NAME``), and these methods.
    """

    name: str = POWER

    def direction(self, X: Tensor, p: Tensor, steps: int, compute_dtype: torch.dtype | None = None) -> Tensor:
        """Apply the target to matrices X (B, m, n), whose p is (B,); the rest as in `spectral_power`."""
        return spectral_power(X, p, steps=steps, compute_dtype=compute_dtype)

    def accuracy(self, steps: int) -> str:
        """Fit what is to be fitted, and say how accurate it is."""
        return f"errors of each exponent are in the table for {steps} steps"


@dataclass(frozen=True)
class TopK:
    """1 for the k largest singular values, 0 for the rest."""

    name: str
    k: int

    def direction(self, X: Tensor, p: Tensor, steps: int, compute_dtype: torch.dtype | None = None) -> Tensor:
        """`top_singular_direction` for k = 1, else `top_k_direction`."""
        return top_singular_direction(X) if self.k == 1 else top_k_direction(X, self.k)

    def accuracy(self, steps: int) -> str:
        """Say what limits it."""
        return (
            "nothing is fitted; power iteration separates the singular values k and k + 1 where their gap is above 5 %"
        )


@dataclass(frozen=True)
class Function:
    """Any function of the relative singular values, fitted."""

    name: str
    f: TargetFunction

    def direction(self, X: Tensor, p: Tensor, steps: int, compute_dtype: torch.dtype | None = None) -> Tensor:
        """`spectral_function` with the fitted coefficients."""
        return spectral_function(X, fit_target(self.f, steps).coefficients, compute_dtype=compute_dtype)

    def accuracy(self, steps: int) -> str:
        """The fit's errors."""
        return str(fit_target(self.f, steps))


Target = Power | TopK | Function


@dataclass(frozen=True)
class SoftThreshold:
    """``max(x - tau, 0)``, for tau in (0, 1): what is left of a low-rank signal when noise below tau is removed.

    Where the largest relative singular value, which is between ``rank^{-1/8}`` and 1, is below tau, nothing is left
    but the error of the fit, which a pinned norm would blow up: stay below 0.3.
    """

    tau: float

    def __call__(self, x: Array) -> Array:  # noqa: D102
        return np.maximum(x - self.tau, 0.0)


@dataclass(frozen=True)
class SoftStep:
    """``1 / (1 + (tau/x)^8)``, for tau in (0, 1): a step at tau as steep as five Newton–Schulz steps follow.

    It is as close as a polynomial comes to keeping the largest singular values alone; how many are above tau is left
    to the spectrum. With the largest below tau, see `SoftThreshold`.
    """

    tau: float

    def __call__(self, x: Array) -> Array:  # noqa: D102
        return 1 / (1 + (self.tau / x) ** _STEP_SHARPNESS)


_NAMED: dict[str, Callable[[float], Target]] = {
    POWER: lambda number: Power(),
    "top_k": lambda k: TopK(f"top_k:{int(k)}", int(k)),
    "soft_threshold": lambda tau: Function(f"soft_threshold:{tau:g}", SoftThreshold(tau)),
    "soft_step": lambda tau: Function(f"soft_step:{tau:g}", SoftStep(tau)),
}


def target_of(target: str | TargetFunction) -> Target:
    """Return the target that an option's text, or a Python function, stands for.

    Raises:
        OptionError: as :func:`hf_schatten.option_text.parse_target`.
    """
    if not isinstance(target, str):
        return Function(json_ready(target), target)
    name, number = parse_target(target)
    return _NAMED[name](number)
