"""A training script with a Trainer as a regime: what a YAML file says of it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.comparison.candidates import SHUFFLED
from benchmarks.comparison.outcomes import Outcome, Run

_TIMED_RUN = Path(__file__).with_name("timed_run.py")
_FIRST_SEED = 42  # of transformers


@dataclass(frozen=True)
class Script:
    """A training script; every run is a process of its own.

    Attributes:
        script: path of a script that takes Trainer's arguments, evaluates, and needs nothing but a Trainer.
        arguments: the same for all runs.
        rates: learning rates that a sweep of the Schatten-p update begins with, increasing.
        adamw_rates: those of AdamW.
        interval: steps between two estimates of p.
        kinds: of layers; none are known.
        tokens: of a run; 0 for not counted.
    """

    script: Path
    arguments: tuple[str, ...]
    rates: tuple[float, ...]
    adamw_rates: tuple[float, ...]
    interval: int
    kinds: Mapping[str, str]
    tokens: int = 0

    @classmethod
    def load(cls, path: Path) -> Script:
        """Read a YAML file; ``script``, and arguments that name files, are relative to it.

        Raises:
            ValueError: when a key is missing or unknown, or there is no such file.
        """
        try:
            content = yaml.safe_load(path.read_text("utf-8"))
            return cls(
                script=path.parent / content.pop("script"),
                arguments=tuple(_argument(text, path.parent) for text in content.pop("arguments")),
                rates=tuple(map(float, content.pop("learning_rates"))),
                adamw_rates=tuple(map(float, content.pop("adamw_learning_rates"))),
                interval=content.pop("p_interval"),
                kinds={},
                **content,
            )
        except (OSError, KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path} describes no training: {error!r}. See benchmarks/README.md.") from error

    @property
    def summary(self) -> str:
        """What is trained: the script with its arguments."""
        return f"`{' '.join([self.script.name, *(Path(each).name for each in self.arguments)])}`"

    def train(self, run: Run, device: torch.device) -> Outcome:
        """Run the script, and return what became of its training.

        Raises:
            RuntimeError: when the script fails; the message has the end of its output.
        """
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            command = [sys.executable, str(_TIMED_RUN), str(result), str(self.script), *self.arguments]
            command += [*self.flags(run), "--output_dir", str(Path(folder) / "output")]
            command += ["--use_cpu"] if device.type == "cpu" else []
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                end = (done.stdout + done.stderr)[-2000:]
                raise RuntimeError(f"{self.script} failed with exit code {done.returncode}:\n{end}")
            measured: dict[str, Any] = json.loads(result.read_text("utf-8"))
        return Outcome(**asdict(run), **measured)

    def flags(self, run: Run) -> list[str]:
        """Return the arguments that make the script train so.

        Raises:
            ValueError: when a script cannot have this candidate.
        """
        rate = ["--learning_rate", repr(run.rate), "--seed", str(_FIRST_SEED + run.seed)]
        name, _, beta = run.candidate.partition(":")
        if name == "adamw":
            return ["--optim", "adamw_torch", "--adam_beta1", "0.9", "--adam_beta2", beta or "0.95", *rate]
        if not self.can(run.candidate):
            raise ValueError(f"A script cannot have {run.candidate!r}: give options of the optimizer, or a class")
        if "=" not in run.candidate:
            return ["--optim", run.candidate, *rate]
        interval = f",p_interval={self.interval}" if "p=adaptive" in run.candidate else ""
        return ["--optim", "schatten_p", "--optim_args", run.candidate + interval, *rate]

    def can(self, candidate: str) -> bool:
        """Return whether a script can have a candidate: controls that act inside the optimizer, it cannot."""
        return candidate != "random" and not candidate.startswith(SHUFFLED) and "@" not in candidate


def _argument(text: Any, folder: Path) -> str:
    beside = folder / str(text)
    return str(beside) if beside.is_file() else str(text)
