"""Training engines that leave no whole matrices to an optimizer, refused by name."""

from __future__ import annotations

from torch import nn

_FLATTENING = {"DeepSpeedEngine": "DeepSpeed", "FullyShardedDataParallel": "FSDP version 1"}  # by the wrapper's class


class UnsupportedEngineError(RuntimeError):
    """A training engine hands the optimizer something other than the model's own matrices."""


def refuse_unsupported_engines(model: nn.Module) -> None:
    """Raise UnsupportedEngineError when DeepSpeed ZeRO or FSDP version 1, which flatten parameters, wrap the model."""
    for module in model.modules():
        engine = _FLATTENING.get(type(module).__name__)
        if engine:
            raise UnsupportedEngineError(
                f"schatten_p needs whole weight matrices, and {engine} hands the optimizer flat pieces of them. "
                "Use DDP, or optim='adamw_torch' with this engine."
            )


def refuse_emptied(model: nn.Module) -> None:
    """Raise UnsupportedEngineError when stage 3 of DeepSpeed ZeRO keeps the elements of a parameter elsewhere."""
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            raise UnsupportedEngineError(
                f"{name!r} of {type(model).__name__} has no elements, as under stage 3 of DeepSpeed ZeRO, which keeps "
                "the parameters elsewhere. Use DDP or FSDP version 2, or optim='adamw_torch' with this engine."
            )
