"""What adapting p costs: time and peak memory of the same training with and without it.

Runs of a GPT-2 with random weights and tokens alternate in one process: p fixed, p adaptive with one step of the run
due, p fixed, …; on a GPU with ``bf16`` autocast. The time that adaptation adds to a run is that of one due step and of
hooks on the others; it is scaled to one due step in ``--interval`` steps. Peak memory is the largest sum of the sizes
of living tensors, over steps that are all due. Nothing here asserts a time.

Usage:
    python benchmarks/adaptation/adaptation_overhead.py                             # 12 M parameters, ten minutes
    python benchmarks/adaptation/adaptation_overhead.py --estimators exact lanczos  # several in turn
    python benchmarks/adaptation/adaptation_overhead.py --device cuda --width 768 --layers 12
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.interleaved_timing import Ratio, time_ratio
from benchmarks.random_gpt2 import Setting, loss_of, random_gpt2
from benchmarks.tables import print_table
from hf_schatten import SchattenOptions, SchattenP, create_schatten_optimizer
from hf_schatten.linalg.spectrum import LOG_NORM_ESTIMATORS


@dataclass(frozen=True)
class Runs(Setting):
    """The training whose runs are measured.

    Attributes:
        micro_batches: Backward passes in a step.
        run_steps: Steps of a run, one of which is due where p is adaptive.
    """

    micro_batches: int
    run_steps: int


class Training:
    """A model, its optimizer, and runs of steps on one random batch.

    Args:
        setting: The training.
        options: Of the optimizer.
    """

    def __init__(self, setting: Runs, **options: Any) -> None:
        self._steps = setting.run_steps
        self._model, tokens = random_gpt2(setting)
        self._optimizer: SchattenP = create_schatten_optimizer(self._model, 1e-4, verbose=False, **options)
        self._batches = tokens.chunk(setting.micro_batches)

    @property
    def parameters(self) -> int:
        """Number of the model's parameters."""
        return self._model.num_parameters()

    def run(self) -> None:
        """Take the steps of a run."""
        for _ in range(self._steps):
            for tokens in self._batches:
                (loss_of(self._model, tokens) / len(self._batches)).backward()
            self._optimizer.step()
            self._optimizer.zero_grad()


def adaptive_options(setting: Runs, estimator: str) -> dict[str, Any]:
    """Options with one due step in each run, its last."""
    interval = setting.run_steps
    return {"p": "adaptive", "p_estimator": estimator, "p_interval": interval, "p_first_step": interval}


def measure_time(setting: Runs, options: dict[str, Any], repeats: int) -> tuple[Ratio, int]:
    """Time of a run with these options over that of a run with fixed p; and the model's parameters."""
    fixed, adaptive = Training(setting, p=4.0), Training(setting, **options)
    ratio = time_ratio(adaptive.run, fixed.run, repeats, torch.device(setting.device))
    return ratio, fixed.parameters


def measure_peak_memory(setting: Runs, options: dict[str, Any]) -> int:
    """Largest sum of the sizes of living tensors, in bytes, over model, optimizer and two runs."""
    if torch.device(setting.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        _train(setting, options)
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _train(setting, options)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def _train(setting: Runs, options: dict[str, Any]) -> None:
    training = Training(setting, **options)
    for _ in range(2):
        training.run()


def overhead(ratio: float, setting: Runs, interval: int) -> float:
    """Share of training time, where one of ``interval`` steps is due instead of one of a run's."""
    return (ratio - 1) * setting.run_steps / interval


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    setting = Runs(
        *(options.device, options.layers, options.width, options.sequences, options.length),
        *(options.vocabulary, options.micro_batches, options.run_steps),
    )
    peak = measure_peak_memory(replace(setting, run_steps=1), {"p": 4.0})
    idle, _ = measure_time(setting, {"p": "adaptive", "p_interval": 10**9, "p_first_step": 10**9}, options.repeats)
    rows: list[dict[str, Any]] = []
    for estimator in options.estimators:
        adaptive = adaptive_options(setting, estimator)
        ratio, parameters = measure_time(setting, adaptive, options.repeats)
        share = partial(overhead, setting=setting, interval=options.interval)
        every_step = adaptive_options(replace(setting, run_steps=1), estimator)
        rows.append(
            {
                "estimator": estimator,
                "parameters": parameters,
                "overhead": share(ratio.median),
                "overhead_quartiles": [share(ratio.low), share(ratio.high)],
                "step_seconds": ratio.reference_seconds / setting.run_steps,
                "due_step_seconds": ratio.seconds - ratio.reference_seconds,
                "peak_bytes": peak,
                "adaptive_peak_bytes": measure_peak_memory(replace(setting, run_steps=1), every_step),
            }
        )
    print(f"{rows[0]['parameters']:,} parameters, {setting}, {torch.get_num_threads()} threads")
    header = (f"time, 1 due step in {options.interval} (quartiles)", "added to a due step", "a step", "peak memory")
    print_table(("estimator", *header), map(_cells, rows))
    print(f"\nSteps that are not due, with hooks over without: {idle.median:.4f} ({idle.low:.4f} to {idle.high:.4f})")
    options.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {"setting": asdict(setting), "interval": options.interval, "hooks": asdict(idle), "rows": rows}, indent=1
    )
    (options.output / "adaptation_overhead.json").write_text(text + "\n", "utf-8")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = row["overhead_quartiles"]
    return (
        row["estimator"],
        f"{row['overhead']:+.2%} ({low:+.2%} to {high:+.2%})",
        f"{row['due_step_seconds']:.3f} s",
        f"{row['step_seconds']:.3f} s",
        f"{row['adaptive_peak_bytes'] / row['peak_bytes'] - 1:+.2%} of {row['peak_bytes'] / 2**20:.0f} MiB",
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (default cpu)")
    parser.add_argument(
        "--estimators",
        nargs="+",
        choices=list(LOG_NORM_ESTIMATORS),
        default=[SchattenOptions.p_estimator],
        help="of the spectra (default: the package's)",
    )
    parser.add_argument("--interval", type=int, default=100, help="steps between estimates (default %(default)s)")
    parser.add_argument("--run-steps", type=int, default=5, help="steps of a run (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="runs of each variant (default %(default)s)")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--micro-batches", type=int, default=1, help="backward passes in a step (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"), help="folder (default %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
