"""Named methods that find coefficients for `spectral_function`, and the command that remakes the stored tables.

``python -m hf_schatten.linalg.coefficients`` fits every table of `spectral_power` anew (minutes on two cores, the
same numbers each time) and writes them next to this file.
"""

import argparse
import json
import multiprocessing
from collections.abc import Callable
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
_DAMPING = 0.02  # at s = 0; falls like the error as s goes to 1
_DEGREE = 4  # of the curves b_k(s) and c_k(s)
_EXPONENTS = np.linspace(MIN_EXPONENT, MAX_EXPONENT, 41)  # 1/32 apart: 0, 1/4, 1/2 and 1 are columns
# Monotone in p where p >= 1; beyond Muon the price would be high, and the penalty only smooths.
_STRICTNESS = np.where(_EXPONENTS[:-1] >= 0, 10.0, 3.0)


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
    x = _points(_POINTS, lowest)
    fit = MultiscaleFit(steps, x, f_target(x)[None], np.ones((1, 1)), np.full(1, _DAMPING))
    starts = [np.array([*c["b"], *c["c"]])[:, None] for c in load_table(steps)["columns"]]
    _, curves = min((fit.minimise(start, 100) for start in starts), key=_value)
    return _columns_of(fit, curves, np.empty(0))[0]


def _points(count: int, lowest: float) -> Array:
    """Points in [lowest, 1], equally spaced in a small power of x: nearly log-uniform, but denser towards 1.

    Spectra spread over decades, each of which must count; the largest values carry most of the result's norm.
    """
    return np.linspace(lowest**_SPACING, 1, count) ** (1 / _SPACING)


def _power_family(steps: int, exponents: Array, points: int = _POINTS, degree: int = _DEGREE) -> MultiscaleFit:
    """The targets x^s for each exponent, with Chebyshev polynomials of s on [-0.25, 1] as the curves' basis."""
    x = _points(points, _LOWEST)
    centre, half = (MAX_EXPONENT + MIN_EXPONENT) / 2, (MAX_EXPONENT - MIN_EXPONENT) / 2
    basis = np.asarray(chebyshev.chebvander((exponents - centre) / half, degree), dtype=np.float64)
    return MultiscaleFit(steps, x, x ** exponents[:, None], basis, _DAMPING * (1 - exponents) ** 2)


def search_curves(steps: int, *, starts: int = 600, kept: int = 8, hops: int = 120) -> Array:
    """Find the curves of the power family by a seeded multi-start search, coarse to fine.

    s = 1 takes no part: there the identity is exact, and the logarithm of its error infinite.

    Args:
        steps: Number of Newton–Schulz steps K.
        starts: Random starts on a coarse problem (few columns and points, straight curves).
        kept: How many of the best go on to each finer problem.
        hops: Perturbed restarts from the best.

    Returns:
        Chebyshev coefficients of the curves, shape (2K, 5).
    """
    rng = np.random.default_rng(steps)
    coarse = _power_family(steps, _EXPONENTS[:-1:4], points=120, degree=1)
    pool = sorted((coarse.minimise(random_start(steps, 2, rng), 40) for _ in range(starts)), key=_value)[:kept]
    medium = _power_family(steps, _EXPONENTS[:-1:3], points=160)
    pool = [medium.minimise(np.pad(curves, ((0, 0), (0, _DEGREE - 1))), 100) for _, curves in pool]
    for _ in range(hops):
        pool = sorted(pool, key=_value)[:kept]
        pool.append(medium.minimise(perturbed(pool[rng.integers(len(pool))][1], rng), 100))
    finalists = [refine_curves(steps, curves) for _, curves in pool]
    errors = np.array([_interpolated_errors(steps, curves) for curves in finalists])
    # The fit's objective forgives one bad column, and knows nothing of what lies between columns.
    regret = ((errors / errors.min(0)) ** 2).sum(1)
    return finalists[int(regret.argmin())]


def refine_curves(steps: int, curves: Array) -> Array:
    """The nearest minimum of the full problem; curves as `search_curves` returns them."""
    return _power_family(steps, _EXPONENTS[:-1]).minimise(curves, 300)[1]


def _interpolated_errors(steps: int, curves: Array) -> Array:
    """Relative errors half-way between neighbouring columns, shape (columns - 1,); infinite if s = 1 overflows."""
    family = _power_family(steps, _EXPONENTS)
    if family.linearize(curves) is None:
        return np.full(len(_EXPONENTS) - 1, np.inf)
    columns = np.array([c.row for c in _columns_of(family, curves, _STRICTNESS)])
    targets = family.x ** ((_EXPONENTS[1:] + _EXPONENTS[:-1]) / 2)[:, None]
    between = (columns[1:] + columns[:-1]) / 2
    values = [Coefficients.from_row(row).transfer(family.x) for row in between]
    return np.linalg.norm(np.array(values) - targets, axis=1) / np.linalg.norm(targets, axis=1)


def tabulate(steps: int, curves: Array) -> dict[str, Any]:
    """The content of a table's file, see `load_table`, for given curves."""
    family = _power_family(steps, _EXPONENTS)
    columns = []
    for s, column, target in zip(_EXPONENTS, _columns_of(family, curves, _STRICTNESS), family.targets, strict=True):
        error = column.transfer(family.x) - target
        columns.append(
            {
                "s": float(s),
                **vars(column),
                "max_error": float(f"{abs(error).max():.3g}"),
                "relative_error": float(f"{np.linalg.norm(error) / np.linalg.norm(target):.3g}"),
            }
        )
    return {"steps": steps, "domain": [_LOWEST, 1], "columns": columns, "curves": curves.round(9).tolist()}


def _columns_of(fit: MultiscaleFit, curves: Array, strictness: Array) -> list[Coefficients]:
    groups = [*fit.steps_of(curves), fit.ordered_weights(curves, strictness)]
    return [Coefficients(*map(tuple, column)) for column in zip(*(g.round(9).tolist() for g in groups), strict=True)]


def _value(candidate: tuple[float, Array]) -> float:
    return candidate[0]


def _write_table(steps: int, folder: Path) -> str:
    """Fit the table for ``steps`` and write it, one column a line; returns a line about it."""
    table = tabulate(steps, search_curves(steps))
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
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        # The dearest first, so that no process is left alone with it at the end.
        for line in pool.imap(partial(_write_table, folder=options.folder), sorted(options.steps, reverse=True)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
