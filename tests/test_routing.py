"""Which parameter goes where, on the architectures of issue and notes; small models made from configurations."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    DbrxConfig,
    DbrxForCausalLM,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from hf_schatten import RoutingError, UnsupportedEngineError, create_schatten_optimizer, route_parameters
from hf_schatten.matrices.layout import matches


def names(routing, destination):
    return {route.name for route in routing.to(destination)}


def reasons(routing):
    return {route.name: route.reason for route in routing.routes}


def test_gpt2_routes_its_conv1d_weights_and_keeps_the_tied_embedding(gpt2):
    routing = route_parameters(gpt2)
    blocks = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names(routing, "schatten_p") == {f"transformer.h.{i}.{block}.weight" for i in (0, 1) for block in blocks}
    assert all(route.layout.transposed for route in routing.to("schatten_p"))
    assert reasons(routing)["transformer.wte.weight"] == "embedding, or tied to one"
    assert {route.name for route in routing.routes} == {name for name, _ in gpt2.named_parameters()}


def test_llama_routes_its_linear_weights_and_keeps_the_untied_head(llama):
    routing = route_parameters(llama)
    assert len(routing.to("schatten_p")) == 2 * 7
    assert not any(route.layout.transposed for route in routing.to("schatten_p"))
    assert reasons(routing)["lm_head.weight"] == "embedding, or tied to one"


def test_weight_decay_leaves_out_vectors(llama):
    decay = {route.name: route.decay for route in route_parameters(llama).routes}
    assert decay["model.layers.0.self_attn.q_proj.weight"]
    assert decay["model.embed_tokens.weight"]
    assert not decay["model.norm.weight"]


def test_a_task_head_stays_with_adamw():
    config = BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=30, num_labels=3
    )
    routing = route_parameters(BertForSequenceClassification(config))
    assert reasons(routing)["classifier.weight"] == "outside the backbone (task head)"
    assert "bert.encoder.layer.0.attention.self.query.weight" in names(routing, "schatten_p")


def test_t5_keeps_relative_positions_and_the_tied_head():
    config = T5Config(d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8, vocab_size=30)
    routing = route_parameters(T5ForConditionalGeneration(config))
    adamw = names(routing, "adamw")
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in adamw
    assert "shared.weight" in adamw
    assert "decoder.block.0.layer.1.EncDecAttention.k.weight" in names(routing, "schatten_p")


def test_mixtral_routes_its_experts_as_matrices_and_keeps_the_router():
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=30,
        num_local_experts=2,
    )
    model = MixtralForCausalLM(config)
    routing = route_parameters(model)
    assert "model.layers.0.mlp.gate.weight" in names(routing, "adamw")
    experts = {route.name.rpartition(".")[2]: route for route in routing.to("schatten_p") if "experts" in route.name}
    gate_up, down = experts["gate_up_proj"], experts["down_proj"]
    assert gate_up.layout.part_names(gate_up.parameter.shape) == ["0.gate", "0.up", "1.gate", "1.up"]
    assert down.layout.part_names(down.parameter.shape) == ["0", "1"]
    whole = {route.name: route.layout for route in route_parameters(model, fused_parts=["*:"]).routes}
    assert whole[gate_up.name].parts == ()


def sections(model):
    return {route.name: tuple(route.layout.parts) for route in route_parameters(model).routes}


def test_fused_projections_are_split_by_their_heads(gpt2):
    assert sections(gpt2)["transformer.h.0.attn.c_attn.weight"] == (("q", 32), ("k", 32), ("v", 32))
    assert sections(gpt2)["transformer.h.0.mlp.c_fc.weight"] == ()
    config = Phi3Config(
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=30,
        pad_token_id=0,
    )
    phi3 = sections(Phi3ForCausalLM(config))
    assert phi3["model.layers.0.self_attn.qkv_proj.weight"] == (("q", 32), ("k", 16), ("v", 16))
    assert phi3["model.layers.0.mlp.gate_up_proj.weight"] == (("gate", 24), ("up", 24))


def test_a_projection_whose_parts_do_not_add_up_stays_whole():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = nn.Linear(16, 16 + 2 * 4)  # one key and value head for all

    assert sections(Attention())["c_attn.weight"] == ()


def test_a_cnn_routes_its_filters_but_not_the_first_nor_depthwise_ones():
    depthwise = nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 32, 3, groups=16), nn.Conv2d(32, 16, 3, groups=16)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), *depthwise)
    routing = route_parameters(model)
    assert names(routing, "schatten_p") == {"1.weight"}
    assert reasons(routing)["0.weight"] == "convolution of an image's channels"
    for name in ("2.weight", "3.weight", "4.weight"):
        assert reasons(routing)[name] == "Conv2d of single channels (depthwise)"


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(12, 8, 5, groups=4), (2, 15)),
        (nn.Conv2d(12, 8, (3, 2), groups=2), (4, 36)),
        (nn.ConvTranspose1d(12, 8, 3, groups=2), (6, 12)),
    ],
)
def test_a_convolution_in_groups_has_a_matrix_for_each(module, shape):
    (route,) = route_parameters(module).to("schatten_p")
    weight, groups = route.parameter, module.groups
    assert route.layout.part_names(weight.shape) == [str(group) for group in range(groups)]
    for group, own in enumerate(weight.chunk(groups)):  # torch has groups one after the other in the first dimension
        assert route.layout.matrix_shape(weight.shape, group) == shape
        assert torch.equal(route.layout.matrix(weight, group), own.flatten(1))


def test_clip_which_has_no_input_embeddings_keeps_every_embedding():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 30, "max_position_embeddings": 8},
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    routing = route_parameters(CLIPModel(config))
    adamw = names(routing, "adamw")
    assert "text_model.embeddings.token_embedding.weight" in adamw
    assert "vision_model.embeddings.patch_embedding.weight" in adamw
    assert routing.to("schatten_p")


def test_lora_routes_the_adapters_and_freezes_the_rest(llama):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    routing = route_parameters(model)
    assert len(routing.to("schatten_p")) == 2 * 2 * 2
    assert all(".lora_" in name for name in names(routing, "schatten_p"))
    assert "base_model.model.lm_head.weight" in names(routing, "frozen")


def test_names_lose_the_components_of_wrappers(llama):
    bare = {route.name for route in route_parameters(llama).routes}
    compiled = torch.compile(llama)
    assert {route.name for route in route_parameters(compiled).routes} == bare
    llama.model.layers[0] = torch.compile(llama.model.layers[0])
    assert {route.name for route in route_parameters(llama).routes} == bare


def test_any_module_is_its_own_backbone_and_exclude_names_its_head():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert names(route_parameters(model), "schatten_p") == {"0.weight", "2.weight"}
    routing = route_parameters(model, exclude=["2.*"])
    assert names(routing, "schatten_p") == {"0.weight"}
    assert reasons(routing)["2.weight"] == "excluded by option"


def test_a_side_of_length_one_is_no_matrix():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    assert reasons(route_parameters(model))["1.weight"] == "a side of length 1"


def test_an_exclude_pattern_without_a_match_is_an_error(llama):
    with pytest.raises(RoutingError, match=r"exclude has '\*\.heads', which matches nothing; names look like"):
        route_parameters(llama, exclude=["*.heads"])


def test_no_matrix_routed_is_an_error_that_shows_the_table():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(RoutingError, match=r"No matrix of Sequential is routed(.|\n)*of an image's channels"):
        route_parameters(model)


def test_a_frozen_model_is_an_error_of_its_own(llama):
    llama.requires_grad_(False)
    with pytest.raises(RoutingError, match="All parameters of LlamaForCausalLM are frozen"):
        route_parameters(llama)


def test_parameters_without_elements_are_an_engines(llama):
    for parameter in llama.parameters():
        parameter.data = parameter.data.new_empty(0)
    with pytest.raises(UnsupportedEngineError, match=r"'model\.embed_tokens\.weight' of .* no elements: an engine"):
        route_parameters(llama)


@pytest.mark.parametrize(
    ("wrapper", "reason"),
    [
        ("FullyShardedDataParallel", "FSDP version 1 hands the optimizer flat pieces"),
        ("DeepSpeedEngine", "DeepSpeed has wrapped the model: make the optimizer of the bare model"),
    ],
)
def test_a_model_in_an_engines_wrapper_is_refused(wrapper, reason):
    wrapped = type(wrapper, (nn.Sequential,), {})(nn.Linear(4, 4))
    for model in (wrapped, nn.Sequential(nn.Linear(4, 4), wrapped)):  # FSDP 1 wraps layers too
        with pytest.raises(UnsupportedEngineError, match=f"and {reason}"):
            create_schatten_optimizer(model)


def table(model):
    """Return the lines of the printed table, and (tensors, parameters, pattern) of each kind."""
    lines = str(route_parameters(model)).splitlines()
    found = [re.fullmatch(r" +([\d,]+) +([\d,]+)  (\S+)(?:  .*)?", line) for line in lines]
    return lines, [(*(int(row[i].replace(",", "")) for i in (1, 2)), row[3]) for row in found if row]


def test_the_table_has_a_row_for_each_kind_and_a_total_for_each_update(gpt2):
    assert (
        str(route_parameters(gpt2))
        == """\
  tensors  parameters  name                                (out, in)
