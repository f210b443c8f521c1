"""Fits the coefficients of the multi-scale iteration to any family of target functions, by variable projection.

A column of coefficients turns x in (0, 1] into ``f(x) = Σ_k w_k y_k`` with ``y_0 = x`` and
``y_k = a_k y_{k-1} + b_k y_{k-1}³ + c_k y_{k-1}⁵``. The weights w, in which f is linear, are solved for exactly in
each column. Rescaling an iterate changes nothing but its weight, which leaves two numbers a step, its *shape*: the
stretch u, of which the fit knows the logarithm, and the drop d::

    y_k = q(u y_{k-1}),    q(z) = (3/2 + γ) z - (1/2 + 2γ) z³ + γ z⁵,    γ = (u + 2)/(2u (u+1)²) - d/(u (1+u²)²)

``q(1) = 1`` and ``q'(1) = 0``: the step has a peak of height 1 at 1/u. At 1 its value is
``1 - d ((u²-1)/(u²+1))²``, so that 0 <= d <= 2 keeps the iterates in [-1, 1]. In these coordinates the good fits to
different powers lie close together, with u from 1.5 to 2.8 and d from 0 to 1.5, and may be interpolated; in a gauge
like ``a + b + c = 1`` the same fits lie far apart, and most of what lies between them explodes.

All columns of a family are fitted at once: the shapes are curves in the family's parameter. The stored tables are the
family of the exponents s (``benchmarks/spectral_power/fit_tables.py``); :func:`least_squares` fits one column.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray

from hf_schatten.exponent import MAX_EXPONENT, MIN_EXPONENT
from hf_schatten.linalg.coefficient_table import Coefficients, load_table

Array = NDArray[np.float64]

POINTS = 240
# Of the weights at s = 0. With 0.003 at K = 5, the search for the tables ends in minima that are as good as a whole,
# but a fifth worse at p = 4 to 6.
DAMPING = {3: 0.003, 4: 0.003, 5: 0.005, 6: 0.003, 7: 0.003, 8: 0.003}
RIDGE = 0.01  # of the curves; only steps that a column does not need feel it
DEGREE = 4  # of the stored curves
SEARCHED = np.linspace(MIN_EXPONENT, MAX_EXPONENT, 41)[:-1]  # exponents of the columns in the search for the curves

_SPACING = 0.35
_OVERFLOW = 1e6
_LARGEST_LOG_STRETCH = 3.0


@dataclass(frozen=True)
class Linearization:
    """The fit at one point: weights (S, K+1), error (S,), residual (S, R) and its Jacobian (S, R, 2K)."""

    weights: Array
    error: Array
    residual: Array
    jacobian: Array


@dataclass(frozen=True)
class MultiscaleFit:
    """The problem of fitting S columns of K steps to S targets on N points.

    Attributes:
        steps: number of Newton–Schulz steps K.
        x: points in (0, 1], (N,). All weigh the same: their density is the measure of the error.
        targets: values of the targets at the points, (S, N).
        basis: values of the D basis functions of the curves at the columns, (S, D).
        damping: of the weights of X_1 … X_K in each column, relative to the target's root mean square, (S,). Large
            weights that cancel amplify half precision's rounding, and jump from column to column. X_0 is never
            rounded and goes free, so that the target x is met exactly.
        importance: of each column, (S,).
        roughness: quadratic form in the curves that the objective contains, (D, D), positive definite: it keeps a
            step that a column does not need from running off to infinity.
    """

    steps: int
    x: Array
    targets: Array
    basis: Array
    damping: Array
    importance: Array
    roughness: Array

    def steps_of(self, curves: Array) -> tuple[Array, Array, Array]:
        """Return the coefficients ``(a, b, c)``, each (S, K), of curves (2K, D)."""
        u, d = self._shapes(curves)
        gamma = _gamma(u, d)
        return (1.5 + gamma) * u, -(0.5 + 2 * gamma) * u**3, gamma * u**5

    def _shapes(self, curves: Array) -> tuple[Array, Array]:
        """Stretches and drops, (S, K) each."""
        log_u, d = np.split(self.basis @ curves.T, 2, axis=1)
        return np.exp(np.clip(log_u, -_LARGEST_LOG_STRETCH, _LARGEST_LOG_STRETCH)), d

    def columns(self, curves: Array, weights: Array) -> list[Coefficients]:
        """Return the S columns of curves (2K, D) and weights (S, K + 1), rounded as they are stored."""
        groups = [*self.steps_of(curves), weights]
        return [
            Coefficients(*map(tuple, column)) for column in zip(*(g.round(9).tolist() for g in groups), strict=True)
        ]

    @property
    def _root_mean_squares(self) -> Array:
        return np.sqrt((self.targets**2).mean(1))

    def _run(self, curves: Array) -> tuple[Array, Array] | None:
        """Iterates y_0 … y_K (S, N, K+1) and derivatives dy_{k+1}/dy_k (S, N, K); None if they overflow."""
        iterates, slopes = [np.broadcast_to(self.x, self.targets.shape)], []
        with np.errstate(over="ignore", invalid="ignore"):
            for a, b, c in zip(*(coefficient.T[:, :, None] for coefficient in self.steps_of(curves)), strict=True):
                y = iterates[-1]
                slopes.append(a + y**2 * (3 * b + 5 * c * y**2))
                iterates.append(y * (a + y**2 * (b + c * y**2)))
        if not (np.abs(iterates) < _OVERFLOW).all():  # true of NaN too
            return None
        return np.stack(iterates, -1), np.stack(slopes, -1)

    def linearize(self, curves: Array) -> Linearization | None:
        """Solve for the weights and differentiate the rest (Kaufman's variant of variable projection).

        The residual is relative to each target's root mean square, so that ``error`` is a relative error; None where
        the iterates exceed a million. The first K rows of curves (2K, D) are those of log u, the last K those of d.
        """
        ran = self._run(curves)
        if ran is None:
            return None
        iterates, slopes = ran
        columns, points = self.targets.shape
        scale = 1 / (np.sqrt(points) * self._root_mean_squares)  # (S,)
        ridge = self.damping[:, None, None] * np.eye(self.steps + 1)[1:]  # (S, K, K + 1)
        design = np.concatenate([iterates * scale[:, None, None], ridge], 1)  # (S, N + K, K + 1)
        wanted = np.concatenate([self.targets * scale[:, None], np.zeros((columns, self.steps))], 1)[..., None]
        Q, R = np.linalg.qr(design)
        try:
            weights = np.linalg.solve(R, Q.mT @ wanted)
        except np.linalg.LinAlgError:
            return None
        residual = (design @ weights - wanted)[..., 0]

        u, d = self._shapes(curves)
        by_log_u, by_d = _gamma_derivatives(u, d)
        jacobian = np.zeros((columns, points + self.steps, 2 * self.steps))
        sensitivity = np.broadcast_to(weights[:, self.steps], (columns, points))  # ∂f/∂y_k, from the last k down
        for k in reversed(range(self.steps)):
            y = iterates[..., k]
            z = y * u[:, k, None]
            by_gamma = z * (1 - z**2) ** 2  # ∂y_{k+1}/∂γ
            jacobian[:, :points, k] = sensitivity * (y * slopes[..., k] + by_gamma * by_log_u[:, k, None])
            jacobian[:, :points, self.steps + k] = sensitivity * by_gamma * by_d[:, k, None]
            sensitivity = weights[:, k] + sensitivity * slopes[..., k]
        jacobian *= scale[:, None, None]
        jacobian -= Q @ (Q.mT @ jacobian)
        return Linearization(weights[..., 0], np.sqrt((residual**2).sum(1)), residual, jacobian)

    def minimise(self, curves: Array, iterations: int) -> tuple[float, Array]:
        """Minimise ``Σ importance · log(error)`` and the roughness from curves (2K, D), by Levenberg–Marquardt steps.

        The logarithm gives every column the same right to a given *relative* improvement, from p = 1.03 with
        its error of 0.01 % to p = -4 with its 20 %. Returns the objective reached (infinite where the start
        overflows), and the curves.
        """
        current = self.linearize(curves)
        if current is None:
            return np.inf, curves
        objective, damping, unproductive = self._objective(current, curves), 1e-3, 0
        for _ in range(iterations):
            gradient, hessian = self._normal_equations(current, curves)
            for _ in range(12):
                lift = damping * np.diag(hessian.diagonal() + 1e-12 * np.trace(hessian))
                trial = curves - np.linalg.solve(hessian + lift, gradient).reshape(curves.shape)
                after = self.linearize(trial)
                if after is not None and self._objective(after, trial) < objective:
                    break
                damping *= 4
            else:
                break
            damping /= 6
            gain = objective - self._objective(after, trial)
            unproductive = unproductive + 1 if gain < 1e-5 * abs(objective) else 0
            current, curves, objective = after, trial, objective - gain
            if unproductive > 5:
                break
        return objective, curves

    def _objective(self, at: Linearization, curves: Array) -> float:
        fit = self.importance @ np.log(at.error)
        return float(fit + ((curves @ self.roughness) * curves).sum() / 2)

    def _normal_equations(self, at: Linearization, curves: Array) -> tuple[Array, Array]:
        """Gradient (2KD,) and Gauss–Newton matrix (2KD, 2KD) of the objective."""
        size = len(curves)
        share = self.importance / at.error**2
        gram = at.jacobian.mT @ at.jacobian * share[:, None, None]  # (S, 2K, 2K)
        slope = (at.jacobian.mT @ at.residual[..., None])[..., 0] * share[:, None]  # (S, 2K)
        products = self.basis[:, :, None] * self.basis[:, None, :]  # (S, D, D)
        hessian = np.ascontiguousarray(np.tensordot(gram, products, (0, 0)).transpose(0, 2, 1, 3))  # (2K, D, 2K, D)
        hessian[range(size), :, range(size), :] += self.roughness
        gradient = slope.T @ self.basis + curves @ self.roughness
        return gradient.ravel(), hessian.reshape(curves.size, curves.size)


def _gamma(u: Array, d: Array) -> Array:
    return (u + 2) / (2 * u * (u + 1) ** 2) - d / (u * (1 + u**2) ** 2)


def _gamma_derivatives(u: Array, d: Array) -> tuple[Array, Array]:
    """Return ∂γ/∂(log u) and ∂γ/∂d."""
    by_d = -1 / (u * (1 + u**2) ** 2)
    peak = _gamma(u, np.zeros_like(d))
    return peak * (u / (u + 2) - 1 - 2 * u / (u + 1)) - d * by_d * (1 + 4 * u**2 / (1 + u**2)), by_d


def least_squares(f_target: Callable[[Array], Array], steps: int, *, lowest: float) -> Coefficients:
    """Fit any function of the singular values, from the nearest stored column.

    It covers [lowest, 1], relative to the Schatten-8 norm, in 3 to 8 Newton–Schulz steps. The step function
    ``1[x = x_max]`` is out of a polynomial's reach: use :func:`hf_schatten.linalg.top_singular_direction`.

    Raises:
        ValueError: when ``lowest`` is outside (0, 1), there is no table to start ``steps`` steps from, or the iterates
            of every start overflow.

    Source:
        "Interpolating Between SGD and Muon".
    """
    if not 0 < lowest < 1:
        raise ValueError(f"lowest must lie in (0, 1), got {lowest!r}")
    starts = np.array(load_table(steps)["curves"]) @ curve_basis(SEARCHED, DEGREE).T  # (2K, S)
    x, one = fit_points(POINTS, lowest), np.ones((1, 1))
    fit = MultiscaleFit(steps, x, f_target(x)[None], one, one[0] * DAMPING[steps], one[0], RIDGE * one)
    _, shape = min((fit.minimise(start[:, None], 100) for start in starts.T), key=itemgetter(0))
    fitted = fit.linearize(shape)
    if fitted is None:
        raise ValueError("the iterates of every start overflow")
    return fit.columns(shape, fitted.weights)[0]


def fit_points(count: int, lowest: float) -> Array:
    """Return points in [lowest, 1], equally spaced in a small power of x: nearly log-uniform, but denser towards 1.

    Spectra spread over decades, each of which must count; the largest values carry most of the result's norm.
    """
    return np.linspace(lowest**_SPACING, 1, count) ** (1 / _SPACING)


def curve_basis(exponents: Array, degree: int) -> Array:
    """Return Chebyshev polynomials of s on [-0.25, 1], shape (S, degree + 1)."""
    centre, half = (MAX_EXPONENT + MIN_EXPONENT) / 2, (MAX_EXPONENT - MIN_EXPONENT) / 2
    return np.asarray(chebyshev.chebvander((exponents - centre) / half, degree), dtype=np.float64)
