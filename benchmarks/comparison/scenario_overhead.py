"""What a training costs with this optimizer over what it costs with torch's Muon, at the size of a comparison's task.

The task's script runs until its Trainer is about to train; its model and its first batch are taken from there. Two
copies of the model then train on that batch in turn, in one process: a run of ``p_interval`` steps with the candidate,
one of which estimates p, a run of as many with `torch_muon.py`, and so on. A step is forward, backward and update.
Whole runs of `compare_optimizers.py`, one after the other, differ by more than what is measured here.

Usage:
    python benchmarks/comparison/scenario_overhead.py recipes/pretrain_clm/comparison.yaml --repeats 3  # six minutes
    python benchmarks/comparison/scenario_overhead.py recipes/*/comparison.yaml --repeats 3
    python benchmarks/comparison/scenario_overhead.py recipes/lora_sft/comparison.yaml --candidate 'p = inf'
"""

import argparse
import copy
import json
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import trainer as transformers_trainer

from benchmarks.comparison.comparison import Candidate, ComparisonError, Task
from benchmarks.comparison.torch_muon import MuonAndAdamW
from benchmarks.interleaved_timing import Ratio, time_ratio
from benchmarks.tables import print_table
from hf_schatten import create_schatten_optimizer
from hf_schatten.options import SchattenOptions


class _AboutToTrainError(Exception):
    """Ends the script: a Trainer has its model and its data."""

    def __init__(self, model: nn.Module, batch: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.batch = model, batch


class _Catch(TrainerCallback):
    """Ends the first training before its first step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise with the model and its first batch, on the training's device."""
        batch = next(iter(kwargs["train_dataloader"]))
        raise _AboutToTrainError(kwargs["model"], send_to_device(batch, args.device))


def training_of(task: Task, output: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model that a task's script would train, and its first batch.

    Args:
        task: Of `compare_optimizers.py`.
        output: The folder that the script writes to.

    Raises:
        ComparisonError: The script trains nothing.
    """
    before = sys.argv, sys.path[0]
    sys.argv = [str(task.script), *task.arguments, "--output_dir", str(output)]
    sys.path[0] = os.path.dirname(os.path.abspath(task.script))
    transformers_trainer.DEFAULT_CALLBACKS.append(_Catch)  # type: ignore[arg-type] # inferred too narrowly
    try:
        runpy.run_path(str(task.script), run_name="__main__")
    except _AboutToTrainError as caught:
        return caught.model, caught.batch
    finally:
        sys.argv, sys.path[0] = before
        transformers_trainer.DEFAULT_CALLBACKS.remove(_Catch)  # type: ignore[arg-type]
    raise ComparisonError(f"{task.script} made no Trainer that trains, so there is nothing to measure.")


def measure(model: nn.Module, batch: dict[str, Any], candidate: Candidate, repeats: int) -> tuple[Ratio, int]:
    """Train two copies in turn.

    Args:
        model: Whose copies are trained.
        batch: What they are trained on.
        candidate: Options of ``schatten_p``.
        repeats: Runs of each.

    Returns:
        The candidate's time over Muon's, and the steps of a run.
    """
    options = SchattenOptions.from_optim_args(candidate.optim_args)

    def run_of(optimizer_of: Callable[[nn.Module], Optimizer]) -> Callable[[], None]:
        own = copy.deepcopy(model).train()
        optimizer = optimizer_of(own)

        def run() -> None:
            for _ in range(options.p_interval):
                own(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        return run

    ours = run_of(lambda own: create_schatten_optimizer(own, 1e-4, verbose=False, **vars(options)))
    muon = run_of(lambda own: MuonAndAdamW(own, lr=1e-4, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8))
    return time_ratio(ours, muon, repeats, next(model.parameters()).device), options.p_interval


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    rows: list[dict[str, Any]] = []
    for path in options.tasks:
        task = Task.load(path)
        (candidate,) = task.only([options.candidate])
        if candidate.optim != "schatten_p":
            raise ComparisonError(
                f"--candidate {candidate.name!r} trains with {candidate.optim}: take one of schatten_p."
            )
        name = f"{path.resolve().parent.name}/{path.name}"
        model, batch = training_of(task, options.output / "scenario")
        ratio, steps = measure(model, batch, candidate, options.repeats)
        parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        rows.append({"task": name, "candidate": candidate.name, "parameters": parameters, "steps": steps})
        rows[-1]["run"] = asdict(ratio)
        print(f"{name}: {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})", flush=True)
    print()
    print_table(
        ("task", "trained parameters", "steps of a run", "run over Muon's (quartiles)", "a step"),
        [
            (
                row["task"],
                f"{row['parameters'] / 1e6:.2f} M",
                f"{row['steps']}",
                f"{row['run']['median']:.3f} ({row['run']['low']:.3f} to {row['run']['high']:.3f})",
                f"{1e3 * row['run']['seconds'] / row['steps']:.0f} ms",
            )
            for row in rows
        ],
    )
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "scenario_overhead.json"
    written = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
    file.write_text(json.dumps(written, indent=1) + "\n", "utf-8")
    print(f"\nWritten to {file}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tasks", nargs="+", type=Path, metavar="TASK.yaml", help="files of compare_optimizers.py")
    parser.add_argument("--candidate", default="adaptive", help="of every task (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"), help="folder (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: give 1 or more")
    return options


if __name__ == "__main__":
    try:
        main()
    except ComparisonError as error:
        sys.exit(f"scenario_overhead.py: error: {error}")
