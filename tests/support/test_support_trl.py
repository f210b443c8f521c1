"""Rows of the table of support: more of trl's trainers."""

from __future__ import annotations

from functools import partial

import pytest
from datasets import Dataset
from support_models import LLAMA, in_steps, llama_config, maker
from support_runs import (
    DUE,
    STEPS,
    check_equal,
    check_estimates,
    check_run,
    losses,
    optimizer_of,
    record_samples,
    routed,
    trl_is_behind,
    weights,
)
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from trl import (
    DistillationConfig,
    DistillationTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)

THEME = "Trainers"

pytestmark = trl_is_behind
make = maker(LlamaForCausalLM, llama_config(vocab_size=32))


@pytest.fixture(autouse=True)
def experimental(monkeypatch):
    """Leave out trl's warning that some trainers may change."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def saved(tmp_path):
    """Return a maker of one model from a folder, from which trl loads reference models."""
    make().save_pretrained(tmp_path / "start")
    return partial(LlamaForCausalLM.from_pretrained, tmp_path / "start")


@pytest.mark.supports(THEME, "trl's `RewardTrainer`", "the score's head trains with AdamW")
def test_reward_trainer(tokenizer, trl_arguments, preferences):
    config = llama_config(vocab_size=32, num_labels=1)
    names = {name for name in LLAMA if "lm_head" not in name}
    options = {"processing_class": tokenizer}
    arguments = RewardConfig(**trl_arguments, max_length=16)
    trainer = check_run(
        maker(LlamaForSequenceClassification, config), preferences, arguments, names, RewardTrainer, **options
    )
    assert "exp_avg_sq" in optimizer_of(trainer).state[trainer.model.score.weight]


@pytest.mark.slow
@pytest.mark.supports(THEME, "trl's `KTOTrainer`", "the reference model has no state")
def test_kto_trainer(tokenizer, trl_arguments, tmp_path):
    rows = [
        {"prompt": in_steps(i, 1, 3), "completion": " " + in_steps(i + 3, i % 2, 3), "label": bool(i % 2)}
        for i in range(32)
    ]
    arguments = KTOConfig(**trl_arguments, max_length=16)
    check_run(saved(tmp_path), Dataset.from_list(rows), arguments, LLAMA, KTOTrainer, processing_class=tokenizer)


@pytest.mark.slow
@pytest.mark.supports(THEME, "trl's `ORPOTrainer` (experimental)", "as it is")
def test_orpo_trainer(tokenizer, trl_arguments, preferences):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    arguments = ORPOConfig(**trl_arguments, max_length=16)
    check_run(make, preferences, arguments, LLAMA, ORPOTrainer, processing_class=tokenizer)


def different_words(completions, **kwargs):
    return [float(len(set(text.split()))) for text in completions]


@pytest.mark.slow
@pytest.mark.supports(THEME, "trl's `RLOOTrainer`", "in the place of PPO, which trl no longer has")
def test_rloo_trainer(tokenizer, trl_arguments, tmp_path):
    dataset, start = Dataset.from_list([{"prompt": in_steps(i, 1, 3)} for i in range(16)]), saved(tmp_path)
    arguments = RLOOConfig(**trl_arguments, max_completion_length=4, num_generations=4)
    options = {"args": arguments, "train_dataset": dataset, "processing_class": tokenizer}
    ends = []
    for checkpoint in (None, f"{arguments.output_dir}/checkpoint-{STEPS // 2}"):
        trainer = RLOOTrainer(start(), different_words, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert routed(trainer) == LLAMA
        check_estimates(trainer)
        ends.append(weights(trainer.model))
    check_equal(*ends)


@pytest.mark.slow
@pytest.mark.supports(
    THEME, "trl's `DistillationTrainer`", "the teacher has no state; a resume generates other answers, also with AdamW"
)
def test_distillation_trainer(tokenizer, trl_arguments):
    dataset, teacher = Dataset.from_list([{"prompt": in_steps(i, 1, 3)} for i in range(16)]), make()
    arguments = DistillationConfig(**trl_arguments, max_completion_length=4)
    trainer = DistillationTrainer(
        make(), teacher_model=teacher, args=arguments, train_dataset=dataset, processing_class=tokenizer
    )
    trainer.train()
    assert routed(trainer) == LLAMA
    check_estimates(trainer)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert not any(module._forward_hooks for module in trainer.teacher_model.modules())
    assert set(optimizer_of(trainer).state) == set(trainer.model.parameters())


@pytest.mark.slow
@pytest.mark.supports(
    THEME, "trl's `GKDTrainer` (experimental)", "exact resume; generation by student or teacher is not sampled"
)
@pytest.mark.parametrize("generated", ["by the student", "by the teacher", "nothing"])
def test_gkd_trainer(generated, tokenizer, trl_arguments, monkeypatch):
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    samples, teacher = record_samples(monkeypatch), make()
    rows = [
        {
            "messages": [
                {"role": "user", "content": in_steps(i, 1, 3)},
                {"role": "assistant", "content": in_steps(i + 3, 1, 4)},
            ]
        }
        for i in range(32)
    ]
    options = {"lmbda": float(generated == "by the student"), "seq_kd": generated == "by the teacher"}
    arguments = GKDConfig(**trl_arguments, **options, max_new_tokens=4, max_length=16)
    trainer = check_run(
        make,
        Dataset.from_list(rows),
        arguments,
        LLAMA,
        GKDTrainer,
        teacher_model=teacher,
        processing_class=tokenizer,
    )
    assert len(samples) == len(DUE) + 1  # the last one after the resume, too
    for counts in samples:
        (count,) = set(counts.values())  # of all layers
        assert 8 * (3 + 1) <= count <= 8 * (3 + 4)
        assert count == 8 * (3 + 4) or generated != "nothing"
    assert not any(module._forward_hooks for module in trainer.teacher_model.modules())
    assert set(optimizer_of(trainer).state) == set(trainer.model.parameters())
