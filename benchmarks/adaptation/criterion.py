"""The estimators of p on the layers of a real training run: error in s = 1/p, time, memory and bytes to synchronise.

Gradients and inputs come from short runs of a GPT-2 on the standard library's source and are cached, so that a second
call measures only. The reference is ``exact`` in float64 on the gradient and all captured tokens. Prints its tables
and writes them to ``criterion.md`` and ``criterion.json``; a time is a ratio of calls that ran alternately in this
process, and nothing here asserts one.

Usage:
    python benchmarks/adaptation/criterion.py                                 # captures first: ten minutes
    python benchmarks/adaptation/criterion.py --estimators lanczos iterates   # some of them
    python benchmarks/adaptation/criterion.py --quick                         # tiny model: does it run?
"""

import argparse
import io
import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.adaptation.captured_layers import NARROW, TINY, WIDE, CapturedLayer, TrainingRun, captured_layers
from benchmarks.interleaved_timing import time_ratio
from benchmarks.tables import print_table
from hf_schatten.adaptive.criterion import exponent_nodes, maximising_exponent, objective_curve
from hf_schatten.adaptive.probe import RowSample
from hf_schatten.linalg.iterate_norms import iterate_log_norms
from hf_schatten.linalg.spectrum import LOG_NORM_ESTIMATORS, LogNormEstimator, exact_log_norms, of_unit_matrices
from hf_schatten.optim.matrix import CURVES, NODES

RANGES = {"p in [1, 100]": (0.01, 1.0), "s in [-0.25, 1]": (-0.25, 1.0)}
ESTIMATORS: dict[str, LogNormEstimator] = {
    **{name: estimator for name, estimator in LOG_NORM_ESTIMATORS.items() if name != "auto"},  # which is one of them
    "iterates in float16": of_unit_matrices(partial(iterate_log_norms, dtype=torch.float16)),  # as on a GPU
}
ROWS = 1024  # of the inputs, by default, in training
TARGET = (0.02, 0.06)  # error of s: median, 95th percentile
_EDGE = 1e-3  # an s closer than this to the end of its range is at the end


@dataclass(frozen=True)
class Curves:
    """Log-norms at the criterion's nodes, (layers, NODES) each.

    Attributes:
        gradients: at orders 1 + s.
        inputs: at orders 2 (1 + s) / (1 − s).
    """

    gradients: Tensor
    inputs: Tensor

    def exponents(self, bounds: tuple[float, float], crossed: bool) -> Tensor:
        """The s of every layer, (layers,), or of every gradient with every input, (layers², )."""
        gradients, inputs = self.gradients, self.inputs
        if crossed:
            count = len(gradients)
            gradients, inputs = gradients.repeat_interleave(count, 0), inputs.repeat(count, 1)
        return maximising_exponent(objective_curve(torch.stack([gradients, inputs], dim=1), *bounds), *bounds)


@dataclass(frozen=True)
class Errors:
    """How far the s of one estimator are from the exact ones.

    Attributes:
        layers: median, 95th percentile and maximum over layers.
        crossed: the same over all pairs of a gradient and an input of one run whose exact s is inside its range.
    """

    layers: tuple[float, ...]
    crossed: tuple[float, ...]

    @classmethod
    def between(cls, estimate: Sequence[Curves], exact: Sequence[Curves], bounds: tuple[float, float]) -> "Errors":
        """Compare curves, one element a run."""

        def errors(crossed: bool) -> Tensor:
            s = torch.cat([curves.exponents(bounds, crossed) for curves in exact])
            error = (torch.cat([curves.exponents(bounds, crossed) for curves in estimate]) - s).abs()
            return error[is_inside(s, bounds)] if crossed else error

        return cls(_quantiles(errors(False)), _quantiles(errors(True)))


