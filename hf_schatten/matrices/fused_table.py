"""The fused projections that are known: by the name of a layer, the parts that its outputs are cut into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

Parts = tuple[tuple[str, int], ...]

# How modules call the number of their inputs.
_INPUTS = ("in_features", "nx", "in_channels", "input_size", "embed_dim")


class Cut(NamedTuple):
    """How the outputs of a layer are cut: name and number of outputs of each part, () for one matrix; blocks."""

    parts: Parts = ()
    blocks: int = 1

    @property
    def outputs(self) -> int:
        """How many outputs the layer has."""
        return self.blocks * sum(size for _, size in self.parts)


WHOLE = Cut()


class Layer(NamedTuple):
    """A layer whose outputs may be cut: its name, their number, and where it lies."""

    attribute: str
    outputs: int
    owner: nn.Module
    above: tuple[nn.Module, ...]  # what it lies in, from its parent up
    config: Any  # of the text model

    @property
    def inputs(self) -> int:
        """How many inputs it has, 0 where it does not say."""
        return int(next((getattr(self.owner, key) for key in _INPUTS if hasattr(self.owner, key)), 0))

    def size(self, *names: str) -> int:
        """Return the first of these sizes that its parent has, 0 without."""
        parent = self.above[0] if self.above else None
        return next((value for name in names if type(value := getattr(parent, name, None)) is int), 0)

    def read_by(self, sibling: str) -> int:
        """Return how many features a module beside it reads, 0 without such a module."""
        module = getattr(self.above[0], sibling, None) if self.above else None
        return int(next((getattr(module, key) for key in _INPUTS if hasattr(module, key)), 0))


def known_cut(layer: Layer) -> Cut:
    """Return the cut of a layer that the table knows, WHOLE where it does not, or where it does not add up."""
    if layer.attribute not in FUSED or not layer.outputs:
        return WHOLE
    cut = FUSED[layer.attribute](layer)
    return cut if cut.outputs == layer.outputs else WHOLE  # a projection of the same name that is another


def heads_of(config: Any) -> tuple[int, int]:
    """Return the numbers of heads of queries, and of keys and values."""
    heads = getattr(config, "num_attention_heads", 0)
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _qkv(queries: int, shared: int, blocks: int = 1) -> Cut:
    """Return the cut into queries and, of ``shared`` outputs each, keys and values."""
    return Cut((("q", queries), ("k", shared), ("v", shared)), blocks)


def _thirds(outputs: int, blocks: int = 1) -> Cut:
    """Return the cut of each block into three equal parts; of no blocks, one that does not add up."""
    size = outputs // (3 * blocks) if blocks else 0
    return _qkv(size, size, blocks)


def _parts(names: str, *sizes: int, blocks: int = 1) -> Cut:
    """Return the cut into named parts of these sizes; of one size, into equal ones."""
    each = names.split("/")
    return Cut(tuple(zip(each, sizes if len(sizes) > 1 else sizes * len(each), strict=True)), blocks)


def _equal(names: str) -> Callable[[Layer], Cut]:
    """Return the rule that cuts the outputs into equal parts."""
    return lambda layer: _parts(names, layer.outputs // len(names.split("/")))


def _equal_before(sibling: str, names: str) -> Callable[[Layer], Cut]:
    """Return the rule that cuts the outputs into equal parts where the next layer reads one of them."""
    return lambda layer: _parts(names, layer.read_by(sibling))


def _doubled(layer: Layer) -> Cut:
    """Cut what a gated linear unit reads, twice as many outputs as inputs, into values and gates."""
    return _parts("value/gate", layer.inputs)


def _vision_qkv(layer: Layer) -> Cut:
    inputs, outputs = layer.inputs, layer.outputs
    # With fewer heads of keys and values (EXAONE 4.5), queries are as large as the inputs.
    return _qkv(inputs, (outputs - inputs) // 2) if inputs < outputs < 3 * inputs else _thirds(outputs)


def _c_attn(layer: Layer) -> Cut:
    config, inputs, outputs = layer.config, layer.inputs, layer.outputs
    if getattr(config, "model_type", None) == "gpt_bigcode":
        if not config.multi_query:
            return _thirds(outputs, heads_of(config)[0])
        shared = config.hidden_size // config.num_attention_heads
        return _qkv(outputs - 2 * shared, shared)
    if outputs == 2 * inputs:  # cross-attention, whose queries have a layer of their own
        return _parts("k/v", inputs)
    return _thirds(outputs) if outputs == 3 * inputs else WHOLE


def _qkv_proj(layer: Layer) -> Cut:
    model_type, (heads, shared) = getattr(layer.config, "model_type", None), heads_of(layer.config)
    if model_type == "codegen":
        return _parts("q/v/k", layer.outputs // 12, blocks=4)
    if model_type == "minimax":
        return _thirds(layer.outputs, heads)
    size = layer.outputs // max(1, heads + 2 * shared)
    return _qkv(heads * size, shared * size)


def _wqkv(layer: Layer) -> Cut:
    thirds = layer.outputs == 3 * layer.inputs
    return _thirds(layer.outputs) if thirds else _qkv(layer.inputs, (layer.outputs - layer.inputs) // 2)


def _query_key_value(layer: Layer) -> Cut:
    config, outputs = layer.config, layer.outputs
    model_type, (heads, _) = getattr(config, "model_type", None), heads_of(config)
    if model_type in {"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"}:
        return _thirds(outputs, heads)
    if model_type != "falcon":
        return WHOLE
    size = config.hidden_size // heads
    if config.new_decoder_architecture:
        return _qkv(heads // config.num_kv_heads * size, size, config.num_kv_heads)
    return _qkv(heads * size, size) if config.multi_query else _thirds(outputs, heads)


def _q_proj(layer: Layer) -> Cut:
    """Cut queries with a gate of each head behind them (Qwen3-Next)."""
    size, queries = layer.size("head_dim"), layer.read_by("o_proj")
    return _parts("q/gate", size, blocks=queries // size) if size and layer.outputs == 2 * queries else WHOLE


def _of_each_head(names: str, *sizes: str) -> Callable[[Layer], Cut]:
    """Return the rule that cuts the outputs of each head into parts of the sizes that its parent says."""

    def cut(layer: Layer) -> Cut:
        found = [layer.size(size) for size in sizes]
        return _parts(names, *found, blocks=layer.outputs // sum(found)) if all(found) else WHOLE

    return cut


def _delta_net(names: str) -> Callable[[Layer], Cut]:
    """Return the rule of what a gated delta net reads, a block for each head of keys."""

    def cut(layer: Layer) -> Cut:
        blocks = layer.size("num_k_heads")
        if not blocks:
            return WHOLE
        ratio = layer.size("num_v_heads") // blocks
        key, value = layer.size("head_k_dim"), ratio * layer.size("head_v_dim")
        sizes = {"q": key, "k": key, "v": value, "z": value, "b": ratio, "a": ratio}
        return Cut(tuple((name, sizes[name]) for name in names.split("/")), blocks)

    return cut


def _in_proj(layer: Layer) -> Cut:
    """Cut what a state space model, a short convolution or DeBERTa's attention reads."""
    owner = type(layer.above[0]).__name__ if layer.above else ""
    inner, convolved, outputs = layer.size("intermediate_size"), layer.size("conv_dim"), layer.outputs
    if owner == "DisentangledSelfAttention":
        return _thirds(outputs, layer.size("num_attention_heads"))
    if inner and convolved:  # Mamba 2
        state = (convolved - inner) // 2
        return _parts("gate/x/B/C/dt", inner, inner, state, state, outputs - inner - convolved)
    if owner == "ZambaMambaMixer":
        return _parts("x/gate", 1, blocks=inner)
    if inner:  # Mamba
        return _parts("x/gate", inner)
    return _parts("B/C/x", layer.inputs) if owner.endswith("ShortConv") else WHOLE


