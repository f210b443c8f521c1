"""What of an adapter is a matrix: factors, one for each expert; and what a wrapper around a model leaves in place."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_schatten import RoutingError, SchattenP, create_schatten_optimizer, route_parameters

TARGETS = ["q_proj", "down_proj"]


def names(model, destination="schatten_p"):
    return {route.name for route in route_parameters(model).to(destination)}


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("config", "vectors"),
    [
        (peft.LoraConfig(r=4, target_modules=TARGETS, use_rslora=True), ()),
        (peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True), ("magnitude",)),
        (peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"), ()),
        (peft.LoraConfig(r=1, target_modules=TARGETS, rank_pattern={"q_proj": 2}), ("down_proj",)),
        (peft.LoHaConfig(r=4, target_modules=TARGETS), ()),
        (peft.LoKrConfig(r=4, target_modules=TARGETS), ()),
        (peft.LoKrConfig(r=2, target_modules=["q_proj"], decompose_both=True), ()),
        (peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=TARGETS), ("lora_E",)),
        (peft.DeloraConfig(r=4, target_modules=TARGETS), ("delora_lambda",)),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "peft_type") else None,
)
def test_factors_are_matrices_and_the_rest_of_an_adapter_is_not(config, vectors, llama):
    model = peft.get_peft_model(llama, config)
    adamw = {name for name in trained(model) if any(part in name for part in vectors)}
    assert names(model, "adamw") == adamw
    assert names(model) == trained(model) - adamw != set()


@pytest.mark.filterwarnings("ignore:Unsupported layer type .*RMSNorm:UserWarning")  # PEFT's, of its own LN tuning
@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=1, target_modules=TARGETS),
        peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
        peft.VeraConfig(r=4, target_modules=["q_proj"]),
        peft.OFTConfig(oft_block_size=4, r=0, target_modules=TARGETS),
        peft.LNTuningConfig(target_modules=["input_layernorm"]),
        peft.FourierFTConfig(n_frequency=10, target_modules=TARGETS),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_an_adapter_of_vectors_alone_has_nothing_to_orthogonalise(config, llama):
    model = peft.get_peft_model(llama, config)
    with pytest.raises(RoutingError, match=r"there is nothing to orthogonalise\. Use AdamW, optim='adamw_torch'"):
        create_schatten_optimizer(model, verbose=False)


def test_an_adapter_goes_where_the_weight_would_that_it_adapts(llama):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head", "embed_tokens"])
    model = peft.get_peft_model(llama, config)
    assert {name for name in names(model, "adamw") if "lm_head" in name or "embed" in name} == names(model, "adamw")
    assert len(names(model)) == 2 * 2
    images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3))
    adapted = peft.get_peft_model(images, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    assert all(".1.lora_" in name for name in names(adapted))
    assert len(names(adapted)) == 2


def test_the_router_of_an_adapter_is_no_factor(llama):
    model = peft.get_peft_model(llama, peft.LilyConfig(r=4, target_modules=["q_proj"]))
    assert any("lily_router" in name for name in trained(model))
    assert all("lily_router" in name for name in names(model, "adamw"))


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=30,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return MixtralForCausalLM(config)


def on_experts(model, rank):
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=[], target_parameters=targets))


def test_an_adapter_of_experts_has_two_matrices_for_each_of_them():
    """The product of the matrices that are cut out is what PEFT adds to the expert's weight."""
    model = on_experts(mixtral(), 3)
    routes = {route.name: route for route in route_parameters(model).to("schatten_p")}
    layer = model.base_model.model.model.layers[0].mlp.experts
    for wrapper, path in ((layer, "experts"), (layer.base_layer, "experts.base_layer")):
        stem = f"base_model.model.model.layers.0.mlp.{path}"
        nn.init.normal_(wrapper.lora_B["default"].weight)
        delta = wrapper.get_delta_weight("default")
        first, second = (routes[f"{stem}.lora_{side}.default.weight"] for side in "AB")
        for route in (first, second):
            assert route.layout.part_names(route.parameter.shape) == ["0", "1", "2", "3"]
        for expert in range(4):
            a, b = (route.layout.matrix(route.parameter, expert) for route in (first, second))
            assert tuple(a.shape) == (3, delta.shape[2])
            assert tuple(b.shape) == (delta.shape[1], 3)
            product = wrapper.scaling["default"] * b @ a
            torch.testing.assert_close(product, delta[expert], atol=1e-6, rtol=1e-5)


