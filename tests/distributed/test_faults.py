"""A process that dies or stops ends the run of the others; a slow estimator keeps nobody waiting before it must."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import outcomes, together
from safetensors import safe_open
from small_gpt2 import GLOBAL_BATCH, arguments, model, sequences
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

import hf_schatten
from hf_schatten import SchattenTrainer
from hf_schatten.adaptive import adaptation
from hf_schatten.integration.checkpoint import STATE_FILE, newest_complete_checkpoint

FAULTY_STEP = 3
TIMEOUT = timedelta(seconds=6)
EXIT_CODE = 7


def die(folder: Path) -> None:
    (folder / "fault").write_text(str(time.time()))
    os._exit(EXIT_CODE)


def stop(folder: Path) -> None:
    (folder / "fault").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGSTOP)


class Fault(TrainerCallback):
    """Calls a function on process 1, after the gradients of a step have been averaged and before its update."""

    def __init__(self, fault: Callable[[], None]) -> None:
        self._fault = fault

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == FAULTY_STEP and args.process_index == 1:
            self._fault()


def train_with_fault(folder: Path, fault: Callable[[Path], None], options: str) -> None:
    trainer = SchattenTrainer(
        model(),
        arguments(folder / "run", max_steps=6, save_strategy="steps", save_steps=1, optim_args=options),
        train_dataset=sequences(6 * GLOBAL_BATCH),
        callbacks=[Fault(lambda: fault(folder))],
    )
    trainer.train()


# Where the other process waits: for updates, or, on a due step, for statistics.
WAITS = {"updates": "p=2", "statistics": f"p=adaptive,p_first_step={FAULTY_STEP},share_work=false"}


@pytest.mark.parametrize(
    ("fault", "waits"),
    [
        (die, "updates"),
        (die, "statistics"),
        pytest.param(stop, "updates", marks=pytest.mark.slow),
        pytest.param(stop, "statistics", marks=pytest.mark.slow),
    ],
)
def test_the_other_process_raises_within_the_timeout_and_leaves_whole_files(fault, waits, tmp_path, caplog):
    stopped = (1,) if fault is stop else ()
    first, second = outcomes(
        train_with_fault, 2, tmp_path, tmp_path, fault, WAITS[waits], timeout=TIMEOUT, stopped=stopped
    )
    assert second.exit_code == (-signal.SIGKILL if stopped else EXIT_CODE)
    assert first.exit_code == 1
    assert "schatten_p.py" in first.error  # where it waited
    assert "RuntimeError" in first.error
    waited = first.ended - float((tmp_path / "fault").read_text())
    assert waited <= TIMEOUT.total_seconds() + 20  # and not half an hour, torch's own
    assert waited >= TIMEOUT.total_seconds() - 1 or not stopped

    run = tmp_path / "run"
    checkpoints = {path.name for path in run.glob("checkpoint-*")}
    assert checkpoints == {f"checkpoint-{step}" for step in range(1, FAULTY_STEP)}
    assert newest_complete_checkpoint(run) == run / f"checkpoint-{FAULTY_STEP - 1}"
    assert caplog.text == ""  # no checkpoint is passed over
    assert not list(run.rglob("*.tmp"))
    for path in run.glob(f"checkpoint-*/{STATE_FILE}"):
        with safe_open(path, framework="pt") as file:
            assert all(file.get_tensor(key).isfinite().all() for key in file.keys())  # noqa: SIM118


INTERVAL = 4


def straggle(folder: Path) -> dict[str, Any]:
    """Take steps of which two are due, with an estimator on process 1 that only works when both wait for it.

    Nothing depends on how fast the machine is: the estimator of step 4 waits until both processes have taken step 7,
    so that a run that waited for it any earlier would never end.
    """
    rank, release = dist.get_rank(), threading.Event()
    arrived = [folder / f"process {rank} has taken step 7" for rank in range(2)]
    measure, released = adaptation.measure, []

    def measure_late(*args: Any, **kwargs: Any) -> Any:
        if not release.wait(60):
            raise TimeoutError("A process has waited for the estimator before the next due step.")
        return measure(*args, **kwargs)

    def release_late() -> None:
        while not all(path.exists() for path in arrived):
            time.sleep(0.05)
        time.sleep(0.5)
        released.append(time.time())
        release.set()

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))
    optimizer = hf_schatten.create_schatten_optimizer(
        module,
        p="adaptive",
        p_async=True,
        p_interval=INTERVAL,
        p_first_step=INTERVAL,
        p_max=1000.0,
        verbose=False,
    )
    wrapped = DistributedDataParallel(module)
    if rank == 1:
        adaptation.measure = measure_late
        threading.Thread(target=release_late, daemon=True).start()
    ended, p = [], []
    generator = torch.Generator().manual_seed(rank)
    for step in range(1, 2 * INTERVAL + 2):
        inputs = torch.randn(24, 12, generator=generator) * torch.linspace(1, 1 - 0.9 * rank, 12)
        wrapped(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ended.append(time.time())
        p.append(list(optimizer.learned_p().values()))
        if step == 2 * INTERVAL - 1:
            arrived[rank].touch()
    return {"ended": ended, "p": p, "released": released}


def test_a_slow_estimator_is_waited_for_at_the_next_due_step_and_not_before(tmp_path):
    results = together(straggle, 2, tmp_path, tmp_path)
    [released] = results[1]["released"]
    due = 2 * INTERVAL - 1  # counted from 0
    for result in results:
        assert result["ended"][due - 1] < released < result["ended"][due]
        assert all(p == result["p"][0] for p in result["p"][:due])
        assert all(p == result["p"][due] for p in result["p"][due:])
        assert result["p"][due] != result["p"][0]
    assert results[0]["p"] == results[1]["p"]
