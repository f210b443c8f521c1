"""Numbers of many tensors, in one vector for each device: one by one, each would be a launch of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from hf_schatten.linalg.constants import constant


class NumbersOf:
    """Numbers of tensors, one or several of each, by tensor, on the device on which they are given.

    Nothing waits for the device. The tensors must live as long as this does; what is returned is not to be written to.
    """

    def __init__(self) -> None:
        self._vectors: dict[torch.device, list[Tensor]] = {}
        self._spans: dict[int, tuple[torch.device, int, int]] = {}  # of tensors by id: device, first, and how many
        self._found: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}  # asked for several times

    def add(self, tensors: Iterable[Tensor], numbers: Tensor, counts: Sequence[int] | None = None) -> None:
        """Take numbers (N,) of tensors, in their order: one of each, or as many as ``counts`` says."""
        vectors = self._vectors.setdefault(numbers.device, [])
        tensors, start = list(tensors), sum(map(len, vectors))
        counts = counts or [1] * len(tensors)
        for tensor, first, count in zip(tensors, accumulate(counts, initial=start), counts, strict=False):
            self._spans[id(tensor)] = numbers.device, first, count
        vectors.append(numbers)

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._spans

    def of(self, tensors: Sequence[Tensor], which: Sequence[int] | None = None) -> Tensor:
        """Return one number of each of B tensors of one device, (B,): the first, or that of a position."""
        spans = [self._spans[id(tensor)] for tensor in tensors]
        positions = [start for _, start, _ in spans]
        if which is not None:
            positions = [start + number for start, number in zip(positions, which, strict=True)]
        return self._taken(spans[0][0], positions)

    def all_of(self, tensors: Sequence[Tensor], times: Sequence[int]) -> Tensor:
        """Return all numbers of each of B tensors of one device, (N,), those of each repeated so many times."""
        spans = [self._spans[id(tensor)] for tensor in tensors]
        repeated = [
            number
            for (_, start, count), each in zip(spans, times, strict=True)
            for number in range(start, start + count)
            for _ in range(each)
        ]
        return self._taken(spans[0][0], repeated)

    def _taken(self, device: torch.device, positions: Sequence[int]) -> Tensor:
        key = device, tuple(positions)
        if key not in self._found:
            vectors = self._vectors[device]
            if len(vectors) > 1:
                vectors[:] = [torch.cat(vectors)]
            first, last = positions[0], positions[-1] + 1
            in_order = last - first == len(positions) and list(positions) == list(range(first, last))
            self._found[key] = vectors[0][first:last] if in_order else vectors[0][constant(key[1], device, torch.long)]
        return self._found[key]


def repeated(numbers: Tensor, counts: Sequence[int]) -> Tensor:
    """Return numbers (B,), each of them so many times, (N,)."""
    if all(count == 1 for count in counts):
        return numbers
    index = tuple(number for number, count in enumerate(counts) for _ in range(count))
    return numbers[constant(index, numbers.device, torch.long)]
