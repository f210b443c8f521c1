"""What fused projections consist of: the parts that a layer's outputs are cut into, by the name of the layer.

A layer's outputs are blocks of one kind that follow one another, and each block holds the parts in order: GPT-2's
``c_attn`` is one block of query, key and value, GPT-NeoX's ``query_key_value`` is one such block for each head. Known
layers are in a table; whoever knows better names the parts in the option ``fused_parts``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_schatten.matrices.layout import matches
from hf_schatten.option_text import parse_fused_parts

Parts = tuple[tuple[str, int], ...]

# Layers whose outputs are the heads of attention, and where their module keeps the size of one.
_HEADED = frozenset({"q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "k", "v"})
_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")

_ADAPTER = re.compile(r"\.lora_B\.[^.]+$")  # PEFT's: the outputs of a layer's adapter B are the layer's


class Cut(NamedTuple):
    """How the outputs of a layer are cut: name and number of outputs of each part, () for one matrix; blocks."""

    parts: Parts = ()
    blocks: int = 1

    @property
    def outputs(self) -> int:
        """How many outputs the layer has."""
        return self.blocks * sum(size for _, size in self.parts)


WHOLE = Cut()


def cut_of(
    name: str,
    outputs: int,
    owner: nn.Module,
    config: Any,
    *,
    fused_parts: Iterable[str] = (),
    split_heads: bool = False,
    parent: nn.Module | None = None,
) -> Cut:
    """Return how the outputs of a layer are cut; :data:`WHOLE` where it is no known projection.

    Args:
        name: of the parameter.
        outputs: of the layer.
        owner: the module that has the parameter.
        config: the model's configuration, or None.
        fused_parts: as in the option; the first entry that matches is used, ValueError where it does not divide.
        split_heads: cut queries, keys and values further, into heads, where their size is known.
        parent: the module that has the owner, whose head size counts.
    """
    cut = _given(name, outputs, fused_parts)
    if cut is None:
        attribute = _ADAPTER.sub("", name.removesuffix(".weight")).rpartition(".")[2]
        cut = _FUSED[attribute](outputs, owner, _text_config(config)) if attribute in _FUSED else WHOLE
        if cut.outputs != outputs:  # a projection of the same name that is another
            cut = WHOLE
        if split_heads and attribute in _HEADED:
            cut = Cut((("", outputs),))
    return _by_head(cut, parent) if split_heads else cut


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


def _qkv(queries: int, shared: int, blocks: int = 1) -> Cut:
    """Return the cut into queries and, of ``shared`` outputs each, keys and values."""
    return Cut((("q", queries), ("k", shared), ("v", shared)), blocks)


def _thirds(outputs: int, blocks: int = 1) -> Cut:
    """Return the cut of each block into three equal parts; of no blocks, one that does not add up."""
    size = outputs // (3 * blocks) if blocks else 0
    return _qkv(size, size, blocks)


def _vision_qkv(outputs: int, owner: nn.Module, config: Any) -> Cut:
    inputs = getattr(owner, "in_features", 0)
    # With fewer heads of keys and values (EXAONE 4.5), queries are as large as the inputs.
    return _qkv(inputs, (outputs - inputs) // 2) if inputs < outputs < 3 * inputs else _thirds(outputs)


def _c_attn(outputs: int, owner: nn.Module, config: Any) -> Cut:
    if getattr(config, "model_type", None) == "gpt_bigcode":
        if not config.multi_query:
            return _thirds(outputs, _heads(config)[0])
        shared = config.hidden_size // config.num_attention_heads
        return _qkv(outputs - 2 * shared, shared)
    inputs = owner.nx if isinstance(owner, Conv1D) else getattr(owner, "in_features", 0)
    if outputs == 2 * inputs:  # cross-attention, whose queries have a layer of their own
        return Cut((("k", inputs), ("v", inputs)))
    return _thirds(outputs) if outputs == 3 * inputs else WHOLE


def _qkv_proj(outputs: int, owner: nn.Module, config: Any) -> Cut:
    model_type, (heads, shared) = getattr(config, "model_type", None), _heads(config)
    if model_type == "codegen":
        size = outputs // 12
        return Cut((("q", size), ("v", size), ("k", size)), 4)
    if model_type == "minimax":
        return _thirds(outputs, heads)
    size = outputs // max(1, heads + 2 * shared)
    return _qkv(heads * size, shared * size)


def _query_key_value(outputs: int, owner: nn.Module, config: Any) -> Cut:
    model_type, (heads, _) = getattr(config, "model_type", None), _heads(config)
    if model_type in {"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"}:
        return _thirds(outputs, heads)
    if model_type != "falcon":
        return WHOLE
    size = config.hidden_size // heads
    if config.new_decoder_architecture:
        return _qkv(heads // config.num_kv_heads * size, size, config.num_kv_heads)
    return _qkv(heads * size, size) if config.multi_query else _thirds(outputs, heads)


def _gate_up(outputs: int, owner: nn.Module, config: Any) -> Cut:
    if getattr(owner, "is_concatenated", True):
        return Cut((("gate", outputs // 2), ("up", outputs // 2)))
    return Cut((("gate", 1), ("up", 1)), outputs // 2)


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _heads(config: Any) -> tuple[int, int]:
    """Return the numbers of heads of queries, and of keys and values."""
    heads = getattr(config, "num_attention_heads", 0)
    return heads, getattr(config, "num_key_value_heads", None) or heads


# By layer name: from the outputs, the owner and the configuration of the text model to the cut. Where it does not add
# up to the outputs, the projection stays whole.
_FUSED: Mapping[str, Callable[[int, nn.Module, Any], Cut]] = {
    "c_attn": _c_attn,
    "qkv_proj": _qkv_proj,
    "query_key_value": _query_key_value,
    "qkv": _vision_qkv,
    "qkv_linear": lambda outputs, owner, config: _thirds(outputs),
    "Wqkv": lambda outputs, owner, config: _thirds(3 * getattr(owner, "in_features", 0)),
    "gate_up_proj": _gate_up,
}
