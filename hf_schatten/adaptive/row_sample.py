"""Which rows of a stream are kept: an even share, by their index alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

# 2^32 divided by the golden ratio: i ↦ (i · this) mod 2^32 visits the integers evenly, whatever the stride, so that
# "below a threshold" keeps an even share of every sequence and position.
_GOLDEN = 2_654_435_769
_WORD = 2**32

_Ranges = tuple[tuple[int, int], ...]  # [start, stop) of indices, ascending


class RowSample:
    """At most ``capacity`` rows of a stream, chosen by their index in the stream alone.

    The same stream gives the same sample however it is cut into micro-batches. No random generator is used, so that
    the probe cannot change training.

    Attributes:
        seen: how many of the offered rows count.
    """

    def __init__(self, capacity: int) -> None:
        self.seen = 0
        self._capacity = capacity
        self._offered = 0
        self._counted: _Ranges = ()
        self._pieces: list[tuple[Tensor, Tensor]] = []  # stream indices on the host, rows
        self._threshold = _WORD

    def offer(self, count: int, pick: Callable[[Tensor], Tensor], *, at_once: bool = False) -> Callable[[], None]:
        """Offer the next ``count`` rows; they count as soon as the returned function is called, once.

        ``pick`` takes indices (k,) below ``count`` and returns a copy of those rows, (k, n). It is called then, or now
        where ``at_once`` says that the rows will be gone.
        """
        start, stop = self._offered, self._offered + count
        self._offered = stop

        def picked() -> tuple[Tensor, Tensor]:
            threshold = _threshold(_with_range(self._counted, start, stop), self._capacity, self._threshold)
            index = _chosen(threshold, start, stop)
            return index, pick(index - start)

        if not at_once:
            return partial(self._keep, start, stop, picked)
        early = picked()
        return partial(self._keep, start, stop, lambda: early)  # does not keep what `pick` takes the rows from

    def _keep(self, start: int, stop: int, picked: Callable[[], tuple[Tensor, Tensor]]) -> None:
        piece = picked()
        self.seen += stop - start
        self._counted = _with_range(self._counted, start, stop)
        self._threshold = _threshold(self._counted, self._capacity, self._threshold)
        self._pieces = [self._thinned(*each) for each in (*self._pieces, piece)]

    def rows(self) -> Tensor | None:
        """Return the sample, (at most capacity, n), in stream order; None where nothing was kept."""
        if not sum(len(index) for index, _ in self._pieces):
            return None
        if len(self._pieces) == 1:
            return self._pieces[0][1]
        index, rows = (torch.cat(column) for column in zip(*self._pieces, strict=True))
        return rows[on_device_of(rows, index.argsort())]

    def _thinned(self, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        chosen = _hash(index) < self._threshold
        return (index, rows) if chosen.all() else (index[chosen], rows[on_device_of(rows, chosen.nonzero().flatten())])


def on_device_of(rows: Tensor, index: Tensor) -> Tensor:
    """Return indices from the host where the rows are; nothing waits for the device."""
    return index.to(rows.device, non_blocking=True)


def _hash(index: Tensor) -> Tensor:
    return (index * _GOLDEN) % _WORD


def _with_range(ranges: _Ranges, start: int, stop: int) -> _Ranges:
    """Return ascending ranges with one more, joined to those that it touches."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted((*ranges, (start, stop))):
        touches = bool(joined) and joined[-1][1] == first
        joined.append((joined.pop()[0] if touches else first, last))
    return tuple(joined)


# All layers that see the same tokens choose the same rows: the choice is remembered.
@lru_cache(maxsize=64)
def _threshold(ranges: _Ranges, capacity: int, threshold: int) -> int:
    """Lower the threshold until at most ``capacity`` of the indices in the ranges lie below it."""
    kept = torch.cat([_below(threshold, *each) for each in ranges])
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
