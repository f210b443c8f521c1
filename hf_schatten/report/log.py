"""What a log entry holds of the optimizer, and under which names."""

from __future__ import annotations

import math
from collections.abc import Mapping

from hf_schatten.matrices.layout import layer_name

# Of entries that hold one layer's value, by quantity.
LAYER_PREFIX = "schatten_p/"
STABLE_RANK_PREFIX = "schatten_stable_rank/"
RELATIVE_SIZE_PREFIX = "schatten_relative_size/"
LAYER_PREFIXES = (LAYER_PREFIX, STABLE_RANK_PREFIX, RELATIVE_SIZE_PREFIX)

SUMMARY_PREFIX = "schatten_p_"  # of the entries that summarise the p of all layers
MEDIAN = "median"

SKIPPED_STEPS = "schatten_skipped_steps"


def log_entry(
    learned_p: Mapping[str, float],
    stable_ranks: Mapping[str, float] | None = None,
    relative_sizes: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return the log entry of one estimate: the summary of p, and every layer's values by its name.

    Args:
        learned_p: p by matrix name, at least one.
        stable_ranks: ‖ΔW‖_F² / ‖ΔW‖_2² of the step's updates, by matrix name.
        relative_sizes: ‖ΔW‖_F / ‖W‖_F of the step's updates, by matrix name.
    """
    by_layer = zip(LAYER_PREFIXES, (learned_p, stable_ranks or {}, relative_sizes or {}), strict=True)
    return {
        **{SUMMARY_PREFIX + name: p for name, p in summary(learned_p).items()},
        **{prefix + layer_name(name): value for prefix, values in by_layer for name, value in values.items()},
    }


def history_entry(entry: Mapping[str, float]) -> dict[str, float | str]:
    """Return an entry as ``trainer_state.json`` can hold it: JSON has no infinity, which becomes the string ``inf``.

    ``float(value)`` reads both kinds of value back. What is not a number becomes ``nan``.
    """
    return {name: value if math.isfinite(value) else str(value) for name, value in entry.items()}


def without_layers(entry: Mapping[str, object]) -> dict[str, object]:
    """Return what a terminal shows of an entry: the summary of p, and no layer's values."""
    return {name: value for name, value in entry.items() if not name.startswith(LAYER_PREFIXES)}


def summary(learned_p: Mapping[str, float]) -> dict[str, float]:
    """Return min, median and max in the order of 1/p, in which -4 lies beyond inf."""
    ordered = sorted(learned_p.values(), key=lambda p: -1 / p)
    return {"min": ordered[0], MEDIAN: ordered[(len(ordered) - 1) // 2], "max": ordered[-1]}


def p_label(p: float) -> str:
    """Return p as people read it, to three digits."""
    return "∞" if math.isinf(p) else f"{p:.3g}"