schatten_p: 8 tensors, 24,576 parameters
  matrix of Conv1D in the backbone
        2       6,144  transformer.h.*.attn.c_attn.weight  (96, 32) q/k/v
        2       2,048  transformer.h.*.attn.c_proj.weight  (32, 32)
        2       8,192  transformer.h.*.mlp.c_fc.weight     (128, 32)
        2       8,192  transformer.h.*.mlp.c_proj.weight   (32, 128)
adamw: 20 tensors, 3,456 parameters
  embedding, or tied to one
        1       2,048  transformer.wte.weight
        1         512  transformer.wpe.weight
  vector or scalar
        2          64  transformer.h.*.ln_1.weight
        2          64  transformer.h.*.ln_1.bias
        2         192  transformer.h.*.attn.c_attn.bias
        2          64  transformer.h.*.attn.c_proj.bias
        2          64  transformer.h.*.ln_2.weight
        2          64  transformer.h.*.ln_2.bias
        2         256  transformer.h.*.mlp.c_fc.bias
        2          64  transformer.h.*.mlp.c_proj.bias
        1          32  transformer.ln_f.weight
        1          32  transformer.ln_f.bias"""
    )


def test_the_table_counts_every_parameter_once_and_its_names_are_patterns(llama):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama, peft.LoraConfig(r=4, target_modules="all-linear"))
    lines, rows = table(model)
    assert max(map(len, lines)) <= 100
    parameters = dict(model.named_parameters())
    assert sum(tensors for tensors, *_ in rows) == len(parameters)
    assert sum(size for _, size, _ in rows) == sum(parameter.numel() for parameter in parameters.values())
    for tensors, _, pattern in rows:
        assert sum(matches(pattern, name) for name in parameters) == tensors


def test_experts_and_shapes_that_differ_are_shown_in_a_row():
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=30,
        num_local_experts=2,
    )
    lines, _ = table(MixtralForCausalLM(config))
    (experts,) = (line for line in lines if "gate_up_proj" in line)
    assert experts.split() == [
        *("3", f"{3 * 2 * 48 * 16:,}", "model.layers.*.mlp.experts.gate_up_proj"),
        *("(2,", "48,", "16)", "gate/up"),
    ]
    lines, _ = table(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 8)))
    assert lines[1:] == [
        *("schatten_p: 3 tensors, 96 parameters", "  matrix of Linear in the backbone"),
        "        3          96  *.weight  2 shapes",
        *("adamw: 3 tensors, 20 parameters", "  vector or scalar", "        3          20  *.bias"),
    ]


def test_a_long_name_goes_on_without_its_first_components():
    model = nn.Sequential(nn.Linear(2, 3))
    for name in ("inner_" + "x" * 40, "middle_" + "y" * 40, "outer_" + "z" * 40):
        model = nn.ModuleDict({name: model})
    lines, ((_, _, weight), (_, _, bias)) = table(model)
    assert weight == f"*.inner_{'x' * 40}.*"
    assert bias == f"*.inner_{'x' * 40}.*.bias"
    assert max(map(len, lines)) <= 100


def test_weight_decay_goes_where_a_trainer_puts_it(gpt2, llama):
    for model in (gpt2, llama, BertForSequenceClassification(BertConfig(num_hidden_layers=1, hidden_size=24))):
        routes = route_parameters(model).routes  # without the second name of a tied weight
        expected = set(Trainer.get_decay_parameter_names(None, model)) & {route.name for route in routes}
        assert {route.name for route in routes if route.decay} == expected


class Mixture(nn.Module):
    """Experts in parameters of three dimensions with names of their own, and a router that is called otherwise."""

    def __init__(self, stored, count=3, width=8, hidden=10):
        super().__init__()
        self.choice = nn.Linear(width, count)
        up, down = ((hidden, width), (width, hidden)) if stored == "(out, in)" else ((width, hidden), (hidden, width))
        self.first = nn.Parameter(torch.zeros(count, *up))
        self.second = nn.Parameter(torch.zeros(count, *down))


@pytest.mark.parametrize("stored", ["(out, in)", "(in, out)"])
def test_experts_are_known_by_the_router_beside_them_and_stored_as_tokens_tell(stored):
    routing = route_parameters(nn.ModuleList([Mixture(stored)]))
    assert reasons(routing)["0.choice.weight"] == "router of experts"
    layouts = {route.name: route.layout for route in routing.to("schatten_p")}
    assert set(layouts) == {"0.first", "0.second"}
    assert {layout.transposed for layout in layouts.values()} == {stored == "(in, out)"}
    assert all(layout.part_names((3, 8, 10)) == ["0", "1", "2"] for layout in layouts.values())
    assert not routing.warnings


def test_a_router_beside_a_list_of_experts_is_known_by_their_number():
    class SparseLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.select = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    routing = route_parameters(SparseLayer())
    assert reasons(routing)["select.1.weight"] == "router of experts"
    assert {f"experts.{i}.weight" for i in range(4)} <= names(routing, "schatten_p")


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        (nn.MultiheadAttention(8, 2), {"in_proj_weight": [(8, 8)] * 3, "out_proj.weight": [(8, 8)]}),
        (
            nn.MultiheadAttention(8, 2, kdim=6, vdim=5),
            {f"{part}_proj_weight": [(8, n)] for part, n in zip("qkv", (8, 6, 5), strict=True)}
            | {"out_proj.weight": [(8, 8)]},
        ),
        (nn.Conv1d(6, 7, 3), {"weight": [(7, 18)]}),
        (nn.Conv3d(6, 7, (1, 2, 3)), {"weight": [(7, 36)]}),
        (nn.ConvTranspose1d(6, 7, 3), {"weight": [(6, 21)]}),
        (nn.ConvTranspose2d(6, 7, 3), {"weight": [(6, 63)]}),
        (nn.Bilinear(3, 4, 5), {"weight": [(5, 12)]}),
    ],
)
def test_torchs_own_layers_are_read_as_matrices(module, shapes):
    routes = route_parameters(module).to("schatten_p")
    found = {
        route.name: [
            route.layout.matrix_shape(route.parameter.shape, index)
            for index in range(len(route.layout.part_names(route.parameter.shape)))
        ]
        for route in routes
    }
    assert found == shapes


def test_what_is_not_understood_is_said():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.kernel = nn.Linear(4, 5), nn.Parameter(torch.zeros(4, 5))

    routing = route_parameters(Mixer())
    assert names(routing, "adamw") == {"layer.bias", "kernel"}
    assert "kernel: what Mixer does with 'kernel' is not known, so it trains with AdamW" in routing.warnings


def test_a_fused_projection_that_is_not_known_is_found_by_its_size():
    class Block(GradientCheckpointingLayer):
        def __init__(self, config):
            super().__init__()
            self.all_three = nn.Linear(config.hidden_size, 8 * (4 + 2 * 2), bias=False)
            self.both = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
            self.one = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    class Model(LlamaPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.blocks = nn.ModuleList([Block(config)])

    config = LlamaConfig(hidden_size=32, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2)
    model = Model(config)
    found = [text for text in route_parameters(model).warnings if "in one" in text]
    assert len(found) == 2
    assert "fused_parts=blocks.*.all_three.weight:q/k/v" in found[0]
    assert "fused_parts=blocks.*.both.weight:gate/up" in found[1]
    said = route_parameters(model, fused_parts=["*.all_three:q*2/k/v", "*.both:"])
    assert not said.warnings


def test_dbrx_which_stores_experts_one_under_the_other_has_a_matrix_for_each():
    config = DbrxConfig(
        d_model=16,
        n_heads=2,
        n_layers=1,
        vocab_size=30,
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 2, "moe_top_k": 1},
        attn_config={"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
    )
    routing = route_parameters(DbrxForCausalLM(config))
    experts = {route.name.rpartition(".")[2]: route for route in routing.to("schatten_p") if "experts" in route.name}
    assert set(experts) == {"w1", "v1", "w2"}
    for name, route in experts.items():
        shape = route.parameter.shape
        assert route.layout.part_names(shape) == ["0", "1"]
        assert route.layout.matrix_shape(shape, 1) == (24, 16)
        assert route.layout.transposed == (name == "w2")
        stored = torch.arange(shape.numel()).view(shape)
        assert torch.equal(route.layout.matrix(stored, 1), stored[24:])
