"""Which rows of a stream are kept: an even share, by their index alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

# 2^32 divided by the golden ratio: i ↦ (i · this) mod 2^32 visits the integers evenly, whatever the stride, so that
# "below a threshold" keeps an even share of every sequence and position.
_GOLDEN = 2_654_435_769
_WORD = 2**32


class RowSample:
    """At most ``capacity`` rows of a stream, chosen by their index in the stream alone.

    The same stream gives the same sample however it is cut into micro-batches. No random generator is used, so that
    the probe cannot change training.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._pieces: list[tuple[Tensor, Tensor]] = []  # stream indices on the host, rows
        self._seen = 0
        self._threshold = _WORD

    def offer(self, count: int, pick: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        """Offer the next ``count`` rows; return a function that picks what was chosen, to be called once, also later.

        ``pick`` takes indices (k,) below ``count`` and returns a copy of those rows, (k, n).
        """
        start = self._seen
        self._seen += count
        self._threshold = _threshold(self._seen, self._capacity, self._threshold)
        index = _chosen(self._threshold, start, self._seen)

        def keep() -> None:
            self._pieces = [self._thinned(*piece) for piece in self._pieces]
            self._pieces.append((index, pick(index - start)))

        return keep

    def rows(self) -> Tensor | None:
        """Return the sample, (at most capacity, n), in stream order; None where nothing was kept.

        Rows that are not finite are left out: those of a step that a loss scaler skips are in the stream too.
        """
        if not self._pieces:
            return None
        index, rows = (torch.cat(column) for column in zip(*self._pieces, strict=True))
        order = index.argsort()
        kept = order[_hash(index[order]) < self._threshold]
        rows = rows[kept.to(rows.device)]
        finite = rows[rows.isfinite().all(dim=1)]
        return finite if len(finite) else None

    def _thinned(self, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        chosen = _hash(index) < self._threshold
        return (index, rows) if chosen.all() else (index[chosen], rows[chosen.to(rows.device)])


def _hash(index: Tensor) -> Tensor:
    return (index * _GOLDEN) % _WORD


# All layers that see the same tokens choose the same rows: the choice is remembered.
@lru_cache(maxsize=64)
def _threshold(seen: int, capacity: int, threshold: int) -> int:
    """Lower the threshold until at most ``capacity`` of the first ``seen`` rows lie below it."""
    kept = _below(threshold, 0, seen)
    while len(kept) > capacity:
        threshold = threshold * 7 // 8
        kept = kept[_hash(kept) < threshold]
    return threshold


@lru_cache(maxsize=16)
def _chosen(threshold: int, start: int, stop: int) -> Tensor:
    """Return what :func:`_below` does, not to be written to."""
    return _below(threshold, start, stop)


def _below(threshold: int, start: int, stop: int) -> Tensor:
    """Return the stream indices in [start, stop) that lie below the threshold, on the host."""
    index = torch.arange(start, stop)
    return index[_hash(index) < threshold]
