"""The share of predictions that are right, as an `evaluate` module that needs no network.

Usage:
    accuracy = evaluate.load("recipes/metrics/accuracy")
    accuracy.compute(predictions=[3, 1, 4], references=[3, 1, 5])  # {"accuracy": 0.666…}
"""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "The share of predictions that equal their reference."
_INPUTS = """
Args:
    predictions: the predicted classes, integers.
    references: the right classes, as many.
"""


class Accuracy(evaluate.Metric):
    """Counts right predictions."""

    def _info(self) -> evaluate.MetricInfo:
        integer = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": integer, "references": integer}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.equal(predictions, references)))}
