"""Rows of the table of support: kinds of model, each learnt, estimated and resumed through a real Trainer."""

from __future__ import annotations

import pytest
import torch
from support_models import (
    ATTENTION,
    LABELS,
    LENGTH,
    LLAMA,
    T5,
    VOCABULARY,
    adapted,
    adapters,
    layers,
    llama_config,
    maker,
    same_base,
    t5_config,
)
from support_runs import DUE, FIRST_P, RUN, AtStep, check_run, estimates, optimizer_of
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DbrxConfig,
    DbrxForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    T5ForConditionalGeneration,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
)

THEME = "Architectures"


@pytest.fixture
def labelled_dataset(token_dataset):
    """Return the sequences with a label that their first token gives away."""
    return [{"input_ids": row["input_ids"], "labels": torch.tensor(i % LABELS)} for i, row in enumerate(token_dataset)]


@pytest.fixture
def image_dataset():
    """Return 32 images whose label is the quarter that is bright."""
    images = 0.1 * torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for i, image in enumerate(images):
        y, x = divmod(i % LABELS, 2)
        image[:, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] += 1.0
    return [{"pixel_values": image, "labels": torch.tensor(i % LABELS)} for i, image in enumerate(images)]


@pytest.mark.supports(THEME, "GPT-2", "`Conv1D`, three matrices in `c_attn`, tied head")
def test_gpt2(token_dataset, arguments):
    make = maker(
        GPT2LMHeadModel, GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=VOCABULARY, n_positions=LENGTH)
    )
    names = layers("transformer.h", 2, ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])
    trainer = check_run(make, token_dataset, arguments, names)
    learned = optimizer_of(trainer).learned_p()
    assert {f"transformer.h.0.attn.c_attn.weight.{part}" for part in "qkv"} <= set(learned)
    assert trainer.model.lm_head.weight is trainer.model.transformer.wte.weight


@pytest.mark.supports(THEME, "Llama", "grouped key and value heads, untied head")
def test_llama(token_dataset, arguments):
    check_run(maker(LlamaForCausalLM, llama_config()), token_dataset, arguments, LLAMA)


@pytest.mark.supports(THEME, "BERT with a classification head", "the head trains with AdamW, the pooler as a matrix")
def test_bert(labelled_dataset, arguments):
    config = BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        num_labels=LABELS,
    )
    parts = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    names = layers("bert.encoder.layer", 2, [*parts, "intermediate.dense", "output.dense"]) | {
        "bert.pooler.dense.weight"
    }
    trainer = check_run(maker(BertForSequenceClassification, config), labelled_dataset, arguments, names)
    assert set(optimizer_of(trainer).state[trainer.model.classifier.weight]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.supports(THEME, "T5", "encoder and decoder; relative positions train with AdamW")
def test_t5(token_dataset, arguments):
    check_run(maker(T5ForConditionalGeneration, t5_config()), token_dataset, arguments, T5)


@pytest.mark.supports(THEME, "ViT", "patch convolution and head train with AdamW")
def test_vit(image_dataset, arguments):
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=LABELS,
    )
    make = maker(ViTForImageClassification, config)
    names = {
        name
        for name, parameter in make().named_parameters()
        if parameter.ndim == 2 and name.startswith("vit.") and "embeddings" not in name
    }
    assert len(names) == 2 * 6
    check_run(make, image_dataset, arguments, names)


@pytest.mark.supports(THEME, "ResNet", "every filter but the stem's as one matrix (out, in · h · w)")
def test_resnet(image_dataset, arguments):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=LABELS)
    make = maker(ResNetForImageClassification, config)
    names = {name for name, parameter in make().named_parameters() if parameter.ndim == 4 and "embedder" not in name}
    assert len(names) == 2 * 2 + 1
    check_run(make, image_dataset, arguments, names)


@pytest.mark.supports(THEME, "Mamba", "`dt_proj` too, whose weight Mamba reads without calling the layer")
def test_mamba(token_dataset, arguments, caplog):
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2)
    names = layers("backbone.layers", 2, [f"mixer.{part}_proj" for part in ("in", "x", "dt", "out")])
    check_run(maker(MambaForCausalLM, config), token_dataset, arguments, names)
    assert not [text for text in caplog.messages if "No training input" in text]


@pytest.mark.supports(THEME, "RegNet", "a matrix for each group of a convolution's channels")
def test_regnet(image_dataset, arguments):
    config = RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1], groups_width=8, layer_type="x", num_labels=LABELS
    )
    make = maker(RegNetForImageClassification, config)
    names = {name for name, parameter in make().named_parameters() if parameter.ndim == 4 and "embedder" not in name}
    trainer = check_run(make, image_dataset, arguments, names)
    grouped = [matrix for matrix in optimizer_of(trainer).matrices() if matrix.name.endswith((".0", ".1", ".2"))]
    assert [matrix.shape for matrix in grouped] == [(8, 8 * 3 * 3)] * 3
    assert len({matrix.statistics.sum().item() for matrix in grouped}) == 3


EXPERTS = 4


