"""What the launches of Triton kernels share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def launched_where_it_lies(function: Function) -> Function:
    """Launch on the device of the first argument: Triton takes the current one, which may be another."""

    @functools.wraps(function)
    def launch(first: Any, *others: Any, **options: Any) -> Any:
        device = (first if isinstance(first, Tensor) else first[0]).device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(first, *others, **options)
        with torch.cuda.device(device):
            return function(first, *others, **options)

    return cast(Function, launch)
