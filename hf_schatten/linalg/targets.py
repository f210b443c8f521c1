"""Targets: what an update makes of the singular values, as named families or any function, with stated accuracy.

A target f turns ``U Σ Vᵀ`` into ``U f(Σ/c) Vᵀ``, where c is the Schatten-8 norm, at least the largest singular value.
Functions become polynomials that are fitted once; ``top_k``, which no polynomial of that degree is, becomes power or
subspace iteration.

Source: "Interpolating Between SGD and Muon".
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_schatten.linalg.coefficient_table import Coefficients
from hf_schatten.linalg.many_matrices import inner_products
from hf_schatten.linalg.multiscale_fit import Array, least_squares
from hf_schatten.linalg.spectral_power import (
    measured_spectral_function,
    measured_spectral_power,
    spectral_power,
)
from hf_schatten.option_text import POWER, function_name, json_ready, parse_target
from hf_schatten.options import TargetFunction

_ACCURACY_POINTS = 1000
_STEP_SHARPNESS = 8
_START_SEED = 0
_POLISHING_STEPS = 4  # take the table's 11 % at p = inf to rounding: each turns an error e into 1.5 e²


@dataclass(frozen=True)
class FittedTarget:
    """A target as a polynomial iteration, and how far that is from it.

    Attributes:
        coefficients: what :func:`hf_schatten.linalg.spectral_function` takes.
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
    """Fit a target by least squares, once for each function and number of steps: seconds, then from memory.

    Args:
        f: takes an array of singular values in (0, 1], relative to the Schatten-8 norm, and returns as many numbers,
            or one. Hashable, as functions are.
        steps: Newton–Schulz steps K, 3 to 8. Default 5.
        lowest: the fit covers [lowest, 1], and its errors are on 1000 log-uniform points there. Default 0.01.

    Returns:
        the fitted target, with its errors.

    Raises:
        ValueError: when f is not finite or zero everywhere on [lowest, 1], lowest is outside (0, 1), or there is no
            table for ``steps``.
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


def top_singular_direction(X: Tensor, *, squarings: int = 6) -> Tensor:
    """Return the rank-1 matrix ``u₁ v₁ᵀ``, i.e. the target ``1[σ = σ_max]``.

    It is the steepest descent of order 1, by power iteration without a random start: ``(X Xᵀ)^{2^squarings}`` tends to
    a multiple of ``u₁ u₁ᵀ``, whose column with the largest diagonal element is the start of a last step.

    Args:
        X: matrices (..., m, n), float32 or float64; zero gives zero.
        squarings: matrix products of the smaller side; the neighbour is suppressed by ``(σ₂/σ₁)^{2^(squarings + 1)}``.
            Default 6: by 600 at a gap of 5 %.

    Returns:
        matrices of X's shape and dtype.

    Source:
        "Interpolating Between SGD and Muon".
    """
    if X.shape[-2] > X.shape[-1]:
        return top_singular_direction(X.mT, squarings=squarings).mT
    tiny = torch.finfo(X.dtype).tiny
    X = X / X.abs().amax((-2, -1), keepdim=True).clamp(tiny)
    power = X @ X.mT  # (..., m, m)
    for _ in range(squarings):
        power = power / torch.linalg.matrix_norm(power, keepdim=True).clamp(tiny)
        power = power @ power
    largest = power.diagonal(dim1=-2, dim2=-1).argmax(-1)
    u = power.take_along_dim(largest[..., None, None], -1)  # (..., m, 1)
    v = _normalised(X.mT @ _normalised(u))  # (..., n, 1)
    return _normalised(X @ v) @ v.mT


def top_k_direction(X: Tensor, k: int, *, iterations: int = 16) -> Tensor:
    """Return the partial isometry ``U_k V_kᵀ`` of the k largest singular values: 1 for these, 0 for the rest.

    Subspace iteration from a fixed start, by products of X with k columns and QR decompositions. Where σ_{k+1} is
    close to σ_k the block mixes their vectors, weighted by ``(σ_{k+1}/σ_k)^{2 iterations}``: the result still has k
    singular values of 1, and on a Gaussian matrix, which has no gap, ``⟨X, U_k V_kᵀ⟩`` is 99 % of its maximum.

    Args:
        X: matrices (..., m, n), floating point. Singular values below 5e-4 of the largest come out below 1, and zero
            stays zero.
        k: at least 1; from min(m, n) on, the result is the polar factor.
        iterations: products with X and with Xᵀ, as many of each. Default 16.

    Returns:
        matrices of X's shape and dtype.

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


