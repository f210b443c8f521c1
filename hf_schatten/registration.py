"""Makes ``optim="schatten_p"`` valid wherever transformers takes an optimizer's name."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import ProgressCallback
from transformers import trainer as transformers_trainer
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext
from transformers.training_args import OptimizerNames, TrainingArguments

from .callback import SchattenCallback, SchattenProgressCallback
from .distributed import UnsupportedEngineError
from .factory import create_schatten_optimizer
from .optimizer import SchattenP
from .options import OPTIMIZER_NAME, SchattenOptions


def register() -> None:
    """Add the optimizer's name, its handler and its callbacks to transformers; a second call changes nothing.

    The registries are private to transformers: ``pyproject.toml`` pins its major version, and a test watches them.
    """
    if OPTIMIZER_NAME in OptimizerNames._value2member_map_:
        return
    _OPTIMIZER_HANDLERS[_new_optimizer_name()] = _handle
    if transformers_trainer.DEFAULT_PROGRESS_CALLBACK is ProgressCallback:  # a notebook has another
        transformers_trainer.DEFAULT_PROGRESS_CALLBACK = SchattenProgressCallback
    transformers_trainer.DEFAULT_CALLBACKS.append(SchattenCallback)  # type: ignore[arg-type] # inferred too narrowly


def _new_optimizer_name() -> OptimizerNames:
    """Add a real member to the enumeration: argument parsers list the members, so a lookup hook is not enough."""
    attribute = OPTIMIZER_NAME.upper()
    member: Any = str.__new__(OptimizerNames, OPTIMIZER_NAME)
    member._name_ = attribute
    member._value_ = OPTIMIZER_NAME
    member.__objclass__ = OptimizerNames
    member._sort_order_ = len(OptimizerNames._member_names_)
    # Pickled as a plain string, so that training_args.bin loads where this package is not installed.
    member.__reduce_ex__ = lambda protocol: (str, (OPTIMIZER_NAME,))
    type.__setattr__(OptimizerNames, attribute, member)
    OptimizerNames._member_names_.append(attribute)
    OptimizerNames._member_map_[attribute] = member
    OptimizerNames._value2member_map_[OPTIMIZER_NAME] = member
    return member


def _handle(context: OptimizerContext) -> tuple[Any, dict[str, Any]]:
    """Return what Trainer calls to make the optimizer: a factory and its keyword arguments."""
    _refuse_unsupported_arguments(context.args)
    options = SchattenOptions.from_optim_args(context.args.optim_args)
    arguments = {
        **context.optimizer_kwargs,
        **context.adam_kwargs,
        "weight_decay": context.args.weight_decay,
        "options": options,
    }
    return _Factory, arguments


class _Factory:
    """The callable that Trainer expects from handlers of optimizers that need the whole model."""

    def __call__(self, model: nn.Module, *, options: SchattenOptions, **arguments: Any) -> SchattenP:
        return create_schatten_optimizer(model, **arguments, **vars(options))


def _refuse_unsupported_arguments(args: TrainingArguments) -> None:
    """Raise when the arguments ask for an engine that flattens or shards the matrices.

    Raises:
        UnsupportedEngineError: for DeepSpeed and FSDP.
    """
    for engine, asked_for in (("DeepSpeed", args.deepspeed), ("FSDP", args.fsdp)):
        if asked_for:
            raise UnsupportedEngineError(
                f"optim='schatten_p' does not support {engine}, which hands the optimizer pieces of the matrices. "
                "Use DDP (accelerate launch --multi_gpu), or optim='adamw_torch'."
            )
