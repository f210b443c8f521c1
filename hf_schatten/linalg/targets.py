"""Targets: what an update makes of the singular values, as named families or any function, with stated accuracy.

A target f turns ``U Σ Vᵀ`` into ``U f(Σ/c) Vᵀ``, where c is the matrix' Schatten-8 norm, at least its largest singular
value ("Interpolating Between SGD and Muon"). Functions become polynomials that are fitted once; ``top_k``, which no
polynomial of that degree is, becomes subspace iteration.
"""

import difflib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hf_schatten.linalg.coefficient_table import Coefficients
from hf_schatten.linalg.multiscale_fit import Array
from hf_schatten.linalg.spectral_power import spectral_function, spectral_power
from hf_schatten.linalg.top_singular import top_singular_direction

TargetFunction = Callable[[Array], Array]

LOWEST = 0.01  # fits cover [LOWEST, 1] of the Schatten-8 norm
POWER = "power"
FUNCTION_PREFIX = "function:"  # of the name that stands for a Python function

_ACCURACY_POINTS = 1000
_START_SEED = 0
_POLISHING_STEPS = 4  # take the table's 11 % at p = inf to rounding: each turns an error e into 1.5 e²
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
def fit_target(f: TargetFunction, steps: int = 5, lowest: float = LOWEST) -> FittedTarget:
    """Fit a target by `least_squares`, once for each function and number of steps: seconds, then from memory.

    Args:
        f: takes an array of singular values in (0, 1], relative to the Schatten-8 norm, and returns as many numbers,
            or one. Hashable, as functions are.
        steps: Newton–Schulz steps K, 3 to 8.
        lowest: the fit covers [lowest, 1]. Default 0.01.

    Returns:
        The coefficients and their errors on 1000 log-uniform points.

    Raises:
        ValueError: when f is not finite or zero everywhere on [lowest, 1], or as `least_squares`.
    """
    # Imported where it is used: `python -m hf_schatten.linalg.coefficients` must not find itself imported already.
    from hf_schatten.linalg.coefficients import least_squares  # noqa: PLC0415

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


def top_k_direction(X: Tensor, k: int, *, iterations: int = 16) -> Tensor:
    """The partial isometry ``U_k V_kᵀ`` of the k largest singular values: 1 for these, 0 for the rest.

    Subspace iteration from a fixed start, by products of X with k columns and QR decompositions. Where σ_{k+1} is
    close to σ_k the block mixes their vectors, weighted by ``(σ_{k+1}/σ_k)^{2 iterations}``: the result still has k
    singular values of 1, and on a Gaussian matrix, which has no gap, ``⟨X, U_k V_kᵀ⟩`` is 99 % of its maximum.

    Args:
        X: matrices, shape (..., m, n), of a floating point dtype.
        k: at least 1; from min(m, n) on, the result is the polar factor.
        iterations: products with X and with Xᵀ, as many of each. Default 16.

    Returns:
        Tensor of X's shape and dtype. Singular values below 5e-4 of the largest come out below 1, and zero stays
        zero.

    Raises:
        ValueError: when k is below 1, or X is not floating point or has fewer than two dimensions.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k!r}")
    if X.ndim < 2 or not X.is_floating_point():
        raise ValueError(f"X must be floating point with two dimensions or more, got {X.dtype} {tuple(X.shape)}")
    if X.shape[-2] > X.shape[-1]:
        return top_k_direction(X.mT, k, iterations=iterations).mT
    if X.numel() == 0:
        return torch.zeros_like(X)
    working = X.to(torch.promote_types(X.dtype, torch.float32))
    working = working / working.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(working.dtype).tiny)
    U = _start(working, min(k, X.shape[-2]))
    for _ in range(iterations):
        V = torch.linalg.qr(working.mT @ U).Q  # (..., n, k)
        U, core = torch.linalg.qr(working @ V)  # (..., m, k) and (..., k, k) with X V = U core
    return (U @ _polar_factor(core) @ V.mT).to(X.dtype)


def _start(like: Tensor, k: int) -> Tensor:
    """The same Gaussian columns (m, k) for every matrix, from a generator of their own."""
    generator = torch.Generator().manual_seed(_START_SEED)
    return torch.randn(like.shape[-2], k, generator=generator, dtype=like.dtype).to(like.device)


def _polar_factor(X: Tensor) -> Tensor:
    """The polar factor of small matrices (..., k, k) to rounding: `spectral_power`, then Newton–Schulz steps."""
    Y = spectral_power(X, math.inf, compute_dtype=X.dtype)
    for _ in range(_POLISHING_STEPS):
        Y = 1.5 * Y - 0.5 * (Y @ Y.mT) @ Y
    return Y


class Target(Protocol):
    """What an optimizer asks of a target."""

    @property
    def name(self) -> str:
        """What `parse_target` takes; of a Python function, a name that it refuses."""

    def direction(self, X: Tensor, p: Tensor, steps: int, compute_dtype: torch.dtype | None = None) -> Tensor:
        """Apply the target to matrices (B, m, n).

        Args:
            X: the matrices.
            p: (B,) their p.
            steps: Newton–Schulz steps.
            compute_dtype: as in `spectral_power`, where the target is a polynomial.
        """

    def accuracy(self, steps: int) -> str:
        """Fit what is to be fitted, and say how accurate it is."""


@dataclass(frozen=True)
class Power:
    """x^{1/p}, by the stored tables."""

    name: str = POWER

    def direction(self, X: Tensor, p: Tensor, steps: int, compute_dtype: torch.dtype | None = None) -> Tensor:
        """`spectral_power`."""
        return spectral_power(X, p, steps=steps, compute_dtype=compute_dtype)

    def accuracy(self, steps: int) -> str:
        """Refer to the tables."""
        return f"errors of each exponent are in the table for {steps} steps"


@dataclass(frozen=True)
class TopK:
    """1 for the k largest singular values, 0 for the rest.

    Raises:
        ValueError: when k is below 1.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k!r}")

    @property
    def name(self) -> str:
        """``top_k:K``."""
        return f"top_k:{self.k}"

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


