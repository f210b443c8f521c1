"""Triton kernels of the numbers of an iteration; see :mod:`hf_schatten.linalg.iteration_numbers` for what they are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_schatten.linalg.triton_launch import launched_where_it_lies
from hf_schatten.linalg.triton_placed import lerp

_BLOCK = 1024  # rows that are looked at at once
_SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _squared_units_kernel(gram, found, m, BLOCK: tl.constexpr):
    index = tl.program_id(0)
    diagonal = gram + index.to(tl.int64) * m * m
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, m, BLOCK):
        row = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(diagonal + row * (m + 1), mask=row < m, other=0.0).to(tl.float32))
    unit = tl.max(largest)
    unit = tl.where(unit == 0, 1.0, unit)
    tl.store(found + index, unit)
    tl.store(found + tl.num_programs(0) + index, 1 / unit)


@launched_where_it_lies
def squared_units(gram: Tensor) -> Tensor:
    """Return the largest element of each contiguous Gram matrix (B, m, m), 1 for 0, and its reciprocal, (2, B)."""
    count, m, _ = gram.shape
    found = torch.empty(2, count, dtype=torch.float32, device=gram.device)
    _squared_units_kernel[(count,)](gram, found, m, BLOCK=_BLOCK, num_warps=4)
    return found


@triton.jit
def _place_in_table(exponent, nodes, table, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """The row before an exponent, and how far it is on the way to the next one."""
    number = tl.arange(0, ROWS)
    before = (number < rows) & (tl.load(nodes + number, mask=number < rows, other=0.0) <= exponent)
    right = tl.minimum(tl.maximum(tl.sum(before.to(tl.int32)), 1), rows - 1)
    low, high = tl.load(nodes + right - 1), tl.load(nodes + right)
    return table + (right - 1) * WIDTH, (exponent - low) / (high - low)


@triton.jit
def _coefficient(row, number, fraction, WIDTH: tl.constexpr, POWER: tl.constexpr):
    """A number of a row, or between that and the one of the next row."""
    value = tl.load(row + number)
    if POWER:
        value = lerp(value, tl.load(row + WIDTH + number), fraction)
    return value


@triton.jit
def _squared_norm(norms, m, safety, smallest_norm, BLOCK: tl.constexpr):
    """The squared Schatten-8 norm of the start, relative to its unit, given norms of rows."""
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, m, BLOCK):
        at = start + tl.arange(0, BLOCK)
        of_rows = tl.load(norms + at, mask=at < m, other=0.0).to(tl.float32)
        squares += of_rows * of_rows
    norm = tl.sqrt(tl.sum(squares))
    return safety * safety * tl.sqrt(tl.where(norm < smallest_norm, smallest_norm, norm))  # NaN stays


@triton.jit
def _store_columns(
    columns, row, fraction, identity, squared_norm, over, STEPS: tl.constexpr, POWER: tl.constexpr, ONE: tl.constexpr
):
    """Store a, b, c of all steps, the first for a Gram matrix that is not divided; ONE: the rest is the last step."""
    WIDTH: tl.constexpr = 4 * STEPS + 1
    count = tl.num_programs(0)
    for k in tl.static_range(STEPS):
        a = _coefficient(row, k, fraction, WIDTH, POWER)
        b = _coefficient(row, STEPS + k, fraction, WIDTH, POWER)
        c = _coefficient(row, 2 * STEPS + k, fraction, WIDTH, POWER)
        if ONE and k == STEPS - 1:
            weight = _coefficient(row, 4 * STEPS, fraction, WIDTH, POWER)
            a, b, c = identity + weight * a, weight * b, weight * c
        if k == 0:
            a, b, c = a / over, b / squared_norm / over, c / (squared_norm * squared_norm) / over
        tl.store(columns + k * count, a)
        tl.store(columns + (STEPS + k) * count, b)
        tl.store(columns + (2 * STEPS + k) * count, c)
    tl.store(columns + 3 * STEPS * count, 1 / squared_norm)
    tl.store(columns + (3 * STEPS + 1) * count, identity)


@triton.jit
def _iteration_numbers_kernel(
    s,
    nodes,
    table,
    norms,
    largest,
    squared_units,
    columns,
    inner,
    outer,
    m,
    rows,
    safety,
    smallest_norm,
    largest_weight,
    POWER: tl.constexpr,
    STEPS: tl.constexpr,
    DIRECT: tl.constexpr,
    FROM_START: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    WIDTH: tl.constexpr = 4 * STEPS + 1
    WEIGHTS: tl.constexpr = 3 * STEPS
    INNER: tl.constexpr = STEPS - DIRECT
    OUTER: tl.constexpr = max(DIRECT, 1) + 1

    squared_norm = _squared_norm(norms + index.to(tl.int64) * m, m, safety, smallest_norm, BLOCK)
    norm, own_unit = tl.sqrt(squared_norm), tl.sqrt(tl.load(squared_units + index))
    unit, divisor = tl.load(largest + index) * own_unit, own_unit * norm
    row, fraction, scale = table, 0.0, 1.0
    if POWER:
        exponent = tl.load(s + index)
        row, fraction = _place_in_table(exponent, nodes, table, rows, WIDTH, ROWS)
        # In float64, so that p = 1 gives back what there was.
        scale = tl.exp2(exponent.to(tl.float64) * tl.log2(unit.to(tl.float64) * norm)).to(tl.float32)
    whole = divisor
    if not FROM_START:
        whole = tl.where(unit * norm < _SMALLEST, _SMALLEST, unit * norm)
    over, rest = 1.0, scale / divisor
    identity = 0.0
    if DIRECT:
        over, rest = divisor, scale
        identity = _coefficient(row, WEIGHTS + DIRECT, fraction, WIDTH, POWER)
    _store_columns(columns + index, row, fraction, identity, squared_norm, over, STEPS, POWER, DIRECT == STEPS - 1)
    for k in tl.static_range(INNER):
        weight = _coefficient(row, WEIGHTS + DIRECT + 1 + k, fraction, WIDTH, POWER)
        tl.store(inner + index * INNER + k, weight)
    for k in tl.static_range(OUTER):
        weight = rest
        if k < OUTER - 1:
            weight = _coefficient(row, WEIGHTS + k, fraction, WIDTH, POWER) * scale
        if k == 0:
            weight = weight / whole
        weight = tl.where(weight > largest_weight, largest_weight, weight)
        tl.store(outer + index * OUTER + k, tl.where(weight < -largest_weight, -largest_weight, weight))


@launched_where_it_lies
def iteration_numbers(
    norms: Tensor,
    s: Tensor | None,
    table: tuple[Tensor, Tensor],
    steps: int,
    direct: int,
    largest: Tensor,
    squared_unit: Tensor,
    from_start: bool,
    limits: tuple[float, float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return columns (3K + 2, B), inner weights (B, K - direct), and outer ones (B, max(direct, 1) + 1).

    All tensors are float32, but for the norms, and contiguous. The table is that of nodes and rows, or of a node and a
    row without s; limits are the constants of :mod:`hf_schatten.linalg.iteration_numbers`.
    """
    count, m = norms.shape
    nodes, rows = table
    shapes = (3 * steps + 2, count), (count, steps - direct), (count, max(direct, 1) + 1)
    columns, inner, outer = (torch.empty(shape, dtype=torch.float32, device=norms.device) for shape in shapes)
    given = nodes if s is None else s, nodes, rows, norms, largest, squared_unit
    _iteration_numbers_kernel[(count,)](
        *(*given, columns, inner, outer, m, len(nodes), *limits),
        POWER=s is not None,
        STEPS=steps,
        DIRECT=direct,
        FROM_START=from_start,
        ROWS=triton.next_power_of_2(len(nodes)),
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return columns, inner, outer
