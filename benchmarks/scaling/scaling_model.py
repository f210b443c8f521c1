"""Weak scaling of a training step to 1,024 ranks: compute, communication, overlap, and the bytes that travel.

A model, not a measurement. The work is counted by running the optimizers on tensors without memory, the rounds of
updates are those of `hf_schatten.distributed.replicated`, and the machine is a table of data-sheet numbers,
assumptions, and two numbers that are fitted to steps of one GPU (`scaling_gpu.py`), each with its source.
``--calibrate`` measures this machine and two real processes on it, and compares the model with them.

Usage:
    python benchmarks/scaling/scaling_model.py               # tables, picture; a minute
    python benchmarks/scaling/scaling_model.py --calibrate   # first measures this machine: five minutes more
    python benchmarks/scaling/scaling_model.py --quick       # tiny model: does it run?
"""

import argparse
import io
import json
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.scaling.scaling_calibration import CALIBRATED, QUICK, calibrate, print_calibration
from benchmarks.scaling.scaling_gpu import compare, print_comparison, trained
from benchmarks.scaling.scaling_machines import H100, Machine, all_reduce_bytes, with_network
from benchmarks.scaling.scaling_simulation import VARIANTS, Step, crossover
from benchmarks.scaling.scaling_workload import PLANS, Workload
from benchmarks.tables import print_table

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
NETWORKS = (400, 100, 25)  # Gb/s for each rank
# Of one number of the machine at a time, to see how much the outcome depends on it.
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"kernel_seconds": 5e-6},
    {"kernel_seconds": 2e-6},
    {"spectrum_seconds": 0.0},
    {"spectrum_seconds": 20e-3},
    {"training_efficiency": 0.5},
    {"layer_seconds": 0.0, "training_efficiency": 0.4},  # compiled, perhaps
    {"update_efficiency": 0.7},
    {"memory_rate": 0.6 * 3.35e12},
)
NAME = "scaling_model"
_SHARED, _ALONE = "ours, shared", "ours, replicated"

Simulated = dict[str, list[Step]]  # a step for each number of ranks, by variant


def simulate(workload: Workload, machine: Machine, interval: int, ranks: Sequence[int]) -> Simulated:
    """Return every variant's step on each number of ranks."""
    return {
        name: [variant(workload, machine, interval, number) for number in ranks] for name, variant in VARIANTS.items()
    }


def print_machine(machine: Machine) -> None:
    """Print every number of a machine with its source."""
    values = asdict(machine)
    rows = []
    for name, source in machine.sources.items():
        value: Any = values
        for part in name.split("."):
            value = value[part]
        rows.append((name, f"{value:g}", source))
    print_table(("number", "value", "source"), rows)


def print_bytes(workloads: Iterable[Workload], ranks: int) -> None:
    """Print what a rank sends in a step by what it is for."""
    rows = []
    for workload in workloads:
        gradients = workload.itemsize * workload.parameters
        updates = workload.itemsize * workload.matrix_elements
        rows.append(
            (
                workload.plan.name,
                f"{workload.parameters / 1e6:,.0f} M",
                f"{len(workload.matrices)}",
                _bytes(all_reduce_bytes(ranks, gradients)),
                _bytes((ranks - 1) / ranks * updates),
                _bytes(all_reduce_bytes(ranks, workload.statistics_bytes())),
            )
        )
    header = ("model", "parameters", "matrices", "gradients", "updates, without padding", "statistics, due step")
    print_table(header, rows)


def print_steps(machine: Machine, simulated: Simulated) -> None:
    """Print the parts of a step, and how the variants compare, for each number of ranks."""
    names = ("AdamW", "Muon", _ALONE, _SHARED)
    first = simulated[_SHARED][0].seconds
    rows = []
    for adamw, muon, alone, shared in zip(*(simulated[name] for name in names), strict=True):
        rows.append(
            (
                f"{shared.ranks}",
                f"{shared.sharing}",
                *(f"{1e3 * step.seconds:.1f}" for step in (adamw, muon, alone)),
                f"{1e3 * shared.seconds:.1f}" + ("" if shared.memory <= machine.memory else " (does not fit)"),
                *(
                    f"{1e3 * part:.1f}"
                    for part in (
                        shared.training,
                        shared.gradients,
                        shared.optimizer,
                        shared.updates,
                        shared.statistics,
                    )
                ),
                f"{first / shared.seconds:.2f}",
                *(f"{shared.seconds / other.seconds:.2f}" for other in (adamw, muon, alone)),
                _bytes(shared.gradient_bytes),
                _bytes(shared.update_bytes),
                _bytes(shared.buffers),
            )
        )
    parts = ("training", "gradients", "optimizer", "updates", "statistics")
    ratios = ("over AdamW", "over Muon", "over not sharing")
    sent = ("gradients sent", "updates sent", "two buffers")
    times = ("AdamW", "Muon", "replicated", "shared")
    print_table(("ranks", "of these share", *times, *parts, "efficiency", *ratios, *sent), rows)


