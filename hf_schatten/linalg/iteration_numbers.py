"""The numbers that a polynomial iteration multiplies matrices by: a few for each, from coefficients and norms.

They take some forty operations on short tensors. Launched one by one on a GPU, these would take longer than the
products of small matrices do, so that there they are one kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_schatten.linalg.accelerated import kernels_of
from hf_schatten.linalg.coefficient_table import columns_of, interpolate

# The Schatten-8 norm bounds σ_max, but for the rounding of half precision; beyond 1 the polynomials explode.
SAFETY = 1.01
SMALLEST_NORM = 0.5  # of squares whose largest element is 1 but for rounding
LARGEST_WEIGHT = 1e37  # what zero is multiplied by stays finite


class Step(NamedTuple):
    """Coefficients of a step's polynomial ``a I + b A + c A²``, one for each matrix: tensors (B,), or (1,)."""

    a: Tensor
    b: Tensor
    c: Tensor


class Numbers(NamedTuple):
    """The numbers of B matrices; see :mod:`hf_schatten.linalg.spectral_power` for the iteration.

    With the Gram matrix A of the start, divided by its largest element, ``A · inverse_norms`` is that of X_0. The
    first steps, ``direct`` of them, act on iterates, and the rest on Gram matrices.
    """

    steps: list[Step]  # the first is one of A, and gives X_1 from the start; a rest of one step is the sum of the rest
    inverse_norms: Tensor  # (B,)
    identity: Tensor  # weight of the identity in the sum of the rest, (B,) or (1,)
    inner: Tensor  # weights of the polynomials there, (B, rest) or (1, rest)
    outer: Tensor  # weights of X, or the start, of iterates but the last, and of the rest: (B, max(direct, 1) + 1)


def squared_units(gram: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the largest element of each Gram matrix (B, m, m), 1 where that is 0, and its reciprocal; (B,) each."""
    kernels = kernels_of(gram.device)
    if kernels is not None and dtype == torch.float32:
        return kernels.squared_units(gram)
    largest = gram.diagonal(dim1=-2, dim2=-1).amax(-1).to(dtype)  # it is on the diagonal
    largest = largest.masked_fill(largest == 0, 1.0)
    return largest, largest.reciprocal()


def iteration_numbers(
    s: Tensor | None,
    row: Sequence[float],
    steps: int,
    direct: int,
    norms: Tensor,
    largest: Tensor,
    squared_unit: Tensor,
    from_start: bool,
) -> Numbers:
    """Return the numbers of an iteration.

    Args:
        s: exponents (B,), float32 or float64, which the numbers are too; None for the coefficients in ``row``.
        row: those of a function that is relative to the norm, see :class:`Coefficients`; empty with s.
        steps: the number of steps K.
        direct: how many of them act on iterates, less than K.
        norms: Euclidean norms of the rows of A², (B, m).
        largest: what X is divided by in the start, (B,).
        squared_unit: what the start's Gram matrix is divided by in A, (B,).
        from_start: whether the sum begins with the start and not with X.
    """
    kernels = kernels_of(norms.device)
    if kernels is not None and squared_unit.dtype == torch.float32:
        table = _one_row(tuple(row), norms.device) if s is None else columns_of(steps, s.dtype, s.device)
        limits = SAFETY, SMALLEST_NORM, LARGEST_WEIGHT
        found = kernels.iteration_numbers(norms, s, table, steps, direct, largest, squared_unit, from_start, limits)
        return _unpacked(found, steps)
    given = s, list(row), steps, direct, norms, largest, squared_unit, from_start
    found = _unpacked(_iteration_numbers(*given), steps)
    if norms.device.type == "cpu" and (s is None or bool((s == s[0]).all())):
        one = [Step(*(numbers[:1] for numbers in step)) for step in found.steps[1:]]
        return Numbers([found.steps[0], *one], found.inverse_norms, found.identity[:1], found.inner[:1], found.outer)
    return found


@functools.lru_cache(maxsize=16)
def _one_row(row: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a table of one row, and one node."""
    rows = torch.tensor([row], dtype=torch.float32).to(device, non_blocking=True)
    return rows.new_zeros(1), rows


def _unpacked(found: tuple[Tensor, Tensor, Tensor], steps: int) -> Numbers:
    columns, inner, outer = found
    *of_steps, inverse_norms, identity = columns.unbind()
    chain = [Step(*of_steps[k : 3 * steps : steps]) for k in range(steps)]
    return Numbers(chain, inverse_norms, identity, inner, outer)


@torch.library.custom_op("hf_schatten::iteration_numbers", mutates_args=())
def _iteration_numbers(
    s: Tensor | None,
    row: list[float],
    steps: int,
    direct: int,
    norms: Tensor,
    largest: Tensor,
    squared_unit: Tensor,
    from_start: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return all a, b and c, the inverse norms and weights of the identity, (3K + 2, B), and inner and outer ones."""
    dtype = squared_unit.dtype
    if s is None:
        rows = torch.tensor(row, dtype=dtype).to(norms.device, non_blocking=True).expand(len(norms), -1)
    else:
        rows = interpolate(s, steps)
    a, b, c, w = rows.mT.clone().split([steps, steps, steps, steps + 1])
    squared_norm = SAFETY**2 * torch.linalg.vector_norm(norms, dim=-1, dtype=dtype).clamp(SMALLEST_NORM).sqrt()
    own_unit, norm = squared_unit.sqrt(), squared_norm.sqrt()
    unit = largest * own_unit
    scale = torch.ones_like(unit) if s is None else unit**s * norm**s
    divisor = own_unit * norm
    whole = divisor if from_start else (unit * norm).clamp(torch.finfo(dtype).tiny)
    outer = [w[0] * scale / whole, *(w[1:direct] * scale), scale / (1.0 if direct else divisor)]
    identity, inner = w[direct] if direct else torch.zeros_like(scale), w[direct + 1 :].mT.contiguous()
    if direct == steps - 1:
        a[-1], b[-1], c[-1] = identity + w[-1] * a[-1], w[-1] * b[-1], w[-1] * c[-1]
    over = divisor if direct else 1.0
    a[0], b[0], c[0] = a[0] / over, b[0] / squared_norm / over, c[0] / squared_norm**2 / over
    columns = torch.cat([a, b, c, squared_norm.reciprocal()[None], identity[None]])
    return columns, inner, torch.stack(outer, 1).clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)


@_iteration_numbers.register_fake
def _(
    s: object, row: object, steps: int, direct: int, norms: Tensor, largest: Tensor, unit: Tensor, from_start: bool
) -> tuple[Tensor, Tensor, Tensor]:
    count = len(unit)
    shapes = (3 * steps + 2, count), (count, steps - direct), (count, max(direct, 1) + 1)
    return unit.new_empty(shapes[0]), unit.new_empty(shapes[1]), unit.new_empty(shapes[2])
