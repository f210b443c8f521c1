"""The section on the optimizer in a model card. What reads and writes cards is imported when one is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_schatten.exponent import p_label
from hf_schatten.matrices.layout import layer_kind, layer_name
from hf_schatten.options import OPTIMIZER_NAME, SchattenOptions
from hf_schatten.report.log import summary

SECTION_START = "<!-- hf_schatten: start of the optimizer section -->"
SECTION_END = "<!-- hf_schatten: end of the optimizer section -->"

_HEADING = "## Optimizer: Schatten-p"
# The markers, also after an edit of their words or blanks: still comments of ours.
_START = re.compile(r"<!--\s*hf_schatten\b.*\bstart\b.*-->", re.IGNORECASE)
_END = re.compile(r"<!--\s*hf_schatten\b.*\bend\b.*-->", re.IGNORECASE)
_OTHER_SECTION = re.compile(r"##?\s")

_RESUME = """### Resume

With the model and the arguments of this run, training goes on from a checkpoint as if it had not stopped:

```python
import hf_schatten

trainer = hf_schatten.SchattenTrainer(model, arguments, train_dataset=dataset)
trainer.train(resume_from_checkpoint=True)
```"""


def card_section(
    options: SchattenOptions,
    destinations: Mapping[str, tuple[int, int]],
    learned_p: Mapping[str, float],
    figure: Path | None,
) -> str:
    """Return the section, Markdown.

    Args:
        options: of the optimizer.
        destinations: update name to (tensors, parameters) that get it.
        learned_p: p by matrix name at the end of training; empty before the first step.
        figure: picture of p, relative to the card, or None.
    """
    paragraphs = [
        _HEADING,
        "Trained with the Python package `hf_schatten`: weight matrices are updated with U Σ^(1/p) Vᵀ of their "
        "momentum (p = 1 is SGD-like, p = ∞ is Muon, negative p lie beyond it), all other parameters with AdamW.",
        _table(
            ("update", "tensors", "parameters"),
            ((name, f"{tensors:,}", f"{size:,}") for name, (tensors, size) in destinations.items() if tensors),
        ),
        f"```bash\n--optim {OPTIMIZER_NAME} --optim_args {options_text(options)!r}\n```",
        f"Other options have the defaults of hf_schatten {version('hf_schatten')}.",
    ]
    if learned_p:
        paragraphs += ["### p by layer", *_p_paragraphs(learned_p)]
    if figure is not None:
        paragraphs.append(f"![p of each layer over training]({figure.as_posix()})")
    return "\n\n".join([*paragraphs, _RESUME])


def options_text(options: SchattenOptions) -> str:
    """Return p and what differs from the defaults, as ``--optim_args`` takes it."""
    shown = [
        (field.name, getattr(options, field.name))
        for field in fields(options)
        if field.name == "p" or getattr(options, field.name) != field.default
    ]
    return ",".join(f"{name}={_option_value(value)}" for name, value in shown)


def write_card_section(card_path: Path, section: str, tags: Iterable[str]) -> None:
    """Put the optimizer's section into a model card, in place of every earlier one.

    The section stands between two comments. Where one of them was deleted, an earlier section begins at its heading,
    or ends before the next heading of its level. Text outside is kept. The tags are added to the card's.
    """
    from huggingface_hub import ModelCard  # noqa: PLC0415 - as the module says

    card = ModelCard.load(card_path)
    before, _, after = _split(card.text)
    marked = f"{SECTION_START}\n{section.strip()}\n{SECTION_END}"
    card.text = "\n\n".join(filter(None, [before.strip("\n"), marked, after.strip("\n")])) + "\n"
    present = card.data.tags or []
    present = [present] if isinstance(present, str) else list(present)
    card.data.tags = present + [tag for tag in tags if tag not in present]
    card.save(card_path)


def read_card_section(card_path: Path) -> str | None:
    """Return the optimizer's section of a model card, or None where there is no card, or none in it."""
    if not card_path.is_file():
        return None
    from huggingface_hub import ModelCard  # noqa: PLC0415 - as the module says

    return _split(ModelCard.load(card_path).text)[1]


def _split(text: str) -> tuple[str, str | None, str]:
    """Return a card's text before the optimizer's section, that (the first of several) or None, and the text after."""
    kept: list[str] = []
    sections: list[list[str]] = []
    places: list[int] = []  # where in the kept lines each section was
    inside = False
    for line in text.split("\n"):
        if _START.search(line):
            inside = True
            sections.append([])
            places.append(len(kept))
        elif _END.search(line):
            if not inside and _HEADING in kept:  # the comment at the start was deleted
                begin = len(kept) - 1 - kept[::-1].index(_HEADING)
                sections.append(kept[begin:])
                places.append(begin)
                del kept[begin:]
            inside = False
        elif inside and _OTHER_SECTION.match(line) and line.strip() != _HEADING:  # that at the end was deleted
            inside = False
            kept.append(line)
        else:
            (sections[-1] if inside else kept).append(line)
    if not sections:
        return text, None, ""
    return "\n".join(kept[: min(places)]), "\n".join(sections[0]).strip(), "\n".join(kept[min(places) :])


def _p_paragraphs(learned_p: Mapping[str, float]) -> list[str]:
    """Describe p: in a sentence where it is one number, else by kind of layer."""
    if len({p_label(p) for p in learned_p.values()}) == 1:
        return [f"p = {p_label(next(iter(learned_p.values())))} for all {len(learned_p)} matrices."]
    extremes = ", ".join(f"{name} {p_label(p)}" for name, p in summary(learned_p).items())
    kinds: dict[str, dict[str, float]] = {}
    for name, p in learned_p.items():
        kinds.setdefault(layer_kind(layer_name(name)), {})[name] = p
    header = ("layers", "matrices", "min", "median", "max")
    rows = [(f"`{kind}`", str(len(ps)), *map(p_label, summary(ps).values())) for kind, ps in kinds.items()]
    return [f"Over all {len(learned_p)} matrices: {extremes}.", _table(header, rows)]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _option_value(value: Any) -> str:
    if isinstance(value, tuple):
        return ";".join(value)
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
