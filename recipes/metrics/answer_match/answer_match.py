"""The share of texts whose final answer is right, as an `evaluate` module that needs no network.

Usage:
    answer_match = evaluate.load("recipes/metrics/answer_match")
    answer_match.compute(
        predictions=["3 and 4 is 7. #### 7", "#### 1,000", "I do not know."],
        references=["#### 7", "#### 1000", "#### 5"],
        pattern=r"#### *(-?[0-9.,]+)",
    )  # {"answer_match": 0.666…}
"""

import re

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "The share of predictions whose final answer equals that of their reference."
_INPUTS = """
Args:
    predictions: texts.
    references: texts, as many.
    pattern: a regular expression; its first match in a text is the answer, or the match's first group where there is
        one. A prediction without a match is wrong.
"""


class AnswerMatch(evaluate.Metric):
    """Counts right answers; commas, dollar signs, blanks at the ends and a full stop at the end do not count."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str], pattern: str) -> dict[str, float]:
        right = [_answer(text, pattern) for text in references]
        if None in right:
            text = references[right.index(None)]
            raise ValueError(f"the pattern {pattern!r} finds no answer in the reference {text!r}.")
        given = [_answer(text, pattern) for text in predictions]
        return {"answer_match": float(np.mean([one == other for one, other in zip(given, right, strict=True)]))}


def _answer(text: str, pattern: str) -> str | None:
    # The first match: a model that does not stop goes on to questions of its own.
    found = re.search(pattern, text)
    if found is None:
        return None
    answer = found[1] if found.re.groups else found[0]
    return re.sub(r"[,$]", "", answer).strip().removesuffix(".")
