"""A resume with other options: they are used, the change is said, and what cannot change is refused."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_schatten import CheckpointError, SchattenTrainer, load_learned_p

TRAINERS = [Trainer, SchattenTrainer]
ADAPTIVE = "p=adaptive,p_interval=2,p_first_step=2"


def trained(trainer_class, output, options, checkpoint=None, **arguments):
    """Train to step six, saving at step three; return the trainer."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0)
    rows = [torch.arange(start, start + 16) % 64 for start in range(64)]
    defaults = {"learning_rate": 1e-3, "lr_scheduler_type": "linear", "disable_tqdm": True, "report_to": "none"}
    trainer = trainer_class(
        GPT2LMHeadModel(config),
        TrainingArguments(
            str(output),
            **defaults | arguments,
            optim="schatten_p",
            optim_args=options,
            max_steps=6,
            save_steps=3,
            logging_strategy="no",
            use_cpu=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "_draw"):
            callback._draw = lambda *args: None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


@pytest.fixture(scope="module", params=TRAINERS, ids=lambda each: each.__name__)
def first(request, tmp_path_factory):
    """Return a Trainer class, and by options the checkpoints of its runs."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    for number, options in enumerate(("p=4,momentum=0.9", ADAPTIVE, "p=4,p_overrides=*.c_proj:inf")):
        trained(request.param, folder / str(number), options)
    fixed, adaptive, overridden = (folder / str(number) / "checkpoint-3" for number in range(3))
    return request.param, {"fixed": fixed, "adaptive": adaptive, "overridden": overridden}


def resumed(first, name, options, tmp_path, **arguments):
    trainer_class, checkpoints = first
    trainer = trained(trainer_class, tmp_path / "resumed", options, checkpoints[name], **arguments)
    assert trainer.state.global_step == 6
    assert trainer.lr_scheduler.get_last_lr()[0] == 0.0  # the schedule went on
    return trainer.optimizer.optimizer


def test_hyperparameters_are_the_present_ones(first, tmp_path, caplog):
    options = "p=2,momentum=0.5,scale=muon,schatten_lr_ratio=3,nesterov=false"
    optimizer = resumed(first, "fixed", options, tmp_path, weight_decay=0.3)
    group = optimizer.param_groups[0]
    found = [group[key] for key in ("momentum", "scale", "lr_ratio", "nesterov", "weight_decay")]
    assert found == [0.5, "muon", 3.0, False, 0.3]
    assert set(optimizer.learned_p().values()) == {2.0}
    assert "Options changed since the checkpoint was written, and the new values are used: p 4.0 -> 2.0" in caplog.text
    assert "momentum 0.9 -> 0.5" in caplog.text
    assert "weight_decay" not in caplog.text  # no option of this package


def test_without_a_change_nothing_is_said(first, tmp_path, caplog):
    resumed(first, "fixed", "p=4,momentum=0.9", tmp_path)
    assert "Options changed" not in caplog.text


@pytest.mark.parametrize(
    ("name", "options", "projections", "others"),
    [
        ("fixed", "p=4,p_overrides=*.c_proj:inf", math.inf, 4.0),
        ("overridden", "p=4,p_overrides=*.c_proj:2", 2.0, 4.0),
        ("overridden", "p=4", 4.0, 4.0),
        ("overridden", "p=3", 3.0, 3.0),
        ("adaptive", "p=3", 3.0, 3.0),
    ],
)
def test_a_fixed_p_is_the_present_one(first, tmp_path, name, options, projections, others):
    learned = resumed(first, name, options, tmp_path).learned_p()
    assert {p for key, p in learned.items() if ".c_proj." in key} == {projections}
    assert {p for key, p in learned.items() if ".c_proj." not in key} == {others}


def test_a_learned_p_stays_until_the_next_estimate(first, tmp_path):
    later = "p=adaptive,p_interval=50,p_first_step=50"
    learned = resumed(first, "adaptive", later, tmp_path).learned_p()
    assert learned == load_learned_p(first[1]["adaptive"])
    assert len(set(learned.values())) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (f"{ADAPTIVE},precondition=adam", "its second moment is kept otherwise. Use the options exclude and precond"),
        (f"{ADAPTIVE},exclude=*.mlp.*", "the parameter was routed elsewhere"),
        (f"{ADAPTIVE},split_heads=true", "Use the options split_heads and fused_parts of the run"),
    ],
)
def test_what_the_state_does_not_fit_is_refused(first, tmp_path, options, message):
    with pytest.raises(CheckpointError, match=message):
        resumed(first, "adaptive", options, tmp_path)


def test_p_init_may_come_and_go_and_its_source_is_not_needed_again(first, tmp_path):
    trainer_class, checkpoints = first
    begun = f"{ADAPTIVE},p_init={checkpoints['adaptive']}"
    trained(trainer_class, tmp_path / "begun", begun)
    own = {"own": tmp_path / "begun" / "checkpoint-3"}
    learned = resumed((trainer_class, own), "own", ADAPTIVE, tmp_path).learned_p()
    assert resumed((trainer_class, own), "own", begun, tmp_path).learned_p() == learned
    with pytest.raises(CheckpointError, match=r"is not a folder.*leave p_init out there"):
        resumed((trainer_class, own), "own", f"{ADAPTIVE},p_init={tmp_path / 'gone'}", tmp_path)
