"""Which gradients are finite, on all processes together; the others count as absent, and their steps are skipped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hf_schatten.distributed.sharded import is_sharded, local
from hf_schatten.linalg.all_finite import are_finite
from hf_schatten.optim.matrix import Group


class FiniteGradients:
    """Whether the gradient of each parameter is finite, for those that have one. Nothing waits for the device.

    Where FSDP shards parameters, all processes make it together, and agree.

    Args:
        groups: of the optimizer.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        parameters = [parameter for group in groups for parameter in group["params"] if parameter.grad is not None]
        found = are_finite([local(parameter.grad) for parameter in parameters])
        self._finite = dict(zip(parameters, found, strict=True))
        sharded = [parameter for parameter in parameters if is_sharded(parameter)]
        if sharded:
            agreed = torch.stack([self._finite[parameter] for parameter in sharded]).int()
            dist.all_reduce(agreed, dist.ReduceOp.MIN)
            self._finite.update(zip(sharded, agreed.bool(), strict=True))
        self._keep = dict(zip(parameters, _by_device(self._finite.values(), torch.float32), strict=True))

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._finite

    def of(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return those of the parameters that have a gradient."""
        return [parameter for parameter in parameters if parameter in self._finite]

    def keep(self, parameter: Tensor) -> Tensor:
        """Return 1 where the gradient is finite, else 0: a float32 scalar on its device."""
        return self._keep[parameter]

    def gradient(self, parameter: Tensor, dtype: torch.dtype, otherwise: Tensor | float) -> Tensor:
        """Return what this process has of a gradient, or something else where it is not finite.

        On a CPU there is nothing to wait for, and a finite gradient of this dtype is not copied.

        Args:
            parameter: has a gradient.
            dtype: wanted.
            otherwise: of the gradient's shape, or a number for all elements.
        """
        gradient = local(parameter.grad).to(dtype)  # type: ignore[arg-type]
        return self.where(parameter, gradient, otherwise)

    def where(self, parameter: Tensor, gradient: Tensor, otherwise: Tensor | float) -> Tensor:
        """Return a part of the parameter's gradient, or something else where the gradient is not finite."""
        finite = self._finite[parameter]
        if finite.device.type == "cpu" and finite:
            return gradient
        return torch.where(finite, gradient, otherwise)

    def count_skipped(self, parameters: Sequence[Tensor], counters: list[Tensor]) -> None:
        """Add 1 to the counters of parameters whose gradient is not finite.

        Args:
            parameters: have gradients.
            counters: a float64 scalar for each, on its device.
        """
        if parameters:
            skipped = _by_device([self._finite[parameter].logical_not() for parameter in parameters], torch.float64)
            torch._foreach_add_(counters, skipped)


def _by_device(flags: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return bool scalars as numbers, those of one device by one operation."""
    flags = list(flags)
    alike: dict[torch.device, list[Tensor]] = {}
    for flag in flags:
        alike.setdefault(flag.device, []).append(flag)
    numbers = {device: iter(torch.stack(of_device).to(dtype).unbind()) for device, of_device in alike.items()}
    return [next(numbers[flag.device]) for flag in flags]
