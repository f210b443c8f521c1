"""Where the parts of fused projections lie: against what the models' own forward takes them for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    GptOssConfig,
    GptOssForCausalLM,
    LayoutLMv2Config,
    T5Config,
    T5Model,
)
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.codegen.modeling_codegen import CodeGenAttention
from transformers.models.falcon.modeling_falcon import FalconAttention
from transformers.models.layoutlmv2.modeling_layoutlmv2 import LayoutLMv2SelfAttention
from transformers.models.persimmon.modeling_persimmon import PersimmonAttention

from hf_schatten import (
    OptionError,
    RoutingError,
    SchattenOptions,
    SchattenP,
    create_schatten_optimizer,
    route_parameters,
)
from hf_schatten.matrices.fused_projections import parse_fused_parts
from hf_schatten.matrices.layout import Layout

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 30,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# Model type, its own sizes, and the name of the fused layer.
ATTENTIONS = {
    "gpt2": ({}, "c_attn"),
    "gpt_bigcode": ({"multi_query": True}, "c_attn"),
    "gpt_bigcode, all heads": ({"multi_query": False}, "c_attn"),
    "phi3": ({"intermediate_size": 24, "num_key_value_heads": 2}, "qkv_proj"),
    "codegen": ({"n_embd": 32, "n_head": 4, "n_layer": 1, "rotary_dim": 4}, "qkv_proj"),
    "gpt_neox": ({"intermediate_size": 24}, "query_key_value"),
    "bloom": ({}, "query_key_value"),
    "falcon": ({"multi_query": True, "new_decoder_architecture": False}, "query_key_value"),
    "falcon, all heads": ({"multi_query": False, "new_decoder_architecture": False}, "query_key_value"),
    "falcon, groups": ({"new_decoder_architecture": True, "num_kv_heads": 2}, "query_key_value"),
    "persimmon": ({"intermediate_size": 24}, "query_key_value"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 1}, "Wqkv"),
}


_SPLITTERS = [(BloomAttention, "_reshape"), (FalconAttention, "_split_heads"), (PersimmonAttention, "_split_heads")]


class _SeenError(Exception):
    """Ends a forward pass once query, key and value are known."""


def build(kind, **settings):
    config = AutoConfig.for_model(kind.partition(",")[0], **(SMALL | settings))
    return AutoModelForCausalLM.from_config(config)


def taken_for(model, attribute, monkeypatch, **inputs):
    """Return the numbers of the outputs that the model's forward takes for query, key and value."""
    seen = []

    def record(module, query, key, value, *args, **kwargs):
        seen.extend((query, key, value))
        raise _SeenError

    AttentionInterface.register("record", record)
    if model.config.model_type != "mpt":  # which needs a mask
        model.config._attn_implementation = "record"
    # Models that do not go through the interface.
    for cls, method in _SPLITTERS:
        original = getattr(cls, method)
        monkeypatch.setattr(cls, method, lambda self, fused, original=original: record(self, *original(self, fused)))
    monkeypatch.setattr(CodeGenAttention, "_attn", record)
    chunk = torch.Tensor.chunk
    if model.config.model_type == "mpt":
        monkeypatch.setattr(torch.Tensor, "chunk", lambda *args, **kwargs: record(None, *chunk(*args, **kwargs)))
    (layer,) = (module for name, module in model.named_modules() if name.endswith(f".{attribute}"))
    # Rotary embeddings leave position 0 as it is.
    layer.register_forward_hook(
        lambda module, args, output: torch.arange(output.shape[-1]).expand(output.shape).float().clone()
    )
    with pytest.raises(_SeenError):
        model(**inputs or {"input_ids": torch.zeros(1, 1, dtype=torch.long), "use_cache": False})
    return [set(part.flatten().long().tolist()) for part in seen]


