"""Parameters that were frozen when the optimizer was made, and are trained later: nobody updates them."""

from __future__ import annotations

import logging
import weakref
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

logger = logging.getLogger(__name__)


def watch_frozen(model: nn.Module, optimizer: Optimizer) -> None:
    """Warn before a step, once, where a parameter that is frozen now has a gradient and no group of the optimizer."""
    # By their modules: a parameter that anything refers to weakly cannot be moved to another device.
    frozen = [
        (f"{path}.{name}".lstrip("."), weakref.ref(module), name)
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if not parameter.requires_grad
    ]
    if not frozen:
        return
    handle: RemovableHandle | None = None

    def warn(optimizer: Optimizer, *arguments: Any) -> None:
        present = ((name, getattr(module(), attribute, None)) for name, module, attribute in frozen)
        thawed = {name: each for name, each in present if each is not None and each.grad is not None}
        if not thawed:
            return
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        unknown = [name for name, parameter in thawed.items() if id(parameter) not in known]
        if unknown:
            logger.warning(
                "%d parameters that were frozen when the optimizer was made are trained now, and no group of it has "
                "them, so that they do not move: %s. Add them by optimizer.add_param_group, a matrix in a group of "
                "its own with spectral=True; or make the optimizer while everything that will be trained is "
                "trainable, and freeze afterwards.",
                len(unknown),
                ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else ""),
            )
            assert handle is not None
            handle.remove()

    handle = optimizer.register_step_pre_hook(warn)
