"""A new run that starts from the p that another has learned."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from hf_schatten import CheckpointError, OptionError, SchattenOptions, SchattenTrainer, create_schatten_optimizer
from hf_schatten.integration.checkpoint import load_learned_p, save_optimizer


def gpt2_of(layers):
    config = GPT2Config(
        n_layer=layers, n_embd=16, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


@pytest.fixture
def checkpoint(tmp_path):
    """Return the checkpoint of a two-layer GPT-2 whose matrices have p = 2, 3, 4, … and the last three 200."""
    optimizer = create_schatten_optimizer(gpt2_of(2), verbose=False, p="adaptive", p_max=200)
    optimizer.create_state()
    matrices = list(optimizer.matrices())
    for number, matrix in enumerate(matrices):
        matrix.p.fill_(200 if number >= len(matrices) - 3 else 2 + number)
    save_optimizer(optimizer, tmp_path)
    return tmp_path


def first_p(optimizer):
    optimizer.create_state()
    return optimizer.learned_p()


def test_matrices_of_the_same_name_start_from_it_and_the_report_counts_the_others(checkpoint, capsys):
    learned = load_learned_p(checkpoint)
    assert len(learned) == 12
    optimizer = create_schatten_optimizer(gpt2_of(3), p="adaptive", p_init=str(checkpoint), p_max=100)
    started = first_p(optimizer)
    assert len(started) == 18
    for name, p in started.items():
        assert p == min(100, learned.get(name, 100)), name
    printed = capsys.readouterr().out
    assert f"p_init: 12 matrices start from the p of {checkpoint}." in printed
    assert "3 of them were out of the range p_min to p_max: transformer.h.1." in printed
    assert "6 are not in it and start from 100: transformer.h.2.attn.c_attn.weight.q" in printed
    assert "of it are not in this model" not in printed
    create_schatten_optimizer(gpt2_of(1), p="adaptive", p_init=str(checkpoint), p_max=200)
    assert "6 of it are not in this model: transformer.h.1." in capsys.readouterr().out


def test_overrides_come_first(checkpoint):
    overrides = ["*.c_fc:1.5"]
    optimizer = create_schatten_optimizer(
        gpt2_of(2), p="adaptive", p_init=str(checkpoint), p_max=200, p_overrides=overrides, verbose=False
    )
    started, learned = first_p(optimizer), load_learned_p(checkpoint)
    assert {name: p for name, p in started.items() if ".c_fc." not in name} == {
        name: p for name, p in learned.items() if ".c_fc." not in name
    }
    assert started["transformer.h.0.mlp.c_fc.weight"] == 1.5


def test_from_the_checkpoint_of_a_plain_trainer_by_command_line_options(
    gpt2, training_arguments, token_dataset, tmp_path
):
    arguments = training_arguments(
        optim_args="p=adaptive,p_interval=2,p_first_step=2,p_min=2", max_steps=4, save_strategy="steps"
    )
    arguments.save_steps = 4
    Trainer(gpt2, arguments, train_dataset=token_dataset).train()
    source = tmp_path / "run" / "checkpoint-4"
    learned = load_learned_p(source)
    arguments = training_arguments(
        optim_args=f"p=adaptive,p_init={source},p_interval=1000,p_first_step=1000", max_steps=2
    )
    trainer = SchattenTrainer(gpt2, arguments, train_dataset=token_dataset)
    trainer.train()
    assert trainer.optimizer.optimizer.learned_p() == learned
    state = tmp_path / "saved"
    state.mkdir()
    save_optimizer(trainer.optimizer.optimizer, state)
    assert json.loads((state / "optimizer_config.json").read_text())["options"]["p_init"] == str(source)


def test_a_checkpoint_of_another_model_is_refused(checkpoint):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(
        CheckpointError, match=r"p_init=.* has p of transformer\.h\.0.*none of this model's.*0\.weight"
    ):
        create_schatten_optimizer(model, p="adaptive", p_init=str(checkpoint), verbose=False)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing' is not a folder: give that of a checkpoint"):
        create_schatten_optimizer(gpt2_of(1), p="adaptive", p_init=str(tmp_path / "nothing"), verbose=False)


def test_a_checkpoint_needs_an_adaptive_p():
    with pytest.raises(OptionError, match="a checkpoint is for p=adaptive to start from"):
        SchattenOptions(p=3, p_init="run/checkpoint-1")
