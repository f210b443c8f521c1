"""How a parameter is read as matrices: whole, by parts of a fused projection, by expert, or as filters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from itertools import product

from torch import Tensor

from hf_schatten.linalg.place import Place


@dataclass(frozen=True)
class Layout:
    """The matrices (out, in) that a parameter consists of.

    A parameter of shape (r, c) is one matrix; (E, r, c) is one for each of E experts; the filters (out, in, h, w) or
    (out, in, d, h, w) of a convolution are one matrix (out, in · h · w). Each is cut along its outputs where the
    projection is a fused one.

    Attributes:
        transposed: matrices are stored (in, out), as in GPT-2's ``Conv1D`` and in transposed convolutions.
        parts: name and number of outputs of each part of a fused projection, in order; () where it is not fused.
        blocks: how many times the parts follow one another: a part consists of its outputs in every block.
        cuts_inputs: parts are of the inputs, not of the outputs, as in an adapter's B for all experts.
        filters: three dimensions are the filters (out, in, width) of a convolution, and not experts.

    In the methods, ``tensor`` is of the parameter's shape, and ``index`` counts the matrices as :meth:`part_names`.
    """

    transposed: bool = False
    parts: Sequence[tuple[str, int]] = ()
    blocks: int = 1
    cuts_inputs: bool = False
    filters: bool = False

    def has_experts(self, shape: Sequence[int]) -> bool:
        """Return whether a parameter of this shape is a stack of experts."""
        return len(shape) == 3 and not self.filters

    @property
    def _cut_dimension(self) -> int:
        """The dimension of a stored matrix in which its parts follow one another."""
        return int(self.transposed != self.cuts_inputs)

    def part_names(self, shape: Sequence[int]) -> list[str]:
        """Return a name for each matrix of a parameter of this shape; ``[""]`` where the parameter is one matrix."""
        experts = [str(expert) for expert in range(shape[0])] if self.has_experts(shape) else [""]
        parts = [name for name, _ in self.parts] or [""]
        return [".".join(filter(None, pair)) for pair in product(experts, parts)]

    def expert(self, shape: Sequence[int], index: int) -> str:
        """Return the name of the expert that a matrix belongs to, "" where the parameter has no experts."""
        return str(index // (len(self.parts) or 1)) if self.has_experts(shape) else ""

    def part(self, tensor: Tensor, index: int) -> Tensor:
        """Return one matrix of a tensor of the parameter's shape as a view in the shape in which it is stored.

        That is (rows, columns); (out, in, ...) of filters; (blocks, outputs, columns), or (rows, blocks, outputs)
        where columns are cut, of a part that lies in several blocks.
        """
        expert, part = divmod(index, len(self.parts) or 1)
        if self.has_experts(tensor.shape):
            tensor = tensor[expert]
        if not self.parts:
            return tensor
        dim = self._cut_dimension
        if self.blocks > 1:
            tensor = tensor.unflatten(dim, (self.blocks, -1))
            dim += 1
        sizes = [size for _, size in self.parts]
        return tensor.narrow(dim, sum(sizes[:part]), sizes[part])

    def matrix(self, tensor: Tensor, index: int) -> Tensor:
        """Return one matrix as (rows, columns); a copy where it lies in several blocks, else a view."""
        part = self.part(tensor, index)
        return part.flatten(0, 1) if self.blocks > 1 and not self._cut_dimension else part.flatten(1)

    def place(self, tensor: Tensor, index: int) -> Place:
        """Return where one matrix lies in a tensor of the parameter's shape."""
        part = self.part(tensor, index)
        return Place.of(part, 2 if self.blocks > 1 and not self._cut_dimension else 1, tensor)

    def matrix_shape(self, shape: Sequence[int], index: int) -> tuple[int, int]:
        """Return (rows, columns) of one matrix of a parameter of this shape, as stored."""
        rows, *others = shape[1:] if self.has_experts(shape) else shape
        columns = math.prod(others)
        if self.parts:
            cut = self.blocks * self.parts[index % len(self.parts)][1]
            return (rows, cut) if self._cut_dimension else (cut, columns)
        return rows, columns

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raise unless a parameter of this shape consists of such matrices.

        Raises:
            ValueError: when it has one dimension or more than five, or its parts do not add up to its outputs.
        """
        if not 2 <= len(shape) <= 5:
            raise ValueError(
                f"Parameter {name!r} of shape {tuple(shape)} is not a matrix. Put it into a group with "
                "spectral=False, or let hf_schatten.create_schatten_optimizer(model) make the groups."
            )
        size = replace(self, parts=()).matrix_shape(shape, 0)[self._cut_dimension]
        total = self.blocks * sum(size for _, size in self.parts)
        if self.parts and total != size:
            blocks = f" in {self.blocks} blocks" if self.blocks > 1 else ""
            raise ValueError(
                f"Parameter {name!r} has {size} {'inputs' if self.cuts_inputs else 'outputs'}, and its parts "
                f"{dict(self.parts)} have {total}{blocks}: give parts that add up."
            )


LAYOUT = tuple(field.name for field in fields(Layout))  # what parameter groups have under these names


def matches(pattern: str, name: str) -> bool:
    """Return whether an ``fnmatch`` pattern matches a parameter's or matrix's name, with or without "weight"."""
    return fnmatchcase(name, pattern) or fnmatchcase(layer_name(name), pattern)


def matrix_name(parameter_name: str, part_name: str) -> str:
    """Return the name of a matrix: the parameter's, followed by the part's where it has several."""
    return f"{parameter_name}.{part_name}" if part_name else parameter_name


def layer_kind(name: str) -> str:
    """Return what layers of one kind have in common: their name with every number as ``*``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def layer_name(name: str) -> str:
    """Return the name that a matrix is reported under: without "weight"."""
    return ".".join(component for component in name.split(".") if component != "weight")
