"""Measures this machine with one and two processes over gloo, and compares the scaling model with what they did.

One process alone measures how fast it computes and fixes the machine's numbers; two processes measure collectives.
What the two then need for a step of training is predicted from these numbers, and compared. Times are those that a
process had a core for, all its threads together, so that other programs do not count: gloo copies on the cores that
compute, and a process that waits takes none. The clock's times are kept beside them.
"""

import math
import os
import platform
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, GPT2Config

from benchmarks.scaling.scaling_gpu import REBUILT
from benchmarks.scaling.scaling_machines import Link, Machine, all_gather_bytes, all_reduce_bytes
from benchmarks.scaling.scaling_simulation import replicated, shared
from benchmarks.scaling.scaling_workload import PLANS, Plan, Workload
from benchmarks.tables import print_table
from hf_schatten import create_schatten_optimizer
from hf_schatten.distributed.replicated import _ALL_GATHER

PROCESSES = 2
_ELEMENTS = 1 << 22  # of the tensors that measure element-wise work: more than a cache holds
_SHORTEST = 0.05  # seconds of a measurement
_WARM_UP = 2  # steps

Seconds = tuple[float, float]  # of a core, and of the clock
Times = dict[str, list[Seconds]]  # of each step, by what they are of


@dataclass(frozen=True)
class Trial:
    """What is measured.

    Attributes:
        plan: The model that is trained.
        product: (B, m) of the batch of square products that measures their rate: those of the optimizer.
        sizes: Bytes that each process contributes to a collective.
        intervals: How many intervals are trained.
        interval: Steps between two that are due, even, at least 4.
    """

    plan: Plan
    product: tuple[int, int]
    sizes: tuple[int, ...]
    intervals: int
    interval: int


CALIBRATED = Trial(
    Plan(
        "GPT-2, 4 layers of width 256",
        GPT2Config(n_layer=4, n_embd=256, n_head=4, vocab_size=4096, n_positions=256, bos_token_id=0, eos_token_id=0),
        torch.float32,
        4,
        256,
    ),
    (16, 256),
    (1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24),
    6,
    6,
)
QUICK = Trial(PLANS["tiny"](), (2, 16), (1 << 10, 1 << 20), 2, 4)


def calibrate(trial: Trial) -> dict[str, Any]:
    """Measure with one process and with two, and return what was measured, fitted and predicted."""
    (alone,), pair = _run(trial, 1), _run(trial, PROCESSES)
    workload = Workload(trial.plan, "cpu")
    machine = fit(workload, alone, pair[0])
    measured = {
        f"{count} {name}": typical(seconds)
        for count, times in ((1, alone["steps"]), (PROCESSES, pair[0]["steps"]))
        for name, seconds in times.items()
    }
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "plan": trial.plan.name,
        "tokens": trial.plan.sequences * trial.plan.length,
        "fitted": {
            "peak": machine.peak,
            "training_efficiency": machine.training_efficiency,
            "memory_rate": machine.memory_rate,
            "kernel_seconds": machine.kernel_seconds,
            "collective_seconds": machine.collective_seconds,
            "link_rate": machine.node.rate,
            "spectrum_seconds": machine.spectrum_seconds,
        },
        "peak_of_two": [result["peak"] for result in pair],
        "memory_rate_of_two": [result["memory_rate"] for result in pair],
        "collectives": pair[0]["collectives"],
        "steps": [
            {"what": what, "measured": measured[key][0], "elapsed": measured[key][1], "predicted": predicted}
            for what, key, predicted in predictions(workload, machine)
        ],
    }


def fit(workload: Workload, alone: dict[str, Any], pair: dict[str, Any]) -> Machine:
    """Return the machine that one process' computation and two processes' collectives describe.

    Args:
        workload: What the processes trained, on the device ``cpu``.
        alone: What one process measured.
        pair: What one of two processes measured.
    """
    times = {name: typical(seconds)[0] for name, seconds in alone["steps"].items()}
    launch, rate = fit_line([(size, seconds) for size, seconds, _ in pair["collectives"]])
    return Machine(
        name=f"{PROCESSES} processes on a CPU",
        node_ranks=PROCESSES,
        peak=alone["peak"],
        training_efficiency=workload.training_flops / (times["training"] * alone["peak"]),
        update_efficiency=1.0,
        memory_rate=alone["memory_rate"],
        memory=math.inf,
        kernel_seconds=alone["kernel_seconds"],
        queued=False,
        node=Link(rate, 1.0, 0.0),
        network=Link(rate, 1.0, 0.0),
        collective_seconds=launch,
        overlaps=False,  # what gloo copies, it copies on the cores that compute
        spectrum_seconds=max(0.0, times["optimizer, due"] - times["optimizer"]) / workload.spectra,
    )