def numbers(layout, outputs, name):
    """Return the numbers of the outputs that belong to the part of this name."""
    column = torch.arange(outputs)[None] if layout.transposed else torch.arange(outputs)[:, None]
    index = layout.part_names(column.shape).index(name)
    return set(layout.matrix(column, index).flatten().tolist())


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_parts_are_what_the_model_takes_them_for(kind, monkeypatch):
    settings, attribute = ATTENTIONS[kind]
    model = build(kind, **settings)
    (route,) = (route for route in route_parameters(model).routes if route.name.endswith(f"{attribute}.weight"))
    outputs = route.parameter.shape[1 if route.layout.transposed else 0]
    parts = [numbers(route.layout, outputs, name) for name in ("q", "k", "v")]
    assert sorted(number for part in parts for number in part) == list(range(outputs))
    assert parts == taken_for(model, attribute, monkeypatch)


def test_parts_of_a_vision_transformer_are_what_it_takes_them_for(monkeypatch):
    config = Blip2VisionConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, image_size=4, patch_size=4
    )
    model = Blip2VisionModel(config)
    routes = {route.name: route.layout for route in route_parameters(model).routes}
    parts = [numbers(routes["encoder.layers.0.self_attn.qkv.weight"], 96, name) for name in ("q", "k", "v")]
    assert parts == taken_for(model, "qkv", monkeypatch, pixel_values=torch.zeros(1, 3, 4, 4))


def test_parts_of_exaone_whose_vision_has_fewer_keys_are_what_it_takes_them_for():
    modeling = pytest.importorskip("transformers.models.exaone4_5.modeling_exaone4_5")
    config = modeling.Exaone4_5_VisionConfig(hidden_size=32, num_heads=4, num_key_value_heads=1, depth=1)
    attention = modeling.Exaone4_5_VisionAttention(config)
    routes = {route.name: route.layout for route in route_parameters(attention).routes}
    parts = [numbers(routes["qkv.weight"], 48, name) for name in ("q", "k", "v")]
    seen = []

    def record(module, *query_key_value, **kwargs):
        seen.extend(query_key_value[:3])
        raise _SeenError

    AttentionInterface.register("record", record)
    config._attn_implementation = "record"
    attention.qkv.register_forward_hook(lambda module, args, output: torch.arange(48.0)[None])
    unturned = (torch.ones(1, 8), torch.zeros(1, 8))
    with pytest.raises(_SeenError):
        attention(torch.zeros(1, 32), cu_seqlens=torch.tensor([0, 1]), position_embeddings=unturned)
    assert parts == [set(part.flatten().long().tolist()) for part in seen]


def test_parts_of_layoutlmv2_are_what_it_takes_them_for():
    attention = LayoutLMv2SelfAttention(LayoutLMv2Config(hidden_size=32, num_attention_heads=4, fast_qkv=True))
    routes = {route.name: route.layout for route in route_parameters(attention).routes}
    parts = [numbers(routes["qkv_linear.weight"], 96, name) for name in ("q", "k", "v")]
    attention.qkv_linear.register_forward_hook(lambda module, args, output: torch.arange(96.0))
    assert parts == [set(part.flatten().long().tolist()) for part in attention.compute_qkv(torch.zeros(32))]


def test_gate_and_up_of_interleaved_experts():
    config = GptOssConfig(**SMALL, intermediate_size=6, head_dim=8, num_key_value_heads=2, num_local_experts=2)
    experts = GptOssForCausalLM(config).model.layers[0].mlp.experts
    routes = {route.name: route.layout for route in route_parameters(experts).routes}
    layout = routes["gate_up_proj"]
    # Its gate is σ(1.702 gate) gate (up + 1): 0 where the gate is, and so where up is -1.
    fused = torch.ones(2, 32, 12)
    layout.part(fused, 2).zero_()
    assert not experts._apply_gate(fused[1]).any()
    assert experts._apply_gate(fused[0]).all()
    layout.part(fused, 2).fill_(1)
    layout.part(fused, 3).fill_(-1)
    assert not experts._apply_gate(fused[1]).any()
    assert layout.part_names(fused.shape) == ["0.gate", "0.up", "1.gate", "1.up"]