@pytest.mark.supports(THEME, "DBRX", "its experts lie in one parameter, and each is sampled")
def test_dbrx(token_dataset, arguments, caplog):
    config = DbrxConfig(
        d_model=16,
        n_heads=2,
        n_layers=1,
        vocab_size=VOCABULARY,
        max_seq_len=LENGTH,
        attn_config={"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 24, "hidden_size": 16, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    )
    names = layers("transformer.blocks", 1, ["norm_attn_norm.attn.Wqkv", "norm_attn_norm.attn.out_proj"])
    names |= {f"transformer.blocks.0.ffn.experts.mlp.{part}" for part in ("w1", "v1", "w2")}
    trainer = check_run(maker(DbrxForCausalLM, config), token_dataset, arguments, names)
    experts = [matrix for matrix in optimizer_of(trainer).matrices() if ".experts." in matrix.name]
    assert len({matrix.statistics.sum().item() for matrix in experts}) == len(experts) == 3 * EXPERTS
    assert not [text for text in caplog.messages if "No training input" in text]


def mixtral(implementation):
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        experts_implementation=implementation,
    )
    return maker(MixtralForCausalLM, config)


@pytest.mark.supports(
    THEME,
    "Mixtral",
    "a p for each matrix of each expert, one batch for all of one shape",
)
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])  # test_adaptation.py has eager ones
def test_mixtral(implementation, token_dataset, arguments, monkeypatch):
    names = layers("model.layers", 2, ATTENTION)
    names |= {f"model.layers.{i}.mlp.experts.{part}" for i in (0, 1) for part in ("gate_up_proj", "down_proj")}
    trainer = check_run(mixtral(implementation), token_dataset, arguments, names)
    optimizer = optimizer_of(trainer)
    measured = torch.stack([matrix.statistics for matrix in optimizer.matrices() if ".experts." in matrix.name])
    assert len(measured) == len(measured.unique(dim=0)) == 2 * EXPERTS * 3
    batches = []
    direction = optimizer.direction
    monkeypatch.setattr(
        optimizer, "direction", lambda momenta, p: batches.append(tuple(momenta.shape)) or direction(momenta, p)
    )
    trainer.train()
    assert (2 * EXPERTS * 3, 16, 24) in batches


@pytest.mark.supports(THEME, "Mixtral with an expert without tokens", "the expert keeps its p")
def test_an_expert_without_tokens_keeps_its_p(token_dataset, training_arguments):
    model = mixtral("grouped_mm")()
    chosen: list[set[int]] = [set(), set()]
    for used, layer in zip(chosen, model.model.layers, strict=True):
        layer.mlp.gate.register_forward_hook(lambda gate, args, out, used=used: used.update(out[2].flatten().tolist()))
    chosen_at = {}

    def note(step):
        chosen_at[step] = [set(used) for used in chosen]
        for used in chosen:
            used.clear()

    rows = [{name: tokens[:1].repeat(2) for name, tokens in row.items()} for row in token_dataset]  # few tokens
    options = RUN | {"max_steps": 3, "per_device_train_batch_size": 1, "save_strategy": "no"}
    trainer = Trainer(model=model, args=training_arguments(**options), train_dataset=rows, callbacks=[AtStep(note)])
    trainer.train()
    assert list(estimates(trainer)) == DUE[:1]
    learned = optimizer_of(trainer).learned_p()
    for layer, used in enumerate(chosen_at[DUE[0]]):
        assert 0 < len(used) < EXPERTS
        for expert in range(EXPERTS):
            for part in (f"gate_up_proj.{expert}.gate", f"gate_up_proj.{expert}.up", f"down_proj.{expert}"):
                name = f"model.layers.{layer}.mlp.experts.{part}"
                assert (learned[name] == FIRST_P) == (expert not in used), name


@pytest.mark.supports(
    "Adapters", "PEFT's LoRA", "`lora_A` and `lora_B` are matrices with a p each; what is frozen has no state"
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_lora(architecture, token_dataset, arguments):
    if architecture == "llama":
        make = adapted(same_base(LlamaForCausalLM, llama_config()), target_modules=["q_proj", "down_proj"])
        names = layers("model.layers", 2, ["self_attn.q_proj", "mlp.down_proj"])
    else:
        config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=VOCABULARY, n_positions=LENGTH)
        make = adapted(same_base(GPT2LMHeadModel, config), target_modules=["c_attn"], fan_in_fan_out=True)
        names = layers("transformer.h", 2, ["attn.c_attn"])
    trainer = check_run(make, token_dataset, arguments, adapters(names))
    trained = {parameter for parameter in trainer.model.parameters() if parameter.requires_grad}
    assert set(optimizer_of(trainer).state) == trained


@pytest.mark.supports(
    "Adapters",
    "PEFT's LoRA with `modules_to_save`",
    "a head or embedding trains with AdamW, a layer of the backbone with its own p",
)
@pytest.mark.parametrize("task", ["sequence classification", "language modelling"])
def test_lora_with_modules_to_save(task, token_dataset, labelled_dataset, arguments):
    if task == "sequence classification":
        model_class, config, dataset = (
            LlamaForSequenceClassification,
            llama_config(num_labels=LABELS),
            labelled_dataset,
        )
        saved, adamw = ["score", "up_proj"], {"base_model.model.score.modules_to_save.default.weight"}
    else:
        model_class, config, dataset = LlamaForCausalLM, llama_config(), token_dataset
        saved = ["lm_head", "embed_tokens", "up_proj"]
        adamw = {
            f"base_model.model.{name}.modules_to_save.default.weight" for name in ("lm_head", "model.embed_tokens")
        }
    make = adapted(same_base(model_class, config), target_modules=["q_proj"], modules_to_save=saved)
    copies = {f"base_model.model.model.layers.{i}.mlp.up_proj.modules_to_save.default.weight" for i in (0, 1)}
    names = adapters(layers("model.layers", 2, ["self_attn.q_proj"])) | copies
    trainer = check_run(make, dataset, arguments, names)
    by_adamw = {
        name for group in optimizer_of(trainer).param_groups if not group["spectral"] for name in group["param_names"]
    }
    assert by_adamw == adamw
    original, start = trainer.model.state_dict(), make().state_dict()
    moved = {name for name in adamw | copies if not torch.equal(original[name], start[name])}
    assert moved == adamw | copies
    for name in moved:
        frozen = name.replace("modules_to_save.default", "original_module")
        assert torch.equal(original[frozen], start[frozen])
