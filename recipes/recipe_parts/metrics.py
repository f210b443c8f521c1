"""The `evaluate` modules that are shipped with the recipes."""

from pathlib import Path

import evaluate

METRICS = Path(__file__).resolve().parents[1] / "metrics"


def load_metric(name: str) -> evaluate.EvaluationModule:
    """Load a module of `recipes/metrics`; no network is needed."""
    return evaluate.load(str(METRICS / name), keep_in_memory=True)