@pytest.mark.parametrize("transposed", [False, True])
def test_an_interleaved_projection_trains_as_separate_layers(transposed):
    """q, k and v in four blocks, against three matrices of their own."""
    torch.manual_seed(0)

    fused = torch.randn(4, 3, 2, 6, dtype=torch.float64)  # blocks, parts, outputs, inputs
    stored = fused.reshape(24, 6).T.contiguous() if transposed else fused.reshape(24, 6)
    one = nn.Parameter(stored.clone())
    own = [nn.Parameter(fused[:, part].reshape(8, 6).clone()) for part in range(3)]
    for precondition in ("none", "adam", "muadam"):
        parts = (("q", 2), ("k", 2), ("v", 2))
        group = {"params": [one], "parts": parts, "blocks": 4, "transposed": transposed}
        options = {"p": 3.0, "precondition": precondition, "weight_decay": 0.1}
        together, apart = SchattenP([group], lr=0.1, **options), SchattenP(own, lr=0.1, **options)
        for _ in range(3):
            G = torch.randn(4, 3, 2, 6, dtype=torch.float64)
            one.grad = G.reshape(24, 6).T.contiguous() if transposed else G.reshape(24, 6).clone()
            for part, W in enumerate(own):
                W.grad = G[:, part].reshape(8, 6).clone()
            together.step()
            apart.step()
        result = (one.T if transposed else one).reshape(4, 3, 2, 6)
        for part, W in enumerate(own):
            torch.testing.assert_close(result[:, part].reshape(8, 6), W, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "phi3"])
def test_heads_are_matrices_where_asked_for(kind):
    settings, attribute = ATTENTIONS[kind]
    model = build(kind, **settings)
    (whole,), (split,) = (
        [
            route
            for route in route_parameters(model, split_heads=asked).routes
            if route.name.endswith(f"{attribute}.weight")
        ]
        for asked in (False, True)
    )
    outputs = whole.parameter.shape[1 if whole.layout.transposed else 0]
    for part in ("q", "k", "v"):
        heads = [name for name in split.layout.part_names(split.parameter.shape) if name.startswith(part)]
        assert heads == [
            f"{part}.{head}" for head in range(2 if (kind, part) in {("phi3", "k"), ("phi3", "v")} else 4)
        ]
        of_heads = [numbers(split.layout, outputs, name) for name in heads]
        assert all(len(head) == 8 for head in of_heads)
        assert set.union(*of_heads) == numbers(whole.layout, outputs, part)
        assert [min(head) for head in of_heads] == sorted(min(head) for head in of_heads)


def test_heads_of_separate_projections():
    bert = BertModel(BertConfig(**SMALL, intermediate_size=24))
    routes = {route.name: route for route in route_parameters(bert, split_heads=True).routes}
    query = routes["encoder.layer.0.attention.self.query.weight"]
    assert query.layout.part_names(query.parameter.shape) == ["0", "1", "2", "3"]
    assert routes["encoder.layer.0.intermediate.dense.weight"].layout == Layout()
    t5 = T5Model(T5Config(d_model=32, d_kv=4, d_ff=24, num_layers=1, num_heads=4, vocab_size=30))
    routes = {route.name: route for route in route_parameters(t5, split_heads=True).routes}
    assert len(routes["encoder.block.0.layer.0.SelfAttention.q.weight"].layout.parts) == 4
    assert routes["encoder.block.0.layer.0.SelfAttention.o.weight"].layout == Layout()


