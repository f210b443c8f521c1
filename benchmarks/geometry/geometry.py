"""What steepest descent under each Schatten norm would make of a checkpoint's gradients: a picture and a page.

Usage:
    python benchmarks/geometry/geometry.py outputs/pretrain_clm/checkpoint-300

Source: F. L. Cesista 2025, "Steepest Descent Under Schatten-p Norms", section "What does the dualizer actually do?".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.geometry import command_line
from benchmarks.geometry.layer_geometry import (
    FIT_FROM,
    ORDERS,
    Array,
    LayerGeometry,
    QuadraticDecay,
    fit_decay,
    measure,
)
from benchmarks.geometry.text import STDLIB_NAME, GeometryError, read_text, token_blocks

_SHOWN_ORDERS = (1, 2, 4, 8, 32, math.inf)  # in the page's tables
_BATCH = 8  # sequences
_LENGTH = 256  # tokens, or the model's context
_INFINITY = math.log2(max(order for order in ORDERS if order < math.inf)) + 1  # its place on the axis of log2(order)
_TOKENIZER_FILES = "tokenizer.json", "tokenizer_config.json"


def write_geometry(
    checkpoint: Path, folder: Path, data: Path | None = None, *, batches: int = 4, device: str = "cpu"
) -> Path:
    """Compute a checkpoint's gradients and write ``geometry.png`` and ``geometry.md``.

    Args:
        checkpoint: folder of a causal language model as Trainer saves it, with a tokenizer in it or in its parent.
        folder: is made.
        data: UTF-8 text. Default: the Python standard library's source.
        batches: of 8 sequences of 256 tokens (the model's context where that is shorter), whose mean loss is
            differentiated. Default 4.
        device: Default ``cpu``.

    Returns:
        The page.

    Raises:
        GeometryError: when the checkpoint has no such model or tokenizer, or there is too little text.
        RoutingError: when the model has no matrix.
    """
    model, tokenizer = _load(checkpoint)
    length = min(_LENGTH, getattr(model.config, "max_position_embeddings", _LENGTH))
    blocks = token_blocks(read_text(data), tokenizer, batches * _BATCH, length)
    model.to(device)  # type: ignore[arg-type] # wrapped without its self
    compute_gradients(model, blocks.to(device))
    layers = measure(model)
    if not layers:
        raise GeometryError(f"every gradient of {checkpoint} is zero or not finite: is the model trained with NaN?")
    folder.mkdir(parents=True, exist_ok=True)
    decay = fit_decay(_median([layer.variance for layer in layers]))
    _draw(layers, decay, folder / "geometry.png")
    page = folder / "geometry.md"
    source = data.name if data else STDLIB_NAME
    page.write_text(_page(checkpoint, source, blocks.numel(), layers, decay), "utf-8")
    return page


def _load(checkpoint: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not (checkpoint / "config.json").is_file():
        newest = max(checkpoint.glob("checkpoint-*/config.json"), key=lambda path: path.stat().st_mtime, default=None)
        hint = f" Did you mean {newest.parent}?" if newest else " Give a folder that Trainer saved a model in."
        raise GeometryError(f"{checkpoint} is not a checkpoint: it has no config.json.{hint}")
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise GeometryError(f"{checkpoint} holds no causal language model that can be loaded: {error}") from error
    for folder in (checkpoint, checkpoint.parent):
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            return model, AutoTokenizer.from_pretrained(folder)
    raise GeometryError(
        f"neither {checkpoint} nor its parent has a tokenizer ({' or '.join(_TOKENIZER_FILES)}): copy it there, with "
        "tokenizer.save_pretrained(folder)."
    )


def compute_gradients(model: PreTrainedModel, blocks: Tensor) -> None:
    """Leave the gradient of the mean loss over all blocks (blocks, length), without dropout, in the parameters."""
    model.eval()
    model.zero_grad()
    for batch in blocks.split(_BATCH):
        loss = model(input_ids=batch, labels=batch).loss
        (loss * (len(batch) / len(blocks))).backward()


def _median(curves: Sequence[Array]) -> Array:
    return np.median(curves, axis=0)


# Title and formula; t are the singular values of T.
_QUANTITIES = {
    "variance": ("variance of the singular values", "Var t"),
    "relative_size": ("relative size", "‖T‖_F / ‖W‖_F"),
    "stable_rank": ("stable rank", "‖T‖²_F / ‖T‖²₂"),
}


def _draw(layers: Sequence[LayerGeometry], decay: QuadraticDecay | None, path: Path) -> None:
    figure = Figure(figsize=(16, 5.2), dpi=120, layout="constrained")
    panels = dict(zip(_QUANTITIES, figure.subplots(1, len(_QUANTITIES)), strict=True))
    for quantity, axes in panels.items():
        _draw_quantity(axes, layers, quantity)
    panels["variance"].set_yscale("log")
    if decay is not None:
        _draw_decay(panels["variance"], decay, _median_log_variance(layers))
    panels["stable_rank"].legend(fontsize=8, loc="upper left")
    figure.suptitle(f"Gradients of {len(layers)} matrices, dualized under the Schatten norm of order r")
    figure.savefig(path)


def _draw_quantity(axes: Axes, layers: Sequence[LayerGeometry], quantity: str) -> None:
    """Draw the median of each kind of layer, and median and quartiles of all; a variance of 0 has no logarithm."""
    places = np.array([_place(order) for order in ORDERS])
    kinds: dict[str, list[Array]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(getattr(layer, quantity))
    for kind, curves in kinds.items():
        _draw_curve(axes, places, _median(curves), linewidth=1, alpha=0.7, label=f"{kind} ({len(curves)})")
    everything = [getattr(layer, quantity) for layer in layers]
    low, high = np.quantile(everything, (0.25, 0.75), axis=0)
    shown = low > 0
    axes.fill_between(places[shown], low[shown], high[shown], color="black", alpha=0.12, label="quartiles")
    _draw_curve(axes, places, _median(everything), linewidth=2.5, color="black", label="median of all layers")
    title, formula = _QUANTITIES[quantity]
    axes.set_title(title)
    axes.set_xlabel("order r of the norm (2: SGD, ∞: Muon)")
    axes.set_ylabel(f"{formula}, no unit")
    ticks = [1, 2, 4, 8, 16, 32, 64, 128, math.inf]
    axes.set_xticks([_place(tick) for tick in ticks], [_order_label(tick) for tick in ticks])
    axes.grid(alpha=0.3)


def _draw_curve(axes: Axes, places: Array, values: Array, **style: object) -> None:
    axes.plot(places[values > 0], values[values > 0], **style)  # type: ignore[arg-type]


def _draw_decay(axes: Axes, decay: QuadraticDecay, limit: float) -> None:
    orders = np.array([order for order in ORDERS if FIT_FROM / 2 <= order < math.inf])
    lines = (
        (
            decay.constant,
            "--",
            f"C / (r − 1)² fitted to r ≥ {FIT_FROM}: C = {decay.constant:.3g}, R² = {decay.r_squared:.3f}",
        ),
        (limit, ":", f"limit of proposition 5: C = Var ln σ = {limit:.3g}"),
    )
    handles = [
        axes.plot(np.log2(orders), constant / (orders - 1) ** 2, style, color="tab:red", linewidth=2, label=label)[0]
        for constant, style, label in lines
    ]
    axes.legend(handles=handles, fontsize=8, loc="lower left")


def _median_log_variance(layers: Sequence[LayerGeometry]) -> float:
    return float(np.median([layer.log_variance for layer in layers]))


def _place(order: float) -> float:
    """Where an order lies on the axis of log2(order)."""
    return _INFINITY if math.isinf(order) else math.log2(order)


def _order_label(order: float) -> str:
    return "∞" if math.isinf(order) else f"{order:g}"


def _page(
    checkpoint: Path, source: str, tokens: int, layers: Sequence[LayerGeometry], decay: QuadraticDecay | None
) -> str:
    fit = "The variance is 0 at some order: nothing to fit."
    if decay is not None:
        fit = (
            "By proposition 5 the variance of T's singular values falls as C / (r − 1)² in the limit, with C the "
            f"variance of ln σ, {_median_log_variance(layers):.4g} in the median layer. Fitted to the median from "
            f"r = {FIT_FROM} on, C = {decay.constant:.4g}, with R² = {decay.r_squared:.4f} of its logarithm; with the "
            f"exponent fitted too, it is {decay.exponent:.3g} instead of −2."
        )
    return "\n".join(
        [
            "# Geometry of the gradients",
            "",
            f"Gradients of `{checkpoint}` on {tokens:,} tokens of {source}, one for each of {len(layers)} matrices. "
            "T is the gradient after dualization under the Schatten norm of order r: its steepest descent direction "
            'of norm 1 (r = 2: SGD, r = ∞: Muon; F. L. Cesista 2025, "Steepest Descent Under Schatten-p Norms"). '
            f"{fit}",
            "",
            "![Variance, relative size and stable rank against the order of the norm](geometry.png)",
            "",
            "## Median over layers",
            "",
            "| r | " + " | ".join(f"{title} {formula}" for title, formula in _QUANTITIES.values()) + " |",
            "|---:|" + "---:|" * len(_QUANTITIES),
            *(_order_row(layers, order) for order in ORDERS),
            "",
            "## By layer",
            "",
            "Variance, relative size and stable rank at each order.",
            "",
            "| layer | " + " | ".join(f"r = {_order_label(order)}" for order in _SHOWN_ORDERS) + " |",
            "|---|" + "---:|" * len(_SHOWN_ORDERS),
            *(_layer_row(layer) for layer in layers),
            "",
        ]
    )


def _order_row(layers: Sequence[LayerGeometry], order: float) -> str:
    index = ORDERS.index(order)
    values = [np.median([getattr(layer, quantity)[index] for layer in layers]) for quantity in _QUANTITIES]
    return f"| {_order_label(order)} | " + " | ".join(f"{value:.4g}" for value in values) + " |"


def _layer_row(layer: LayerGeometry) -> str:
    cells = [
        " · ".join(f"{getattr(layer, quantity)[ORDERS.index(order)]:.4g}" for quantity in _QUANTITIES)
        for order in _SHOWN_ORDERS
    ]
    return f"| `{layer.name}` | " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw what every Schatten norm makes of a checkpoint's gradients, and write a page beside it."""
    parser = command_line.parser("geometry", main.__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder of a causal language model saved by Trainer")
    parser.add_argument("--batches", type=command_line.positive, default=4, help="of 8 sequences (default 4)")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    command_line.run(write_geometry, parser, arguments)


if __name__ == "__main__":
    main()
