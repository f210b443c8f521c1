"""What a comparison of optimizers consists of: the task, the candidates, their runs, and which runs are next.

Every candidate gets a sweep over learning rates at the task's first seed; a sweep whose best rate lies at its end is
extended by factors of two until it does not. The best rate then runs with the other seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

_MOST_RATES = 8  # of one sweep: a candidate that wants more has no best learning rate


class ComparisonError(ValueError):
    """A comparison cannot be made; the message names what is wrong and the fix."""


@dataclass(frozen=True)
class Candidate:
    """An optimizer with its options and the learning rates to begin its sweep with.

    Attributes:
        name: As in tables.
        optim: Name that Trainer takes as ``--optim``; ``torch_muon`` is the benchmark's own.
        optim_args: Its options, as Trainer's ``--optim_args`` takes them; "" for none.
        learning_rates: Increasing, at least four for a sweep that means something.
    """

    name: str
    optim: str
    optim_args: str
    learning_rates: tuple[float, ...]


@dataclass(frozen=True)
class Task:
    """A training script and how its runs are compared.

    Attributes:
        script: Path of a script that takes Trainer's arguments.
        arguments: Its arguments, the same for all runs.
        metric: Key of the evaluation's logs that decides, such as ``eval_loss``.
        greater_is_better: Whether more of it is better.
        seeds: The first is the sweep's.
        candidates: What is compared.
    """

    script: Path
    arguments: tuple[str, ...]
    metric: str
    greater_is_better: bool
    seeds: tuple[int, ...]
    candidates: tuple[Candidate, ...]

    @classmethod
    def load(cls, path: Path) -> Task:
        """Read a YAML file; ``script`` and arguments that name files are relative to it.

        Raises:
            ComparisonError: A key is missing or unknown.
        """
        try:
            content = yaml.safe_load(path.read_text("utf-8"))
            rates = content.pop("learning_rates")
            candidates = tuple(
                Candidate(
                    name,
                    settings.get("optim", "schatten_p"),
                    settings.get("optim_args", ""),
                    tuple(map(float, settings.get("learning_rates", rates))),
                )
                for name, settings in content.pop("candidates").items()
            )
            return cls(
                script=path.parent / content.pop("script"),
                arguments=tuple(_argument(text, path.parent) for text in content.pop("arguments")),
                metric=content.pop("metric"),
                greater_is_better=content.pop("greater_is_better"),
                seeds=tuple(content.pop("seeds")),
                candidates=candidates,
                **content,
            )
        except (OSError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise ComparisonError(f"{path} describes no comparison: {error!r}. See benchmarks/README.md.") from error

    def only(self, names: Sequence[str]) -> tuple[Candidate, ...]:
        """Return the named candidates, all of them without names.

        Raises:
            ComparisonError: There is no such candidate.
        """
        known = {candidate.name: candidate for candidate in self.candidates}
        for name in names:
            if name not in known:
                raise ComparisonError(f"There is no candidate {name!r}; there are: {', '.join(known)}.")
        return tuple(known[name] for name in names or known)


def _argument(text: Any, folder: Path) -> str:
    beside = folder / str(text)
    return str(beside) if beside.is_file() else str(text)


@dataclass(frozen=True)
class Run:
    """One training: a candidate at one learning rate with one seed."""

    candidate: Candidate
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder and file."""
        readable = "".join(c if c.isalnum() or c in "-." else "_" for c in self.candidate.name)
        return f"{readable}_lr{self.learning_rate:.3g}_seed{self.seed}"

    def flags(self) -> list[str]:
        """The arguments that make the script train so."""
        options = ["--optim_args", self.candidate.optim_args] if self.candidate.optim_args else []
        return [
            *("--optim", self.candidate.optim, *options),
            *("--learning_rate", repr(self.learning_rate), "--seed", str(self.seed)),
        ]


