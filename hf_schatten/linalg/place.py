"""Where a matrix lies in a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Place(NamedTuple):
    """Where a matrix lies in a tensor: the sizes of two dimensions that make its rows, and of two its columns."""

    sizes: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    offset: int  # of the first element, from that of the tensor

    @classmethod
    def of(cls, view: Tensor, row_dimensions: int, tensor: Tensor) -> Place:
        """Return that of a view of a tensor, whose first dimensions are rows, the others columns.

        Raises:
            ValueError: when rows or columns take three strides or more.
        """
        dimensions = list(zip(view.shape, view.stride(), strict=True))
        rows, columns = _merged(dimensions[:row_dimensions]), _merged(dimensions[row_dimensions:])
        sizes, strides = zip(*rows, *columns, strict=True)
        return cls(sizes, strides, int(view.storage_offset() - tensor.storage_offset()))

    def view(self, tensor: Tensor) -> Tensor:
        """Return the matrix in a tensor, with four dimensions."""
        return tensor.as_strided(self.sizes, self.strides, tensor.storage_offset() + self.offset)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.sizes[0] * self.sizes[1], self.sizes[2] * self.sizes[3]


def _merged(dimensions: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return size and stride of two dimensions that go through memory as these do."""
    merged = [(1, 1)]
    for size, stride in dimensions:
        if size == 1:
            continue
        before, outer = merged[-1]
        if before == 1:
            merged[-1] = size, stride
        elif outer == size * stride:
            merged[-1] = before * size, stride
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        raise ValueError(
            f"rows or columns with the sizes and strides {list(dimensions)} take more than two strides: make the "
            "tensor contiguous"
        )
    return [(1, 1)] * (2 - len(merged)) + merged


def flat(places: Sequence[Place]) -> list[int]:
    """Return places as an operation takes them: nine numbers each."""
    return [number for place in places for number in (*place.sizes, *place.strides, place.offset)]


def unflattened(numbers: Sequence[int]) -> list[Place]:
    """Return the places of such numbers."""
    each = (numbers[start : start + 9] for start in range(0, len(numbers), 9))
    return [Place(tuple(nine[:4]), tuple(nine[4:8]), nine[8]) for nine in each]  # type: ignore[arg-type]
