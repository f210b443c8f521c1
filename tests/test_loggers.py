"""What reaches the loggers and the terminal: p through Trainer's own channel, whatever the logger."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from trackio.sqlite_storage import SQLiteStorage
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from hf_schatten import SchattenCallback
from hf_schatten.integration.terminal import SchattenProgressCallback

# p_max=inf: one of the layers takes it at once, so that every logger meets an infinite p.
INFINITE = "p=adaptive,p_interval=2,p_first_step=1,p_max=inf"
DUE = [1, 2, 4]
LAYERS = [
    f"transformer.h.{block}.{layer}"
    for block in range(2)
    for layer in (*(f"attn.c_attn.{part}" for part in "qkv"), "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]
SUMMARY = ["schatten_p_min", "schatten_p_median", "schatten_p_max"]
NAMES = {
    *SUMMARY,
    *(
        f"{quantity}/{layer}"
        for quantity in ("schatten_p", "schatten_stable_rank", "schatten_relative_size")
        for layer in LAYERS
    ),
}


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(SchattenCallback, "_draw", lambda *args: None)


@pytest.fixture
def run(gpt2, token_dataset, training_arguments, no_pictures):
    """Return a function that trains five steps with infinite p and returns the Trainer."""

    def train(callbacks=None, **arguments):
        arguments = {"optim_args": INFINITE, "max_steps": 5} | arguments
        trainer = Trainer(
            model=gpt2,
            args=training_arguments(**arguments),
            train_dataset=token_dataset,
            eval_dataset=token_dataset[:4],
            callbacks=callbacks,
        )
        trainer.train()
        return trainer

    return train


def logged_p(trainer):
    """Return what the log history holds of the optimizer as numbers, by step."""
    return {
        entry["step"]: {name: float(value) for name, value in entry.items() if name.startswith("schatten_")}
        for entry in trainer.state.log_history
        if "schatten_p_median" in entry
    }


class AnyLogger(TrainerCallback):
    """Keeps what a logger would send on, at the moment at which it would."""

    def __init__(self):
        self.sent = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.sent.append({"step": state.global_step, **logs})


def test_a_logger_is_handed_p_with_the_loss_of_the_step(run):
    logger = AnyLogger()
    trainer = run([logger], logging_steps=3)
    with_p = [entry for entry in logger.sent if "schatten_p_median" in entry]
    assert [entry["step"] for entry in with_p] == DUE
    assert [entry["step"] for entry in logger.sent if "loss" in entry] == [1, 2, 3, 4]
    for entry in with_p:
        sent = {name: value for name, value in entry.items() if name.startswith("schatten_")}
        assert set(sent) == NAMES
        assert all(type(value) is float for value in sent.values())
        assert sent == logged_p(trainer)[entry["step"]]
        assert sent["schatten_p_max"] == math.inf


def test_the_callback_stands_before_every_logger(gpt2, training_arguments):
    trainer = Trainer(model=gpt2, args=training_arguments(report_to="tensorboard"), callbacks=[AnyLogger()])
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert names.index("SchattenCallback") < min(names.index("TensorBoardCallback"), names.index("AnyLogger"))


def test_tensorboard_has_every_estimate(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = run(report_to="tensorboard")
    (folder,) = (Path(trainer.args.output_dir) / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    found = {tag for tag in events.Tags()["scalars"] if "schatten_" in tag}
    assert found == {f"train/{name}" for name in NAMES}
    expected = logged_p(trainer)
    assert list(expected) == DUE
    for name in NAMES:
        scalars = events.Scalars(f"train/{name}")
        assert [event.step for event in scalars] == DUE
        values = [expected[step][name] for step in DUE]
        assert [event.value for event in scalars] == pytest.approx(values, rel=1e-6, abs=1e-9)


def test_wandb_has_the_estimates(run, tmp_path, monkeypatch):
    import wandb

    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    trainer = run(report_to="wandb")
    try:
        summary = wandb.run.summary
        last = logged_p(trainer)[DUE[-1]]
        assert {name: summary[f"train/{name}"] for name in NAMES} == last
        assert summary["train/schatten_p_max"] == math.inf
    finally:
        wandb.finish()


def test_trackio_has_the_estimates(run):
    trainer = run(report_to="trackio", project="tiny", run_name="one")
    rows = [row for row in SQLiteStorage.get_logs("tiny", "one") if "train/schatten_p_median" in row]
    assert [row["train/global_step"] for row in rows] == DUE
    for row in rows:
        found = {name.removeprefix("train/"): value for name, value in row.items() if "schatten_" in name}
        assert found == logged_p(trainer)[row["train/global_step"]]


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_an_infinite_p_leaves_the_state_on_disk_json(run):
    trainer = run(save_strategy="steps", save_steps=5)
    path = Path(trainer.args.output_dir) / "checkpoint-5" / "trainer_state.json"
    history = json.loads(path.read_text(), parse_constant=no_constant)["log_history"]
    stored = [entry["schatten_p_max"] for entry in history if "schatten_p_max" in entry]
    assert stored == ["inf"] * len(DUE)


@pytest.mark.parametrize("optim_args", [INFINITE, "p=schedule,p_schedule=2:4"])
@pytest.mark.parametrize("logging_strategy", ["steps", "no"])
def test_metrics_stay_metrics(run, optim_args, logging_strategy):
    trainer = run(optim_args=optim_args, logging_strategy=logging_strategy)
    assert not [name for name in trainer.evaluate() if "schatten" in name]
    assert all("loss" in entry for entry in trainer.state.log_history if "schatten_p_median" in entry)


def medians_at_the_bar(text):
    """Return the different medians that a progress bar has shown, in order."""
    return list(dict.fromkeys(re.findall(r"median p ([-0-9.inf]+)", text)))


@pytest.mark.parametrize("logging_strategy", ["steps", "no"])
def test_the_bar_shows_the_median_of_every_estimate(run, capsys, logging_strategy):
    medians = []

    class Medians(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            p = sorted(1 / p for p in optimizer.optimizer.learned_p().values())
            medians.append(f"{1 / p[len(p) // 2]:.3g}")

    run([Medians()], optim_args="p=adaptive,p_interval=2,p_first_step=2", disable_tqdm=False, max_steps=7)
    assert medians[0] == "-4"
    assert len(set(medians)) > 2
    estimated = list(dict.fromkeys(medians[1:]))
    assert "-4" not in estimated
    assert medians_at_the_bar(capsys.readouterr().err) == estimated


def test_the_bar_goes_on_with_the_median_of_the_last_estimate(run, capsys):
    trainer = run(optim_args="p=adaptive,p_interval=100,p_first_step=2", disable_tqdm=False, max_steps=3)
    (median,) = medians_at_the_bar(capsys.readouterr().err)
    trainer.train()
    assert medians_at_the_bar(capsys.readouterr().err) == [median]


def test_the_bar_shows_the_median_of_a_schedule(run, capsys):
    run(optim_args="p=schedule,p_schedule=2:4", disable_tqdm=False)
    expected = [f"{1 / (0.5 - 0.25 * step / 4):.3g}" for step in range(5)]
    assert medians_at_the_bar(capsys.readouterr().err) == expected


def test_the_bar_is_transformers_own_with_another_optimizer(run, capsys):
    run(optim="adamw_torch", optim_args=None, disable_tqdm=False)
    shown = capsys.readouterr().err
    assert "5/5" in shown
    assert "median p" not in shown


def test_without_a_bar_the_summary_is_printed_and_no_layers(gpt2, token_dataset, training_arguments, capsys):
    arguments = training_arguments(optim_args=INFINITE, max_steps=2)
    trainer = Trainer(model=gpt2, args=arguments, train_dataset=token_dataset)
    trainer.train()
    printed = capsys.readouterr().out
    assert "'schatten_p_max': 'inf'" in printed
    assert "schatten_p/" not in printed
    assert "total_flos" not in printed


def test_a_notebooks_own_progress_goes_on(run):
    pytest.importorskip("IPython")
    from transformers.utils.notebook import NotebookProgressCallback

    trainer = run([NotebookProgressCallback()], eval_strategy="steps", eval_steps=2)
    assert list(logged_p(trainer)) == DUE


def test_a_process_without_a_bar_shows_nothing(gpt2, training_arguments, capsys):
    optimizer = Trainer(model=gpt2, args=training_arguments(optim_args=INFINITE)).create_optimizer()
    events = (training_arguments(), TrainerState(is_world_process_zero=False, max_steps=5), TrainerControl())
    progress = SchattenProgressCallback()
    progress.on_train_begin(*events, optimizer=optimizer)
    progress.on_step_end(*events, optimizer=optimizer)
    progress.on_log(*events, logs={"loss": 1.0, "schatten_p_median": 2.0}, optimizer=optimizer)
    progress.on_train_end(*events, optimizer=optimizer)
    assert "median p" not in capsys.readouterr().err
