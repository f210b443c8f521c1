"""The coefficients of the multi-scale iteration: what they are, their stored tables, interpolation in the exponent.

``python benchmarks/spectral_power/fit_tables.py`` makes the tables, one JSON file for each number of steps.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from hf_schatten.exponent import MAX_EXPONENT, MIN_EXPONENT
from hf_schatten.options import NS_STEPS

Argument = TypeVar("Argument", np.ndarray, Tensor)


@dataclass(frozen=True)
class Coefficients:
    """A polynomial iteration ``x ↦ Σ_k w_k y_k``, an odd function on (0, 1].

    ``y_0 = x`` and ``y_k = a_k y_{k-1} + b_k y_{k-1}³ + c_k y_{k-1}⁵`` for k = 1 … K.

    Attributes:
        a: K coefficients of y.
        b: K coefficients of y³.
        c: K coefficients of y⁵.
        w: K + 1 weights of the iterates.
    """

    a: tuple[float, ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    w: tuple[float, ...]

    @classmethod
    def from_row(cls, row: Sequence[float]) -> "Coefficients":
        """Split one sequence of 4K + 1 numbers: a, b, c and w.

        Args:
            row: as :attr:`row` has them.
        """
        steps = len(row) // 4
        a, b, c, w = (tuple(row[k * steps : (k + 1) * steps + k // 3]) for k in range(4))
        return cls(a, b, c, w)

    @property
    def row(self) -> tuple[float, ...]:
        """All 4K + 1 numbers: a, b, c and w."""
        return (*self.a, *self.b, *self.c, *self.w)

    @property
    def steps(self) -> int:
        """The number of steps K."""
        return len(self.a)

    def transfer(self, x: Argument) -> Argument:
        """Return what the iteration makes of singular values.

        Args:
            x: an array or tensor of any shape.

        Returns:
            values of the shape and dtype of x.
        """
        y = x
        total = self.w[0] * y
        for a, b, c, weight in zip(self.a, self.b, self.c, self.w[1:], strict=True):
            y = y * (a + y**2 * (b + y**2 * c))
            total = total + weight * y
        return total


def table_filename(steps: int) -> str:
    """Return the name of the data file that holds the columns for ``steps`` Newton–Schulz steps."""
    return f"spectral_power_{steps}_steps.json"


@functools.cache
def load_table(steps: int) -> dict[str, Any]:
    """Read the stored table for one of :data:`hf_schatten.options.NS_STEPS`.

    ``columns``: one dict for each of the exponents ``s``, ascending from -0.25 to 1, with the coefficients ``a``,
    ``b``, ``c``, ``w`` and the fit's ``max_error`` (absolute) and ``relative_error`` (root mean square over log x,
    relative to the target's) on ``domain``. ``curves``: Chebyshev coefficients in s of the steps' shapes from which
    the fit of the columns began.

    Raises:
        ValueError: when no table is stored for ``steps``.
    """
    if steps not in NS_STEPS:
        raise ValueError(f"steps must be one of {NS_STEPS}, got {steps!r}")
    content: dict[str, Any] = json.loads(
        resources.files(__package__).joinpath(table_filename(steps)).read_text("utf-8")
    )
    return content


# A dict and not functools.cache, of which torch.compile warns.
_COLUMNS: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}


@torch.compiler.assume_constant_result
def columns_of(steps: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return s of all columns, (columns,), and the columns, (columns, 4K + 1), from memory after the first call."""
    key = steps, dtype, device
    if key not in _COLUMNS:
        columns = load_table(steps)["columns"]
        rows = [[*c["a"], *c["b"], *c["c"], *c["w"]] for c in columns]
        nodes = [c["s"] for c in columns]
        _COLUMNS[key] = torch.tensor(nodes, dtype=dtype, device=device), torch.tensor(rows, dtype=dtype, device=device)
    return _COLUMNS[key]


def interpolate(s: Tensor, steps: int) -> Tensor:
    """Return rows of coefficients (B, 4K + 1) for exponents s (B,): linear between the stored columns.

    s is float32 or float64, which the rows are too, and clamped to [-0.25, 1]. NaN gives NaN.

    Raises:
        ValueError: when no table is stored for ``steps``.
    """
    nodes, table = columns_of(steps, s.dtype, s.device)
    s = s.clamp(MIN_EXPONENT, MAX_EXPONENT)
    right = torch.searchsorted(nodes, s, right=True).clamp(1, len(nodes) - 1)  # the last one for NaN
    left = right - 1
    fraction = (s - nodes[left]) / (nodes[right] - nodes[left])
    return torch.lerp(table[left], table[right], fraction.unsqueeze(-1))
