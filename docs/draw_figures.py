"""Draws the pictures of README and docs: ``python docs/draw_figures.py``.

Those of the mathematics are computed, without random numbers; that of the comparison has the outcomes which are kept
beside its benchmark.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.comparison.outcomes import Outcome, load
from benchmarks.comparison.regimes import REGIMES
from benchmarks.comparison.report import COLOURS, GREY, ORANGE
from docs.write_tables import COMPARED, LOWEST, OUTCOMES, SHOWN, coefficients, losses_of
from hf_schatten.adaptive.criterion import Inputs, Sample, maximising_exponent, objective_curve, statistics_of
from hf_schatten.exponent import exponent_of, p_label, p_of
from hf_schatten.linalg import Coefficients
from hf_schatten.linalg.spectrum import exact_log_norms

EXAMPLE = 4.0  # whose iterates are drawn

# Powers of the index by which the singular values of the criterion's examples fall.
DECAYS = {"flat": 0.25, "medium": 0.5, "steep": 1.5}
LINES = {"flat": "-", "medium": "--", "steep": ":"}

PLACES = (0.2, 0.42, -0.24, -0.22)  # of the labels of the criterion's curves, on the axis of 1/p
RANGE = (exponent_of(-4.0), 1.0)  # of the exponents

Array = NDArray[np.float64]
Colour = tuple[float, float, float, float]


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
    objective = objective_curve(statistics_of([sample], exact_log_norms)[0], *RANGE)
    chosen = float(maximising_exponent(objective, *RANGE))
    return np.linspace(*RANGE, len(objective)), objective.numpy(), chosen


def draw_comparison(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw the validation loss of each optimizer in each kind of training; what is far to the right is named there."""
    shown = [regime for regime in REGIMES if any(each.regime == regime for each in outcomes)]
    figure = Figure(figsize=(11, 2.5 * math.ceil(len(shown) / 3)), layout="constrained")
    panels = figure.subplots(math.ceil(len(shown) / 3), 3, sharey=True, squeeze=False)
    for axes, regime in zip(panels.flat, shown, strict=False):
        losses = {name: list(losses_of(regime, name, outcomes).values()) for name in COMPARED}
        means = {name: fmean(values) for name, values in losses.items() if values}
        errors = {name: stdev(losses[name]) / len(losses[name]) ** 0.5 for name in means if len(losses[name]) > 1}
        near = [mean for name, mean in means.items() if name != "AdamW"] or [*means.values()]
        margin = 0.1 * (max(near) - min(near)) or 0.1
        end = max(near) + 2 * margin
        for name, mean in means.items():
            colour, row = COLOURS.get(name, GREY), -COMPARED.index(name)
            if mean <= end:
                axes.errorbar(mean, row, xerr=errors.get(name, 0.0), fmt="o", color=colour, markersize=7, capsize=3)
            else:
                axes.text(end, row, f"{mean:.3g} →", color=colour, ha="right", va="center", fontsize=9)
        if "Muon" in means:
            axes.axvline(means["Muon"], color=ORANGE, linewidth=0.8, linestyle=":")
        start = min(mean - errors.get(name, 0.0) for name, mean in means.items())
        axes.set(xlim=(start - 0.3 * margin, end), ylim=(0.6 - len(COMPARED), 0.6))
        axes.set_yticks([-row for row in range(len(COMPARED))], list(COMPARED))
        axes.set_title(regime)
        axes.grid(axis="x", alpha=0.3)
    figure.supxlabel("validation loss; bars are standard errors, the dotted line is Muon")
    figure.savefig(path, dpi=110)


