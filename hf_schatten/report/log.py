"""What a log entry holds of the optimizer, under which names, and where a run keeps its log."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_schatten.exponent import ascending
from hf_schatten.matrices.layout import layer_name

# Of entries that hold one layer's value, by quantity.
LAYER_PREFIX = "schatten_p/"
STABLE_RANK_PREFIX = "schatten_stable_rank/"
RELATIVE_SIZE_PREFIX = "schatten_relative_size/"
LAYER_PREFIXES = (LAYER_PREFIX, STABLE_RANK_PREFIX, RELATIVE_SIZE_PREFIX)

SUMMARY_PREFIX = "schatten_p_"  # of the entries that summarise the p of all layers
MEDIAN = "median"
SKIPPED_STEPS = "schatten_skipped_steps"

TRAINER_STATE_FILE = "trainer_state.json"


class LogError(ValueError):
    """A folder without a log that can be read; the message says what was looked for."""


def log_entry(
    learned_p: Mapping[str, float],
    stable_ranks: Mapping[str, float] | None = None,
    relative_sizes: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return the log entry of one estimate: the summary of p, and every layer's values by its name.

    By matrix name, it takes p of one or more, and ‖ΔW‖_F² / ‖ΔW‖_2² and ‖ΔW‖_F / ‖W‖_F of the step's updates.
    """
    by_layer = zip(LAYER_PREFIXES, (learned_p, stable_ranks or {}, relative_sizes or {}), strict=True)
    return {
        **summary_entry(learned_p),
        **{prefix + layer_name(name): value for prefix, values in by_layer for name, value in values.items()},
    }


def summary_entry(learned_p: Mapping[str, float]) -> dict[str, float]:
    """Return what a log entry of one estimate holds without the layers: the summary of p."""
    return {SUMMARY_PREFIX + name: p for name, p in summary(learned_p).items()}


def summary(learned_p: Mapping[str, float]) -> dict[str, float]:
    """Return min, median and max in the order of 1/p, in which -4 lies beyond inf."""
    ordered = ascending(learned_p.values())
    return {"min": ordered[0], MEDIAN: ordered[(len(ordered) - 1) // 2], "max": ordered[-1]}


def history_entry(entry: Mapping[str, float]) -> dict[str, float | str]:
    """Return an entry as JSON can hold it: ``inf`` and ``nan`` become strings, which ``float`` reads back."""
    return {name: value if math.isfinite(value) else str(value) for name, value in entry.items()}


def without_layers(entry: Mapping[str, object]) -> dict[str, object]:
    """Return what a terminal shows of an entry: the summary of p, and no layer's values."""
    return {name: value for name, value in entry.items() if not name.startswith(LAYER_PREFIXES)}


def read_log_history(run: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Return the log history of a run, after the file that holds it.

    Args:
        run: a checkpoint, or an output folder, whose own ``trainer_state.json`` is read, or its newest checkpoint's.

    Raises:
        LogError: when none of them can be read.
    """
    checkpoints = (folder for folder in checkpoints_of(run) if step_of(folder) >= 0)
    for folder in (run, *checkpoints):
        path = folder / TRAINER_STATE_FILE
        try:
            return path, json.loads(path.read_text(encoding="utf-8"))["log_history"]
        except (OSError, ValueError, KeyError):  # missing, or of a run that was killed while it saved
            continue
    raise LogError(f"{run} has no log: neither it nor a checkpoint in it holds a readable {TRAINER_STATE_FILE}.")


def checkpoints_of(run: Path) -> list[Path]:
    """Return the folders ``checkpoint-…`` of an output folder, the newest first."""
    return sorted(run.glob("checkpoint-*"), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint's folder, -1 where there is none."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
