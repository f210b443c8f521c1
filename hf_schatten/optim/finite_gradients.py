"""Which gradients can be used: those that are finite, on all processes together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hf_schatten.distributed.sharded import is_sharded, local
from hf_schatten.linalg.all_finite import are_finite
from hf_schatten.optim.matrix import Group

Usable = dict[Tensor, Tensor]  # by parameter, a bool scalar on its device


def usable_gradients(groups: Iterable[Group]) -> Usable:
    """Return for every parameter that has a gradient whether all of it is finite.

    Nothing waits for the device. Where FSDP shards parameters, all processes call it together, and agree.
    """
    parameters = [parameter for group in groups for parameter in group["params"] if parameter.grad is not None]
    finite = are_finite([local(parameter.grad) for parameter in parameters])
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
