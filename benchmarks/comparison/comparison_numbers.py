"""The numbers of a comparison that stay beside its tables: enough of every outcome to write the tables again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.comparison.comparison import ComparisonError, Outcome, Standing
from benchmarks.comparison.comparison_stability import learned_exponents
from hf_schatten.report.log import LAYER_PREFIX

NAME = "comparison.json"


def numbers_of(standing: Standing, outcome: Outcome) -> dict[str, Any]:
    """Return what is kept of an outcome: curves, times, and the p of every layer at the best learning rate."""
    steps, values = outcome.curve(standing.task.metric)
    at_best = outcome.learning_rate == standing.best_rate
    return {
        "candidate": outcome.candidate,
        "learning_rate": outcome.learning_rate,
        "seed": outcome.seed,
        "arguments": list(outcome.arguments),
        "device": outcome.device,
        "machine": outcome.machine,
        "date": outcome.date,
        "steps": steps,
        standing.task.metric: [_rounded(value) for value in values],
        "step_seconds": _rounded(outcome.step_time),
        "optimizer_seconds": _rounded(outcome.optimizer_time),
        "p": {
            step: {layer: _rounded(1 / s) if s else "inf" for layer, s in by_layer.items()}
            for step, by_layer in (learned_exponents(outcome) if at_best else {}).items()
        },
    }


def outcome_of(numbers: dict[str, Any], metric: str) -> Outcome:
    """Return an outcome of which :func:`numbers_of` is the same again.

    Args:
        numbers: From :func:`numbers_of`.
        metric: Of the task.
    """
    end = numbers["steps"][-1]
    seconds, optimizer_seconds = ([end * numbers[name]] for name in ("step_seconds", "optimizer_seconds"))
    learned = [
        {"step": int(step)} | {LAYER_PREFIX + layer: float(p) for layer, p in by_layer.items()}
        for step, by_layer in numbers["p"].items()
    ]
    evaluations = [
        {"step": step, metric: float(value)} for step, value in zip(numbers["steps"], numbers[metric], strict=True)
    ]
    return Outcome(
        **{name: numbers[name] for name in ("candidate", "learning_rate", "seed", "device", "machine", "date")},
        arguments=tuple(numbers["arguments"]),
        logs=[*learned, *evaluations],
        steps=[end],
        seconds=seconds,
        cpu_seconds=seconds,
        optimizer_seconds=optimizer_seconds,
        optimizer_cpu_seconds=optimizer_seconds,
    )


def load_outcomes(file: Path, metric: str) -> list[Outcome]:
    """Return the outcomes of a report's file; none where there is no file yet.

    Raises:
        ComparisonError: The file is not a report's, or of another metric.
    """
    try:
        return [outcome_of(numbers, metric) for numbers in json.loads(file.read_text("utf-8"))]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ComparisonError(
            f"{file} has no outcomes of a comparison by {metric}: {error!r}. Remove it, or leave out --keep."
        ) from error


def _rounded(value: Any) -> float | str:
    """Return a number to seven digits, or the text of one that JSON has not."""
    number = float(value)
    return float(f"{number:.7g}") if math.isfinite(number) else str(number)
