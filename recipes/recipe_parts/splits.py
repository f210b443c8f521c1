"""Which rows of a data set are used, and which are held out."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from datasets import Dataset


def sample(dataset: Dataset, limit: int | None) -> Dataset:
    """Keep at most `limit` rows, evenly spaced: the first ones would show only a corner of the data."""
    total = len(dataset)
    if limit is None or limit >= total:
        return dataset
    return dataset.select([row * total // limit for row in range(limit)])


def is_held_out(name: str, fraction: float) -> bool:
    """Say whether the document called `name` belongs to the validation split.

    The choice hangs on the name alone, so that a file added or removed never moves another one across.

    Args:
        name: Path of the document relative to its corpus, with forward slashes.
        fraction: Expected share of documents that are held out, in [0, 1].
    """
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def held_out_rows(labels: Sequence[int], fraction: float) -> list[int]:
    """Choose the rows of the validation split: the same share of every class, and the same rows everywhere.

    A class' rows are ordered by a hash of their numbers, and its first ones are held out, at least one.

    Args:
        labels: The class of every row.
        fraction: Share of each class that is held out, in (0, 1).

    Returns:
        Row numbers, increasing.
    """
    rows_by_label: dict[int, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        rows_by_label[label].append(row)
    chosen: list[int] = []
    for rows in rows_by_label.values():
        shuffled = sorted(rows, key=lambda row: hashlib.sha256(str(row).encode()).digest())
        chosen += shuffled[: max(1, round(fraction * len(rows)))]
    return sorted(chosen)
