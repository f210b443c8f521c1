"""Sees every collective that the package starts in a process, for the tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

import hf_schatten

_PACKAGE = str(Path(hf_schatten.__file__).parent)
_LOOP = "_inner_training_loop"  # of the Trainer: what is outside of it has called the whole training
_NAMES = ("all", "barrier", "broadcast", "gather", "monitored_barrier", "recv", "reduce", "scatter", "send")

# What all functions of torch.distributed call, those for objects too, however they were imported. The C++ of
# DistributedDataParallel does not come through here.
METHODS = [name for name in vars(dist.ProcessGroup) if name.lstrip("_").startswith(_NAMES)]

Seen = list[tuple[int, str, int]]


@contextmanager
def counted(step: Callable[[], int]) -> Iterator[Seen]:
    """Collect (step, method of the process group, bytes of its first argument) of what the package calls.

    Args:
        step: returns the number of the present step.
    """
    seen: Seen = []
    originals = {name: vars(dist.ProcessGroup)[name] for name in METHODS}  # getattr would lose how they bind

    def counting(name: str) -> Callable[..., Any]:
        def count(group: Any, *args: Any, **kwargs: Any) -> Any:
            if _called_by_the_package():
                tensors = [leaf for leaf in tree_leaves(args[:1]) if isinstance(leaf, Tensor)]
                seen.append((step(), name, sum(tensor.numel() * tensor.element_size() for tensor in tensors)))
            return originals[name].__get__(group)(*args, **kwargs)

        return count

    for name in METHODS:
        setattr(dist.ProcessGroup, name, counting(name))
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)


def _called_by_the_package() -> bool:
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != _LOOP:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            return True
        frame = frame.f_back
    return False
