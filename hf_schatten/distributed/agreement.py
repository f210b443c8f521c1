"""Whether the processes of the group take the same step: of the same parameters, by the same rules and gradients.

Only then may one compute for the others, and may statistics be averaged. Processes of one group may as well train
different models, or copies on other data between two averages of their weights. They find out by one small reduction,
of which each number is a hash: of what is stepped, and of the bits of all gradients of matrices. Gradients that DDP,
or any other reduction, has averaged are the same in every bit.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_schatten.distributed.pieces import is_sharded
from hf_schatten.distributed.processes import process_count
from hf_schatten.options import SchattenOptions

logger = logging.getLogger(__name__)

PATIENCE = timedelta(minutes=3)  # in which the other processes must come to their first step
_INTERVAL = 100  # steps between two agreements, after those of the steps 1, 2, 4, …, 64

_BLOCK = 1 << 20  # elements that are hashed at once
_MIXED = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, so that a product with it loses nothing
_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_DIFFERENT_STEPS = "The processes step other parameters, or by other rules"
_DIFFERENT_GRADIENTS = "The gradients of the processes differ"
_ALONE = (
    "%s (first seen at step %d). Each process therefore computes all its updates and estimates its own p. If they "
    "should train one model together, let DDP average the gradients: prepare model and optimizer with Accelerate."
)
_MISSING = (
    "The processes of a group take the steps of SchattenP together, and not all came to {step}. Let all of them "
    "step, or step before torch.distributed is initialised. Where each trains for itself, set share_work=false and p "
    "to a number."
)


class Agreement:
    """What a process knows of the others: whether all take the same steps. Once they differ, it asks no more.

    Attributes:
        together: whether they do, as far as is known.
    """

    def __init__(self) -> None:
        self.together = True
        self._steps = 0
        self._key: object = None

    def renew(self, groups: Sequence[dict[str, Any]], options: SchattenOptions) -> None:
        """Agree, where this step asks for it; all processes that take steps together must call it at each step.

        Args:
            groups: of the optimizer.
            options: of the optimizer.

        Raises:
            RuntimeError: when the other processes do not come.
        """
        if process_count() == 1:
            return
        self._steps += 1
        parameters = [parameter for group in groups for parameter in group["params"]]
        if not self.together or any(map(is_sharded, parameters)):  # shards are of one model by their nature
            return
        key = process_count(), [id(parameter) for parameter in parameters if parameter.grad is not None]
        often = self._steps < _INTERVAL and self._steps & (self._steps - 1) == 0
        if key == self._key and not often and self._steps % _INTERVAL:
            return
        self._key, first = key, self._key is None
        fallback = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        device = parameters[0].device if parameters else fallback
        of_steps = torch.tensor(_hash_of_steps(groups, options)).to(device)
        hashes = torch.stack([of_steps, _hash_of_gradients(groups, device)])
        extremes = torch.cat([hashes, ~hashes])  # the least of the complements belongs to the largest
        with naming_the_missing(f"step {self._steps}"):
            work = dist.all_reduce(extremes, dist.ReduceOp.MIN, async_op=True)
            assert work is not None
            work.wait(*[PATIENCE] if first else [])
        least, largest = extremes[:2], ~extremes[2:]
        same_steps, same_gradients = least.eq(largest).tolist()
        if not (same_steps and same_gradients):
            self.together = False
            logger.warning(_ALONE, _DIFFERENT_GRADIENTS if same_steps else _DIFFERENT_STEPS, self._steps)


@contextmanager
def naming_the_missing(step: str) -> Iterator[None]:
    """Say of an error of a collective that other processes have not come to it.

    Args:
        step: what the collective is for, as the message says it.

    Raises:
        RuntimeError: in place of the collective's own.
    """
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(_MISSING.format(step=step)) from error


def _hash_of_steps(groups: Iterable[dict[str, Any]], options: SchattenOptions) -> int:
    """Return a hash of the shapes of all parameters, which of them have gradients, and all values of the update."""
    described = [
        (
            sorted((key, str(value)) for key, value in group.items() if key != "params"),
            [(tuple(p.shape), p.dtype, p.grad is not None) for p in group["params"]],
        )
        for group in groups
    ]
    digest = hashlib.sha256(repr((described, options.as_json())).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _hash_of_gradients(groups: Iterable[dict[str, Any]], device: torch.device) -> Tensor:
    """Return a hash of the gradients of matrices, int64: a polynomial in their bits, whose sums have no roundings."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for group in groups:
        for parameter in group["params"] if group["spectral"] else ():
            if parameter.grad is None:
                continue
            bits = parameter.grad.flatten().view(_OF_SIZE[parameter.grad.itemsize])
            for block in bits.split(_BLOCK):
                odd = torch.arange(1, 2 * len(block), 2, device=block.device)
                total = total * _MIXED + (odd * block).sum().to(device)
    return total
