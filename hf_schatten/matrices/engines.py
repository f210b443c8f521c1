"""Training engines: what they leave of a model's parameters, and which are refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPERS = {  # by their class
    "DeepSpeedEngine": "DeepSpeed has wrapped the model: make the optimizer of the bare model, and pass both to it",
    "FullyShardedDataParallel": "FSDP version 1 hands the optimizer flat pieces of them: use FSDP version 2 or DDP",
}


class UnsupportedEngineError(RuntimeError):
    """An engine that hands the optimizer something other than the model's own matrices; the message says what."""


def refuse_unsupported_engines(model: nn.Module) -> None:
    """Refuse a model that an engine has wrapped which flattens matrices.

    Raises:
        UnsupportedEngineError: when DeepSpeed or FSDP version 1 wraps the model.
    """
    for module in model.modules():
        reason = _WRAPPERS.get(type(module).__name__)
        if reason:
            raise UnsupportedEngineError(
                f"schatten_p needs the model's weight matrices, and {reason}. Or use optim='adamw_torch'."
            )


def shape_of(parameter: Tensor) -> torch.Size:
    """Return the shape of a parameter, also where stage 3 of DeepSpeed ZeRO keeps its elements elsewhere."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def is_elsewhere(parameter: Tensor) -> bool:
    """Return whether stage 3 of DeepSpeed ZeRO keeps the elements of a parameter elsewhere."""
    return hasattr(parameter, "ds_shape")


@contextmanager
def in_their_shapes(model: nn.Module) -> Iterator[None]:
    """Give the parameters that stage 3 of DeepSpeed ZeRO has emptied their shapes, and no elements, for a while."""
    emptied: list[tuple[Any, Tensor]] = []
    try:
        for parameter in model.parameters():
            if parameter.shape != shape_of(parameter):
                emptied.append((parameter, parameter.data))
                parameter.data = parameter.data.new_empty(()).expand(shape_of(parameter))
        yield
    finally:
        for parameter, data in emptied:
            parameter.data = data


def refuse_emptied(model: nn.Module) -> None:
    """Refuse a model whose parameters have no elements.

    Raises:
        UnsupportedEngineError: when an engine keeps the elements of a parameter elsewhere, and does not say where.
    """
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            raise UnsupportedEngineError(
                f"{name!r} of {type(model).__name__} has no elements: an engine that is not known keeps them "
                "elsewhere. Use stages 1 to 3 of DeepSpeed ZeRO, DDP or FSDP version 2, or optim='adamw_torch'."
            )
