"""Whole runs through Trainer and SchattenTrainer: learning, exact resume, logging, pictures and cards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import Trainer, TrainerCallback

from hf_schatten import CheckpointError, OptionError, SchattenTrainer, load_learned_p

ADAPTIVE = "p=adaptive,p_interval=4,p_first_step=2"


class Losses(TrainerCallback):
    """Records every logged loss unrounded (the log history rounds to four digits)."""

    def __init__(self):
        self.values = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.values.append([parameter.grad.clone() for parameter in model.parameters()])


def train(trainer_class, model, dataset, arguments, resume=None):
    """Train and return (gradients of every step, weights at the end, log history)."""
    recorder = Losses()
    trainer = trainer_class(model=model, args=arguments, train_dataset=dataset, callbacks=[recorder])
    trainer.train(resume_from_checkpoint=resume)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return recorder.values, weights, trainer.state.log_history


@pytest.mark.pictures
@pytest.mark.parametrize("trainer_class", [Trainer, SchattenTrainer])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_both_trainers_learn_on_both_architectures(trainer_class, name, request, token_dataset, training_arguments):
    model = request.getfixturevalue(name)
    arguments = training_arguments(optim_args=ADAPTIVE, max_steps=30, learning_rate=1e-2)
    trainer = trainer_class(model=model, args=arguments, train_dataset=token_dataset, eval_dataset=token_dataset)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.75 * before
    estimated = [entry for entry in trainer.state.log_history if "schatten_p_median" in entry]
    assert [entry["step"] for entry in estimated] == [2, 4, 8, 12, 16, 20, 24, 28]
    assert (Path(arguments.output_dir) / "figures" / "p_by_layer.png").is_file()


@pytest.mark.parametrize("trainer_class", [Trainer, SchattenTrainer])
@pytest.mark.parametrize("p_interval", [4, 5, 6])  # due before, at and after the resume point
def test_resume_is_bitwise(trainer_class, p_interval, gpt2, token_dataset, training_arguments):
    initial = {name: value.clone() for name, value in gpt2.state_dict().items()}
    arguments = training_arguments(
        optim_args=f"p=adaptive,p_interval={p_interval},p_first_step=2",
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=5,
        warmup_steps=2,
    )
    straight, weights, log = train(trainer_class, gpt2, token_dataset, arguments)

    gpt2.load_state_dict(initial)
    checkpoint = f"{arguments.output_dir}/checkpoint-5"
    resumed, resumed_weights, resumed_log = train(trainer_class, gpt2, token_dataset, arguments, resume=checkpoint)

    assert len(straight) == 10
    assert len(resumed) == 5
    for step, (expected, found) in enumerate(zip(straight[5:], resumed, strict=True), start=6):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), f"gradients of step {step}"
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)
    timings = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
    for expected, found in zip(log, resumed_log, strict=True):
        assert {k: v for k, v in expected.items() if k not in timings} == {
            k: v for k, v in found.items() if k not in timings
        }


def test_a_schatten_checkpoint_holds_safetensors_and_no_state_in_a_pickle(gpt2, token_dataset, training_arguments):
    arguments = training_arguments(optim_args=ADAPTIVE, save_strategy="steps", save_steps=10)
    trainer = SchattenTrainer(model=gpt2, args=arguments, train_dataset=token_dataset)
    trainer.train()
    folder = Path(arguments.output_dir) / "checkpoint-10"
    files = {path.name for path in folder.iterdir()}
    assert {"optimizer.safetensors", "optimizer_config.json", "scheduler.pt"} <= files
    assert torch.load(folder / "optimizer.pt", weights_only=True)["state"] == {}
    learned = load_learned_p(folder)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    last = [entry for entry in history if "schatten_p_median" in entry][-1]
    assert len(learned) == 2 * (3 + 3)
    for name, p in learned.items():
        assert last[f"schatten_p/{name.replace('.weight', '')}"] == p


def test_a_schatten_trainer_resumes_a_plain_trainers_checkpoint(gpt2, token_dataset, training_arguments):
    arguments = training_arguments(optim_args=ADAPTIVE, save_strategy="steps", save_steps=5)
    _, weights, _ = train(Trainer, gpt2, token_dataset, arguments)
    checkpoint = f"{arguments.output_dir}/checkpoint-5"
    _, resumed, _ = train(SchattenTrainer, gpt2, token_dataset, arguments, resume=checkpoint)
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_a_plain_trainer_refuses_to_resume_without_the_optimizer_state(gpt2, token_dataset, training_arguments):
    arguments = training_arguments(save_strategy="steps", save_steps=5)
    train(SchattenTrainer, gpt2, token_dataset, arguments)
    trainer = Trainer(model=gpt2, args=arguments, train_dataset=token_dataset)
    with pytest.raises(ValueError, match=r"Resume with hf_schatten\.SchattenTrainer, or start"):
        trainer.train(resume_from_checkpoint=f"{arguments.output_dir}/checkpoint-5")


@pytest.mark.parametrize("name", ["optimizer.safetensors", "optimizer_config.json", "scheduler.pt"])
def test_a_truncated_file_is_named_before_any_step(name, gpt2, token_dataset, training_arguments):
    arguments = training_arguments(save_strategy="steps", save_steps=5)
    train(SchattenTrainer, gpt2, token_dataset, arguments)
    path = Path(arguments.output_dir) / "checkpoint-5" / name
    path.write_bytes(path.read_bytes()[:100])
    recorder = Losses()
    trainer = SchattenTrainer(model=gpt2, args=arguments, train_dataset=token_dataset, callbacks=[recorder])
    with pytest.raises(CheckpointError, match=name):
        trainer.train(resume_from_checkpoint=str(path.parent))
    assert not recorder.values


def test_training_twice_continues(gpt2, token_dataset, training_arguments):
    trainer = SchattenTrainer(model=gpt2, args=training_arguments(optim_args=ADAPTIVE), train_dataset=token_dataset)
    trainer.train()
    trainer.train()
    estimated = [entry["step"] for entry in trainer.state.log_history if "schatten_p_median" in entry]
    assert estimated == [2, 6, 10]  # steps 12, 16 and 20 of the optimizer


@pytest.mark.parametrize("trainer_class", [Trainer, SchattenTrainer])
def test_the_progress_bar_shows_the_summary_and_no_layers(
    trainer_class, gpt2, token_dataset, training_arguments, capsys
):
    arguments = training_arguments(optim_args=ADAPTIVE, disable_tqdm=False)
    trainer_class(model=gpt2, args=arguments, train_dataset=token_dataset).train()
    shown = capsys.readouterr()
    assert "schatten_p_median" in shown.out + shown.err
    assert "schatten_p/" not in shown.out + shown.err


def test_the_routing_is_printed_once(gpt2, token_dataset, training_arguments, capsys):
    trainer = SchattenTrainer(model=gpt2, args=training_arguments(), train_dataset=token_dataset)
    trainer.train()
    assert capsys.readouterr().out.count("schatten_p routes the parameters of GPT2LMHeadModel") == 1


def test_the_card_describes_the_optimizer_once_however_often_it_is_written(gpt2, token_dataset, training_arguments):
    arguments = training_arguments(optim_args=ADAPTIVE)
    trainer = SchattenTrainer(model=gpt2, args=arguments, train_dataset=token_dataset)
    trainer.train()
    for _ in range(2):
        trainer.create_model_card(model_name="tiny", tags="demo")
    card = ModelCard.load(Path(arguments.output_dir) / "README.md")
    assert card.text.count("## Optimizer: Schatten-p") == 1
    assert "| schatten_p | 8 |" in card.text
    assert "'p=adaptive,p_interval=4,p_first_step=2'" in card.text
    assert "(figures/p_by_layer.png)" in card.text
    assert {"schatten-p", "demo"} <= set(card.data.tags)
    assert "# tiny" in card.text


def test_bad_options_are_refused_when_the_trainer_is_made(gpt2, training_arguments):
    for trainer_class in (Trainer, SchattenTrainer):
        with pytest.raises(OptionError, match="Did you mean 'p_interval'"):
            trainer_class(model=gpt2, args=training_arguments(optim_args="p_intervall=50"))


def test_with_another_optimizer_it_is_a_plain_trainer(gpt2, token_dataset, training_arguments):
    arguments = training_arguments(optim="adamw_torch", save_strategy="steps", save_steps=5)
    _, weights, _ = train(SchattenTrainer, gpt2, token_dataset, arguments)
    checkpoint = Path(arguments.output_dir) / "checkpoint-5"
    assert (checkpoint / "optimizer.pt").is_file()
    _, resumed, _ = train(SchattenTrainer, gpt2, token_dataset, arguments, resume=str(checkpoint))
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_a_schedule_lasts_as_long_as_the_training_and_is_logged(gpt2, token_dataset, training_arguments):
    arguments = training_arguments(optim_args="p=schedule,p_schedule=2:-10")
    trainer = Trainer(model=gpt2, args=arguments, train_dataset=token_dataset)
    trainer.train()
    logged = [1 / entry["schatten_p_median"] for entry in trainer.state.log_history if "schatten_p_median" in entry]
    assert logged[:10] == pytest.approx([0.5 - 0.6 * step / 9 for step in range(10)], abs=1e-6)


@pytest.mark.pictures
def test_the_pictures_are_drawn_at_the_end_and_by_no_save(gpt2, token_dataset, training_arguments):
    arguments = training_arguments(optim_args=ADAPTIVE, save_strategy="steps", save_steps=4, max_steps=5)
    folder, drawn = Path(arguments.output_dir) / "figures", []

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            drawn.append(folder.exists())

    trainer = Trainer(model=gpt2, args=arguments, train_dataset=token_dataset, callbacks=[Watch()])
    trainer.train()
    assert drawn == [False, False]
    assert sorted(path.name for path in folder.iterdir()) == ["p_by_layer.png", "spectra.png", "updates.png"]
    entry = next(entry for entry in trainer.state.log_history if "schatten_p_median" in entry)
    layers = {key.partition("/")[2] for key in entry if key.startswith("schatten_p/")}
    assert layers == {key.partition("/")[2] for key in entry if key.startswith("schatten_stable_rank/")}
    assert all(entry[f"schatten_relative_size/{layer}"] > 0 for layer in layers)


SUMMARY = {"schatten_p_min", "schatten_p_median", "schatten_p_max"}


@pytest.mark.parametrize(("report", "logged", "tables"), [("summary", SUMMARY, 1), ("none", set(), 0)])
@pytest.mark.parametrize("policy", [ADAPTIVE, "p=schedule"])
def test_report_leaves_out_layers_and_pictures_or_everything(
    policy, report, logged, tables, gpt2, token_dataset, training_arguments, capsys
):
    arguments = training_arguments(optim_args=f"{policy},report={report}", max_steps=3, save_steps=2, logging_steps=3)
    trainer = SchattenTrainer(model=gpt2, args=arguments, train_dataset=token_dataset)
    trainer.train()
    trainer.create_model_card()
    shown = capsys.readouterr()
    names = {name for entry in trainer.state.log_history for name in entry if name.startswith("schatten")}
    assert names == logged
    assert shown.out.count("schatten_p routes the parameters") == tables
    assert "median p" not in shown.err
    assert not (Path(arguments.output_dir) / "figures").exists()
    assert "figures/" not in (Path(arguments.output_dir) / "README.md").read_text()


def test_the_bar_is_silent_too_with_report_none(gpt2, token_dataset, training_arguments, capsys):
    for report, shown in (("summary", True), ("none", False)):
        arguments = training_arguments(optim_args=f"{ADAPTIVE},report={report}", max_steps=3, disable_tqdm=False)
        Trainer(model=gpt2, args=arguments, train_dataset=token_dataset).train()
        assert ("median p" in capsys.readouterr().err) == shown


def test_a_worker_thread_estimates_while_a_trainer_trains(gpt2, token_dataset, training_arguments):
    arguments = training_arguments(optim_args=ADAPTIVE + ",p_async=true", max_steps=30, save_strategy="steps")
    trainer = SchattenTrainer(model=gpt2, args=arguments, train_dataset=token_dataset)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "schatten_p_median" in entry]
    assert entries
    last = {name: p for name, p in entries[-1].items() if name.startswith("schatten_p/")}
    saved = load_learned_p(f"{arguments.output_dir}/checkpoint-30")
    assert {f"schatten_p/{name.replace('.weight', '')}": p for name, p in saved.items()} == last


def test_processes_that_train_each_for_itself_are_stopped(gpt2, training_arguments, token_dataset, monkeypatch):
    """Without a GPU and without use_cpu, accelerate starts a process group that the Trainer knows nothing of."""
    monkeypatch.setattr("hf_schatten.integration.callback.process_count", lambda: 2)
    trainer = Trainer(model=gpt2, args=training_arguments(), train_dataset=token_dataset)
    with pytest.raises(RuntimeError, match="2 processes were started, but the Trainer trains in each of them as if"):
        trainer.train()
