"""Named methods that find coefficients for `spectral_function`, and the command that remakes the stored tables.

``python -m hf_schatten.linalg.coefficients`` fits every table of `spectral_power` anew (minutes on two cores, the
same numbers each time) and writes them next to this file.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.polynomial import chebyshev

from hf_schatten.linalg.coefficient_table import (
    MAX_EXPONENT,
    MIN_EXPONENT,
    STEPS,
    Coefficients,
    interpolate,
    load_table,
    table_filename,
)
from hf_schatten.linalg.multiscale_fit import Array, MultiscaleFit, perturbed, random_start

# The fit's domain is [_LOWEST, 1] in units of the Schatten-8 norm; there a log-uniform spectrum of condition 1000
# ends at 7.5e-4.
_LOWEST = 5e-4
_POINTS = 240
_SPACING = 0.35
# Damping of the weights at s = 0; falls like the error as s goes to 1. With 0.003 at K = 5, the search ends in minima
# that are as good as a whole, but a fifth worse at p = 4 to 6.
_DAMPING = {3: 0.003, 4: 0.003, 5: 0.005, 6: 0.003, 7: 0.003, 8: 0.003}
_DAMPING_BEYOND = 0.1  # times -s, beyond Muon, where free weights are large
_RIDGE = 0.01  # of the curves; only steps that a column does not need feel it
_DEGREE = 4  # of the curves in the search
_SEARCHED = np.linspace(MIN_EXPONENT, MAX_EXPONENT, 41)[:-1]
# The stored columns: closer where the best steps change faster and the weights' order costs more.
_EXPONENTS = np.concatenate(
    [np.arange(start, stop, 1 / inverse) for start, stop, inverse in ((-0.25, 0, 32), (0, 0.25, 128), (0.25, 0.5, 64))]
    + [np.linspace(0.5, MAX_EXPONENT, 17)]
)
# While every column finds its own steps: the price of their change along s, near s = 0, and of f rising with s, both
# in units of the column's error and for columns 1/32 apart.
_SMOOTHING = 4e4
_SMOOTHED = 0.1
_ORDER = 100.0

# What candidates are judged by: 1/p, most of them between columns, and singular values in units of the norm, of a
# square and a wide Gaussian and of log-uniform spectra of condition 100 and 1000.
_JUDGED_EXPONENTS = np.array([0, 1 / 100, 1 / 20, 1 / 10, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3])
_JUDGED_SPECTRA = (
    np.linspace(0.001, 0.65, 300),
    np.linspace(0.2, 0.65, 300),
    np.geomspace(0.007, 0.7, 300),
    np.geomspace(0.0007, 0.7, 300),
)
_ROUNDING = 1.02  # in half precision every iterate may come out larger by this factor,
_EXPLODED = 10.0  # and this is what f may not reach then
_TOLERATED_RISES = (0.05, 5e-4)  # of f as s grows from 0 to 1, anywhere and where x < 0.1


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
        x = np.linspace(lowest, 1, _POINTS)
        a, b, c = np.linalg.lstsq(np.stack([x, x**3, x**5], 1), f_target(x), rcond=None)[0].tolist()
        return Coefficients((a,), (b,), (c,), (0.0, 1.0))
    starts = np.array(load_table(steps)["curves"]) @ _chebyshev(_SEARCHED, _DEGREE).T  # (2K, S)
    x = _points(_POINTS, lowest)
    fit = _free_column(steps, x, f_target(x))
    _, shape = min((fit.minimise(start[:, None], 100) for start in starts.T), key=_value)
    return _columns_of(fit, shape, np.empty(0))[0]


def _points(count: int, lowest: float) -> Array:
    """Points in [lowest, 1], equally spaced in a small power of x: nearly log-uniform, but denser towards 1.

    Spectra spread over decades, each of which must count; the largest values carry most of the result's norm.
    """
    return np.linspace(lowest**_SPACING, 1, count) ** (1 / _SPACING)


def _chebyshev(exponents: Array, degree: int) -> Array:
    """Chebyshev polynomials of s on [-0.25, 1], shape (S, degree + 1)."""
    centre, half = (MAX_EXPONENT + MIN_EXPONENT) / 2, (MAX_EXPONENT - MIN_EXPONENT) / 2
    return np.asarray(chebyshev.chebvander((exponents - centre) / half, degree), dtype=np.float64)


def _family(steps: int, exponents: Array, basis: Array, points: int = _POINTS) -> MultiscaleFit:
    """The targets x^s for each exponent, all of the same importance and in no order."""
    x = _points(points, _LOWEST)
    count, size = basis.shape
    return MultiscaleFit(
        steps,
        x,
        x ** exponents[:, None],
        basis,
        damping=_DAMPING[steps] * (1 - exponents) ** 2 + _DAMPING_BEYOND * np.maximum(-exponents, 0),
        importance=np.ones(count),
        roughness=_RIDGE * np.eye(size),
        order=np.zeros(count - 1),
    )


def _free_column(steps: int, x: Array, target: Array) -> MultiscaleFit:
    """One column for one target."""
    one = np.ones((1, 1))
    return MultiscaleFit(steps, x, target[None], one, one[0] * _DAMPING[steps], one[0], _RIDGE * one, np.empty(0))


def _stored_family(steps: int) -> MultiscaleFit:
    """Free columns at the stored exponents."""
    return _family(steps, _EXPONENTS, np.eye(len(_EXPONENTS)))


def _strictness(steps: int) -> Array:
    """Of the order of the stored columns: monotone in p where p >= 1, smooth beyond Muon, where order is dear.

    It is in units of the error, which is larger for few steps, while rises must stay small in the end.
    """
    return np.where(_EXPONENTS[:-1] >= 0, {3: 80.0, 4: 40.0}.get(steps, 10.0), 3.0)


def search_curves(steps: int, *, starts: int = 100, kept: int = 8, hops: int = 40, finalists: int = 4) -> list[Array]:
    """Find good curves for the power family by a seeded multi-start search, coarse to fine.

    s = 1 takes no part: there the identity is exact, and the logarithm of its error infinite.

    Args:
        steps: Number of Newton–Schulz steps K.
        starts: Random starts on a coarse problem (few columns and points, straight curves).
        kept: How many of the best go on to the finer problem.
        hops: Perturbed restarts from the best.
        finalists: How many of the best to return.

    Returns:
        Chebyshev coefficients of the curves, shape (2K, 5) each.
    """
    rng = np.random.default_rng(steps)
    coarse = _family(steps, _SEARCHED[::4], _chebyshev(_SEARCHED[::4], 1), points=120)
    pool = sorted((coarse.minimise(random_start(steps, 2, rng), 40) for _ in range(starts)), key=_value)[:kept]
    fine = _family(steps, _SEARCHED[::3], _chebyshev(_SEARCHED[::3], _DEGREE), points=160)
    pool = [fine.minimise(np.pad(curves, ((0, 0), (0, _DEGREE - 1))), 100) for _, curves in pool]
    for _ in range(hops):
        pool = sorted(pool, key=_value)[:kept]
        pool.append(fine.minimise(perturbed(pool[rng.integers(len(pool))][1], rng), 100))
    return [curves for _, curves in sorted(pool, key=_value)[:finalists]]


def release_columns(steps: int, curves: Array) -> Array:
    """Let every stored column find its own steps, close to its neighbours', from where the curves are.

    Args:
        steps: Number of Newton–Schulz steps K.
        curves: As from `search_curves`.

    Returns:
        Shapes (2K, S) of the stored columns, see `MultiscaleFit`.
    """
    exponents = _EXPONENTS[:-1]
    start = curves @ _chebyshev(exponents, _DEGREE).T
    family = _family(steps, exponents, np.eye(len(exponents)), points=160)
    at_start = family.linearize(start)
    if at_start is None:
        raise ValueError("the iterates of these curves overflow")
    spacings, error = 32 * np.diff(exponents), at_start.error
    unit = error * np.sqrt((family.targets**2).mean(1))
    change = np.diff(np.eye(len(exponents)), axis=0)
    smoothing = 2 * _SMOOTHING * np.exp(-abs(exponents[1:]) / _SMOOTHED) * error[1:] * error[:-1] / spacings
    family = replace(
        family,
        importance=np.minimum(32 * np.gradient(exponents), 1),
        roughness=1e-4 * np.eye(len(exponents)) + change.T @ (smoothing[:, None] * change),
        order=_ORDER / (unit[1:] * unit[:-1] * spacings),
    )
    # At s = 1 only X_0 has a weight, and any steps will do.
    return np.pad(family.minimise(start, 80)[1], ((0, 0), (0, 1)), mode="edge")


def least_regrettable(steps: int, candidates: list[Array]) -> int:
    """Index of the candidate, shapes (2K, S), whose faults are the closest to the smallest of each kind.

    The fit's objective forgives one bad column, and knows nothing of what lies between columns.
    """
    faults = np.array([_faults(steps, shapes) for shapes in candidates])
    return int(((faults / faults.min(0)) ** 2).sum(1).argmin())


def _faults(steps: int, shapes: Array) -> Array:
    """What to hold against a candidate; infinite if its iterates overflow, or would in half precision.

    For each judged exponent, the worst relative error on the first three spectra and that on the last; and how far f
    rises with s, as a multiple of what is tolerated.
    """
    family = _stored_family(steps)
    if family.linearize(shapes) is None:
        return np.full(2 * len(_JUDGED_EXPONENTS) + 1, np.inf)
    table = np.array([column.row for column in _columns_of(family, shapes, _strictness(steps))])

    def values(exponents: Array, x: Array, stretch: float = 1.0) -> Array:
        rows = np.stack([np.interp(exponents, _EXPONENTS, numbers) for numbers in table.T], 1)
        rows[:, : 3 * steps] *= stretch
        return np.array([Coefficients.from_row(row).transfer(x) for row in rows])

    if abs(values(_JUDGED_EXPONENTS, family.x, _ROUNDING)).max() > _EXPLODED:
        return np.full(2 * len(_JUDGED_EXPONENTS) + 1, np.inf)
    errors = []
    for spectrum in _JUDGED_SPECTRA:
        targets = spectrum ** _JUDGED_EXPONENTS[:, None]
        error = values(_JUDGED_EXPONENTS, spectrum) - targets
        errors.append(np.linalg.norm(error, axis=1) / np.linalg.norm(targets, axis=1))
    rises = np.maximum(np.diff(values(np.linspace(0, 1, 161), family.x), axis=0), 0).sum(0)
    everywhere, low = rises.max() / _TOLERATED_RISES[0], rises[family.x < 0.1].max() / _TOLERATED_RISES[1]
    return np.array([*np.max(errors[:3], axis=0), *errors[3], max(everywhere, low, 1)])


def tabulate(steps: int, curves: Array, shapes: Array) -> dict[str, Any]:
    """The content of a table's file, see `load_table`, for given curves and what `release_columns` made of them."""
    x = _points(5 * _POINTS, _LOWEST)  # the largest errors lie between the fit's points
    columns = []
    for s, column in zip(_EXPONENTS, _columns_of(_stored_family(steps), shapes, _strictness(steps)), strict=True):
        target = x**s
        error = column.transfer(x) - target
        columns.append(
            {
                "s": float(s),
                **vars(column),
                "max_error": float(f"{abs(error).max():.3g}"),
                "relative_error": float(f"{np.linalg.norm(error) / np.linalg.norm(target):.3g}"),
            }
        )
    return {"steps": steps, "domain": [_LOWEST, 1], "columns": columns, "curves": curves.round(9).tolist()}