def print_crossovers(
    workloads: Iterable[Workload], machine: Machine, interval: int, ranks: Sequence[int]
) -> list[dict[str, Any]]:
    """Print and return from how many ranks on sharing the work costs more than it saves, for slower networks too."""
    found: list[dict[str, Any]] = []
    for workload in workloads:
        for gigabits in NETWORKS:
            simulated = simulate(workload, with_network(machine, gigabits), interval, ranks)
            shared, alone = simulated[_SHARED], simulated[_ALONE]
            fits = [step.ranks for step in shared if step.memory <= machine.memory]
            best = min(zip(shared, alone, strict=True), key=lambda pair: pair[0].seconds / pair[1].seconds)
            found.append(
                {
                    "model": workload.plan.name,
                    "gigabits": gigabits,
                    "slower_from": crossover(ranks, shared, alone),
                    "best_ranks": best[0].ranks,
                    "best_ratio": best[0].seconds / best[1].seconds,
                    "last_ratio": shared[-1].seconds / alone[-1].seconds,
                    "fits_to": max(fits, default=None),
                }
            )
    print_table(
        ("model", "network, Gb/s a rank", "slower from", "least time over not sharing", "at most ranks", "fits up to"),
        [
            (
                row["model"],
                f"{row['gigabits']}",
                f"{row['slower_from']} ranks" if row["slower_from"] else "–",
                f"{row['best_ratio']:.2f} at {row['best_ranks']}",
                f"{row['last_ratio']:.2f}",
                f"{row['fits_to']} ranks" if row["fits_to"] else "none",
            )
            for row in found
        ],
    )
    return found


