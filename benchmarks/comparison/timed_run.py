"""Runs a training script as ``python SCRIPT`` would, and writes its losses and times: one run of a `Script`.

Usage:
    python benchmarks/comparison/timed_run.py RESULT.json SCRIPT.py [ARGUMENT …]

The script needs nothing but a Trainer. ``--optim`` may be ``schatten_p``, ``muon``, or the class of another package.
"""

import json
import math
import os
import runpy
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import trainer as transformers_trainer
from transformers.trainer_optimizer import OptimizerContext
from transformers.training_args import OptimizerNames

from benchmarks.comparison.peers import peer_optimizer
from benchmarks.comparison.regime import bytes_of_state, finite, machine, now, peak_memory
from benchmarks.comparison.torch_muon import MuonAndAdamW
from hf_schatten.integration.registration import register_optimizer
from hf_schatten.report.log import LAYER_PREFIX


class Recorder(TrainerCallback):
    """Keeps a Trainer's logs, and how long its steps took; the last Trainer of a script counts."""

    newest: "Recorder | None" = None

    def __init__(self) -> None:
        Recorder.newest = self
        self.seconds = {0: 0.0}  # by step
        self.logs: list[dict[str, Any]] = []
        self.state, self.device = 0, torch.device("cpu")
        self._start = self._total = 0.0

    def on_step_begin(self, args: TrainingArguments, *arguments: Any, **kwargs: Any) -> None:
        """Start the step, its batch being there."""
        self._start = now(args.device)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the time so far."""
        self._total += now(args.device) - self._start
        self.seconds[state.global_step] = self._total

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the logs, which other callbacks may still add to."""
        self.logs, self.device = state.log_history, args.device

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the optimizer."""
        self.state = bytes_of_state(kwargs["optimizer"].optimizer)

    def result(self) -> dict[str, Any]:
        """Return what an outcome has beside its run.

        Raises:
            ValueError: when there was no evaluation.
        """
        losses = {entry["step"]: finite(entry["eval_loss"]) for entry in self.logs if "eval_loss" in entry}
        curve = [[step, self.seconds[step], loss] for step, loss in losses.items() if step]
        if not curve:
            raise ValueError("The logs have no eval_loss: let the script evaluate (--do_eval, --eval_strategy).")
        training = [entry["train_loss"] for entry in self.logs if "train_loss" in entry]
        exponents: dict[int, dict[str, float]] = {}
        for entry in self.logs:  # of which a step may have several
            learned = {key.removeprefix(LAYER_PREFIX): p for key, p in entry.items() if key.startswith(LAYER_PREFIX)}
            if learned:
                exponents[entry["step"]] = {name: round(1 / float(p), 4) for name, p in learned.items()}
        return {
            "loss": curve[-1][2],
            "training_loss": finite(training[-1]) if training else math.inf,
            "seconds": self._total,
            "exponents": exponents,
            "curve": curve,
            "state": self.state,
            "memory": peak_memory(self.device),
            "machine": machine(self.device),
            "date": date.today().isoformat(),
        }


def _handle(context: OptimizerContext) -> tuple[Any, dict[str, Any]]:
    """Return what Trainer calls to make an optimizer that is compared, for `registration.register_optimizer`."""
    own = {"name": OptimizerNames(context.args.optim).value, "weight_decay": context.args.weight_decay}
    return _Factory, context.optimizer_kwargs | context.adam_kwargs | own


class _Factory:
    def __call__(
        self, model: nn.Module, *, name: str, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        if name == "muon":
            return MuonAndAdamW(model, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)
        return peer_optimizer(name, model, lr, weight_decay, heads=())


def _is_class(argument: str) -> bool:
    """Return whether an argument is the value of ``--optim`` that names a class of another package."""
    return argument.replace(".", "").isidentifier() and "." in argument


def main(arguments: list[str]) -> None:
    """Run the script, then write what it logged."""
    path, script = Path(arguments[0]), arguments[1]
    for name in ("muon", *(each for each in arguments[2:] if _is_class(each))):
        register_optimizer(name, _handle)
    transformers_trainer.DEFAULT_CALLBACKS.append(Recorder)  # type: ignore[arg-type] # inferred too narrowly
    sys.argv = arguments[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")
    if Recorder.newest is None:
        sys.exit(f"{script} made no Trainer, so there is nothing to compare.")
    path.write_text(json.dumps(Recorder.newest.result()) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