def draw_spectral_power(path: Path) -> None:
    """Draw what five steps make of singular values, and the iterates that they are a sum of."""
    x = np.geomspace(LOWEST, 1, 800)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    powers, example = figure.subplots(1, 2)
    for p, colour in zip(SHOWN, shades(len(SHOWN)), strict=True):
        powers.loglog(x, coefficients(p).transfer(x), color=colour)
        powers.loglog(x, x ** exponent_of(p), color="black", linewidth=0.8, linestyle=":")
        _label(powers, (LOWEST, LOWEST ** exponent_of(p)), f"p = {p_label(p)}", colour)
    powers.set_title("What five steps make of a singular value σ (dotted: σ^(1/p))")
    c = coefficients(EXAMPLE)
    drawn = iterates(c, x)
    for k, (y, colour) in enumerate(zip(drawn, shades(len(drawn)), strict=True)):
        example.loglog(x, np.abs(y), color=colour, linewidth=1)
        _label(example, (LOWEST, float(y[0])), f"X{k}, weight {c.w[k]:+.2f}", colour)
    example.loglog(x, c.transfer(x), color="black", linewidth=2.5)
    _label(example, (LOWEST, float(c.transfer(x)[0])), "their sum", "black")
    example.set_title(f"The six iterates of p = {p_label(EXAMPLE)} and their weighted sum")
    for axes, left in ((powers, 4e-4), (example, 1.2e-4)):
        axes.set(xlabel="σ, relative to the norm", xlim=(left, 1))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def draw_criterion(path: Path) -> None:
    """Draw the criterion for four pairs of spectra."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    spectra, criterion = figure.subplots(1, 2)
    index = np.arange(1, 65)
    for name, decay in DECAYS.items():
        spectra.loglog(index, index**-decay, color="black", linestyle=LINES[name])
        spectra.annotate(f"{name}: i^(-{decay:g})", (20, 20**-decay), xytext=(2, 4), textcoords="offset points")
    pairs = (("flat", "steep"), ("medium", "medium"), ("steep", "medium"), ("steep", "flat"))
    for (gradient, inputs), colour, place in zip(pairs, shades(4), PLACES, strict=True):
        s, objective, chosen = criterion_of(DECAYS[gradient], DECAYS[inputs])
        shown = objective - objective.max()
        criterion.plot(s, shown, color=colour)
        criterion.plot(chosen, 0, "o", color=colour)
        text = f"G {gradient}, A {inputs}: p = {p_label(p_of(chosen))}"
        at, va = (place, float(np.interp(place, s, shown))), "bottom" if place > 0 else "top"
        criterion.annotate(text, at, xytext=(6, 0), textcoords="offset points", va=va, color=colour, fontsize=9)
    spectra.set(xlabel="index i", ylabel="singular value", title="Spectra of a gradient G or of inputs A")
    _label_p(criterion)
    criterion.set(ylabel="log ‖G‖ − log ‖A‖, less its maximum", title="The criterion; a dot is the p that it chooses")
    criterion.set_xlim(right=1.0)
    for axes in (spectra, criterion):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def shades(number: int) -> list[Colour]:
    """Return so many colours in an order that stays one in grey, and for colour-blind readers."""
    return [colormaps["viridis"](place) for place in np.linspace(0, 0.85, number)]


def _label(axes: Axes, place: tuple[float, float], text: str, colour: Colour | str) -> None:
    """Write to the left of a curve's beginning."""
    axes.annotate(
        text, place, xytext=(-4, 0), textcoords="offset points", ha="right", va="center", color=colour, fontsize=9
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    folder = Path(__file__).with_name("figures")
    parser.add_argument("--output", type=Path, default=folder, help="folder (default: figures beside this script)")
    output = parser.parse_args(arguments).output
    output.mkdir(parents=True, exist_ok=True)
    draw_comparison(load(OUTCOMES), output / "comparison.png")
    draw_spectral_power(output / "spectral_power.png")
    draw_criterion(output / "criterion.png")


def _label_p(axes: Axes) -> None:
    ticks = (1, 1.5, 2, 3, 4, 6, 10, math.inf, -10, -6, -4)
    axes.set_xticks([exponent_of(p) for p in ticks], labels=[p_label(p) for p in ticks])
    axes.set_xlabel("p, on an axis linear in 1/p")


if __name__ == "__main__":
    main()