def print_sensitivity(
    workloads: Sequence[Workload], machine: Machine, interval: int, ranks: Sequence[int]
) -> list[dict[str, Any]]:
    """Print and return how the time of shared work compares where one number of the machine is another."""
    shown = (ranks[0], ranks[len(ranks) // 2], ranks[-1])
    found: list[dict[str, Any]] = []
    for workload in workloads:
        for change in CHANGES:
            changed: Machine = replace(machine, **change)
            simulated = simulate(workload, changed, interval, shown)
            ratios = {
                name: [step.seconds / other.seconds for step, other in zip(simulated[_SHARED], column, strict=True)]
                for name, column in simulated.items()
                if name in ("AdamW", _ALONE)
            }
            found.append({"model": workload.plan.name, "change": change, "ranks": shown, "ratios": ratios})
    print_table(
        (
            "model",
            "changed",
            *(f"{name}, {count} ranks" for name in ("over AdamW", "over not sharing") for count in shown),
        ),
        [
            (
                row["model"],
                ", ".join(f"{name} {value:g}" for name, value in row["change"].items()) or "nothing",
                *(f"{ratio:.2f}" for name in ("AdamW", _ALONE) for ratio in row["ratios"][name]),
            )
            for row in found
        ],
    )
    return found


def draw(path: Path, machine: Machine, results: dict[str, Simulated]) -> None:
    """Draw tokens per second and rank against ranks, relative to AdamW on one rank, a panel for each model."""
    figure = Figure(figsize=(5.4 * len(results), 4.6), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for panel, (name, simulated) in zip(panels, results.items(), strict=True):
        _draw_panel(panel, machine, simulated)
        panel.set_title(name)
    panels[0].set_ylabel("tokens per second and rank,\nrelative to AdamW on one rank")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Modelled weak scaling, {machine.name}; dotted: does not fit into memory")
    figure.savefig(path, dpi=110)


def _draw_panel(panel: Axes, machine: Machine, simulated: Simulated) -> None:
    reference = simulated["AdamW"][0].seconds
    for index, (name, steps) in enumerate(simulated.items()):
        points = [(step.ranks, reference / step.seconds, step.memory <= machine.memory) for step in steps]
        style: dict[str, Any] = {"color": f"C{index}", "linewidth": 2.0 if name == _SHARED else 1.2}
        panel.plot([], [], label=name, **style)
        for (x0, y0, _), (x1, y1, fits) in pairwise(points):
            panel.plot([x0, x1], [y0, y1], linestyle="-" if fits else ":", **style)
    panel.set_xscale("log", base=2)
    panel.set_xlabel("ranks")
    panel.set_ylim(0, 1.05)
    panel.grid(alpha=0.3)


def _bytes(size: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"{NAME}.json"
    calibration = calibrate(QUICK if options.quick else CALIBRATED) if options.calibrate else _stored_calibration(file)
    names = ["tiny"] if options.quick else options.models
    ranks = (1, 2, 16) if options.quick else RANKS
    interval, machine = options.p_interval, H100
    workloads = [Workload(PLANS[name]()) for name in names]
    results = {workload.plan.name: simulate(workload, machine, interval, ranks) for workload in workloads}
    text = io.StringIO()
    with redirect_stdout(text):
        print("# Weak scaling, modelled\n")
        print("A model: no step on several machines has been measured. Every rank keeps its tokens.")
        print(f"`python benchmarks/scaling/scaling_model.py`: an estimate of p every {interval} steps.\n")
        print(f"## Machine: {machine.name}\n")
        print_machine(machine)
        print(f"\n## Bytes that a rank of {ranks[-1]} sends in a step\n")
        print_bytes(workloads if options.quick else _all_workloads(workloads), ranks[-1])
        for workload in workloads:
            tokens = workload.plan.sequences * workload.plan.length
            print(f"\n## {workload.plan.name}: a step of {tokens} tokens a rank, ms\n")
            print_steps(machine, results[workload.plan.name])
        print("\n## When sharing the work pays\n")
        crossovers = print_crossovers(workloads, machine, interval, ranks)
        print("\n## How much the assumptions matter: time of shared work\n")
        sensitivity = print_sensitivity(workloads, machine, interval, ranks)
        one_gpu = [] if options.quick else compare(trained(), machine)
        if one_gpu:
            print("\n## One H100, measured and predicted\n")
            print_comparison(one_gpu)
        if calibration is not None:
            print("\n## Calibration on this machine\n")
            print_calibration(calibration)
    print(text.getvalue())
    (options.output / f"{NAME}.md").write_text(text.getvalue(), "utf-8")
    draw(options.output / f"{NAME}.png", machine, results)
    steps = {
        model: {
            name: [asdict(step) | {"seconds": step.seconds} for step in column] for name, column in simulated.items()
        }
        for model, simulated in results.items()
    }
    written = {
        "machine": asdict(machine),
        "p_interval": interval,
        "steps": steps,
        "crossovers": crossovers,
        "sensitivity": sensitivity,
        "one_gpu": one_gpu,
        "calibration": calibration,
    }
    file.write_text(json.dumps(written, indent=1, allow_nan=False) + "\n", "utf-8")
    print(f"Written to {options.output}")


def _all_workloads(simulated: Sequence[Workload]) -> list[Workload]:
    known = {workload.plan.name: workload for workload in simulated}
    plans = [plan() for name, plan in PLANS.items() if name != "tiny"]
    return [known.get(plan.name) or Workload(plan) for plan in plans]


def _stored_calibration(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text("utf-8"))["calibration"] if file.exists() else None


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--models", nargs="+", choices=[name for name in PLANS if name != "tiny"], default=["gpt2", "llama-1.3b"]
    )
    parser.add_argument("--p-interval", type=int, default=100, help="steps between estimates (default %(default)s)")
    parser.add_argument(
        "--calibrate", action="store_true", help="measure this machine, and compare; else keep the last"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"), help="folder (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, only to check that everything runs")
    options = parser.parse_args(arguments)
    if options.p_interval < 1:
        parser.error("--p-interval must be at least 1")
    return options


if __name__ == "__main__":
    main()
