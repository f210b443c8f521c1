"""Named methods that find coefficients for `spectral_function`: the stored fit, and two to compare with it.

The tables of the stored fit are made by ``python benchmarks/spectral_power/fit_tables.py``, which starts from what is
here: points, damping and basis are those of every fit.
"""

from collections.abc import Callable
from operator import itemgetter

import numpy as np
import torch
from numpy.polynomial import chebyshev

from hf_schatten.exponent import MAX_EXPONENT, MIN_EXPONENT
from hf_schatten.linalg.coefficient_table import (
    Coefficients,
    interpolate,
    load_table,
)
from hf_schatten.linalg.multiscale_fit import Array, MultiscaleFit

POINTS = 240
_SPACING = 0.35
# Of the weights at s = 0. With 0.003 at K = 5, the search for the tables ends in minima that are as good as a whole,
# but a fifth worse at p = 4 to 6.
DAMPING = {3: 0.003, 4: 0.003, 5: 0.005, 6: 0.003, 7: 0.003, 8: 0.003}
RIDGE = 0.01  # of the curves; only steps that a column does not need feel it
DEGREE = 4  # of the stored curves
SEARCHED = np.linspace(MIN_EXPONENT, MAX_EXPONENT, 41)[:-1]  # exponents of the columns in the search for the curves


def multiscale(s: float, steps: int = 5) -> Coefficients:
    """The stored fit to x^s, the default of `spectral_power`.

    Args:
        s: Spectral exponent 1/p; clamped to [-0.25, 1].
        steps: Number of Newton–Schulz steps K, 3 to 8.

    Returns:
        The column for s, interpolated between its stored neighbours.

    Raises:
        ValueError: If no table is stored for ``steps``.
    """
    return Coefficients.from_row(interpolate(torch.tensor([s], dtype=torch.float64), steps)[0].tolist())


def lagrange(s: float, steps: int = 5) -> Coefficients:
    """One constrained least-squares quintic for x^{s^{1/K}}, composed K times (T. Massena 2026).

    The quintic minimises ``∫₀¹ (a x + b x³ + c x⁵ - x^t)² dx`` subject to ``a + b + c = 1``, where ``t^K = s``;
    its Lagrange conditions are four linear equations.

    Args:
        s: Spectral exponent 1/p in [0, 1].
        steps: How often the quintic is composed, K.

    Returns:
        K equal steps, of which only the last iterate has a weight.

    Raises:
        ValueError: If s lies outside [0, 1].
    """
    if not 0 <= s <= 1:
        raise ValueError(f"s must lie in [0, 1], got {s!r}")
    powers = np.array([1, 3, 5])
    conditions = np.ones((4, 4))
    conditions[:3, :3] = 1 / (powers[:, None] + powers + 1)  # ∫ x^i x^j
    conditions[3, 3] = 0
    moments = np.append(1 / (powers + s ** (1 / steps) + 1), 1)
    a, b, c, _ = np.linalg.solve(conditions, moments).tolist()
    return Coefficients((a,) * steps, (b,) * steps, (c,) * steps, (0.0,) * steps + (1.0,))


def least_squares(f_target: Callable[[Array], Array], steps: int = 1, *, lowest: float = 0.01) -> Coefficients:
    """Least squares on a grid, for any function of the singular values ("Interpolating Between SGD and Muon").

    One step is the quintic ``a x + b x³ + c x⁵`` of the source, fitted on equally spaced points. Three to eight
    steps fit the multi-scale sum, on log-uniform points, from the stored column that is nearest to the target.

    Args:
        f_target: Takes an array of singular values in (0, 1], relative to the Schatten-8 norm, and returns what
            becomes of them. The step function ``1[x = x_max]`` is out of a polynomial's reach: use
            `hf_schatten.linalg.top_singular_direction`.
        steps: Number of Newton–Schulz steps: 1, or 3 to 8.
        lowest: The fit covers [lowest, 1].

    Returns:
        The fitted coefficients.

    Raises:
        ValueError: If ``lowest`` is outside (0, 1) or there is no table to start ``steps`` steps from.
    """
    if not 0 < lowest < 1:
        raise ValueError(f"lowest must lie in (0, 1), got {lowest!r}")
    if steps == 1:
        x = np.linspace(lowest, 1, POINTS)
        a, b, c = np.linalg.lstsq(np.stack([x, x**3, x**5], 1), f_target(x), rcond=None)[0].tolist()
        return Coefficients((a,), (b,), (c,), (0.0, 1.0))
    starts = np.array(load_table(steps)["curves"]) @ curve_basis(SEARCHED, DEGREE).T  # (2K, S)
    x = fit_points(POINTS, lowest)
    fit = _free_column(steps, x, f_target(x))
    _, shape = min((fit.minimise(start[:, None], 100) for start in starts.T), key=itemgetter(0))
    fitted = fit.linearize(shape)
    if fitted is None:
        raise ValueError("the iterates of every start overflow")
    return fit.columns(shape, fitted.weights)[0]


def fit_points(count: int, lowest: float) -> Array:
    """Points in [lowest, 1], equally spaced in a small power of x: nearly log-uniform, but denser towards 1.

    Spectra spread over decades, each of which must count; the largest values carry most of the result's norm.
    """
    return np.linspace(lowest**_SPACING, 1, count) ** (1 / _SPACING)


def curve_basis(exponents: Array, degree: int) -> Array:
    """Chebyshev polynomials of s on [-0.25, 1], shape (S, degree + 1)."""
    centre, half = (MAX_EXPONENT + MIN_EXPONENT) / 2, (MAX_EXPONENT - MIN_EXPONENT) / 2
    return np.asarray(chebyshev.chebvander((exponents - centre) / half, degree), dtype=np.float64)


def _free_column(steps: int, x: Array, target: Array) -> MultiscaleFit:
    """One column for one target."""
    one = np.ones((1, 1))
    return MultiscaleFit(steps, x, target[None], one, one[0] * DAMPING[steps], one[0], RIDGE * one)
