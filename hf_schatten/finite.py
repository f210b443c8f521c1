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


def count_unusable(usable: Sequence[Tensor], counters: Sequence[Tensor]) -> None:
    """Add 1 to the counters of gradients that are not usable; nothing waits for the device.

    Args:
        usable: bool scalars.
        counters: a float64 scalar for each, on its device.
    """
    by_device: dict[torch.device, list[int]] = {}
    for number, counter in enumerate(counters):
        by_device.setdefault(counter.device, []).append(number)
    for numbers in by_device.values():
        added = torch.stack([usable[number] for number in numbers]).logical_not_().double()
        torch._foreach_add_([counters[number] for number in numbers], added.unbind())


def _are_finite(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return for each gradient whether every element is a finite number, bool scalars on its device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        by_device.setdefault(gradient.device, []).append(gradient)
    # Looked at together: an operation for each would take longer than the look.
    finite = {device: iter(_extremes(found).isfinite().all(-1).unbind()) for device, found in by_device.items()}
    return [next(finite[gradient.device]) for gradient in gradients]


def _extremes(gradients: Sequence[Tensor]) -> Tensor:
    """Return numbers of each gradient, (gradients, 1 or 2), that are finite where all its elements are."""
    sized = [gradient if gradient.numel() else gradient.new_zeros(1) for gradient in gradients]  # FSDP: without rows
    # NaN wins in both. A norm of infinite order is one operation for all on an accelerator, and slower on a CPU.
    if gradients[0].device.type == "cpu":
        return torch.stack([extreme for gradient in sized for extreme in gradient.aminmax()]).view(-1, 2)
    return torch.stack(torch._foreach_norm(sized, torch.inf))[:, None]
