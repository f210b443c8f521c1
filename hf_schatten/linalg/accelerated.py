"""Whether a device runs the Triton kernels."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

_OLDEST = 8  # major compute capability with products of bfloat16


@functools.cache
def kernels_of(device: torch.device) -> ModuleType | None:
    """Return the module of kernels where a device runs them and they are right there, else None.

    Builds of torch for GPUs bring Triton along. Where it is missing, or the kernels fail, a warning says so, and
    torch's own operations do the same work in more launches.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < _OLDEST:
        return None
    try:
        from hf_schatten.linalg import triton_kernels  # noqa: PLC0415 - slow to import, and missing on a CPU

        triton_kernels.check(device)
    except Exception as error:
        logger.warning(
            "The Triton kernels do not run on %s (%s: %s): updates are computed by torch's operations, which is "
            "slower. `python -m pip install triton` where it is missing.",
            torch.cuda.get_device_name(device),
            type(error).__name__,
            error,
        )
        return None
    return triton_kernels
