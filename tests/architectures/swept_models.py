"""Small models of every class that transformers can make from a configuration alone, without weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS = 2  # of one kind; kinds that differ in a list of the configuration have one each
MOST_KINDS = 6
_COUNTS = re.compile(r"^(num|n)_layers?$|_layers$|^(num_)?(decoder_|encoder_)?(depth|blocks)$|_depth$")
# How many layers come before the first one with experts, or between two.
_DENSE = re.compile(r"first_k_dense|dense_layers|first_.*_dense|moe_layer_start")

# What a configuration lacks, or has for models that are not to be had offline.
_RESNET = {"model_type": "resnet", "depths": [1, 1, 1, 1], "out_features": ["stage2", "stage3", "stage4"]}
_OWN_BACKBONE = {"backbone_config": _RESNET, "use_timm_backbone": False, "backbone": None}
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"prediction_length": 4} for name in ("autoformer", "informer", "time_series_transformer")},
    **dict.fromkeys(("conditional_detr", "dab-detr", "deformable_detr", "detr", "table-transformer"), _OWN_BACKBONE),
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    **{name: {"head_dim": 32} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "nemotron": {"num_key_value_heads": 8},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
}  # fmt: skip

# Classes that cannot be made here, by what they need.
UNAVAILABLE: dict[str, tuple[str, ...]] = {}


def architectures() -> dict[str, tuple[str, ...]]:
    """Return the names of the model classes of each type, those with a head first."""
    classes: dict[str, dict[str, None]] = {}
    for mapping in sorted(vars(modeling_auto)):
        if re.fullmatch(r"MODEL_.*MAPPING_NAMES|MODEL_MAPPING_NAMES", mapping):
            for model_type, names in getattr(modeling_auto, mapping).items():
                for name in [names] if isinstance(names, str) else names:
                    classes.setdefault(model_type, {})[name] = None
    return {model_type: tuple(names) for model_type, names in sorted(classes.items())}


def make(model_type: str, class_name: str) -> nn.Module:
    """Return a model without memory: full width, few layers."""
    config = small_config(model_type)
    with torch.device("meta"):
        return getattr(transformers, class_name)(config)


def small_config(model_type: str) -> PreTrainedConfig:
    """Return the configuration of a type with few layers, and with one of each kind that it has."""
    return _shrunk(CONFIG_MAPPING[model_type](**copy.deepcopy(OPTIONS.get(model_type, {}))))


def _shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            _shrunk(value)
    counts = {name: value for name, value in _integers(config) if _COUNTS.search(name) and value > LAYERS}
    for count in sorted(set(counts.values()), reverse=True):
        lists = {
            name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == count
        }
        kept = _one_of_each(list(zip(*lists.values(), strict=True))) if lists else list(range(LAYERS))
        for name, value in lists.items():
            setattr(config, name, [value[index] for index in kept])
        for name in [name for name in counts if counts[name] == count]:
            setattr(config, name, len(kept))
    for name, value in list(_integers(config)):
        if _DENSE.search(name) and value > 1:
            setattr(config, name, 1)
    return config


def _one_of_each(kinds: list[Any]) -> list[int]:
    """Return the positions of the first layer of each kind, and at least two."""
    first: dict[str, int] = {}
    for index, kind in enumerate(kinds):
        first.setdefault(repr(kind), index)
    kept = sorted(first.values())[:MOST_KINDS]
    return kept if len(kept) >= LAYERS else sorted({*kept, *range(LAYERS)})


def _integers(config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    return ((name, value) for name, value in vars(config).items() if type(value) is int)
