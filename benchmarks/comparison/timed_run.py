"""Runs a training script as ``python SCRIPT`` would, and keeps its logs and times: one run of `compare_optimizers.py`.

Usage:
    python benchmarks/comparison/timed_run.py TIMES.json SCRIPT.py [ARGUMENT …]

The script needs nothing but a Trainer. ``--optim schatten_p`` and ``--optim torch_muon`` are available to it.
"""

import json
import os
import platform
import runpy
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import trainer as transformers_trainer

from benchmarks.comparison import torch_muon
from hf_schatten.integration.registration import register_optimizer


class Stopwatch:
    """Seconds between starts and stops, of the clock and of the process' threads."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self._started = (0.0, 0.0)

    def start(self) -> None:
        """Start."""
        self._started = _now()

    def stop(self) -> None:
        """Add what has passed since the start."""
        clock, cpu = _now()
        self.seconds += clock - self._started[0]
        self.cpu_seconds += cpu - self._started[1]


def _now() -> tuple[float, float]:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter(), time.process_time()


class Recorder(TrainerCallback):
    """Keeps a Trainer's logs and how long its steps and its optimizer took; the last Trainer of a script counts."""

    newest: "Recorder | None" = None

    def __init__(self) -> None:
        Recorder.newest = self
        self._step, self._optimizer = Stopwatch(), Stopwatch()
        self.logs: list[dict[str, Any]] = []
        self.device = "cpu"
        self.times: dict[str, list[float]] = {
            name: [] for name in ("steps", "seconds", "cpu_seconds", "optimizer_seconds", "optimizer_cpu_seconds")
        }

    def on_step_begin(self, *arguments: Any, **kwargs: Any) -> None:
        """Start the step, its batch being there."""
        self._step.start()

    def on_pre_optimizer_step(self, *arguments: Any, **kwargs: Any) -> None:
        """Start the optimizer."""
        self._optimizer.start()

    def on_optimizer_step(self, *arguments: Any, **kwargs: Any) -> None:
        """Stop the optimizer."""
        self._optimizer.stop()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the times so far."""
        self._step.stop()
        newest = (
            state.global_step,
            self._step.seconds,
            self._step.cpu_seconds,
            self._optimizer.seconds,
            self._optimizer.cpu_seconds,
        )
        for values, value in zip(self.times.values(), newest, strict=True):
            values.append(value)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the logs, which other callbacks may still add to."""
        self.logs, self.device = state.log_history, args.device.type


def main(arguments: list[str]) -> None:
    """Run the script, then write what it logged."""
    path, script = Path(arguments[0]), arguments[1]
    register_optimizer(torch_muon.NAME, torch_muon.handle)
    transformers_trainer.DEFAULT_CALLBACKS.append(Recorder)  # type: ignore[arg-type] # inferred too narrowly
    sys.argv = arguments[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")
    if Recorder.newest is None:
        sys.exit(f"{script} made no Trainer, so there is nothing to compare.")
    newest = Recorder.newest
    origin = {"device": newest.device, "machine": _machine(newest.device), "date": date.today().isoformat()}
    measured = {"logs": newest.logs, **origin, **newest.times}
    path.write_text(json.dumps(measured) + "\n", "utf-8")


def _machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"{device} ({platform.machine()})"
    python = f"Python {platform.python_version()}"
    return f"{name}, {python}, torch {torch.__version__}, transformers {transformers.__version__}"


if __name__ == "__main__":
    main(sys.argv[1:])
