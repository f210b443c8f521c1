"""Rows of the table of support: PEFT's adapters, each trained by its rule and resumed bitwise."""

from __future__ import annotations

import copy
from itertools import count

import peft
import pytest
import torch
from support_models import adapters, layers, llama_config, same_base
from support_runs import DUE, check_run, optimizer_of, record_samples
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, QuantoConfig

from hf_schatten import RoutingError, SchattenTrainer

THEME = "Adapters"
TARGETS = ["q_proj", "down_proj"]
ADAPTED = layers("model.layers", 2, ["self_attn.q_proj", "mlp.down_proj"])
ROWS = 8 * 16  # of a batch
base = same_base(LlamaForCausalLM, llama_config())


def adapted(make_base, config):
    """Return a function that adds an adapter with other weights at each call."""
    seeds = count()

    def make():
        model = make_base()
        torch.manual_seed(next(seeds))
        return peft.get_peft_model(model, copy.deepcopy(config))

    return make


def factors(*attributes):
    """Return the names of the factors that PEFT's layers keep in dictionaries."""
    stems = [f"base_model.model.{name.removesuffix('.weight')}" for name in ADAPTED]
    return {f"{stem}.{attribute}.default" for stem in stems for attribute in attributes}


@pytest.mark.supports(
    THEME, "rsLoRA, DoRA, PiSSA", "DoRA's pass over an identity is not sampled, its magnitude trains with AdamW"
)
@pytest.mark.parametrize(
    "variant",
    [{"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "pissa"}],
    ids=lambda each: next(iter(each)),
)
def test_variants_of_lora(variant, token_dataset, arguments, monkeypatch):
    samples = record_samples(monkeypatch)
    make = adapted(base, peft.LoraConfig(r=4, target_modules=TARGETS, **variant))
    check_run(make, token_dataset, arguments, adapters(ADAPTED))
    assert len(samples) == len(DUE) + 1
    for counts in samples:
        assert counts == dict.fromkeys(adapters(ADAPTED), ROWS)


@pytest.mark.supports(
    THEME,
    "AdaLoRA, LoHa, LoKr",
    "factors are matrices, scales train with AdamW; a factor whose inputs cannot be seen gets the median p",
)
@pytest.mark.parametrize(
    ("config", "unseen", "seen"),
    [
        (peft.AdaLoraConfig(init_r=4, target_r=2, total_step=12, target_modules=TARGETS), (), ("lora_A", "lora_B")),
        (peft.LoHaConfig(r=4, target_modules=TARGETS), ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ()),
        (peft.LoKrConfig(r=4, target_modules=TARGETS), ("lokr_w1", "lokr_w2"), ()),
    ],
    ids=["AdaLoRA", "LoHa", "LoKr"],
)
def test_adapters_with_other_factors(config, unseen, seen, token_dataset, arguments, caplog):
    names, unestimated = factors(*unseen, *seen), factors(*unseen)
    check_run(adapted(base, config), token_dataset, arguments, names, unestimated=unestimated)
    assert (f"No training input of {len(unestimated)} of the routed matrices" in caplog.text) == bool(unestimated)


EXPERTS = 4


@pytest.mark.supports(
    THEME,
    "LoRA on experts (`target_parameters`)",
    "a matrix for each expert and factor; its p is the median of the others",
)
def test_lora_on_experts(token_dataset, arguments):
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
    stems = [f"base_model.model.model.layers.0.mlp.{path}" for path in ("experts", "experts.base_layer")]
    of_experts = {f"{stem}.lora_{side}.default.weight" for stem in stems for side in "AB"}
    names = of_experts | adapters(layers("model.layers", 1, ["self_attn.q_proj"]))
    make = adapted(same_base(MixtralForCausalLM, config), lora)
    check_run(make, token_dataset, arguments, names)


@pytest.mark.supports(
    THEME, "several adapters at once", "all that were active train on after a resume, with `SchattenTrainer`"
)
def test_several_adapters(token_dataset, arguments):
    first = adapted(base, peft.LoraConfig(r=4, target_modules=TARGETS))

    def make():
        model = first()
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
        model.base_model.set_adapter(["default", "second"])
        return model

    second = {name.replace("default", "second") for name in adapters(ADAPTED) if "q_proj" in name}
    check_run(make, token_dataset, arguments, adapters(ADAPTED) | second, SchattenTrainer)


@pytest.mark.supports(
    THEME, "X-LoRA", "its classifier trains with AdamW, its LoRA adapters as matrices where they train"
)
def test_xlora(token_dataset, arguments, tmp_path):
    lora = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
    make_adapter = adapted(base, lora)
    for name in "01":
        make_adapter().save_pretrained(tmp_path / name)

    def make_base():
        model = base()
        model.config.use_cache = False
        return model

    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=32,
        adapters={name: str(tmp_path / name) for name in "01"},
        xlora_depth=2,
        xlora_size=16,
        use_trainable_adapters=True,
    )
    names = {
        name.replace("base_model.model.", "base_model.lora_model.model.").replace("default", adapter)
        for name in adapters(ADAPTED)
        for adapter in "01"
    }
    check_run(adapted(make_base, config), token_dataset, arguments, names, SchattenTrainer)


@pytest.mark.supports(THEME, "QLoRA", "LoRA on a base of 8-bit integers (optimum-quanto, on a CPU)")
def test_qlora(token_dataset, arguments, tmp_path):
    pytest.importorskip("optimum.quanto")
    base().save_pretrained(tmp_path / "base")

    def make_base():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=QuantoConfig(weights="int8")
        )

    make = adapted(make_base, peft.LoraConfig(r=4, target_modules=TARGETS))
    trainer = check_run(make, token_dataset, arguments, adapters(ADAPTED))
    trained = {parameter for parameter in trainer.model.parameters() if parameter.requires_grad}
    assert set(optimizer_of(trainer).state) == trained


@pytest.mark.supports(
    THEME,
    "IA³, VeRA, OFT, prompt tuning, LoRA of rank 1",
    "refused: there is nothing to orthogonalise, use AdamW",
)
@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
        peft.VeraConfig(r=4, target_modules=["q_proj"]),
        peft.OFTConfig(oft_block_size=4, r=0, target_modules=TARGETS),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.LoraConfig(r=1, target_modules=TARGETS),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_adapters_of_vectors(config, token_dataset, arguments):
    trainer = SchattenTrainer(model=adapted(base, config)(), args=arguments, train_dataset=token_dataset)
    with pytest.raises(RoutingError, match=r"there is nothing to orthogonalise\. Use AdamW, optim='adamw_torch'"):
        trainer.train()
