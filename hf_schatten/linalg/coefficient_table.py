"""The stored coefficients of the multi-scale iteration: reads them and interpolates between their columns.

The data, one file for each number of steps, is made by ``python -m hf_schatten.linalg.coefficients``.
"""

import functools
import json
from importlib import resources

import torch
from torch import Tensor

MIN_EXPONENT = -0.25
MAX_EXPONENT = 1.0
STEPS = (3, 4, 5, 6, 7, 8)


def table_filename(steps: int) -> str:
    """Name of the data file that holds the columns for ``steps`` Newton–Schulz steps."""
    return f"spectral_power_{steps}_steps.json"


@functools.cache
def load_table(steps: int) -> dict:
    """Read the stored table for ``steps`` steps.

    Args:
        steps: Number of Newton–Schulz steps K, one of `STEPS`.

    Returns:
        The parsed file: ``columns`` is a list in ascending, equally spaced exponent ``s``, each with ``a``,
        ``b``, ``c`` (K numbers), ``w`` (K + 1 numbers) and the errors of its fit.

    Raises:
        ValueError: If no table is stored for ``steps``.
    """
    if steps not in STEPS:
        raise ValueError(f"steps must be one of {STEPS}, got {steps!r}")
    return json.loads(resources.files(__package__).joinpath(table_filename(steps)).read_text("utf-8"))


@torch.compiler.assume_constant_result
@functools.cache
def _columns(steps: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """All columns as one tensor (columns, 4K + 1) on ``device``; cached, so that no step copies it again."""
    rows = [[*c["a"], *c["b"], *c["c"], *c["w"]] for c in load_table(steps)["columns"]]
    return torch.tensor(rows, dtype=dtype, device=device)


def interpolate(
    s: Tensor, steps: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Coefficients for each exponent, linear between the stored columns (hence continuous in s).

    Args:
        s: Exponents, shape (B,); values outside [-0.25, 1] are clamped, NaN gives NaN.
        steps: Number of Newton–Schulz steps K.
        dtype: Dtype of the result.

    Returns:
        ``(a, b, c, w)``: three tuples of K tensors and one of K + 1, each tensor of shape (B, 1, 1).
    """
    table = _columns(steps, dtype, s.device)
    intervals = table.shape[0] - 1
    position = (s.to(dtype).clamp(MIN_EXPONENT, MAX_EXPONENT) - MIN_EXPONENT) * (
        intervals / (MAX_EXPONENT - MIN_EXPONENT)
    )
    # An index cannot be NaN; the fraction still is, and carries the NaN to the result.
    left = position.nan_to_num(0.0).floor().clamp(max=intervals - 1)
    index = left.long()
    column = torch.lerp(table[index], table[index + 1], (position - left).unsqueeze(-1))  # (B, 4K + 1)
    scalars = column[..., None, None].unbind(1)
    return scalars[:steps], scalars[steps : 2 * steps], scalars[2 * steps : 3 * steps], scalars[3 * steps :]
