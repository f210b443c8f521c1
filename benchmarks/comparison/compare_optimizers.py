"""Compare optimizers on a training script: a sweep of learning rates for each, then more seeds at the best rate.

Usage:
    python benchmarks/comparison/compare_optimizers.py recipes/pretrain_clm/comparison.yaml
    python benchmarks/comparison/compare_optimizers.py TASK.yaml --only "p = 2" "p = 4" --seeds 1  # two sweeps
    python benchmarks/comparison/compare_optimizers.py TASK.yaml --report                          # of what has run
    python benchmarks/comparison/compare_optimizers.py TASK.yaml --keep --only "p = 3"             # one more row

A run that is stored is not run again, so that an interrupted comparison goes on where it stopped. Tables, a picture
and all outcomes go beside the task's file: into ``results`` from ``comparison.yaml``, and into ``results_NAME`` from
``NAME_comparison.yaml`` or ``NAME.yaml``. A report is of what has run here, and with ``--keep`` also of what it had
before, which does not run again.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

from benchmarks.comparison import comparison_numbers
from benchmarks.comparison.comparison import Candidate, ComparisonError, Outcome, Run, Standing, Task, next_runs
from benchmarks.comparison.comparison_numbers import load_outcomes
from benchmarks.comparison.comparison_report import write_report

_TIMED_RUN = Path(__file__).with_name("timed_run.py")


class Store:
    """The outcomes of a task's runs, one file each.

    Args:
        task: The task; outcomes of other arguments than its own are passed over.
        folder: Where the files are.
        kept: Outcomes of an earlier report, where there is no file of the same run.
    """

    def __init__(self, task: Task, folder: Path, kept: Sequence[Outcome] = ()) -> None:
        self.task, self._folder, self._kept = task, folder, kept

    def outcomes(self, candidate: Candidate) -> list[Outcome]:
        """The stored outcomes of a candidate, as it is now."""
        stored = [Outcome.load(path) for path in sorted(self._folder.glob("*.json"))]
        found = {
            (outcome.learning_rate, outcome.seed): outcome
            for outcome in (*self._kept, *stored)
            if self._is_of(outcome, candidate)
        }
        return [found[run] for run in sorted(found)]

    def not_kept(self) -> list[str]:
        """The candidates, by name, of earlier outcomes that are of other arguments, or of no candidate any more."""
        lost = [each for each in self._kept if not any(self._is_of(each, one) for one in self.task.candidates)]
        return list(dict.fromkeys(outcome.candidate for outcome in lost))

    def execute(self, run: Run, threads: int) -> None:
        """Train, and store the outcome.

        Raises:
            ComparisonError: The script failed; its output is kept.
        """
        folder = self._folder / run.name
        folder.mkdir(parents=True, exist_ok=True)
        arguments, times = self._arguments(run), folder / "times.json"
        command = [sys.executable, str(_TIMED_RUN), str(times), str(self.task.script), *self.task.arguments]
        command += [*run.flags(), "--output_dir", str(folder / "output")]
        log = folder / "output.log"
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                check=False,
            ).returncode
        if code:
            raise ComparisonError(f"{self.task.script} failed with exit code {code}; its output is in {log}.")
        outcome = Outcome(
            candidate=run.candidate.name,
            learning_rate=run.learning_rate,
            seed=run.seed,
            arguments=arguments,
            **json.loads(times.read_text("utf-8")),
        )
        outcome.save(self._folder / f"{run.name}.json")

    def _is_of(self, outcome: Outcome, candidate: Candidate) -> bool:
        return (
            outcome.candidate == candidate.name
            and outcome.seed in self.task.seeds
            and outcome.arguments == self._arguments(Run(candidate, outcome.learning_rate, outcome.seed))
        )

    def _arguments(self, run: Run) -> tuple[str, ...]:
        """Return the arguments of a run, a file's by name and digest: outcomes of another content are others."""
        return (*map(_identity, self.task.arguments), *run.flags())


def _identity(argument: str) -> str:
    path = Path(argument)
    if not path.is_file():
        return argument
    return f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"


def run_all(store: Store, candidates: Sequence[Candidate], seeds: int, *, jobs: int, threads: int) -> None:
    """Run what is missing, candidate by candidate, ``jobs`` runs at a time."""
    with ThreadPoolExecutor(jobs) as pool, tqdm(unit="run", smoothing=0) as bar:
        running: dict[Future[None], Run] = {}
        try:
            while True:
                busy = {run.name for run in running.values()}
                wanted = [
                    run for each in candidates for run in next_runs(store.task, each, store.outcomes(each), seeds)
                ]
                waiting = [run for run in wanted if run.name not in busy]
                bar.total = bar.n + len(running) + len(waiting)
                for run in waiting[: jobs - len(running)]:
                    running[pool.submit(store.execute, run, threads)] = run
                if not running:
                    return
                bar.set_postfix_str(", ".join(run.name for run in running.values()))
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    del running[future]
                    bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path, help="YAML file that describes the comparison")
    parser.add_argument("--only", nargs="+", default=[], metavar="CANDIDATE", help="leave the other candidates out")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every candidate's best rate (default 3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--threads", type=int, help="threads of a run (default: the cores divided by --jobs)")
    parser.add_argument("--runs", type=Path, help="folder of the outcomes (default outputs/comparisons/NAME)")
    parser.add_argument("--output", type=Path, help="folder of the report (default: beside TASK)")
    parser.add_argument("--report", action="store_true", help="run nothing; report on what has run")
    parser.add_argument("--keep", action="store_true", help="go on from the report that is there, and keep its rows")
    parsed = parser.parse_args(arguments)
    for name in ("seeds", "jobs", "threads"):
        value = getattr(parsed, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: give 1 or more")
    return parsed


def main(arguments: Sequence[str]) -> None:
    parsed = parse_arguments(arguments)
    task = Task.load(parsed.task)
    candidates = task.only(parsed.only)
    kind = parsed.task.stem.removesuffix("comparison").rstrip("_")
    name = "_".join(filter(None, (parsed.task.resolve().parent.name, kind)))
    output = parsed.output or parsed.task.parent / "_".join(filter(None, ("results", kind)))
    kept = load_outcomes(output / comparison_numbers.NAME, task.metric) if parsed.keep else []
    store = Store(task, parsed.runs or Path("outputs/comparisons") / name, kept)
    if lost := store.not_kept():
        print(
            f"Outcomes of other arguments leave the report: {', '.join(lost)}. {parsed.task}, or a file it names, "
            f"was changed since; restore it, and {output} from version control, to have them back.",
            file=sys.stderr,
        )
    if not parsed.report:
        threads = parsed.threads or max(1, (os.cpu_count() or 1) // parsed.jobs)
        run_all(store, candidates, parsed.seeds, jobs=parsed.jobs, threads=threads)
    shown = task.candidates if parsed.keep else candidates
    standings = [Standing(task, each, tuple(store.outcomes(each))) for each in shown]
    page = write_report([standing for standing in standings if standing.outcomes], output, title=name)
    print(page.read_text("utf-8"))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ComparisonError as error:
        sys.exit(f"compare_optimizers.py: error: {error}")
