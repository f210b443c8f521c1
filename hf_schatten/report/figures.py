"""Pictures of a run: p by layer, what it was chosen from, and what the updates were like.

matplotlib is imported when something is drawn: most processes of a training never draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_schatten.adaptive.adaptation import Choice
from hf_schatten.exponent import exponent_of, p_label, p_of
from hf_schatten.matrices.layout import layer_kind, layer_name
from hf_schatten.report.log import LAYER_PREFIX, RELATIVE_SIZE_PREFIX, STABLE_RANK_PREFIX

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In a run's output folder.
FOLDER = Path("figures")
P_BY_LAYER, SPECTRA, UPDATES = (FOLDER / f"{name}.png" for name in ("p_by_layer", "spectra", "updates"))

_PANELS_IN_A_ROW = 4  # of several runs
_P_TICKS = (1, 1.5, 2, 3, 4, 6, 10, math.inf, -10, -6, -4)

_BLUE, _ORANGE = "#0072B2", "#D55E00"  # which colour-blind readers tell apart (M. Okabe and K. Ito, 2008)

Array = NDArray[np.float64]
LogHistory = Sequence[Mapping[str, Any]]  # entries as in ``trainer_state.json``


def draw_log(log_history: LogHistory, folder: Path) -> list[Path]:
    """Draw p by layer and the updates, as far as a log holds them, and return the pictures, relative to the folder."""
    drawings = ((P_BY_LAYER, plot_p_by_layer), (UPDATES, plot_updates))
    return [picture for picture, draw in drawings if draw(log_history, folder / picture)]


def has_p_by_layer(log_history: LogHistory) -> bool:
    """Return whether a log holds what :func:`plot_p_by_layer` draws."""
    return any(name.startswith(LAYER_PREFIX) for entry in log_history for name in entry)


def plot_p_by_layer(log_history: LogHistory, path: Path) -> bool:
    """Draw the learned p as a heat map, layers × steps of the estimates; return whether there was one to draw.

    Colours are linear in s = 1/p, in which the update is smooth, and labelled in p. Layers of one kind lie together.
    The title says so where all p are equal. The folder of the PNG is made.
    """
    return plot_p_of_runs({"p of each layer (1: SGD-like, ∞: Muon)": log_history}, path)


def plot_p_of_runs(log_histories: Mapping[str, LogHistory], path: Path) -> bool:
    """Draw the learned p of several runs of one model, by title, four in a row, as :func:`plot_p_by_layer` draws one.

    Runs without an estimate are passed over.
    """
    runs = {title: _by_layer(history, LAYER_PREFIX) for title, history in log_histories.items()}
    runs = {title: run for title, run in runs.items() if run[1]}
    if not runs:
        return False
    first_layers = next(iter(runs.values()))[1]
    columns = min(len(runs), _PANELS_IN_A_ROW)
    rows = math.ceil(len(runs) / columns)
    figure = _figure(3.5 + 4.5 * columns, 1.6 + 0.2 * rows * len(first_layers))
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    while len(panels) > len(runs):
        panels.pop().remove()
    lowest = min(0.0, *(float(np.nanmin(1 / p)) for _, _, p in runs.values()))
    for axes, (title, (steps, layers, p)) in zip(panels, runs.items(), strict=True):
        image = axes.imshow(1 / p, aspect="auto", interpolation="nearest", cmap="viridis", vmin=lowest, vmax=1.0)
        _label_layers_and_steps(axes, layers, steps)
        shown = {p_label(each) for each in p[~np.isnan(p)]}
        axes.set_title(f"{title}\nall are {shown.pop()}" if len(shown) == 1 else title)
    bar = figure.colorbar(image, ax=panels, label="p")
    places, labels = _ticks(lowest, 1.0)
    bar.set_ticks(places, labels=labels)
    _save(figure, path)
    return True


def plot_updates(log_history: LogHistory, path: Path) -> bool:
    """Draw stable rank and relative size of the updates, layers × steps; return whether there were any to draw.

    Both are quantities of F. L. Cesista 2025, "Steepest Descent Under Schatten-p Norms".
    """
    panels = (
        (STABLE_RANK_PREFIX, "stable rank of the update  ‖ΔW‖²_F / ‖ΔW‖²₂"),
        (RELATIVE_SIZE_PREFIX, "relative size of the update  ‖ΔW‖_F / ‖W‖_F"),
    )
    values = [_by_layer(log_history, prefix) for prefix, _ in panels]
    if not values[0][1]:
        return False
    from matplotlib.colors import LogNorm  # noqa: PLC0415 - as the module says

    figure = _figure(13, 1.6 + 0.2 * len(values[0][1]))
    for axes, (steps, layers, matrix), (_, title) in zip(figure.subplots(1, 2), values, panels, strict=True):
        shown = np.where((matrix > 0) & np.isfinite(matrix), matrix, np.nan)
        # Before the first step that moves anything there is nothing to show, and the colours need a range.
        norm = LogNorm() if np.isfinite(shown).any() else LogNorm(0.1, 1.0)
        image = axes.imshow(shown, aspect="auto", interpolation="nearest", cmap="viridis", norm=norm)
        _label_layers_and_steps(axes, layers, steps)
        axes.set_title(title)
        figure.colorbar(image, ax=axes)
    _save(figure, path)
    return True


def plot_choices(choices: Sequence[Choice], path: Path) -> bool:
    """Draw a row for each choice: spectra of gradient and input, the criterion; return whether there was a choice."""
    if not choices:
        return False
    figure = _figure(11, 3.2 * len(choices))
    for (spectra, criterion), choice in zip(figure.subplots(len(choices), 2, squeeze=False), choices, strict=True):
        _draw_spectra(spectra, choice)
        _draw_criterion(criterion, choice)
    _save(figure, path)
    return True


def _draw_spectra(axes: Axes, choice: Choice) -> None:
    drawn = (("gradient G", choice.gradient_spectrum, _BLUE), ("input rows A", choice.input_spectrum, _ORANGE))
    for label, spectrum, colour in drawn:
        positive = spectrum[spectrum > 0].numpy()
        axes.plot(np.arange(1, len(positive) + 1), positive / positive[0], color=colour, label=label)
    title = f"{layer_name(choice.name)}, step {choice.step}"
    axes.set(xscale="log", yscale="log", xlabel="index i", ylabel="singular value σᵢ / σ₁", title=title)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_criterion(axes: Axes, choice: Choice) -> None:
    exponents, objective = choice.exponents.numpy(), choice.objective.numpy()
    finite = np.isfinite(objective)
    with np.errstate(divide="ignore"):  # at s = 1 the inputs' order is infinite
        terms = {
            "log ‖G‖ of order 1 + 1/p, this step": _log_norms(choice.gradient_spectrum.numpy(), 1 + exponents),
            "−log ‖A‖ of order k, this step": -_log_norms(
                choice.input_spectrum.numpy(), 2 * (1 + exponents) / (1 - exponents)
            ),
        }
    for (label, curve), style in zip(terms.items(), ("--", ":"), strict=True):
        axes.plot(exponents, curve - np.interp(choice.chosen, exponents, curve), style, color="black", label=label)
    label = "criterion: their sum, averaged over estimates"
    axes.plot(exponents[finite], objective[finite] - objective[finite].max(), color=_BLUE, linewidth=2, label=label)
    chosen = f"its maximum: p = {p_label(p_of(choice.chosen))}"
    axes.axvline(choice.chosen, color=_ORANGE, label=chosen)
    axes.set_xticks(*_ticks(exponents[0] - 0.01, exponents[-1]))
    axes.set(xlabel="p, on an axis linear in 1/p", ylabel="relative to the chosen p", title="criterion and its terms")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _log_norms(spectrum: Array, orders: Array) -> Array:
    """Return the logarithms of Schatten norms, relative to the spectral norm, of every order."""
    relative = spectrum[spectrum > 0] / spectrum.max(initial=0.0)
    return np.log((relative ** orders[:, None]).sum(axis=1)) / orders


def _ticks(lowest: float, highest: float) -> tuple[list[float], list[str]]:
    """Return where p is marked on an axis of s = 1/p, and the marks."""
    shown = {exponent_of(p): p_label(p) for p in _P_TICKS if lowest <= exponent_of(p) <= highest}
    return list(shown), list(shown.values())


def _by_layer(log_history: LogHistory, prefix: str) -> tuple[list[int], list[str], Array]:
    """Return the steps of the entries with this prefix, the layers by kind, and the values (layers, steps)."""
    entries = [entry for entry in log_history if any(key.startswith(prefix) for key in entry)]
    layers = [key.removeprefix(prefix) for key in entries[-1] if key.startswith(prefix)] if entries else []
    kinds = list(dict.fromkeys(map(layer_kind, layers)))
    layers.sort(key=lambda layer: kinds.index(layer_kind(layer)))
    # A log history holds the string ``inf`` for infinity.
    values = np.array(
        [[float(entry.get(prefix + layer, math.nan)) for entry in entries] for layer in layers], dtype=np.float64
    )
    return [entry["step"] for entry in entries], layers, values


def _figure(width: float, height: float) -> Figure:
    """Return a figure of this size in inches, at most 40 high, which belongs to no window."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - as the module says

    return Figure(figsize=(width, min(40, height)), dpi=120, layout="constrained")


def _label_layers_and_steps(axes: Axes, layers: Sequence[str], steps: Sequence[int]) -> None:
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    for row, pair in enumerate(pairwise(map(layer_kind, layers))):
        if pair[0] != pair[1]:
            axes.axhline(row + 0.5, color="white", linewidth=1.5)
    shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 12)).astype(int))
    axes.set_xticks(shown, [f"{steps[column]}" for column in shown])
    axes.set_xlabel("step of the estimate")


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
