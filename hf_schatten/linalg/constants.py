"""Numbers on a device that are asked for again and again, and travel there once."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


@functools.lru_cache(maxsize=1024)
def constant(numbers: tuple[Any, ...], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return numbers (N,), or rows of them, on a device; not to be written to. Nothing waits for the device."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)