def test_the_output_of_an_adapter_has_the_parts_of_its_layer(gpt2):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    model = peft.get_peft_model(gpt2, config)
    heads = gpt2.config.num_attention_heads
    for split_heads, parts in ((False, 3), (True, 3 * heads)):
        optimizer = create_schatten_optimizer(model, split_heads=split_heads, verbose=False)
        shapes = [matrix.shape for matrix in optimizer.matrices() if ".c_attn.lora_B." in matrix.name]
        assert shapes == [(3 * gpt2.config.n_embd // parts, 2)] * parts * gpt2.config.n_layer
        others = [m.name for m in optimizer.matrices() if ".lora_A." in m.name or ".c_proj." in m.name]
        assert all(name.endswith(".weight") for name in others)


def test_given_parts_come_before_the_table(gpt2):
    (entry,) = SchattenOptions.from_optim_args("fused_parts=*.c_attn:x*2/y@2").fused_parts
    routes = {route.name: route.layout for route in route_parameters(gpt2, fused_parts=[entry]).routes}
    assert routes["transformer.h.0.attn.c_attn.weight"] == Layout(True, (("x", 32), ("y", 16)), 2)
    assert routes["transformer.h.0.mlp.c_fc.weight"] == Layout(True)
    whole = {route.name: route.layout for route in route_parameters(gpt2, fused_parts=["*.c_attn:"]).routes}
    assert whole["transformer.h.0.attn.c_attn.weight"] == Layout(True)
    given = {route.name: route.layout for route in route_parameters(gpt2, fused_parts=["*.c_fc:a/b"]).routes}
    assert given["transformer.h.0.mlp.c_fc.weight"] == Layout(True, (("a", 64), ("b", 64)))


def test_every_projection_stays_whole_where_asked_for(gpt2):
    routing = route_parameters(gpt2, fused_parts=("*:",))
    assert all(not route.layout.parts for route in routing.to("schatten_p"))
    optimizer = create_schatten_optimizer(gpt2, p=2, verbose=False, fused_parts="*:")
    assert {matrix.name for matrix in optimizer.matrices()} == {route.name for route in routing.to("schatten_p")}


def test_the_optimizer_follows_given_parts(gpt2):
    optimizer = create_schatten_optimizer(gpt2, p=2, verbose=False, fused_parts=["*.c_attn:"])
    assert all(not group["parts"] for group in optimizer.param_groups)
    optimizer = create_schatten_optimizer(gpt2, p=2, verbose=False, split_heads=True)
    names = {matrix.name for matrix in optimizer.matrices()}
    assert "transformer.h.1.attn.c_attn.weight.v.1" in names


@pytest.mark.parametrize("entry", ["*.c_attn", ":q/k", "*.c_attn:q//k", "*.c_attn:q*0/k", "*.c_attn:q/k@0", "a:1"])
def test_malformed_parts(entry):
    with pytest.raises(ValueError, match="says no parts; write for example"):
        parse_fused_parts(entry)
    with pytest.raises(OptionError, match="fused_parts has"):
        SchattenOptions(fused_parts=(entry,))


def test_parts_that_do_not_fit(gpt2):
    with pytest.raises(RoutingError, match=r"does not divide the 96 outputs of 'transformer\.h\.0\.attn\.c_attn"):
        route_parameters(gpt2, fused_parts=["*.c_attn:a/b*4"])
    with pytest.raises(RoutingError, match=r"fused_parts has '\*\.nothing', which matches nothing"):
        route_parameters(gpt2, fused_parts=["*.nothing:a/b"])


def test_layouts_of_filters_and_experts_know_their_shapes():
    for layout, shape in [
        (Layout(), (6, 4)),
        (Layout(), (6, 4, 3, 3)),
        (Layout(True, (("a", 2), ("b", 4))), (5, 6)),
        (Layout(False, (("a", 1), ("b", 2)), 2), (3, 6, 4)),
        (Layout(True, (("a", 1), ("b", 2)), 2), (3, 4, 6)),
    ]:
        tensor = torch.arange(math.prod(shape)).view(shape)
        count = len(layout.part_names(shape))
        matrices = [layout.matrix(tensor, index) for index in range(count)]
        assert [tuple(X.shape) for X in matrices] == [layout.matrix_shape(shape, index) for index in range(count)]
        assert sorted(torch.cat([X.flatten() for X in matrices]).tolist()) == list(range(tensor.numel()))
