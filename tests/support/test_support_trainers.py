"""Rows of the table of support: the trainers of transformers and trl, and training without one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig
from support_models import LLAMA, T5, adapted, adapters, in_steps, layers, llama_config, maker, same_base, t5_config
from support_runs import (
    DUE,
    FIRST_P,
    RUN,
    STEPS,
    check_equal,
    check_estimates,
    check_run,
    check_state_is_fp32,
    optimizer_of,
    record_samples,
    routed,
    trl_is_behind,
    weights,
)
from torch.utils.data import DataLoader
from transformers import (
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
    Trainer,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import hf_schatten
from hf_schatten import SchattenTrainer

THEME = "Trainers"


@pytest.mark.supports(THEME, "`Trainer`", "exact resume from its own `optimizer.pt`")
def test_trainer(token_dataset, arguments):
    check_run(maker(LlamaForCausalLM, llama_config()), token_dataset, arguments, LLAMA, Trainer)


@pytest.mark.supports(THEME, "`SchattenTrainer`", "exact resume from safetensors")
def test_schatten_trainer(token_dataset, arguments):
    check_run(maker(LlamaForCausalLM, llama_config()), token_dataset, arguments, LLAMA, SchattenTrainer)


@pytest.mark.supports(THEME, "`Seq2SeqTrainer`", "also with `predict_with_generate`: what is generated is not sampled")
def test_seq2seq_trainer(token_dataset, arguments, monkeypatch):
    samples = record_samples(monkeypatch)
    options = arguments.to_dict() | {"eval_strategy": "steps", "eval_steps": 1, "predict_with_generate": True}
    arguments = Seq2SeqTrainingArguments(**options | {"generation_max_length": 4})
    check_run(maker(T5ForConditionalGeneration, t5_config()), token_dataset[:16], arguments, T5, Seq2SeqTrainer)
    assert len(samples) == len(DUE) + 1  # the last one after the resume, too
    for counts in samples:
        assert set(counts.values()) == {8 * 16}


@pytest.mark.supports(THEME, "trl's `SFTTrainer`", "with its defaults bf16 and gradient checkpointing")
@trl_is_behind
def test_sft_trainer(tokenizer, trl_arguments, monkeypatch):
    samples = record_samples(monkeypatch)
    lengths = [6 + i % 5 for i in range(32)]
    dataset = Dataset.from_list([{"text": in_steps(i, 1 + i % 3, length)} for i, length in enumerate(lengths)])
    arguments = SFTConfig(**trl_arguments, max_length=16)
    assert arguments.bf16
    assert arguments.gradient_checkpointing
    make = maker(LlamaForCausalLM, llama_config(vocab_size=32))
    trainer = check_run(make, dataset, arguments, LLAMA, SFTTrainer, processing_class=tokenizer)
    for counts in samples:
        assert len(set(counts.values())) == 1  # of all layers, whether checkpointed or not
        assert counts.popitem()[1] < 8 * 11  # padding left out
    assert trainer.train_dataset.num_rows == len(lengths)


def check_each_forward_once(samples, rows):
    assert len(samples) == len(DUE) + 1  # the last one after the resume, too
    for counts in samples:
        assert set(counts.values()) == {rows}


@pytest.mark.supports(THEME, "trl's `DPOTrainer`", "the reference model has no hooks and no state")
@trl_is_behind
def test_dpo_trainer(tokenizer, trl_arguments, preferences, tmp_path, monkeypatch):
    samples = record_samples(monkeypatch)
    start = tmp_path / "start"
    maker(LlamaForCausalLM, llama_config(vocab_size=32))().save_pretrained(start)
    make = partial(LlamaForCausalLM.from_pretrained, start)  # trl loads the reference model from there
    trainer = check_run(make, preferences, DPOConfig(**trl_arguments), LLAMA, DPOTrainer, processing_class=tokenizer)
    check_each_forward_once(samples, 8 * (3 + 3 + 1 + 3 + 4 + 1))  # prompts, answers and their ends
    check_equal(weights(make()), weights(trainer.ref_model))
    assert not any(module._forward_hooks for module in trainer.ref_model.modules())
    assert set(optimizer_of(trainer).state) == set(trainer.model.parameters())


@pytest.mark.supports(
    THEME, "trl's `DPOTrainer` with LoRA", "the reference is the model without adapters, and not sampled"
)
@trl_is_behind
@pytest.mark.parametrize("adapter", ["new", "trained before"])
def test_dpo_trainer_with_lora(adapter, tokenizer, trl_arguments, preferences, monkeypatch):
    samples = record_samples(monkeypatch)
    make, targets = same_base(LlamaForCausalLM, llama_config(vocab_size=32)), ["q_proj", "down_proj"]
    options = {"processing_class": tokenizer}
    if adapter == "new":
        options["peft_config"] = LoraConfig(r=4, target_modules=targets)
    else:  # trl adds a frozen copy as the reference
        make = adapted(make, target_modules=targets, init_lora_weights=False)
    names = adapters(layers("model.layers", 2, ["self_attn.q_proj", "mlp.down_proj"]))
    check_run(make, preferences, DPOConfig(**trl_arguments), names, DPOTrainer, **options)
    check_each_forward_once(samples, 8 * (3 + 3 + 1 + 3 + 4 + 1))


@pytest.mark.supports(THEME, "trl's `GRPOTrainer`", "generated tokens count once, in the policy's own forward")
@trl_is_behind
def test_grpo_trainer(tokenizer, trl_arguments, monkeypatch):
    samples = record_samples(monkeypatch)
    dataset = Dataset.from_list([{"prompt": in_steps(i, 1, 3)} for i in range(16)])
    arguments = GRPOConfig(**trl_arguments, max_completion_length=4, num_generations=4)
    make, runs = maker(LlamaForCausalLM, llama_config(vocab_size=32)), []

    def different_words(completions, **kwargs):
        return [float(len(set(text.split()))) for text in completions]

    for checkpoint in (None, f"{arguments.output_dir}/checkpoint-{STEPS // 2}"):
        trainer = GRPOTrainer(
            make(), different_words, args=arguments, train_dataset=dataset, processing_class=tokenizer
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        assert routed(trainer) == LLAMA
        check_estimates(trainer)
        check_state_is_fp32(trainer)
        runs.append(weights(trainer.model))
    check_equal(*runs)
    assert len(samples) == len(DUE) + 1
    for counts in samples:
        assert len(set(counts.values())) == 1
        assert 8 * (3 + 1) <= counts.popitem()[1] <= 8 * (3 + 4)


@pytest.mark.supports(
    THEME, "any trainer without the argument", "`optimizers=(create_schatten_optimizer(model, lr=…), None)`"
)
@pytest.mark.parametrize("trainer_class", [Trainer, SchattenTrainer])
def test_a_trainer_that_is_given_the_optimizer(trainer_class, token_dataset, training_arguments):
    arguments = training_arguments(**RUN | {"optim": "adamw_torch", "optim_args": None})
    make = maker(LlamaForCausalLM, llama_config())
    ends = []
    for checkpoint in (None, f"{arguments.output_dir}/checkpoint-{STEPS // 2}"):
        model = make()
        optimizer = hf_schatten.create_schatten_optimizer(
            model, lr=1e-2, weight_decay=0.0, p="adaptive", p_init=FIRST_P, p_first_step=2, p_interval=6
        )
        trainer = trainer_class(model=model, args=arguments, train_dataset=token_dataset, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=checkpoint)
        assert optimizer_of(trainer) is optimizer
        assert routed(trainer) == LLAMA
        check_estimates(trainer)
        check_state_is_fp32(trainer)
        ends.append(weights(model))
    check_equal(*ends)


@pytest.mark.supports(
    THEME, "Accelerate without a trainer", "`prepare`, `accumulate`, `clip_grad_norm_`, `save_state`, `load_state`"
)
def test_accelerate(token_dataset, tmp_path, monkeypatch):
    samples = record_samples(monkeypatch)
    make = maker(LlamaForCausalLM, llama_config())

    def train(stop=None, start=0):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = make()
        options = {"p": "adaptive", "p_init": FIRST_P, "p_first_step": 2, "p_interval": 6}
        optimizer = hf_schatten.create_schatten_optimizer(model, lr=1e-2, **options)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
        loader = DataLoader(token_dataset[: 4 * STEPS] + token_dataset[: 4 * STEPS], batch_size=4)
        model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
        if start:
            accelerator.load_state(tmp_path / "state")
        found = []
        for index, batch in enumerate(loader):
            if index < 2 * start:
                continue
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            found.append(loss.item())
            if index == 2 * (stop or 0) - 1:
                accelerator.save_state(tmp_path / "state")
        assert optimizer.optimizer.steps_taken() == STEPS
        assert FIRST_P not in optimizer.optimizer.learned_p().values()
        return found, weights(model)

    straight, end = train(stop=6)
    resumed, resumed_end = train(start=6)
    assert straight[12:] == resumed
    assert sum(straight[-4:]) < sum(straight[:4])
    check_equal(end, resumed_end)
    check_each_forward_once(samples, 2 * 4 * 16)