def _normalised(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp(torch.finfo(x.dtype).tiny)


def _start(like: Tensor, k: int) -> Tensor:
    """Return the same Gaussian columns (m, k) for every matrix, from a generator of their own."""
    generator = torch.Generator().manual_seed(_START_SEED)
    return torch.randn(like.shape[-2], k, generator=generator, dtype=like.dtype).to(like.device)


def _polar_factor(X: Tensor) -> Tensor:
    """Return the polar factor of small matrices (..., k, k) to rounding: the spectral power, then Newton–Schulz."""
    Y = spectral_power(X, math.inf, compute_dtype=X.dtype)
    for _ in range(_POLISHING_STEPS):
        Y = 1.5 * Y - 0.5 * (Y @ Y.mT) @ Y
    return Y


@dataclass(frozen=True)
class Power:
    """x^{1/p}, by the stored tables.

    Every target has a name, as the option has it (of a Python function, ``function:NAME``), says whether matrices may
    come in the dtype of products, and has these methods.
    """

    name: str = POWER
    takes_half_precision: ClassVar[bool] = True

    def direction(
        self, X: Tensor, p: Tensor, steps: int, compute_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Apply the target to matrices X (..., m, n), whose p is (...); the rest as in :func:`spectral_power`.

        Returns:
            the update direction O, of the shape of X, and the inner products ``⟨X, O⟩`` and ``⟨O, O⟩``, (2, B).
        """
        return measured_spectral_power(X, p, steps=steps, compute_dtype=compute_dtype)

    def accuracy(self, steps: int) -> str:
        """Fit what is to be fitted, and say how accurate it is."""
        return f"errors of each exponent are in the table for {steps} steps"


@dataclass(frozen=True)
class TopK:
    """1 for the k largest singular values, 0 for the rest."""

    name: str
    k: int
    takes_half_precision: ClassVar[bool] = False

    def direction(
        self, X: Tensor, p: Tensor, steps: int, compute_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what :func:`top_singular_direction` does for k = 1, else :func:`top_k_direction`."""
        found = top_singular_direction(X) if self.k == 1 else top_k_direction(X, self.k)
        products = inner_products(X.reshape(-1, *X.shape[-2:]), found.reshape(-1, *X.shape[-2:]))
        return found, products

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
    takes_half_precision: ClassVar[bool] = True

    def direction(
        self, X: Tensor, p: Tensor, steps: int, compute_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Apply the polynomial with the fitted coefficients."""
        return measured_spectral_function(X, fit_target(self.f, steps).coefficients, compute_dtype=compute_dtype)

    def accuracy(self, steps: int) -> str:
        """Fit the function, and say how accurate the polynomial is."""
        return str(fit_target(self.f, steps))


Target = Power | TopK | Function


@dataclass(frozen=True)
class SoftThreshold:
    """``max(x - tau, 0)``, for tau in (0, 1): what is left of a low-rank signal when noise below tau is removed.

    Where the largest relative singular value, which is between ``rank^{-1/8}`` and 1, is below tau, nothing is left
    but the error of the fit, which a pinned norm would blow up: stay below 0.3.
    """

    tau: float

    def __call__(self, x: Array) -> Array:
        """Return the values at x."""
        return np.maximum(x - self.tau, 0.0)


@dataclass(frozen=True)
class SoftStep:
    """``1 / (1 + (tau/x)^8)``, for tau in (0, 1): a step at tau as steep as five Newton–Schulz steps follow.

    It is as close as a polynomial comes to keeping the largest singular values alone; how many are above tau is left
    to the spectrum. With the largest below tau, see :class:`SoftThreshold`.
    """

    tau: float

    def __call__(self, x: Array) -> Array:
        """Return the values at x."""
        return 1 / (1 + (self.tau / x) ** _STEP_SHARPNESS)


_NAMED: dict[str, Callable[[float], Target]] = {
    POWER: lambda number: Power(),
    "top_k": lambda k: TopK(f"top_k:{int(k)}", int(k)),
    "soft_threshold": lambda tau: Function(f"soft_threshold:{tau:g}", SoftThreshold(tau)),
    "soft_step": lambda tau: Function(f"soft_step:{tau:g}", SoftStep(tau)),
}


def target_of(target: str | TargetFunction) -> Target:
    """Return the target of an option's text, OptionError where it is none, or of a Python function."""
    if not isinstance(target, str):
        return Function(json_ready(target), target)
    name, number = parse_target(target)
    return _NAMED[name](number)
