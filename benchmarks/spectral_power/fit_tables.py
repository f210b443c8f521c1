"""Fits the tables of `spectral_power` anew: minutes on two cores, and the same numbers each time.

Usage:
    python benchmarks/spectral_power/fit_tables.py            # all of them, into the package
    python benchmarks/spectral_power/fit_tables.py --steps 3 --folder outputs/tables
"""

import argparse
import json
import multiprocessing
import os
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.spectral_power.ordered_fit import OrderedFit
from hf_schatten.exponent import MAX_EXPONENT
from hf_schatten.linalg import coefficient_table
from hf_schatten.linalg.coefficient_table import Coefficients, table_filename
from hf_schatten.linalg.multiscale_fit import (
    DAMPING,
    DEGREE,
    POINTS,
    RIDGE,
    SEARCHED,
    Array,
    curve_basis,
    fit_points,
)
from hf_schatten.options import NS_STEPS

_TABLES = Path(coefficient_table.__file__).parent

# The fit's domain is [_LOWEST, 1] in units of the Schatten-8 norm; there a log-uniform spectrum of condition 1000
# ends at 7.5e-4.
_LOWEST = 5e-4
_DAMPING_BEYOND = 0.1  # times -s, beyond Muon, where free weights are large
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


def _family(steps: int, exponents: Array, basis: Array, points: int = POINTS) -> OrderedFit:
    """The targets x^s for each exponent, all of the same importance and in no order."""
    x = fit_points(points, _LOWEST)
    count, size = basis.shape
    return OrderedFit(
        steps,
        x,
        x ** exponents[:, None],
        basis,
        # Damping falls like the error as s goes to 1.
        damping=DAMPING[steps] * (1 - exponents) ** 2 + _DAMPING_BEYOND * np.maximum(-exponents, 0),
        importance=np.ones(count),
        roughness=RIDGE * np.eye(size),
        order=np.zeros(count - 1),
    )


def _stored_family(steps: int) -> OrderedFit:
    """Free columns at the stored exponents."""
    return _family(steps, _EXPONENTS, np.eye(len(_EXPONENTS)))


def _strictness(steps: int) -> Array:
    """Of the order of the stored columns: monotone in p where p >= 1, smooth beyond Muon, where order is dear.

    It is in units of the error, which is larger for few steps, while rises must stay small in the end.
    """
    return np.where(_EXPONENTS[:-1] >= 0, {3: 80.0, 4: 40.0}.get(steps, 10.0), 3.0)


def _columns(family: OrderedFit, shapes: Array) -> list[Coefficients]:
    """The stored columns of shapes (2K, S), in order."""
    return family.columns(shapes, family.ordered_weights(shapes, _strictness(family.steps)))


def random_start(steps: int, degree_plus_one: int, rng: np.random.Generator) -> Array:
    """Curves (2K, D), constant in s, of random steps that amplify small x by 1.8 to 4.8 and end at 0 to 1."""
    curves = np.zeros((2 * steps, degree_plus_one))
    curves[:, 0] = np.concatenate([rng.uniform(0.2, 1.1, steps), rng.uniform(0, 1, steps)])
    return curves


def perturbed(curves: Array, rng: np.random.Generator) -> Array:
    """A neighbour of ``curves``, at one of three distances, to leave a poor local minimum by."""
    amplitude = rng.choice([0.03, 0.1, 0.3])
    stretched = curves * (1 + amplitude * rng.standard_normal((len(curves), 1)))
    return stretched + 0.1 * amplitude * rng.standard_normal(curves.shape)


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
    coarse = _family(steps, SEARCHED[::4], curve_basis(SEARCHED[::4], 1), points=120)
    pool = sorted((coarse.minimise(random_start(steps, 2, rng), 40) for _ in range(starts)), key=itemgetter(0))[:kept]
    fine = _family(steps, SEARCHED[::3], curve_basis(SEARCHED[::3], DEGREE), points=160)
    pool = [fine.minimise(np.pad(curves, ((0, 0), (0, DEGREE - 1))), 100) for _, curves in pool]
    for _ in range(hops):
        pool = sorted(pool, key=itemgetter(0))[:kept]
        pool.append(fine.minimise(perturbed(pool[rng.integers(len(pool))][1], rng), 100))
    return [curves for _, curves in sorted(pool, key=itemgetter(0))[:finalists]]


def release_columns(steps: int, curves: Array) -> Array:
    """Let every stored column find its own steps, close to its neighbours', from where the curves are.

    Args:
        steps: Number of Newton–Schulz steps K.
        curves: As from `search_curves`.

    Returns:
        Shapes (2K, S) of the stored columns, see `MultiscaleFit`.
    """
    exponents = _EXPONENTS[:-1]
    start = curves @ curve_basis(exponents, DEGREE).T
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
    table = np.array([column.row for column in _columns(family, shapes)])

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
    x = fit_points(5 * POINTS, _LOWEST)  # the largest errors lie between the fit's points
    columns = []
    for s, column in zip(_EXPONENTS, _columns(_stored_family(steps), shapes), strict=True):
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
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, nargs="+", choices=NS_STEPS, default=NS_STEPS, help="tables to remake")
    parser.add_argument("--folder", type=Path, default=_TABLES, help="where to write them")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    # The search amplifies rounding, which depends on the number of threads; the processes inherit these.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        # The dearest first, so that no process is left alone with it at the end.
        for line in pool.imap(partial(_write_table, folder=options.folder), sorted(options.steps, reverse=True)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
