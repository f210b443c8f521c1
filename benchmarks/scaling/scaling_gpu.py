"""Steps that one H100 has taken, what of the model's machine they determine, and what the model predicts of them.

`step_overhead.py --device cuda` has measured a whole step of two GPT-2s, with Muon and with ours. Two numbers are
fitted to Muon's steps; ours are predicted. The measured steps of ours are those of the step before 2026-11-27, the
prediction is of the present one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config

from benchmarks.scaling.scaling_machines import Machine
from benchmarks.scaling.scaling_simulation import muon, replicated
from benchmarks.scaling.scaling_workload import Plan, Workload
from benchmarks.tables import print_table
from hf_schatten.options import SchattenOptions

REBUILT = "2026-11-27"  # when our step became another than the measured one
RESULTS = Path(__file__).parents[1] / "comparison/results/step_overhead_h100.json"


@dataclass(frozen=True)
class Trained:
    """A model that was trained on one GPU, with the measured seconds of a step, without estimates of p."""

    workload: Workload
    muon: float
    ours: float


def trained(file: Path = RESULTS) -> list[Trained]:
    """Return what a file of `step_overhead.py` has measured."""
    rows = json.loads(file.read_text("utf-8"))["rows"]
    return [
        Trained(Workload(_plan(row["setting"])), row["step"]["reference_seconds"], row["step"]["seconds"])
        for row in rows
    ]


def _plan(setting: dict[str, Any]) -> Plan:
    """Return the plan of a `random_gpt2.Setting`."""
    config = GPT2Config(
        n_layer=setting["layers"],
        n_embd=setting["width"],
        n_head=max(1, setting["width"] // 64),
        n_positions=setting["length"],
        vocab_size=setting["vocabulary"],
        bos_token_id=0,
        eos_token_id=0,
    )
    return Plan(f"GPT-2 of width {setting['width']}", config, torch.float32, setting["sequences"], setting["length"])


def fit(steps: Sequence[Trained], machine: Machine) -> tuple[float, float]:
    """Return the training's efficiency and seconds for each layer that two steps with Muon determine.

    Args:
        steps: Two or more, of different widths; least squares where they are more.
        machine: Gives the peak and the time of Muon.
    """
    work = [[step.workload.training_flops / machine.peak, step.workload.layers] for step in steps]
    seconds = [step.muon - machine.seconds(step.workload.muon) for step in steps]
    inverse, layer_seconds = np.linalg.lstsq(np.array(work), np.array(seconds), rcond=None)[0]
    return float(1 / inverse), float(layer_seconds)


def compare(steps: Sequence[Trained], machine: Machine) -> list[dict[str, Any]]:
    """Return what was measured of each step, and what the model predicts of the present one."""
    rows = []
    for step in steps:
        with_muon, ours = (
            variant(step.workload, machine, SchattenOptions.p_interval, 1) for variant in (muon, replicated)
        )
        name = step.workload.plan.name
        rows += [
            {"what": f"{name}: step with Muon (fitted)", "measured": step.muon, "predicted": with_muon.seconds},
            {
                "what": f"{name}: step of ours (measured: before {REBUILT})",
                "measured": step.ours,
                "predicted": ours.seconds - ours.statistics,
            },
        ]
    return rows


def print_comparison(rows: Sequence[dict[str, Any]]) -> None:
    """Print measured and predicted steps."""
    print_table(
        ("what", "measured, ms", "predicted, ms", "predicted / measured"),
        [
            (
                row["what"],
                f"{1e3 * row['measured']:.1f}",
                f"{1e3 * row['predicted']:.1f}",
                f"{row['predicted'] / row['measured']:.2f}",
            )
            for row in rows
        ],
    )
