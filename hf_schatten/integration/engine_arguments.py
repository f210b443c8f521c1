"""What a Trainer's arguments ask of training engines, refused by name where it is not supported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.state import AcceleratorState, is_initialized
from transformers import TrainingArguments

from hf_schatten.matrices.engines import UnsupportedEngineError

_SHORTER_SEQUENCES = "cp_size", "sp_size"

# Settings of DeepSpeed that change what the optimizer gets, and what to do instead.
_OF_DEEPSPEED = {
    "zero_optimization.offload_optimizer.device": "stages 2 and 3 keep a share of the state on each GPU without it",
    "zero_optimization.offload_param.device": "stage 3 keeps a share of the parameters on each GPU without it",
    "zero_optimization.elastic_checkpoint": "resume with the number of processes that wrote the checkpoint",
    "zero_optimization.round_robin_gradients": "DeepSpeed does not say where it puts parameters then",
    "zero_optimization.mics_shard_size": "stage 3 without it shares the parameters out to all processes",
    "checkpoint.load_universal": "resume with the number of processes that wrote the checkpoint, or start a run from "
    "its weights with optim_args='p_init=CHECKPOINT'",
    "tensor_parallel.autotp_size": "use the tensor parallelism of transformers, tp_plan='auto', without DeepSpeed",
    "zenflow": "use stage 2 or 3 without it",
}


def refuse_unsupported_arguments(args: TrainingArguments) -> None:
    """Raise unless the engine that the arguments ask for is supported.

    Raises:
        UnsupportedEngineError: with what is not, and what to do instead.
    """
    if args.fsdp and int((args.fsdp_plugin_args or {}).get("fsdp_version", 1)) == 1:
        raise UnsupportedEngineError(
            "optim='schatten_p' does not support FSDP version 1, which hands the optimizer pieces of the matrices. "
            "Use FSDP version 2, DeepSpeed ZeRO or DDP (accelerate launch --multi_gpu), or optim='adamw_torch'."
        )
    _refuse(args.parallelism_config, args.deepspeed_plugin)


def refuse_unsupported_accelerator() -> None:
    """Raise an UnsupportedEngineError when the Accelerator of this process uses an engine that is not supported."""
    if is_initialized():
        state = AcceleratorState()
        _refuse(getattr(state, "parallelism_config", None), state.deepspeed_plugin)


def _refuse(parallelism_config: Any, deepspeed_plugin: Any) -> None:
    for name in _SHORTER_SEQUENCES:
        size = getattr(parallelism_config, name, 1)
        if size > 1:
            raise UnsupportedEngineError(
                f"schatten_p does not support {name}={size} of parallelism_config: each process would estimate p from "
                "a part of every sequence. Use FSDP version 2 or DeepSpeed ZeRO without it, or optim='adamw_torch'."
            )
    if deepspeed_plugin is not None:
        _refuse_settings(deepspeed_plugin.hf_ds_config.config)


def _refuse_settings(config: Mapping[str, Any]) -> None:
    """Raise an UnsupportedEngineError when a configuration of DeepSpeed has settings that are not supported."""
    if "optimizer" in config:
        raise UnsupportedEngineError(
            f"The DeepSpeed configuration names the optimizer {config['optimizer'].get('type')!r}, which would train "
            "in the place of schatten_p: remove 'optimizer' from it, or leave out --optim."
        )
    stage = _setting(config, "zero_optimization.stage") or 0
    if stage == 0:
        raise UnsupportedEngineError(
            "schatten_p supports stages 1 to 3 of DeepSpeed ZeRO, and the configuration has stage 0: set "
            "zero_optimization.stage, or use DDP (accelerate launch --multi_gpu), which does the same."
        )
    for name, instead in _OF_DEEPSPEED.items():
        value = _setting(config, name)
        used = value not in (-1, 1, "none") if isinstance(value, int | str) and value is not True else value
        if used:
            raise UnsupportedEngineError(
                f"schatten_p does not support {name}={value!r} of DeepSpeed: leave it out; {instead}. Or use "
                "optim='adamw_torch'."
            )


def _setting(config: Mapping[str, Any], path: str) -> Any:
    found: Any = config
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
