"""Several adapters of PEFT that train at once, and their weights in a checkpoint.

Trainer's resume loads all adapters and then activates the first alone: the others would stop training without a word.
And PEFT's files of X-LoRA lack weights. So where several adapters are active, a checkpoint holds all that trains.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

ADAPTERS_FILE = "active_adapters.safetensors"


def save_adapters(model: nn.Module | None, folder: str | os.PathLike[str]) -> None:
    """Write all parameters that train into a checkpoint, by name, where several adapters are active."""
    if len(_active(model)) > 1:
        save_file(
            {name: parameter.detach().contiguous() for name, parameter in _trained(model).items()},
            Path(folder) / ADAPTERS_FILE,
        )


@contextmanager
def keeping_adapters(model: nn.Module | None, checkpoint: str | os.PathLike[str]) -> Iterator[None]:
    """Make the adapters active that are so now, whatever loads the checkpoint, and load what they train.

    Raises:
        RuntimeError: when the checkpoint is of other adapters.
    """
    active, trained, peft_model = _active(model), _trained(model), model
    yield
    if len(active) < 2:
        return
    assert peft_model is not None
    set_adapter: Any = getattr(peft_model, "base_model", peft_model)
    set_adapter.set_adapter(active)
    for name, parameter in peft_model.named_parameters():
        parameter.requires_grad_(name in trained)
    path = Path(checkpoint) / ADAPTERS_FILE
    if not path.is_file():
        return
    stored = load_file(path)
    if stored.keys() != trained.keys():
        names = ", ".join(sorted(stored.keys() ^ trained.keys())[:3])
        raise RuntimeError(f"{path} is of other adapters ({names}): activate those that were trained.")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(stored[name])


def _active(model: nn.Module | None) -> list[str]:
    """Return the active adapters of a model of PEFT, none of any other."""
    active = getattr(model, "active_adapters", ())
    return list(active) if isinstance(active, list | tuple) else []


def _trained(model: nn.Module | None) -> dict[str, nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if each.requires_grad} if model is not None else {}