def typical(seconds: list[Seconds]) -> Seconds:
    """Return the medians of times of a core and of the clock."""
    core, clock = (statistics.median(column) for column in zip(*seconds, strict=True))
    return core, clock


def fit_line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Return seconds for no bytes, and bytes a second, of the line with the least relative errors.

    Args:
        points: (bytes, seconds).

    Raises:
        ValueError: when more bytes did not take longer.
    """
    size, seconds = np.array(points, dtype=np.float64).T
    per_byte, launch = np.polyfit(size, seconds, 1, w=1 / seconds)
    if per_byte <= 0:
        raise ValueError(f"More bytes took no longer, {points}: calibrate on a quieter machine, or with larger sizes.")
    return float(max(launch, 0.0)), float(1 / per_byte)


def predictions(workload: Workload, machine: Machine) -> list[tuple[str, str, float]]:
    """Return (what, name of what was measured, predicted seconds); the first two were fitted."""
    one, two = (replicated(workload, machine, 1, ranks) for ranks in (1, PROCESSES))
    sharing = shared(workload, machine, 1, PROCESSES)
    exchanged = sharing.optimizer + sharing.updates
    return [
        ("1 process: forward and backward (fitted)", "1 training", one.training),
        ("1 process: what a due step adds (fitted), and the step", "1 optimizer, due", one.optimizer + one.statistics),
        ("1 process: step of ours", "1 optimizer", one.optimizer),
        ("1 process: step of fused AdamW", "1 AdamW", machine.seconds(workload.adamw)),
        ("2 processes: forward, backward and gradients", "2 training", two.training + two.gradients),
        ("2 processes: step of ours, replicated", "2 optimizer", two.optimizer),
        ("2 processes: step of ours, shared", "2 optimizer, shared", exchanged),
        ("2 processes: the same, due", "2 optimizer, due", exchanged + sharing.statistics),
        ("2 processes: step of fused AdamW", "2 AdamW", machine.seconds(workload.adamw)),
    ]


def print_calibration(calibration: dict[str, Any]) -> None:
    """Print what was measured, and the model's errors."""
    fitted = calibration["fitted"]
    peaks = " and ".join(f"{rate / 1e9:.0f}" for rate in calibration["peak_of_two"])
    rates = " and ".join(f"{rate / 1e9:.1f}" for rate in calibration["memory_rate_of_two"])
    print(
        f"{calibration['machine']}, one thread a process, torch {calibration['torch']}, {calibration['date']}. "
        f"{calibration['plan']}, {calibration['tokens']} tokens a process.\n"
    )
    if calibration["date"] < REBUILT:
        print(f"Steps of ours, measured and predicted, are those of the step before {REBUILT}.\n")
    print(f"- products: {fitted['peak'] / 1e9:.0f} GFLOP/s (two processes at once: {peaks})")
    print(f"- forward and backward: {fitted['training_efficiency']:.0%} of that")
    print(f"- element-wise work: {fitted['memory_rate'] / 1e9:.1f} GB/s (two processes at once: {rates})")
    print(f"- an operation: {1e6 * fitted['kernel_seconds']:.1f} µs")
    print(f"- a collective: {1e6 * fitted['collective_seconds']:.0f} µs and {fitted['link_rate'] / 1e9:.2f} GB/s")
    print(f"- a spectrum on a due step: {1e3 * fitted['spectrum_seconds']:.1f} ms\n")
    print_table(
        ("what", "measured, ms", "predicted, ms", "predicted / measured", "on the clock, ms"),
        [
            (
                row["what"],
                f"{1e3 * row['measured']:.1f}",
                f"{1e3 * row['predicted']:.1f}",
                f"{row['predicted'] / row['measured']:.2f}",
                f"{1e3 * row['elapsed']:.1f}",
            )
            for row in calibration["steps"]
        ],
    )


