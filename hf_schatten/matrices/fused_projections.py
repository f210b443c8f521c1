"""What fused projections consist of: the parts that a layer's outputs are cut into, by the name of the layer.

A layer's outputs are blocks of one kind that follow one another, and each block holds the parts in order: GPT-2's
``c_attn`` is one block of query, key and value, GPT-NeoX's ``query_key_value`` is one such block for each head. Known
layers are in a table; whoever knows better names the parts in the option ``fused_parts``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from hf_schatten.matrices.fused_table import FUSED, WHOLE, Cut, Layer, known_cut
from hf_schatten.matrices.layout import matches
from hf_schatten.option_text import parse_fused_parts

# Layers whose outputs are the heads of attention, and where their module keeps the size of one.
_HEADED = frozenset({"q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "k", "v"})
_WHOLE = frozenset({"gate_proj", "up_proj", "down_proj", "o_proj", "out_proj"})  # by their names
_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")

_ADAPTER = re.compile(r"\.lora_B\.[^.]+$")  # PEFT's: the outputs of a layer's adapter B are the layer's


def cut_of(
    name: str,
    outputs: int,
    owner: nn.Module,
    config: Any,
    *,
    fused_parts: Iterable[str] = (),
    split_heads: bool = False,
    above: Sequence[nn.Module] = (),
) -> Cut:
    """Return how the outputs of a named layer are cut; :data:`WHOLE` where it is no known projection.

    The first of ``fused_parts`` that matches is used. With ``split_heads``, queries, keys and values are cut further,
    into heads of the size that the module that has the owner says, the last one of those ``above``.

    Raises:
        ValueError: when an entry's parts do not divide the outputs.
    """
    cut = _given(name, outputs, fused_parts)
    if cut is None:
        attribute = _ADAPTER.sub("", name.removesuffix(".weight")).rpartition(".")[2]
        cut = known_cut(Layer(attribute, outputs, owner, tuple(reversed(above)), _text_config(config)))
        if split_heads and attribute in _HEADED:
            cut = Cut((("", outputs),))
    return _by_head(cut, above[-1] if above else None) if split_heads else cut


def fusion_suspected(name: str, outputs: int, inputs: int, config: Any) -> str:
    """Return what a projection that stays whole may hold by its number of outputs, "" where nothing speaks for it.

    Args:
        name: of its weight.
        outputs: how many it has.
        inputs: how many it has.
        config: of the pretrained model that it lies in, or None.
    """
    attribute = name.removesuffix(".weight").rpartition(".")[2]
    if attribute in FUSED or attribute in _HEADED or attribute in _WHOLE or config is None:
        return ""
    for each in (config, _text_config(config)):
        sizes = {key: value for key, value in vars(each).items() if type(value) is int}
        heads = sizes.get("num_attention_heads", 0)
        shared = sizes.get("num_key_value_heads", heads)
        size = sizes.get("head_dim") or (inputs // heads if heads else 0)
        width = sizes.get("intermediate_size") or sizes.get("ffn_dim") or 0
        if sizes.get("hidden_size", sizes.get("d_model")) != inputs or outputs in (inputs, width):
            continue
        if outputs == (heads + 2 * shared) * size:
            return "q/k/v"
        if width and outputs == 2 * width:
            return "gate/up"
    return ""


def _given(name: str, outputs: int, fused_parts: Iterable[str]) -> Cut | None:
    """Return the cut of the first entry that matches, None where none does."""
    for entry in fused_parts:
        pattern, parts, blocks = parse_fused_parts(entry)
        if not matches(pattern, name):
            continue
        if not parts:
            return WHOLE
        shares = sum(weight for _, weight in parts)
        unit, rest = divmod(outputs, blocks * shares)
        if rest or not unit:
            raise ValueError(
                f"fused_parts={entry!r} does not divide the {outputs} outputs of {name!r}: it has {blocks} blocks of "
                f"{shares} equal shares."
            )
        return Cut(tuple((part, weight * unit) for part, weight in parts), blocks)
    return None


def _by_head(cut: Cut, parent: nn.Module | None) -> Cut:
    """Return the cut with a part for each head, where its parts are queries, keys and values of a known head size."""
    size = next((getattr(parent, key) for key in _HEAD_SIZES if isinstance(getattr(parent, key, None), int)), 0)
    names = {name for name, _ in cut.parts}
    if not (size and names and names <= {"", "q", "k", "v"}) or any(part % size for _, part in cut.parts):
        return WHOLE if "" in names else cut
    heads: Counter[str] = Counter()
    parts = []
    for name, part in cut.parts * cut.blocks:
        for _ in range(part // size):
            parts.append((".".join(filter(None, (name, str(heads[name])))), size))
            heads[name] += 1
    return Cut(tuple(parts))


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):  # of another kind, or with several texts
        return config
