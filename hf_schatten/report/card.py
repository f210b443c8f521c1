"""The optimizer's section of a model card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hf_schatten.layout import layer_name
from hf_schatten.report.log import p_label, summary

_SECTION_START = "<!-- hf_schatten: start of the optimizer section -->"
_SECTION_END = "<!-- hf_schatten: end of the optimizer section -->"
_TABLE_ROWS = 12  # layers listed in the card before the table is cut


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
    rows = [f"| `{layer_name(name)}` | {p_label(p)} |" for name, p in list(learned_p.items())[:_TABLE_ROWS]]
    if len(values) > _TABLE_ROWS:
        rows.append(f"| … {len(values) - _TABLE_ROWS} more | |")
    extremes = ", ".join(f"{name} {p_label(p)}" for name, p in summary(learned_p).items())
    return [f"p at the end of training: {extremes}.", "", "| layer | p |", "|---|---:|", *rows, ""]


def _value_label(value: Any) -> str:
    return ";".join(map(str, value)) if isinstance(value, tuple) else str(value)