def _levit(names: str, keys: int) -> Callable[[Layer], Cut]:
    """Return the rule of LeViT, a block for each head; values are longer than keys."""

    def cut(layer: Layer) -> Cut:
        attention = layer.above[1] if len(layer.above) > 1 else None
        key, ratio = getattr(attention, "key_dim", 0), getattr(attention, "attention_ratio", 0)
        sizes = *[key] * keys, int(ratio * key)
        return _parts(names, *sizes, blocks=layer.outputs // sum(sizes)) if key and ratio else WHOLE

    return cut


def _linear(layer: Layer) -> Cut:
    """Cut a layer called ``linear``, by the name of what has it."""
    parent, above = (*layer.above, None, None)[:2]
    if type(parent).__name__ == "MLPLayerWithBN":
        both = getattr(above, "queries_keys_values", None) is parent
        return _levit("q/k/v", 2)(layer) if both else _levit("k/v", 1)(layer)
    return WHOLE


def _modulation(layer: Layer) -> Cut:
    """Cut what modulates a norm: as many shifts, scales and gates of the width of the norm as fit."""
    names = {2: "shift/scale", 3: "shift/scale/gate"}
    count = layer.outputs // max(1, layer.inputs)
    return _parts(names[count], layer.inputs) if count in names else WHOLE


def _gate_up(layer: Layer) -> Cut:
    if getattr(layer.owner, "is_concatenated", True):
        return _parts("gate/up", layer.outputs // 2)
    return _parts("gate/up", 1, blocks=layer.outputs // 2)


# By layer name: from the layer to its cut. Where it does not add up to the outputs, the projection stays whole.
FUSED: Mapping[str, Callable[[Layer], Cut]] = {
    # Attention.
    **dict.fromkeys(("in_proj_weight", "qkv_linear", "att_proj"), _equal("q/k/v")),
    "c_attn": _c_attn,
    "qkv_proj": _qkv_proj,
    "query_key_value": _query_key_value,
    "qkv": _vision_qkv,
    "Wqkv": _wqkv,
    "to_kv": _equal("k/v"),
    "kv_proj": lambda layer: _parts("k/v", layer.size("kv_projection_size")),
    "q_proj": _q_proj,
    "q_gate_proj": _of_each_head("q/gate", "qk_head_dim", "v_head_dim"),
    "kv_b_proj": _of_each_head("k/v", "qk_nope_head_dim", "v_head_dim"),
    "kv_a_proj_with_mqa": _of_each_head("latent/rope", "kv_lora_rank", "qk_rope_head_dim"),
    "o_a_proj": lambda layer: _equal("/".join(map(str, range(getattr(layer.owner, "n_groups", 1)))))(layer),
    # Linear attention, state space models and convolutions.
    "in_proj": _in_proj,
    "in_proj_qkvz": _delta_net("q/k/v/z"),
    "in_proj_ba": _delta_net("b/a"),
    "in_proj_qkv": lambda layer: _parts("q/k/v", *[layer.size(size) for size in ("key_dim", "key_dim", "value_dim")]),
    "x_proj": lambda layer: _parts(
        "dt/B/C", *[layer.size(size) for size in ("time_step_rank", "ssm_state_size", "ssm_state_size")]
    ),
    "projection_in": lambda layer: _parts("q/context/gates", *[layer.inputs] * 2, layer.outputs - 2 * layer.inputs),
    **dict.fromkeys(("pointwise_conv1", "linear_start", "ext_pw_conv_1d"), _doubled),
    "up_conv": _equal_before("down_conv", "value/gate"),
    "pointwise_lin1": _equal_before("pointwise_lin2", "value/gate"),
    # Feed-forward.
    "gate_up_proj": _gate_up,
    "Wi": _equal_before("Wo", "gate/up"),
    "fc1": _equal_before("fc2", "1/2"),
    "input_linear": _equal_before("output_linear", "gate/up"),
    "proj": lambda layer: (
        _equal("up/gate")(layer) if "GatedLinearUnit" in type((*layer.above, None)[0]).__name__ else WHOLE
    ),
    "adaln_proj": _modulation,
    "linear": _linear,
}