def test_an_adapter_of_rank_one_of_experts_has_nothing_to_orthogonalise():
    with pytest.raises(RoutingError, match="nothing to orthogonalise"):
        route_parameters(on_experts(mixtral(), 1))


@pytest.mark.parametrize("scale", ["muon", "schatten"])
def test_factors_of_experts_train_as_matrices_of_their_own(scale):
    """B's columns alternate between the experts; each expert's are updated as a matrix (out, rank)."""
    torch.manual_seed(0)
    fused = nn.Parameter(torch.randn(20, 2 * 3))  # (out, rank · experts)
    alone = [nn.Parameter(fused.detach()[:, expert::3].clone()) for expert in range(3)]
    parts = tuple((str(expert), 1) for expert in range(3))
    group = {"params": [fused], "parts": parts, "blocks": 2, "cuts_inputs": True}
    optimizers = SchattenP([group], p=3.0, scale=scale), SchattenP(alone, p=3.0, scale=scale)
    for _ in range(3):
        fused.grad = torch.randn_like(fused)
        for expert, parameter in enumerate(alone):
            parameter.grad = fused.grad[:, expert::3].clone()
        for optimizer in optimizers:
            optimizer.step()
    for expert, parameter in enumerate(alone):
        torch.testing.assert_close(fused[:, expert::3], parameter, atol=1e-6, rtol=1e-5)


# Wrappers


class ValueHead(nn.Module):
    """As trl's: a scalar beside the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.pretrained_model = model
        self.v_head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))


@pytest.mark.parametrize("adapter", [False, True])
def test_a_wrapped_models_head_and_embeddings_are_respected(adapter, llama):
    if adapter:
        llama = peft.get_peft_model(llama, peft.LoraConfig(r=4, target_modules=TARGETS))
    alone = {f"pretrained_model.{name}" for name in names(llama)}
    model = ValueHead(llama)
    assert names(model) == alone
    reasons = {route.name: route.reason for route in route_parameters(model).routes}
    assert reasons["v_head.0.weight"] == "outside the backbone (task head)"
    assert route_parameters(model).warnings == ()
    assert names(nn.ModuleDict({"loss": nn.ModuleList([model])})) == {f"loss.0.{name}" for name in alone}


def test_a_pair_of_encoders_has_two_backbones():
    config = BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=30
    )
    pair = nn.ModuleDict({"question": BertModel(config), "answer": BertModel(config), "project": nn.Linear(16, 8)})
    alone = names(pair["question"])
    assert names(pair) == {f"{side}.{name}" for side in ("question", "answer") for name in alone}


def test_a_frozen_model_beside_a_network_is_no_backbone(gpt2):
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = copy.deepcopy(gpt2).requires_grad_(False)
            self.trunk = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))

    assert names(Conditioned()) == {"trunk.0.weight", "trunk.1.weight"}


def test_a_plain_modules_last_layer_is_warned_of_unless_another_layer_takes_its_outputs():
    classifier = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 16), nn.Linear(16, 50))
    (warning,) = route_parameters(classifier).warnings
    assert warning.startswith("'2.weight' maps 16 features to 50, which no other layer takes.")
    assert "exclude=2.weight" in warning
    assert route_parameters(classifier, exclude=["2.weight"]).warnings == ()
    assert route_parameters(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))).warnings == ()
    assert route_parameters(nn.Sequential(classifier, nn.Linear(50, 8))).warnings == ()


def test_the_warning_is_logged_when_the_optimizer_is_made(caplog):
    create_schatten_optimizer(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), verbose=False)
    assert "If it is the output head" in caplog.text


def test_models_of_transformers_are_not_warned_of(llama, gpt2):
    for model in (llama, gpt2):
        assert isinstance(model, LlamaForCausalLM | GPT2LMHeadModel)
        assert route_parameters(model).warnings == ()