def is_inside(s: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Whether the criterion has its maximum inside the range."""
    return (s > bounds[0] + _EDGE) & (s < bounds[1] - _EDGE)


def curves_of(layers: Sequence[CapturedLayer], estimator: LogNormEstimator, rows: int | None = None) -> Curves:
    """The curves of layers by an estimator, from all captured tokens or from a sample of them."""
    s = exponent_nodes()
    gradients = [estimator(layer.gradient, 1 / (1 + s)) for layer in layers]
    inputs = [estimator(sampled(layer.inputs, rows), (1 - s) / (2 * (1 + s))) for layer in layers]
    return Curves(torch.stack(gradients), torch.stack(inputs))


def sampled(inputs: Tensor, rows: int | None) -> Tensor:
    """The rows that training would sample; all of them for None."""
    if rows is None:
        return inputs
    sample = RowSample(rows)
    sample.offer(len(inputs), lambda index: inputs[index])()
    kept = sample.rows()
    assert kept is not None
    return kept


def measure_errors(runs: list[list[CapturedLayer]], exact: list[Curves], names: Sequence[str]) -> dict[str, Any]:
    """Errors of every estimator on all captured tokens, by range of s."""
    results = {}
    for name in names:
        progress(f"errors of {name}")
        estimate = [curves_of(layers, ESTIMATORS[name]) for layers in runs]
        results[name] = {label: asdict(Errors.between(estimate, exact, RANGES[label])) for label in RANGES}
    _print_errors("estimator", results)
    return results


def measure_sampling(runs: list[list[CapturedLayer]], exact: list[Curves]) -> dict[str, Any]:
    """Errors of the exact norms of a sample of the tokens."""
    tokens = len(runs[0][0].inputs)
    results = {}
    for rows in (tokens // 16, tokens // 8, tokens // 4, tokens // 2):
        progress(f"sample of {rows} rows")
        estimate = [curves_of(layers, exact_log_norms, rows) for layers in runs]
        results[f"{rows} of {tokens} rows"] = {
            label: asdict(Errors.between(estimate, exact, RANGES[label])) for label in RANGES
        }
    _print_errors("sample", results)
    return results


def measure_costs(runs: list[list[CapturedLayer]], names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Time relative to ``exact`` and peak memory of every estimator, for every kind of layer."""
    kinds = {(layer.run, tuple(layer.gradient.shape)): layer for layers in runs for layer in layers}
    results: dict[str, Any] = {}
    for (run, shape), layer in kinds.items():
        label = f"{run}, {shape[0]} × {shape[1]}"
        progress(f"costs at {label}")
        calls = {name: _estimation(layer, name) for name in names}
        results[label] = {name: _cost(call, calls["exact"], repeats) for name, call in calls.items()}
    others = [name for name in names if name != "exact"]
    print(f"Time of one layer's gradient and {ROWS} input rows relative to `exact`, and quartiles:\n")
    print_table(
        ("layer", "`exact`, ms", *others),
        [
            (label, f"{row['exact']['ms']:.1f}", *(_time_cell(row[name]) for name in others))
            for label, row in results.items()
        ],
    )
    print("\nPeak of the memory that an estimator allocates beside gradient and input rows, MiB:\n")
    print_table(
        ("layer", *names),
        [(label, *(f"{row[name]['peak'] / 2**20:.1f}" for name in names)) for label, row in results.items()],
    )
    return results


def measure_bytes(runs: list[list[CapturedLayer]]) -> dict[str, int]:
    """Bytes of a layer that processes would exchange, by what they exchange."""
    layer = max((layer for layers in runs for layer in layers), key=lambda layer: layer.inputs.shape[1])
    width = layer.inputs.shape[1]
    rows = min(ROWS, len(layer.inputs))
    values = min(layer.gradient.shape) + min(rows, width)
    results = {
        "curves at the nodes, as any estimator gives (float64)": CURVES * NODES * 8,
        "singular values of gradient and sampled rows (float32)": 4 * values,
        f"the {rows} sampled rows (float32)": 4 * rows * width,
        "the inputs' second moments (float32)": 4 * width * width,
    }
    print(f"Bytes that a process sends for one layer whose inputs have {width} features:\n")
    print_table(("what", "bytes"), [(what, f"{size:,}") for what, size in results.items()])
    return results


def describe_layers(exact: list[Curves]) -> dict[str, Any]:
    """How many layers there are, and of how many the exact s is inside its range."""
    results: dict[str, Any] = {}
    for label, bounds in RANGES.items():
        s = torch.cat([curves.exponents(bounds, False) for curves in exact])
        pairs = torch.cat([curves.exponents(bounds, True) for curves in exact])
        inside, inside_pairs = (int(is_inside(values, bounds).sum()) for values in (s, pairs))
        results[label] = {"layers": len(s), "inside": inside, "pairs": len(pairs), "pairs inside": inside_pairs}
        print(
            f"- {label}: s is inside the range for {inside} of {len(s)} layers, {inside_pairs} of {len(pairs)} pairs"
        )
    return results


def peak_memory(call: Callable[[], object]) -> int:
    """Largest total of bytes that a call holds at once, of all that PyTorch's CPU allocator hands out.

    Copies and workspaces of PyTorch's decompositions are part of it, buffers inside the BLAS library are not.
    """
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def progress(what: str) -> None:
    """Say what is being measured, beside the tables."""
    print(what, file=sys.stderr, flush=True)


def _estimation(layer: CapturedLayer, name: str) -> Callable[[], object]:
    """What training does with a layer on a due step, but for the choice of s."""
    estimator, s, rows = ESTIMATORS[name], exponent_nodes(), sampled(layer.inputs, ROWS)
    return lambda: (estimator(layer.gradient, 1 / (1 + s)), estimator(rows, (1 - s) / (2 * (1 + s))))


def _cost(call: Callable[[], object], exact: Callable[[], object], repeats: int) -> dict[str, Any]:
    ratio = time_ratio(call, exact, repeats, torch.device("cpu"))
    return {"ms": 1e3 * ratio.seconds, "ratio": [ratio.low, ratio.median, ratio.high], "peak": peak_memory(call)}


def _time_cell(cost: dict[str, Any]) -> str:
    low, median, high = cost["ratio"]
    return f"{median:.2f} ({low:.2f}–{high:.2f})"


def _print_errors(header: str, results: dict[str, Any]) -> None:
    print("Errors of s: median / 95th percentile / maximum; pairs: exact s inside the range.\n")
    columns = [f"{label}: {kind}" for label in RANGES for kind in ("layers", "pairs")]
    print_table(
        (header, *columns, "target"),
        [
            (
                name,
                *(_error_cell(row[label][kind]) for label in RANGES for kind in ("layers", "crossed")),
                _verdict(row),
            )
            for name, row in results.items()
        ],
    )


def _error_cell(quantiles: Sequence[float]) -> str:
    return " / ".join(f"{value:.4f}" for value in quantiles) if quantiles else "–"


def _verdict(row: dict[str, Any]) -> str:
    """Whether layers and pairs of both ranges meet the target."""
    groups = [row[label][kind] for label in RANGES for kind in ("layers", "crossed") if row[label][kind]]
    return "met" if all(group[0] <= TARGET[0] and group[1] <= TARGET[1] for group in groups) else "missed"


def _quantiles(errors: Tensor) -> tuple[float, ...]:
    if errors.numel() == 0:
        return ()
    ordered = sorted(errors.tolist())
    high = statistics.quantiles(ordered, n=20, method="inclusive")[-1] if len(ordered) > 1 else ordered[0]
    return statistics.median(ordered), high, ordered[-1]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    plans: list[TrainingRun] = [TINY] if options.quick else [NARROW, WIDE]
    runs = [list(captured_layers(plan, options.cache)) for plan in plans]
    progress("exact norms of all captured tokens")
    exact = [curves_of(layers, exact_log_norms) for layers in runs]
    names = ["exact", *(name for name in options.estimators if name != "exact")]
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "layers": lambda: describe_layers(exact),
        "error": lambda: measure_errors(runs, exact, names[1:]),
        "cost": lambda: measure_costs(runs, names, options.repeats),
        "sampling": lambda: measure_sampling(runs, exact),
        "bytes": lambda: measure_bytes(runs),
    }
    results: dict[str, Any] = {"machine": describe_machine(options.repeats)}
    text = io.StringIO()
    with redirect_stdout(text):
        print("# Estimators of p\n")
        print(", ".join(f"{key} {value}" for key, value in results["machine"].items()))
        for name, measure in sections.items():
            print(f"\n## {name.capitalize()}\n")
            results[name] = measure()
    print(text.getvalue())
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "criterion.md").write_text(text.getvalue(), "utf-8")
    (options.output / "criterion.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"Written to {options.output}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache", type=Path, default=Path("outputs/captured_layers"), help="folder of the captures")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"), help="folder (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each side of a ratio (default 7)")
    parser.add_argument("--estimators", nargs="+", choices=list(ESTIMATORS), default=list(ESTIMATORS))
    parser.add_argument("--quick", action="store_true", help="a tiny model, only to check that everything runs")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    return options


def describe_machine(repeats: int) -> dict[str, Any]:
    return {
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": repeats,
    }


if __name__ == "__main__":
    main()
