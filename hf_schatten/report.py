"""What a run leaves for people: the picture of p by layer and the optimizer's section of the model card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard
from matplotlib.figure import Figure

from .layout import layer_name

LAYER_PREFIX = "schatten_p/"  # of the log entries that hold one layer's p
SUMMARY_PREFIX = "schatten_p_"  # of the log entries that summarise all layers
FIGURE = Path("figures") / "p_by_layer.png"  # in a run's output folder

_SECTION_START = "<!-- hf_schatten: start of the optimizer section -->"
_SECTION_END = "<!-- hf_schatten: end of the optimizer section -->"
_P_TICKS = (1, 1.5, 2, 3, 4, 6, 10, math.inf, -10, -6, -4)
_TABLE_ROWS = 12  # layers listed in the card before the table is cut


def log_entry(learned_p: Mapping[str, float]) -> dict[str, float]:
    """Return the log entry of one estimate: the summary, and every layer's p by its name.

    Args:
        learned_p: p by matrix name, at least one.
    """
    return {
        **{SUMMARY_PREFIX + name: p for name, p in _summary(learned_p).items()},
        **{LAYER_PREFIX + layer_name(name): p for name, p in learned_p.items()},
    }


def _summary(learned_p: Mapping[str, float]) -> dict[str, float]:
    """Return min, median and max in the order of 1/p, in which -4 lies beyond inf."""
    ordered = sorted(learned_p.values(), key=lambda p: -1 / p)
    return {"min": ordered[0], "median": ordered[(len(ordered) - 1) // 2], "max": ordered[-1]}


def plot_p_by_layer(log_history: Iterable[Mapping[str, Any]], path: Path) -> bool:
    """Draw the learned p as a heat map, layers × steps of the estimates.

    Colours are linear in s = 1/p, in which the update is smooth, and labelled in p.

    Args:
        log_history: entries as in ``trainer_state.json``; those without a layer's p are passed over.
        path: the PNG to write; its folder is made.

    Returns:
        Whether there was an estimate to draw.
    """
    estimates = [entry for entry in log_history if any(key.startswith(LAYER_PREFIX) for key in entry)]
    if not estimates:
        return False
    layers = [key for key in estimates[-1] if key.startswith(LAYER_PREFIX)]
    s = np.array([[1 / entry.get(layer, math.nan) for entry in estimates] for layer in layers])
    figure = Figure(figsize=(8, min(40, 1.6 + 0.2 * len(layers))), dpi=120, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        s, aspect="auto", interpolation="nearest", cmap="viridis", vmin=min(0.0, np.nanmin(s)), vmax=1.0
    )
    axes.set_yticks(range(len(layers)), [layer.removeprefix(LAYER_PREFIX) for layer in layers], fontsize=7)
    shown = np.unique(np.linspace(0, len(estimates) - 1, min(len(estimates), 12)).astype(int))
    axes.set_xticks(shown, [f"{estimates[column]['step']}" for column in shown])
    axes.set_xlabel("step of the estimate")
    axes.set_title("p of each layer (1: SGD-like, ∞: Muon)")
    bar = figure.colorbar(image, ax=axes, label="p")
    lowest, highest = image.get_clim()
    ticks = [p for p in _P_TICKS if lowest <= 1 / p <= highest]
    bar.set_ticks([1 / p for p in ticks], labels=[_p_label(p) for p in ticks])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def write_card_section(card_path: Path, section: str, tags: Iterable[str]) -> None:
    """Put the optimizer's section into a model card, in place of an earlier one.

    Args:
        card_path: the card, which exists.
        section: Markdown, from :func:`card_section`.
        tags: added to the card's tags.
    """
    card = ModelCard.load(card_path)
    before, _, rest = card.text.partition(_SECTION_START)
    after = rest.partition(_SECTION_END)[2] if rest else ""
    marked = f"{_SECTION_START}\n{section.strip()}\n{_SECTION_END}"
    card.text = "\n\n".join(filter(None, [before.rstrip(), marked, after.strip()])) + "\n"
    present = card.data.tags or []
    present = [present] if isinstance(present, str) else list(present)
    card.data.tags = present + [tag for tag in tags if tag not in present]
    card.save(card_path)


def card_section(
    options: Mapping[str, Any],
    destinations: Mapping[str, tuple[int, int]],
    learned_p: Mapping[str, float],
    figure: Path | None,
) -> str:
    """Return the Markdown section on the optimizer.

    Args:
        options: option names and values.
        destinations: update name to (tensors, parameters) that get it.
        learned_p: p by parameter name at the end of training.
        figure: picture of p, relative to the card, or None.
    """
    lines = [
        "## Optimizer: Schatten-p",
        "",
        "Trained with the Python package `hf_schatten`: weight matrices are updated with "
        "U Σ^(1/p) Vᵀ of their momentum (p = 1 is SGD-like, p = ∞ is Muon), everything else with AdamW.",
        "",
        "| update | tensors | parameters |",
        "|---|---:|---:|",
        *(f"| {name} | {tensors:,} | {size:,} |" for name, (tensors, size) in destinations.items()),
        "",
        "Options: " + ", ".join(f"`{name}={_value_label(value)}`" for name, value in options.items()) + ".",
        "",
    ]
    if learned_p:
        lines += _p_table(learned_p)
    if figure is not None:
        lines += [f"![p of each layer over training]({figure.as_posix()})", ""]
    lines += [
        "A checkpoint carries the learned p: resume with `SchattenTrainer` and `--resume_from_checkpoint`, or read "
        "it with `hf_schatten.load_learned_p(checkpoint)`.",
    ]
    return "\n".join(lines)


def _p_table(learned_p: Mapping[str, float]) -> list[str]:
    values = list(learned_p.values())
    rows = [f"| `{layer_name(name)}` | {_p_label(p)} |" for name, p in list(learned_p.items())[:_TABLE_ROWS]]
    if len(values) > _TABLE_ROWS:
        rows.append(f"| … {len(values) - _TABLE_ROWS} more | |")
    summary = ", ".join(f"{name} {_p_label(p)}" for name, p in _summary(learned_p).items())
    return [f"p at the end of training: {summary}.", "", "| layer | p |", "|---|---:|", *rows, ""]


def _p_label(p: float) -> str:
    return "∞" if math.isinf(p) else f"{p:.3g}"


def _value_label(value: Any) -> str:
    return ";".join(map(str, value)) if isinstance(value, tuple) else str(value)
