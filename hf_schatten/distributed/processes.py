"""What the processes of one run share: statistics, and the right to print."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor


class Peers(NamedTuple):
    """The processes that work on the same parameters together."""

    group: Any  # their process group, None where there is one of them
    size: int
    rank: int  # of this process among them, or `size` where it is a receiver
    receivers: int = 0  # further processes of the group, which share no work and receive what the others send


ALONE = Peers(None, 1, 0)


def process_count() -> int:
    """Return how many processes train together; 1 where no process group exists."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Return the number of this process among those that train together; 0 where no process group exists."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main_process() -> bool:
    """Return whether this process prints; true where no process group exists."""
    return process_rank() == 0


def mean_over_processes(values: Tensor, valid: Tensor, *, alone: bool = False) -> tuple[Tensor, Tensor]:
    """Average rows (L, …) over the processes that have them, by one fused reduction; every process must call it.

    ``valid`` (L,) bool says which rows this process has. Returned are the means, zero where no process has the row,
    and (L,) bool, whether any has. A process that trains ``alone`` averages over itself.
    """
    flat = values.flatten(1)
    mask = valid.unsqueeze(1)
    packed = torch.cat([torch.where(mask, flat, 0.0), mask.to(flat.dtype)], dim=1)
    packed = packed if alone else sum_over_processes(packed)
    count = packed[:, -1:]
    means = packed[:, :-1] / count.clamp_min(1.0)
    return means.view_as(values), count.squeeze(1) > 0


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, which must all call it; it may be the same tensor."""
    if process_count() == 1:
        return values
    if PartialState().num_processes == process_count():
        return reduce(values, reduction="sum")
    # A process group that Accelerate was not told of, for which its reduce would silently do nothing.
    dist.all_reduce(values)
    return values