def _run(trial: Trial, processes: int) -> list[dict[str, Any]]:
    """Return what each process measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_process, args=(processes, port, folder, trial), nprocs=processes)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def _process(rank: int, processes: int, port: int, folder: str, trial: Trial) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    count, m = trial.product
    A, B = torch.randn(2, count, m, m)
    X, Y = torch.randn(2, _ELEMENTS)
    product, Z = torch.empty_like(A), torch.empty_like(X)
    measured: dict[str, Any] = {
        "peak": 2 * count * m**3 / _seconds(lambda: torch.bmm(A, B, out=product))[0],
        "memory_rate": 3 * X.numel() * X.itemsize / _seconds(lambda: torch.mul(X, Y, out=Z))[0],
        "kernel_seconds": _kernel_seconds(),
        "collectives": _time_collectives(trial.sizes, processes) if processes > 1 else [],
        "steps": _time_steps(trial, processes),
    }
    torch.save(measured, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _kernel_seconds() -> float:
    """Seconds of one operation of an optimizer step whose matrices are so small that nothing else counts."""
    tiny = Workload(PLANS["tiny"](), "cpu")
    kernels = tiny.replicated.kernels
    return _seconds(tiny.optimizer.step)[0] / kernels


def _time_collectives(sizes: tuple[int, ...], processes: int) -> list[tuple[float, float, float]]:
    """Return bytes that a rank sends, and seconds of a core and of the clock, of all-gathers and all-reduces."""
    points = []
    for size in sizes:
        own, everything = torch.zeros(size, dtype=torch.uint8), torch.zeros(processes * size, dtype=torch.uint8)
        numbers = torch.zeros(size // 4)
        calls = max(4, (1 << 24) // size // 16)  # the same on all processes
        gather = _seconds(lambda: getattr(dist, _ALL_GATHER)(everything, own), calls)  # noqa: B023
        reduce = _seconds(lambda: dist.all_reduce(numbers), calls)  # noqa: B023
        points += [(all_gather_bytes(processes, size), *gather), (all_reduce_bytes(processes, size), *reduce)]
    return points


def _seconds(call: Callable[[], object], calls: int | None = None, repeats: int = 7) -> Seconds:
    """Return the time of one call, the least core's time of some measurements.

    Args:
        call: What is timed; it runs once before.
        calls: In a measurement; as many as it takes to be long enough where not given.
        repeats: Measurements.
    """
    call()
    calls = calls or int(_SHORTEST / max(_timed(call)[0], 1e-6)) + 1

    def all_calls() -> None:
        for _ in range(calls):
            call()

    core, clock = min(_timed(all_calls) for _ in range(repeats))
    return core / calls, clock / calls


def _time_steps(trial: Trial, processes: int) -> Times:
    """Train, and time forward with backward, steps of ours without sharing and with it in turn, and AdamW's."""
    torch.manual_seed(0)
    plan = trial.plan
    model = AutoModelForCausalLM.from_config(plan.config)
    ours = partial(create_schatten_optimizer, model, 1e-4, verbose=False, compute_dtype="float32")  # as products are
    due_after = trial.interval // 2  # steps of its own
    sharing = ours(p="adaptive", p_interval=due_after, p_first_step=due_after)
    replicating = ours(p=2.0, share_work=False)
    copies = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    adamw = torch.optim.AdamW(copies, lr=1e-4, fused=True)
    trained = DistributedDataParallel(model) if processes > 1 else model
    tokens = torch.randint(plan.config.vocab_size, (plan.sequences, plan.length))

    def forward_and_backward() -> None:
        trained(input_ids=tokens, labels=tokens).loss.backward()

    times: Times = {}
    for number in range(1, trial.intervals * trial.interval + 1):
        optimizer = sharing if number % 2 == 0 else replicating
        due = number % trial.interval == 0
        seconds = {"training": _timed(forward_and_backward)}
        shares = optimizer is sharing and processes > 1
        name = "optimizer, due" if due else "optimizer, shared" if shares else "optimizer"
        seconds[name] = _timed(optimizer.step)
        if due:
            del seconds["training"]  # it has sampled inputs
            for copy, parameter in zip(copies, model.parameters(), strict=True):
                copy.grad = parameter.grad
            seconds["AdamW"] = _timed(adamw.step)
        optimizer.zero_grad()
        if number > _WARM_UP:
            for name, value in seconds.items():
                times.setdefault(name, []).append(value)
    return times


def _timed(call: Callable[[], object]) -> Seconds:
    if dist.get_world_size() > 1:
        dist.barrier()
    core, clock = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - core, time.perf_counter() - clock
