"""Trainings by the hundred: workers that take runs from a queue, and a file that has one line for each outcome."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import multiprocessing, nn

from benchmarks.geometry.command_line import positive
from benchmarks.regimes.candidates import make_optimizer
from benchmarks.regimes.regimes import REGIMES, rate_factor
from hf_schatten import SchattenP

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        regime: by name.
        candidate: as :func:`benchmarks.regimes.candidates.make_optimizer` takes it.
        rate: learning rate.
        seed: of the model, the adapter and the order of the data.
    """

    regime: str
    candidate: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Outcome(Run):
    """The end of a run: its losses, its time, and 1/p of every matrix at every estimate."""

    loss: float
    training_loss: float
    seconds: float
    exponents: dict[str, dict[str, float]] = field(default_factory=dict)  # s by matrix, by step


def train(run: Run) -> Outcome:
    """Train, and return what became of it."""
    regime = REGIMES[run.regime]
    training = regime.make(run.seed)
    model, steps = training.model.train(), regime.steps
    optimizer = make_optimizer(run.candidate, regime, model, run.rate, run.seed)
    exponents: dict[str, dict[str, float]] = {}
    start, losses = time.perf_counter(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = run.rate * rate_factor(step, steps)
        of_step = training.loss(model, training.batch(step))
        losses.append(of_step.item())
        if not math.isfinite(losses[-1]):
            return Outcome(**asdict(run), loss=math.inf, training_loss=math.inf, seconds=0.0)
        of_step.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if "adaptive" in run.candidate and isinstance(optimizer, SchattenP) and (step + 1) % regime.interval == 0:
            exponents[str(step + 1)] = {name: round(1 / p, 4) for name, p in optimizer.learned_p().items()}
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        validation = [training.loss(model, batch).item() for batch in training.validation]
    held_out = mean(validation)
    if not math.isfinite(held_out):  # after the last step: NaN would compare with nothing
        held_out = math.inf
    return Outcome(**asdict(run), loss=held_out, training_loss=mean(losses), seconds=seconds, exponents=exponents)


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line of a script that runs trainings: its own arguments, and those of all."""
    parser.add_argument("regimes", nargs="*", default=[*REGIMES], help=f"some of: {', '.join(REGIMES)}")
    parser.add_argument("--workers", type=positive, default=2, help="runs at a time (default %(default)s)")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds after which no run begins")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder (default %(default)s)")
    options = parser.parse_args(arguments)
    for regime in options.regimes:
        if regime not in REGIMES:
            parser.error(f"{regime!r} is not a regime: one of {', '.join(REGIMES)}")
    return options


def load(path: Path) -> list[Outcome]:
    """Return the outcomes in a file."""
    return [Outcome(**json.loads(line)) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def _work(jobs: Any, outcomes: Any) -> None:
    """Take runs from a queue until there is none."""
    torch.set_num_threads(1)
    while (run := jobs.get()) is not None:
        try:
            outcomes.put((run, train(run)))
        except Exception as error:  # told to the parent
            outcomes.put((run, repr(error)))


def run_all(
    path: Path, wanted: Callable[[list[Outcome]], list[Run]], *, workers: int, deadline: float = math.inf
) -> Iterator[Outcome]:
    """Run what is wanted, given what a file holds, and add it there, until nothing is; yield outcomes as they come.

    After ``deadline`` seconds no run begins. One more call goes on.

    Raises:
        RuntimeError: when a run fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    jobs: Any = context.Queue()
    outcomes: Any = context.Queue()
    processes = [context.Process(target=_work, args=(jobs, outcomes), daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    done, under_way = load(path), set[Run]()
    try:
        with path.open("a", encoding="utf-8") as file:
            while True:
                waiting = [run for run in wanted(done) if run not in under_way]
                while waiting and len(under_way) < workers and time.monotonic() - start < deadline:
                    under_way.add(waiting[0])
                    jobs.put(waiting.pop(0))
                if not under_way:
                    break
                run, outcome = outcomes.get()
                if isinstance(outcome, str):
                    raise RuntimeError(f"{run} failed: {outcome}")
                under_way.remove(run)
                done.append(outcome)
                file.write(json.dumps(asdict(outcome)) + "\n")
                file.flush()
                yield outcome
    finally:  # also where the caller stops early
        for _ in processes:
            jobs.put(None)
        for process in processes:
            process.join(10)
