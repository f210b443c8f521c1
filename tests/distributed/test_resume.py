"""Checkpoints of two processes: they resume on any number of them, and a kill while saving costs one checkpoint."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import outcomes, together
from safetensors import safe_open
from safetensors.torch import save_file
from small_gpt2 import (
    GLOBAL_BATCH,
    MATRICES,
    arguments,
    assert_equal,
    assert_near,
    assert_same_p,
    exponents,
    model,
    sequences,
    sequences_alike,
    trained,
)
from transformers import trainer as transformers_trainer

import hf_schatten.integration.checkpoint
from hf_schatten import CheckpointError, SchattenTrainer, load_learned_p
from hf_schatten.integration.checkpoint import CONFIG_FILE, STATE_FILE, newest_complete_checkpoint

STEPS, SAVE, MOST_PROCESSES = 12, 4, 4
DUE = [3, 6, 9, 12]
MIDDLE, END = f"checkpoint-{2 * SAVE}", f"checkpoint-{STEPS}"


class Messages(logging.Handler):
    """Keeps what the package has logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def train(folder: Path, resume: bool = False) -> dict[str, Any]:
    """Train in one of several processes, or alone; return what was learned and warned of."""
    messages = Messages()
    logging.getLogger("hf_schatten").addHandler(messages)
    options = {
        "optim_args": "p=adaptive,p_interval=3,p_first_step=3,p_max=1000",
        "lr_scheduler_type": "cosine",
    }
    saving = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVE}
    # With the same rows on all processes, p does not depend on their number.
    rows = sequences_alike(STEPS * GLOBAL_BATCH, shares=MOST_PROCESSES)
    trainer = SchattenTrainer(model(), arguments(folder, **options, **saving), train_dataset=rows)
    try:
        return trained(trainer, resume) | {"messages": messages.texts}
    finally:
        logging.getLogger("hf_schatten").removeHandler(messages)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return the folder of an uninterrupted run of two processes, and what each has got."""
    folder = tmp_path_factory.mktemp("pair")
    return folder / "run", together(train, 2, folder, folder / "run")


@pytest.fixture
def interrupted(pair, tmp_path):
    """Return the folder of that run as it was when its second checkpoint was written."""
    shutil.copytree(pair[0], tmp_path / "run", ignore=shutil.ignore_patterns(END))
    return tmp_path / "run"


def test_two_processes_write_one_checkpoint_with_a_readable_p(pair):
    folder, (first, second) = pair
    names = {path.name for path in (folder / MIDDLE).iterdir()}
    assert {STATE_FILE, CONFIG_FILE, "model.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    with safe_open(folder / MIDDLE / STATE_FILE, framework="pt") as file:
        assert sum(tensor.rpartition("/")[2] == "momentum" for tensor in file.keys()) == 8  # noqa: SIM118
    learned = {name.replace(".weight", ""): p for name, p in load_learned_p(folder / MIDDLE).items()}
    assert len(learned) == MATRICES
    assert learned == first["p"][6]
    assert first["p"].keys() == second["p"].keys() == set(DUE)
    assert_equal(second["weights"], first["weights"])


def assert_goes_on_as_the_pair(result, pair):
    _, (first, _) = pair
    inside = (exponents(first["p"])[2:] > 0.002) & (exponents(first["p"])[2:] < 0.998)
    assert inside.sum() >= 3  # p is not only at the ends of its range
    assert_same_p(result["p"], first["p"])
    assert_near(result["weights"], first["weights"])
    assert result["losses"].keys() == first["losses"].keys()
    for step, loss in first["losses"].items():
        assert result["losses"][step] == pytest.approx(loss, rel=1e-5, abs=0), step
    assert result["messages"] == []


def test_one_process_resumes_the_run_of_two(interrupted, pair):
    assert_goes_on_as_the_pair(train(interrupted, resume=True), pair)


@pytest.mark.slow
def test_four_processes_resume_the_run_of_two(interrupted, pair, tmp_path):
    results = together(train, MOST_PROCESSES, tmp_path, interrupted, True)
    for result in results:
        assert_equal(result["weights"], results[0]["weights"])
        assert_goes_on_as_the_pair(result, pair)
    assert {path.name for path in (interrupted / END).glob("rng_state*")} == {
        f"rng_state_{i}.pth" for i in range(MOST_PROCESSES)
    }


def resume_apart(folder: Path) -> str:
    """Resume on machines that have no common folder."""
    with pytest.raises(CheckpointError) as error:
        train(folder / f"machine {dist.get_rank()}", resume=True)
    return str(error.value)


def test_processes_that_would_resume_different_checkpoints_stop(interrupted, tmp_path):
    shutil.copytree(interrupted, tmp_path / "machine 0")
    shutil.copytree(interrupted, tmp_path / "machine 1")
    (tmp_path / "machine 1" / MIDDLE / "trainer_state.json").unlink()
    for message in together(resume_apart, 2, tmp_path, tmp_path):
        assert f"{MIDDLE} (process 0), checkpoint-{SAVE} (process 1)" in message


def resume_each_its_own(folder: Path) -> str:
    """Resume what a script of its own has found."""
    trainer = SchattenTrainer(model(), arguments(folder, max_steps=STEPS), train_dataset=sequences(STEPS))
    own = (MIDDLE, f"checkpoint-{SAVE}")[dist.get_rank()]
    with pytest.raises(CheckpointError) as error:
        trainer.train(resume_from_checkpoint=str(folder / own))
    return str(error.value)


def test_paths_of_different_checkpoints_stop_as_well(interrupted, tmp_path):
    for message in together(resume_each_its_own, 2, tmp_path, interrupted):
        assert f"{MIDDLE} (process 0), checkpoint-{SAVE} (process 1)" in message


def train_and_be_killed(folder: Path, rank: int, file: str) -> None:
    """Train until one process is killed, as by a machine without memory, half way through writing a file."""

    def write_half(data: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        write(data, path, *args, **kwargs)
        if MIDDLE in str(path) and Path(path).name.startswith(file):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == rank and file == STATE_FILE:
        write, hf_schatten.integration.checkpoint.save_file = save_file, write_half
    elif dist.get_rank() == rank:
        write, transformers_trainer.torch.save = torch.save, write_half
    train(folder)


def resume_after_kill(folder: Path, rank: int, file: str) -> Any:
    dead = outcomes(train_and_be_killed, 2, folder, folder / "run", rank, file)
    assert dead[rank].exit_code == -signal.SIGKILL
    assert dead[1 - rank].exit_code == 1
    assert "RuntimeError" in dead[1 - rank].error
    incomplete = folder / "run" / MIDDLE
    assert [path for path in incomplete.iterdir() if path.name.startswith(file)]  # half of it is there
    assert not (incomplete / STATE_FILE).exists() or file != STATE_FILE  # by another name
    assert not (incomplete / "trainer_state.json").exists()
    return together(train, 2, folder, folder / "run", True)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "file"), [(0, STATE_FILE), (1, "rng_state_1.pth")])
def test_a_process_killed_while_saving_leaves_the_checkpoint_before(pair, tmp_path, rank, file):
    results = resume_after_kill(tmp_path, rank, file)
    for result, uninterrupted in zip(results, pair[1], strict=True):
        assert result["p"] == uninterrupted["p"]
        assert result["losses"] == uninterrupted["losses"]
        assert_equal(result["weights"], uninterrupted["weights"])
        [message] = result["messages"]
        assert f"checkpoint-{SAVE} is resumed: the writing of {MIDDLE} was not finished" in message
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_kill_while_a_checkpoint_is_written_again_leaves_the_one_before(interrupted, monkeypatch):
    """A run that starts again meets the whole checkpoints of the run before, and replaces their files one by one."""

    class Killed(BaseException):
        pass

    def be_killed(tensors, path):
        if MIDDLE in str(path):
            raise Killed
        save_file(tensors, path)

    assert newest_complete_checkpoint(interrupted) == interrupted / MIDDLE
    monkeypatch.setattr(hf_schatten.integration.checkpoint, "save_file", be_killed)
    with pytest.raises(Killed):
        train(interrupted)
    assert newest_complete_checkpoint(interrupted) == interrupted / f"checkpoint-{SAVE}"