@dataclass(frozen=True)
class SoftThreshold:
    """``max(x - tau, 0)``, for tau in (0, 1): what is left of a low-rank signal when noise below tau is removed.

    Where the largest relative singular value, which is between ``rank^{-1/8}`` and 1, is below tau, nothing is left
    but the error of the fit, which a pinned norm would blow up: stay below 0.3.

    Raises:
        ValueError: when tau lies outside (0, 1).
    """

    tau: float

    def __post_init__(self) -> None:
        _require_fraction(self.tau)

    def __call__(self, x: Array) -> Array:
        """Return the values at x."""
        return np.maximum(x - self.tau, 0.0)


@dataclass(frozen=True)
class SoftStep:
    """``1 / (1 + (tau/x)^8)``, for tau in (0, 1): a step at tau as steep as five Newton–Schulz steps follow.

    It is as close as a polynomial comes to keeping the largest singular values alone; how many are above tau is left
    to the spectrum. With the largest below tau, see `SoftThreshold`.

    Raises:
        ValueError: when tau lies outside (0, 1).
    """

    tau: float

    def __post_init__(self) -> None:
        _require_fraction(self.tau)

    def __call__(self, x: Array) -> Array:
        """Return the values at x."""
        return 1 / (1 + (self.tau / x) ** _STEP_SHARPNESS)


def _require_fraction(tau: float) -> None:
    if not 0 < tau < 1:
        raise ValueError(f"tau must lie in (0, 1), got {tau!r}")


def target_of(target: str | TargetFunction) -> Target:
    """The target that a name or a Python function stands for.

    Raises:
        ValueError: As `parse_target`.
    """
    return parse_target(target) if isinstance(target, str) else Function(target_name(target), target)


def target_name(target: str | TargetFunction) -> str:
    """The name under which a target is stored: ``function:NAME`` for a Python function."""
    return target if isinstance(target, str) else FUNCTION_PREFIX + function_name(target)


def function_name(f: TargetFunction) -> str:
    """The name of a function, or the type of another callable."""
    return getattr(f, "__qualname__", type(f).__name__)


def parse_target(text: str) -> Target:
    """Read a target's name.

    Args:
        text: ``power``, ``top_k:K``, ``soft_threshold:TAU`` or ``soft_step:TAU``.

    Raises:
        ValueError: when it is none of these; the message names the text and the fix.
    """
    name, separator, argument = text.partition(":")
    if text.startswith(FUNCTION_PREFIX):
        raise ValueError(
            f"target={text!r} is not allowed: it names a Python function, which a text cannot hold. Pass the function "
            "itself, as create_schatten_optimizer(model, target=function)."
        )
    if name not in _FAMILIES:
        nearest = difflib.get_close_matches(name, _FAMILIES, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        forms = ", ".join(family.form for family in _FAMILIES.values())
        raise ValueError(f"target={text!r} is not allowed: one of {forms}.{hint}")
    family = _FAMILIES[name]
    if bool(separator) == (family.form == name):
        raise ValueError(f"target={text!r} is not allowed: write {family.form}, {family.rule}.")
    try:
        return family.make(argument)
    except ValueError as error:
        raise ValueError(f"target={text!r} is not allowed: write {family.form}, {family.rule}.") from error


def _canonical(name: str, function: Callable[[float], TargetFunction]) -> Callable[[str], Target]:
    """A maker of the named target from the text of its number."""
    return lambda text: Function(f"{name}:{float(text):g}", function(float(text)))


@dataclass(frozen=True)
class _Family:
    form: str
    rule: str
    make: Callable[[str], Target]


_FAMILIES = {
    POWER: _Family(POWER, "whose exponent is 1/p", lambda text: Power()),
    "top_k": _Family("top_k:K", "K a whole number from 1, such as top_k:8", lambda text: TopK(int(text))),
    "soft_threshold": _Family(
        "soft_threshold:TAU",
        "TAU between 0 and 1, such as soft_threshold:0.1",
        _canonical("soft_threshold", SoftThreshold),
    ),
    "soft_step": _Family(
        "soft_step:TAU", "TAU between 0 and 1, such as soft_step:0.2", _canonical("soft_step", SoftStep)
    ),
}
