"""Which gradients can be used: those that are finite, on all processes together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .matrix import Group
from .sharded import is_sharded, local

Usable = dict[Tensor, Tensor]  # by parameter, a bool scalar on its device


def usable_gradients(groups: Iterable[Group]) -> Usable:
    """Return for every parameter that has a gradient whether all of it is finite.

    Nothing waits for the device. Where FSDP shards parameters, all processes call it together, and agree.
    """
    parameters = [parameter for group in groups for parameter in group["params"] if parameter.grad is not None]
    finite = _are_finite([local(parameter.grad) for parameter in parameters])
    usable = dict(zip(parameters, finite, strict=True))
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if sharded:
        agreed = torch.stack([usable[parameter] for parameter in sharded]).int()
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        usable.update(zip(sharded, agreed.bool(), strict=True))
    return usable


def _are_finite(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return for each gradient whether every element is a finite number, bool scalars on its device."""
    extremes: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        # NaN wins in both. On a CPU, a norm of infinite order is slower.
        least, largest = gradient.aminmax() if gradient.numel() else gradient.new_zeros(2)  # a process without rows
        extremes.setdefault(gradient.device, []).extend((least, largest))
    # Looked at together: an operation for each would take longer than the look.
    finite = {
        device: iter(torch.stack(found).isfinite().view(-1, 2).all(-1).unbind()) for device, found in extremes.items()
    }
    return [next(finite[gradient.device]) for gradient in gradients]