def _columns_of(fit: MultiscaleFit, shapes: Array, strictness: Array) -> list[Coefficients]:
    groups = [*fit.steps_of(shapes), fit.ordered_weights(shapes, strictness)]
    return [Coefficients(*map(tuple, column)) for column in zip(*(g.round(9).tolist() for g in groups), strict=True)]


def _value(candidate: tuple[float, Array]) -> float:
    return candidate[0]


def _write_table(steps: int, folder: Path) -> str:
    """Fit the table for ``steps`` and write it, one column a line; returns a line about it."""
    found = search_curves(steps)
    released = [release_columns(steps, curves) for curves in found]
    best = least_regrettable(steps, released)
    table = tabulate(steps, found[best], released[best])
    (folder / table_filename(steps)).write_text(_readable(table), "utf-8")
    errors = {column["s"]: column["relative_error"] for column in table["columns"]}
    return f"{steps} steps: relative error {errors[0.5]:.2%} at p = 2, {errors[0.0]:.2%} at p = inf"


def _readable(table: dict[str, Any]) -> str:
    """JSON with one line for each entry, each column and each curve."""
    entries = []
    for key, value in table.items():
        rows = isinstance(value, list) and not isinstance(value[0], float)
        text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]" if rows else json.dumps(value)
        entries.append(f' "{key}": {text}')
    return "{\n" + ",\n".join(entries) + "\n}\n"


def main(arguments: list[str] | None = None) -> None:
    """Remake the tables."""
    parser = argparse.ArgumentParser(prog="python -m hf_schatten.linalg.coefficients", description=main.__doc__)
    parser.add_argument("--steps", type=int, nargs="+", choices=STEPS, default=STEPS, help="tables to remake")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where to write them")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    # The search amplifies rounding, which depends on the number of threads; the processes inherit these.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        # The dearest first, so that no process is left alone with it at the end.
        for line in pool.imap(partial(_write_table, folder=options.folder), sorted(options.steps, reverse=True)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