@dataclass(frozen=True)
class Outcome:
    """What a run left.

    Attributes:
        candidate: Name of the candidate.
        learning_rate: Its learning rate.
        seed: Its seed.
        arguments: All arguments of the script but the output folder, by which a stored outcome is recognised.
        logs: Trainer's log history.
        steps: Steps at the ends of which the times below were taken.
        seconds: Time of training up to there, without evaluations and saves.
        cpu_seconds: The same as time of all the process' threads.
        optimizer_seconds: The part of ``seconds`` that was inside the optimizer's step.
        optimizer_cpu_seconds: The part of ``cpu_seconds`` that was.
        device: Where it trained: ``cpu``, ``cuda``, …
        machine: The device by name, and the versions of what it trained with.
        date: The day, as 2026-11-23.
    """

    candidate: str
    learning_rate: float
    seed: int
    arguments: tuple[str, ...]
    logs: list[dict[str, Any]] = field(repr=False)
    steps: list[int] = field(repr=False)
    seconds: list[float] = field(repr=False)
    cpu_seconds: list[float] = field(repr=False)
    optimizer_seconds: list[float] = field(repr=False)
    optimizer_cpu_seconds: list[float] = field(repr=False)
    device: str = "cpu"
    machine: str = "unknown machine"
    date: str = "unknown date"

    @classmethod
    def load(cls, path: Path) -> Outcome:
        """Read one that :meth:`save` wrote."""
        content = json.loads(path.read_text("utf-8"))
        return cls(**content | {"arguments": tuple(content["arguments"])})

    def save(self, path: Path) -> None:
        """Write it under a temporary name and rename: an interrupted comparison leaves no half outcome."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self)) + "\n", "utf-8")
        temporary.replace(path)

    @property
    def step_time(self) -> float:
        """Mean seconds of a training step, due ones included: of the processor on a CPU, else of the clock."""
        return (self.cpu_seconds if self.device == "cpu" else self.seconds)[-1] / self.steps[-1]

    @property
    def optimizer_time(self) -> float:
        """Mean seconds of the optimizer in a step."""
        total = self.optimizer_cpu_seconds if self.device == "cpu" else self.optimizer_seconds
        return total[-1] / self.steps[-1]

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one key of the logs, the last of several at one step."""
        values = {entry["step"]: entry[key] for entry in self.logs if key in entry}
        return list(values), [math.nan if value is None else value for value in values.values()]

    def final(self, metric: str) -> float:
        """The last value of the metric; not a number where the training failed to keep it finite.

        Raises:
            ComparisonError: The logs have no such key.
        """
        values = self.curve(metric)[1]
        if not values:
            raise ComparisonError(
                f"The logs of {self.candidate} have no {metric!r}: let the script evaluate, or choose another metric."
            )
        return values[-1]


@dataclass(frozen=True)
class Standing:
    """The outcomes of one candidate so far."""

    task: Task
    candidate: Candidate
    outcomes: tuple[Outcome, ...]

    def losses(self) -> dict[float, float]:
        """Metric by learning rate, of the sweep's seed, the smaller the better; infinite where it is no number."""
        sign = -1 if self.task.greater_is_better else 1
        found = {
            outcome.learning_rate: sign * outcome.final(self.task.metric)
            for outcome in self.outcomes
            if outcome.seed == self.task.seeds[0]
        }
        return {rate: math.inf if math.isnan(loss) else loss for rate, loss in sorted(found.items())}

    @cached_property
    def best_rate(self) -> float:
        """The best learning rate of the sweep."""
        losses = self.losses()
        return min(losses, key=losses.__getitem__)

    def best_outcomes(self) -> list[Outcome]:
        """The outcomes at the best rate, in the order of their seeds."""
        at_best = [outcome for outcome in self.outcomes if outcome.learning_rate == self.best_rate]
        return sorted(at_best, key=lambda outcome: self.task.seeds.index(outcome.seed))

    def mean(self) -> float:
        """Mean of the final metric at the best rate, over the seeds that have run."""
        return statistics.fmean(outcome.final(self.task.metric) for outcome in self.best_outcomes())

    def mean_curve(self) -> tuple[list[int], list[float]]:
        """Steps of the evaluations, and means of the metric there at the best rate, over the seeds that have run."""
        curves = [outcome.curve(self.task.metric) for outcome in self.best_outcomes()]
        return curves[0][0], [statistics.fmean(values) for values in zip(*(each for _, each in curves), strict=True)]

    def standard_error(self) -> float:
        """Standard error of that mean, not a number of one seed."""
        values = [outcome.final(self.task.metric) for outcome in self.best_outcomes()]
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def next_runs(task: Task, candidate: Candidate, outcomes: Iterable[Outcome], seeds: int) -> list[Run]:
    """Return what a candidate's comparison lacks and can run now: the sweep, its extension, or the other seeds.

    Args:
        task: The task.
        candidate: The candidate.
        outcomes: Its outcomes so far.
        seeds: How many of the task's seeds to use.
    """
    done = {(outcome.learning_rate, outcome.seed) for outcome in outcomes}
    first = task.seeds[0]
    missing = [rate for rate in candidate.learning_rates if (rate, first) not in done]
    if missing:
        return [Run(candidate, rate, first) for rate in missing]
    standing = Standing(task, candidate, tuple(outcomes))
    losses, best = standing.losses(), standing.best_rate
    if 1 < len(losses) < _MOST_RATES and math.isfinite(losses[best]):
        # An accuracy of few examples is often the same at both ends: the sweep then goes on at both.
        beyond = {min(losses): min(losses) / 2, max(losses): max(losses) * 2}
        if further := [Run(candidate, beyond[end], first) for end in beyond if losses[end] == losses[best]]:
            return further
    return [Run(candidate, best, seed) for seed in task.seeds[:seeds] if (best, seed) not in done]
