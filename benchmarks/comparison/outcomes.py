"""Runs and what becomes of them: a file has one line for each outcome."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

NAME = "outcomes.jsonl"


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        regime: by name, or the path of the file that describes it.
        candidate: as :func:`benchmarks.comparison.candidates.make_optimizer` takes it.
        rate: learning rate.
        seed: of the model, the adapter and the order of the data.
    """

    regime: str
    candidate: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Outcome(Run):
    """The end of a run.

    Attributes:
        loss: validation loss at the end, infinite where the training diverged.
        training_loss: mean over all steps.
        seconds: of the steps, without evaluations; on a CPU those of the process.
        exponents: 1/p by matrix, by step of the estimate; empty where p is not estimated.
        curve: step, seconds until then and validation loss, at every evaluation.
        state: bytes of the optimizer's state.
        memory: largest number of bytes allocated on a GPU; 0 on a CPU.
        machine: the device by name, and torch's version.
        date: the day, as 2026-11-27.
    """

    loss: float
    training_loss: float
    seconds: float
    exponents: dict[str, dict[str, float]] = field(default_factory=dict)
    curve: list[list[float]] = field(default_factory=list)
    state: int = 0
    memory: int = 0
    machine: str = ""
    date: str = ""

    def line(self) -> str:
        """Return the line that a file has of it."""
        return json.dumps(asdict(self)) + "\n"


def load(path: Path) -> list[Outcome]:
    """Return the outcomes in a file, none where there is no file yet."""
    return [Outcome(**json.loads(line)) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
