"""Loads a checkpoint's weights where Trainer would not: after FSDP, and of models whose files name them otherwise.

A checkpoint that FSDP wrote whole has the weights twice, and Trainer reads them back under FSDP only.

Since version 5, ``save_pretrained`` writes some architectures (ViT, mixtures of experts) under the names of their
files on the Hub, which ``from_pretrained`` converts. Trainer's resume does not convert: it warns of missing keys, and
training goes on from fresh weights (https://github.com/huggingface/transformers/issues/48805).
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

_FSDP_FILE = "pytorch_model_fsdp.bin"  # of whole weights, which Trainer takes as a sign that they are sharded


def load_converted_weights(model: nn.Module | None, checkpoint: str | os.PathLike[str]) -> bool:
    """Load a checkpoint into the model if its file names weights that the model does not have, or FSDP wrote it.

    Takes the memory of a second copy of the model, on the CPU, while it loads.

    Returns whether it was loaded; others Trainer loads as it should. The model is the trained one, not its wrapper.

    Raises:
        RuntimeError: when not every weight of the model, or more than these, is in the file.
    """
    folder = Path(checkpoint)
    if not isinstance(model, PreTrainedModel) or getattr(model, "is_quantized", False):
        return False
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):  # whose engine has a loader of its own
        return False
    stored = _stored_names(folder)
    if stored <= model.state_dict().keys() and not (stored and (folder / _FSDP_FILE).is_file()):
        return False
    # In single precision, which holds every half precision: the model then casts each weight to its own.
    loaded: Any = type(model).from_pretrained(
        folder,
        config=copy.deepcopy(model.config),
        dtype=torch.promote_types(model.dtype, torch.float32),
        output_loading_info=True,
    )
    converted, info = loaded
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        text = "; ".join(f"{len(names)} {kind}, such as {names[0]!r}" for kind, names in wrong.items() if names)
        raise RuntimeError(f"{folder} does not hold the weights of this {type(model).__name__}: {text}.")
    model.load_state_dict(converted.state_dict())
    return True


def _stored_names(folder: Path) -> set[str]:
    """Return the names of the weights in a checkpoint, none where it has no safetensors file of a whole model."""
    index, weights = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if weights.is_file():
        with safe_open(weights, framework="pt") as file:
            return set(file.keys())
    return set()
