"""Draws the pictures of docs/how_it_works.md: ``python docs/draw_figures.py``.

Prints the table of errors that stands on that page. Everything is deterministic: there are no random numbers.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hf_schatten.adaptive.criterion import Inputs, Sample, maximising_exponent, objective_curve, statistics_of
from hf_schatten.exponent import exponent_of, p_label
from hf_schatten.linalg import Coefficients
from hf_schatten.linalg.coefficient_table import interpolate
from hf_schatten.linalg.spectrum import exact_log_norms

STEPS = 5
SHOWN = (1, 1.5, 2, 4, 10, math.inf, -5)
EXAMPLE = 4.0  # whose iterates are drawn
LOWEST = 1e-3  # of the singular values, relative to the norm

# Powers of the index by which the singular values of the criterion's examples fall.
DECAYS = {"flat": 0.25, "medium": 0.5, "steep": 1.5}
LINES = {"flat": "-", "medium": "--", "steep": ":"}

Array = NDArray[np.float64]


def coefficients(p: float) -> Coefficients:
    """Return the five steps that the optimizer takes for p."""
    row = interpolate(torch.tensor([exponent_of(p)], dtype=torch.float64), STEPS)[0]
    return Coefficients.from_row(row.tolist())


def largest_error(p: float, lowest: float) -> float:
    """Return the largest |f(x) - x^{1/p}| on [lowest, 1]."""
    x = np.geomspace(lowest, 1, 4000)
    return float(np.abs(coefficients(p).transfer(x) - x ** exponent_of(p)).max())


def iterates(c: Coefficients, x: Array) -> list[Array]:
    """Return the iterates y_0 … y_K of singular values x."""
    found = [x]
    for a, b, quintic in zip(c.a, c.b, c.c, strict=True):
        y = found[-1]
        found.append(y * (a + y**2 * (b + y**2 * quintic)))
    return found


def criterion_of(gradient_decay: float, input_decay: float) -> tuple[Array, Array, float]:
    """Return s, the criterion and its maximiser for spectra that fall as powers of the index.

    Args:
        gradient_decay: a of the gradient's singular values i^{-a}, 64 of them.
        input_decay: the same of the inputs.
    """
    index = torch.arange(1, 65, dtype=torch.float64)
    sample = Sample(torch.diag(index**-gradient_decay), Inputs(torch.diag(index**-input_decay)))
    objective = objective_curve(statistics_of([sample], exact_log_norms)[0], 0.0, 1.0)
    chosen = float(maximising_exponent(objective, 0.0, 1.0))
    return np.linspace(0, 1, len(objective)), objective.numpy(), chosen


def draw_spectral_power(path: Path) -> None:
    """Draw what five steps make of singular values, and the iterates that they are a sum of."""
    x = np.geomspace(LOWEST, 1, 800)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    powers, example = figure.subplots(1, 2)
    for number, p in enumerate(SHOWN):
        powers.loglog(x, coefficients(p).transfer(x), color=f"C{number}", label=f"p = {p_label(p)}")
        powers.loglog(x, x ** exponent_of(p), color="black", linewidth=0.8, linestyle=":")
    powers.set_title("five steps (colour) and σ^(1/p) (dotted)")
    powers.set_ylim(LOWEST, 6)
    c = coefficients(EXAMPLE)
    for k, y in enumerate(iterates(c, x)):
        example.loglog(x, np.abs(y), color=f"C{k}", linewidth=1, label=f"|X{k}|, weight {c.w[k]:+.2f}")
    example.loglog(x, c.transfer(x), color="black", linewidth=2, label="weighted sum")
    example.set_title(f"its six iterates, p = {p_label(EXAMPLE)}")
    for axes in (powers, example):
        axes.set_xlabel("singular value, relative to the norm")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def draw_criterion(path: Path) -> None:
    """Draw the criterion for four pairs of spectra."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    spectra, criterion = figure.subplots(1, 2)
    index = np.arange(1, 65)
    for name, decay in DECAYS.items():
        spectra.loglog(index, index**-decay, color="black", linestyle=LINES[name], label=f"{name}: i^(-{decay:g})")
    for gradient, inputs in (("flat", "steep"), ("medium", "medium"), ("steep", "medium"), ("steep", "flat")):
        s, objective, chosen = criterion_of(DECAYS[gradient], DECAYS[inputs])
        p = p_label(1 / chosen) if chosen > 0 else "∞"
        line = criterion.plot(s, objective - objective.max(), label=f"G {gradient}, A {inputs}: p = {p}")[0]
        criterion.plot(chosen, 0, "o", color=line.get_color())
    spectra.set_xlabel("index i")
    spectra.set_title("singular values of a gradient G or of inputs A")
    _label_p(criterion)
    criterion.set_title("criterion, relative to its maximum")
    for axes in (spectra, criterion):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def error_table() -> str:
    """Return the table of the largest errors in Markdown."""
    rows = [["p", *map(p_label, SHOWN)], ["---"] * (len(SHOWN) + 1)]
    for lowest in (0.01, LOWEST):
        errors = [f"{largest_error(p, lowest):.3f}" for p in SHOWN]
        rows.append([f"largest error, singular values from {lowest:g} to 1", *errors])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw both pictures and print the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    folder = Path(__file__).with_name("figures")
    parser.add_argument("--output", type=Path, default=folder, help="folder (default: figures beside this script)")
    output = parser.parse_args(arguments).output
    output.mkdir(parents=True, exist_ok=True)
    draw_spectral_power(output / "spectral_power.png")
    draw_criterion(output / "criterion.png")
    print(error_table())


def _label_p(axes: Axes) -> None:
    ticks = (1, 1.5, 2, 3, 4, 6, 10, math.inf)
    axes.set_xticks([1 / p for p in ticks], labels=[p_label(p) for p in ticks])
    axes.set_xlabel("p, on an axis linear in 1/p")


if __name__ == "__main__":
    main()
