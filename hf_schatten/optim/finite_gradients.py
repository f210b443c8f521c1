"""Which gradients are finite, on all processes together; the others count as absent, and their steps are skipped."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from hf_schatten.distributed.pieces import is_sharded, local, shared_alike
from hf_schatten.distributed.sharded import expanded, of_experts
from hf_schatten.linalg.many_matrices import largest_magnitudes
from hf_schatten.optim.matrix import Group, by_device, named_parameters
from hf_schatten.optim.numbers_of import NumbersOf

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
    """Whether the gradient of each parameter is finite, and whether it is zero, for those that have one.

    Parameters without elements count as having none. Nothing waits for the device. Where FSDP shards parameters, all
    processes make it together, and agree.

    Args:
        groups: of the optimizer.

    Raises:
        ValueError: when a gradient is sparse.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        pieces: dict[Tensor, list[Tensor]] = {}
        self._experts: dict[Tensor, list[int]] = {}  # of stacks of them, those of which this process has anything
        for group in groups:
            for name, parameter in named_parameters(group):
                if (gradient := parameter.grad) is None or not parameter.numel():
                    continue
                _require_dense(name, gradient)
                if is_sharded(parameter):
                    gradient = local(shared_alike(parameter, gradient))
                pieces[parameter] = [gradient]
                if group["spectral"] and parameter.ndim == 3:
                    self._experts[parameter], of_experts_here = of_experts(parameter, gradient)
                    pieces[parameter] = of_experts_here or [gradient]
        self._keep, self._zero = NumbersOf(), NumbersOf()  # float64, bool
        if self._experts or any(map(is_sharded, pieces)):
            self._look_at_pieces(pieces)
            return
        for parameters in by_device(pieces).values():
            norms = _norms([pieces[parameter][0] for parameter in parameters])
            self._keep.add(parameters, norms.isfinite().double())
            self._zero.add(parameters, norms.eq(0))

    def _look_at_pieces(self, pieces: Mapping[Tensor, Sequence[Tensor]]) -> None:
        finite, zero = finite_and_zero([piece for of_parameter in pieces.values() for piece in of_parameter])
        ends = list(accumulate(map(len, pieces.values()), initial=0))
        spans = dict(zip(pieces, map(slice, ends, ends[1:]), strict=True))
        zeros = {parameter: zero[span] for parameter, span in spans.items()}
        all_finite = {parameter: torch.stack(finite[span]).all() for parameter, span in spans.items()}
        self._agree([parameter for parameter in pieces if is_sharded(parameter)], all_finite, zeros)
        for together in by_device(pieces).values():
            self._keep.add(together, torch.stack([all_finite[parameter] for parameter in together]).double())
            flags = [zeros[parameter] for parameter in together]
            self._zero.add(together, torch.stack([flag for each in flags for flag in each]), list(map(len, flags)))

    def _agree(
        self, sharded: Sequence[Tensor], all_finite: dict[Tensor, Tensor], zeros: dict[Tensor, list[Tensor]]
    ) -> None:
        """Make of what this process has seen of shards what all have seen."""
        if not sharded:
            return
        seen = []
        for parameter in sharded:
            finite, zero = all_finite[parameter], zeros[parameter]
            if parameter in self._experts:
                numbers = self._experts[parameter]
                zero = expanded(parameter, numbers, zero[: len(numbers)], torch.ones_like(finite))
            seen.append(torch.stack([finite, *zero]))
        agreed = torch.cat(seen).int()
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        for parameter, flags in zip(sharded, agreed.bool().split(list(map(len, seen))), strict=True):
            all_finite[parameter], *zeros[parameter] = flags.unbind()

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._keep

    def of(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return those of the parameters that have a gradient."""
        return [parameter for parameter in parameters if parameter in self._keep]

    def keep(self, parameter: Tensor) -> Tensor:
        """Return 1 where the gradient is finite, else 0: a float64 scalar on its device."""
        return self._keep.of([parameter])[0]

    def keeps(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return the same of B parameters of one device, (B,)."""
        return self._keep.of(parameters)

    def zeros(self, parameters: Sequence[Tensor], times: Sequence[int]) -> Tensor:
        """Return whether all of a gradient is zero, bool, of each parameter, or of each of its experts; repeated."""
        return self._zero.all_of(parameters, times)

    def gradient(self, parameter: Tensor, dtype: torch.dtype, otherwise: Tensor | float) -> Tensor:
        """Return what this process has of a gradient, or something else where it is not finite.

        On a CPU there is nothing to wait for, and a finite gradient of this dtype is not copied.
        """
        gradient, finite = local(parameter.grad).to(dtype), self.keep(parameter) > 0  # type: ignore[arg-type]
        if finite.device.type == "cpu" and finite:
            return gradient
        return torch.where(finite, gradient, otherwise)


def finite_and_zero(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return for each floating tensor whether all its elements are finite, and whether all are zero: bool scalars.

    Shapes, dtypes and devices may differ. An empty tensor is both. Nothing waits for the device.
    """
    flags = {device: _flags(together) for device, together in by_device(tensors).items()}
    pairs = [next(flags[tensor.device]) for tensor in tensors]
    return [finite for finite, _ in pairs], [zero for _, zero in pairs]


def warn_of_skipped(skipped: Mapping[str, int]) -> None:
    """Warn of the steps that matrices have skipped, given how many by their names."""
    most = max(skipped.values())
    first, *others = [name for name, count in skipped.items() if count == most]
    message, which = (_SKIPPED_MANY, 1 + len(others)) if others else (_SKIPPED_ONE, first)
    logger.warning(message, len(skipped), which, most)


def _require_dense(name: str, gradient: Tensor) -> None:
    if gradient.layout != torch.strided:
        raise ValueError(
            f"The gradient of {name!r} is sparse, which is not supported: make its module with sparse=False, or leave "
            "this parameter to torch.optim.SparseAdam."
        )


def _flags(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    norms = _norms(tensors)
    return zip(norms.isfinite().unbind(), norms.eq(0).unbind(), strict=True)


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return a norm of each tensor of one device, (tensors,): finite where all elements are, zero where all are."""
    sized = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]  # FSDP: without rows
    if tensors[0].device.type != "cpu":
        return largest_magnitudes(sized)
    # A CPU is fast at the Euclidean norm only, which overflows, or vanishes, where elements are large, or small.
    norms = torch.stack(torch._foreach_norm(sized)).double()
    for index in (~norms.isfinite() | norms.eq(0)).nonzero().flatten().tolist():
        norms[index] = torch.linalg.vector_norm(sized[index], torch.inf)
    return norms
