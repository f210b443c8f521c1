"""Which gradients are finite, on all processes together; the others count as absent, and their steps are skipped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hf_schatten.distributed.sharded import is_sharded, local
from hf_schatten.optim.matrix import Group

logger = logging.getLogger(__name__)

_SKIPPED_ONE = (
    "The gradients of %d of the matrices were not finite (NaN or infinite) on some steps, which were skipped: of %s, "
    "%d steps in all. Lower the learning rate, or look for the layer that overflows."
)
_SKIPPED_MANY = (
    "The gradients of %d of the matrices were not finite (NaN or infinite) on some steps, which were skipped: %d of "
    "them skipped %d steps. A Trainer, and any clipping by the norm of all gradients, makes all of them NaN where one "
    "is, so that this names no layer. Lower the learning rate, or find the layer with --debug underflow_overflow."
)


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
        numbers = _by_device(self._finite.values(), lambda alike: torch.stack(alike).double())
        self._keep = dict(zip(parameters, numbers, strict=True))

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._finite

    def of(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return those of the parameters that have a gradient."""
        return [parameter for parameter in parameters if parameter in self._finite]

    def keep(self, parameter: Tensor) -> Tensor:
        """Return 1 where the gradient is finite, else 0: a float64 scalar on its device."""
        return self._keep[parameter]

    def keeps(self, parameters: Iterable[Tensor]) -> Tensor:
        """Return the same of B parameters of one device, (B,)."""
        return torch.stack([self._keep[parameter] for parameter in parameters])

    def gradient(self, parameter: Tensor, dtype: torch.dtype, otherwise: Tensor | float) -> Tensor:
        """Return what this process has of a gradient, or something else where it is not finite.

        On a CPU there is nothing to wait for, and a finite gradient of this dtype is not copied.
        """
        gradient, finite = local(parameter.grad).to(dtype), self._finite[parameter]  # type: ignore[arg-type]
        if finite.device.type == "cpu" and finite:
            return gradient
        return torch.where(finite, gradient, otherwise)

    def count_skipped(self, parameters: Sequence[Tensor], counters: list[Tensor]) -> None:
        """Add 1 to the counters, float64 scalars, of parameters whose gradient is not finite."""
        if parameters:
            torch._foreach_add_(counters, 1.0)
            torch._foreach_sub_(counters, [self._keep[parameter] for parameter in parameters])


def are_finite(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return for each floating tensor whether all its elements are finite, bool scalars; nothing waits for the device.

    Shapes, dtypes and devices may differ. An empty tensor is finite.
    """
    return _by_device(tensors, _all_finite)


def warn_of_skipped(skipped: Mapping[str, int]) -> None:
    """Warn of the steps that matrices have skipped, given how many by their names."""
    most = max(skipped.values())
    first, *others = [name for name, count in skipped.items() if count == most]
    message, which = (_SKIPPED_MANY, 1 + len(others)) if others else (_SKIPPED_ONE, first)
    logger.warning(message, len(skipped), which, most)


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return whether all elements of each tensor of one device are finite, (tensors,)."""
    sized = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]  # FSDP: without rows
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(sized, torch.inf)).isfinite()
    # A CPU is fast at the Euclidean norm only, which overflows where elements are large; there, look at them.
    finite = torch.stack([norm.float() for norm in torch._foreach_norm(sized)]).isfinite()
    for index in finite.logical_not().nonzero().flatten().tolist():
        finite[index] = torch.stack(sized[index].aminmax()).isfinite().all()
    return finite


def _by_device(tensors: Iterable[Tensor], operation: Callable[[list[Tensor]], Tensor]) -> list[Tensor]:
    """Apply an operation from tensors to a row for each to those of every device together, and return the rows."""
    tensors = list(tensors)
    alike: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault(tensor.device, []).append(tensor)
    rows = {device: iter(operation(of_device).unbind()) for device, of_device in alike.items()}
    return [next(rows[tensor.device]) for tensor in tensors]
