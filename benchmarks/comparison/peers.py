"""Optimizers of other packages, by the path of their class, such as ``pytorch_optimizer.SOAP``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from hf_schatten import route_parameters


def peer_optimizer(
    path: str, model: nn.Module, rate: float, weight_decay: float, heads: Sequence[str]
) -> torch.optim.Optimizer:
    """Make an optimizer of its defaults, at one learning rate for all parameters.

    One that has Muon's groups (``use_muon``) gets the matrices of our routing there, with Moonlight's scale, with
    which AdamW's learning rate carries over; all other parameters use the AdamW that it brings along.

    Raises:
        ImportError, AttributeError: when there is no such class: install its package.
    """
    module, _, name = path.rpartition(".")
    cls = getattr(import_module(module), name)
    routes = [route for route in route_parameters(model, heads).routes if route.destination != "frozen"]
    matrices = [route.parameter for route in routes if route.destination == "schatten_p"]
    decayed = [route.parameter for route in routes if route.destination == "adamw" and route.decay]
    others = [route.parameter for route in routes if route.destination == "adamw" and not route.decay]
    if "use_adjusted_lr" not in inspect.signature(cls).parameters:
        groups: list[dict[str, Any]] = [
            {"params": [*matrices, *decayed], "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        options: dict[str, Any] = {}
    else:
        groups = [
            {"params": matrices, "use_muon": True, "weight_decay": weight_decay},
            {"params": decayed, "use_muon": False, "lr": rate, "weight_decay": weight_decay},
            {"params": others, "use_muon": False, "lr": rate, "weight_decay": 0.0},
        ]
        options = {"use_adjusted_lr": True}
    made: torch.optim.Optimizer = cls([group for group in groups if group["params"]], lr=rate, **options)
    return made
