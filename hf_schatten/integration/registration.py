"""Makes ``optim="schatten_p"`` valid wherever transformers takes an optimizer's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch import nn
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_optimizer import OptimizerContext
from transformers.training_args import OptimizerNames

from hf_schatten import private_api
from hf_schatten.integration.callback import SchattenCallback, model_trained_with
from hf_schatten.integration.engine_arguments import refuse_unsupported_arguments
from hf_schatten.integration.factory import create_schatten_optimizer
from hf_schatten.integration.terminal import SchattenPrinterCallback, SchattenProgressCallback
from hf_schatten.optim.schatten_p import SchattenP
from hf_schatten.options import OPTIMIZER_NAME, SchattenOptions

Handler: TypeAlias = Callable[[OptimizerContext], tuple[Any, dict[str, Any]]]

_registered: set[str] = set()


def register() -> None:
    """Add the optimizer's name, its handler and its callbacks to transformers; a second call changes nothing.

    Raises:
        PrivateApiError: when the installed transformers keeps its registries elsewhere.
    """
    register_optimizer(OPTIMIZER_NAME, _handle)
    private_api.replace_in_trainer(private_api.PROGRESS, SchattenProgressCallback, ProgressCallback)
    private_api.replace_in_trainer(private_api.PRINTER, SchattenPrinterCallback, PrinterCallback)  # without a bar
    private_api.show_through_accelerate(SchattenP.learned_p.__name__, SchattenP.skipped_steps.__name__)
    callbacks = private_api.CALLBACKS.resolve()
    if SchattenCallback not in callbacks:
        callbacks.append(SchattenCallback)


def register_optimizer(name: str, handler: Handler) -> None:
    """Make ``optim=name`` valid wherever transformers takes an optimizer's name; a second call changes nothing.

    Args:
        name: as ``--optim`` takes it.
        handler: gets Trainer's ``OptimizerContext`` and returns an optimizer class and its keyword arguments; or a
            class whose instances have no ``step`` and are called with the model and these.

    Raises:
        ValueError: when another handler has the name, such as that of an optimizer of transformers.
    """
    handlers, members = private_api.HANDLERS.resolve(), OptimizerNames.__members__
    if name in members.values() or name.upper() in members:
        if name not in handlers or _full_name(handlers[name]) != _full_name(handler):
            raise ValueError(f"optim={name!r} is taken by another optimizer: register it under another name.")
        handlers[name] = handler
    else:
        handlers[private_api.add_optimizer_name(name)] = handler
    _registered.add(name)


def is_registered(name: str) -> bool:
    """Return whether :func:`register_optimizer` has added the optimizer with this name."""
    return name in _registered


def _full_name(handler: Handler) -> tuple[str, str]:
    """Return what tells one function from another: a reloaded module defines its functions again."""
    return handler.__module__, handler.__qualname__


def _handle(context: OptimizerContext) -> tuple[Any, dict[str, Any]]:
    """Return what Trainer calls with its parameter groups to make the optimizer, and keyword arguments."""
    refuse_unsupported_arguments(context.args)
    own = {
        "weight_decay": context.args.weight_decay,
        "options": SchattenOptions.from_optim_args(context.args.optim_args),
        "target_modules": context.args.optim_target_modules,
        "routed_model": context.model if context.model is not None else model_trained_with(context.args),
    }
    return _OfParameterGroups, {**context.optimizer_kwargs, **context.adam_kwargs, **own}


class _OfParameterGroups(SchattenP):
    """What Trainer calls with its parameter groups, whose weight decays and learning rates count.

    It is a class of optimizers, and not a factory, for a Trainer gives its groups to these alone: with them come the
    rules of ``get_decay_parameter_names`` and of trainers that make groups of their own.
    """

    def __new__(cls, params: Iterable[Any], routed_model: nn.Module | None, **kwargs: Any) -> Any:
        """Return the optimizer of a model.

        Raises:
            TypeError: without a model.
            RoutingError: when the groups have parameters of another.
        """
        if routed_model is None:
            raise TypeError(
                "schatten_p finds its matrices by the modules of the model, which parameters alone do not show: call "
                "get_optimizer_cls_and_kwargs(args, model), or create_schatten_optimizer(model)."
            )
        return create_schatten_optimizer(routed_model, param_groups=params, **kwargs)
