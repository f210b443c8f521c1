"""Trainings by the hundred: workers that take runs from a queue, and a file that has one line for each outcome."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from benchmarks.comparison.outcomes import Outcome, Run, load
from benchmarks.comparison.regimes import SMALL, find
from benchmarks.comparison.scripts import Script
from benchmarks.geometry.command_line import positive

FOLDER = Path(__file__).parent / "results"


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line of a script that runs trainings: its own arguments, and those of all."""
    parser.add_argument("regimes", nargs="*", default=[*SMALL], help="default: the six small ones")
    parser.add_argument("--workers", type=positive, default=2, help="runs at a time (default %(default)s)")
    parser.add_argument("--device", type=torch.device, default=_default_device(), help="default here: %(default)s")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds after which no run is to go on")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--output", type=Path, help=f"folder (default {FOLDER}, or results beside a YAML file)")
    options = parser.parse_args(arguments)
    try:
        described = [regime for regime in options.regimes if isinstance(find(regime), Script)]
    except ValueError as error:
        parser.error(str(error))
    if options.output is None:
        folders = {Path(regime).parent / "results" if regime in described else FOLDER for regime in options.regimes}
        if len(folders) > 1:
            parser.error(f"these regimes have results in different folders: give --output, or one of {folders} a call")
        (options.output,) = folders
    return options


def _default_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _work(jobs: Any, outcomes: Any, device: torch.device) -> None:
    """Take runs from a queue until there is none."""
    torch.set_num_threads(1)
    while (run := jobs.get()) is not None:
        try:
            outcomes.put((run, find(run.regime).train(run, device)))
        except Exception as error:  # told to the parent
            outcomes.put((run, repr(error)))


def _expected(run: Run, outcomes: Sequence[Outcome]) -> float:
    """Return the seconds that a run may take."""
    return max((each.seconds for each in outcomes if each.regime == run.regime), default=0.0)


def run_all(
    path: Path,
    wanted: Callable[[list[Outcome]], list[Run]],
    *,
    workers: int,
    device: torch.device,
    deadline: float = math.inf,
) -> Iterator[Outcome]:
    """Run what is wanted, given what a file holds, and add it there, until nothing is; yield outcomes as they come.

    No run begins that would end after ``deadline`` seconds, if it is as long as the longest of its regime so far. One
    more call goes on.

    Raises:
        RuntimeError: when a run fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    jobs: Any = context.Queue()
    outcomes: Any = context.Queue()
    processes = [context.Process(target=_work, args=(jobs, outcomes, device), daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    done, under_way = load(path), set[Run]()
    try:
        with path.open("a", encoding="utf-8") as file:
            while True:
                left = deadline - (time.monotonic() - start)
                waiting = [run for run in wanted(done) if run not in under_way and _expected(run, done) < left]
                for run in waiting[: workers - len(under_way)]:
                    under_way.add(run)
                    jobs.put(run)
                if not under_way:
                    break
                run, outcome = outcomes.get()
                if isinstance(outcome, str):
                    raise RuntimeError(f"{run} failed: {outcome}")
                under_way.remove(run)
                done.append(outcome)
                file.write(outcome.line())
                file.flush()
                yield outcome
    finally:  # also where the caller stops early
        for _ in processes:
            jobs.put(None)
        for process in processes:
            process.join(10)
