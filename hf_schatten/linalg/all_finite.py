"""Whether tensors are finite, all of them looked at together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def are_finite(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return for each floating tensor whether all its elements are finite, bool scalars; nothing waits for the device.

    Shapes, dtypes and devices may differ. An empty tensor is finite.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    # Together: an operation for each would take longer than the look.
    finite = {device: iter(_extremes(found).isfinite().all(-1).unbind()) for device, found in by_device.items()}
    return [next(finite[tensor.device]) for tensor in tensors]


def _extremes(tensors: Sequence[Tensor]) -> Tensor:
    """Return numbers of each tensor, (tensors, 1 or 2), that are finite where all its elements are."""
    sized = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]  # FSDP: without rows
    # NaN wins in both. A norm of infinite order is one operation for all on an accelerator, and slower on a CPU.
    if tensors[0].device.type == "cpu":
        return torch.stack([extreme for tensor in sized for extreme in tensor.aminmax()]).view(-1, 2)
    return torch.stack(torch._foreach_norm(sized, torch.inf))[:, None]
