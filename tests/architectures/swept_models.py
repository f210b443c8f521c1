"""Small models of every class that transformers can make from a configuration alone, without weights."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# What transformers raises where a configuration does not fit a class, or a package is missing.
_REFUSALS = (AssertionError, AttributeError, ImportError, KeyError, TypeError, ValueError)

LAYERS = 2  # of one kind; kinds that differ in a list of the configuration have one each
MOST_KINDS = 6
_COUNTS = re.compile(r"^(num|n)_layers?$|_layers$|^(num_)?(decoder_|encoder_)?(depth|blocks)$|_depth$")
# How many layers come before the first one with experts, or between two.
_DENSE = re.compile(r"first_k_dense|dense_layers|first_.*_dense|moe_layer_start")

# What a configuration lacks, or has for models that are not to be had offline.
_RESNET = {"model_type": "resnet", "depths": [1, 1, 1, 1], "out_features": ["stage2", "stage3", "stage4"]}
_OWN_BACKBONE = {"backbone_config": _RESNET, "use_timm_backbone": False, "backbone": None}
_ROTARY = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
_INDEXED = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "ple_embed_dim": 64,
    "ple_layer_ids": [1],
    "ngram_vocab_size_base": 1000,
    "eos_token_id": 1,
}
_DETECTION = {
    "intraclass_block_config": {
        **{
            f"{kind}_{ratio}ratio": [3, 1, 1]
            for kind in ("vertical_long_to_small_conv", "horizontal_small_to_long_conv", "symmetric_conv_long")
            for ratio in ("long", "mid", "short")
        },
        "reduce_channel": [1, 1, 0],
        "return_channel": [1, 1, 0],
    },
    "scale_factor_list": [1, 2, 4, 8],
    "kernel_list": [3, 2, 2],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model"}},
    "cohere_compass": {"text_config": _ROTARY},
    "cohere_compass_text": _ROTARY,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", *["sparse"] * 11]}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "hunyuan_vl": {"text_config": {"head_dim": 32}},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "moonshine_streaming": {"num_attention_heads": 8, "num_key_value_heads": 8},
    "hunyuan_v1_moe": {"head_dim": 32, "num_experts": 4},
    "nllb-moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1, "num_experts": 4},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "qwen3_omni_moe": {"enable_audio_output": False},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "vitmatte": {
        "backbone_config": {"model_type": "vitdet", "out_features": ["stage2"]},
        "fusion_hidden_sizes": [32, 32, 32, 32],
    },
    "zamba": {"layers_block_type": ["hybrid"] * LAYERS, "num_hidden_layers": LAYERS},
    **{name: {"vocabulary_map": {"<image>": 65_000}} for name in ("chameleon", "emu3")},
    **dict.fromkeys(("pp_ocrv5_server_det", "pp_ocrv6_medium_det"), _DETECTION),
    **dict.fromkeys(("conditional_detr", "dab-detr", "deformable_detr", "detr", "table-transformer"), _OWN_BACKBONE),
    **{name: {"head_dim": 32} for name in ("hunyuan_v1_dense", "hunyuan_vl_text", "ministral")},
    **{name: {"prediction_length": 4} for name in ("autoformer", "informer", "time_series_transformer")},
}

# Types of which no class can be made here, and why.
UNAVAILABLE = {
    **dict.fromkeys(
        """edgetam edgetam_vision_model fast_vlm gemma3n gemma3n_vision omdet-turbo pe_audio_video
        pe_audio_video_encoder pe_video pe_video_encoder perception_lm timm_backbone timm_wrapper""".split(),  # noqa: SIM905
        "needs timm",
    ),
    "dinat": "needs natten",
    "higgs_audio_v2_tokenizer": "needs torchaudio",
    "layoutlmv2": "needs detectron2",
    "voxtral_realtime_text": "transformers does not export it",
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "transformers refuses its own configuration"),
}


@cache
def architectures() -> dict[str, tuple[str, ...]]:
    """Return the names of the model classes of each type, those with a head first."""
    classes: dict[str, dict[str, None]] = {}
    for mapping in sorted(vars(modeling_auto)):
        if re.fullmatch(r"MODEL_.*MAPPING_NAMES|MODEL_MAPPING_NAMES", mapping):
            for model_type, names in getattr(modeling_auto, mapping).items():
                for name in [names] if isinstance(names, str) else names:
                    classes.setdefault(model_type, {})[name] = None
    return {model_type: tuple(names) for model_type, names in sorted(classes.items())}


@cache
def families() -> tuple[str, ...]:
    """Return a type of each module of transformers that has models, without those that are not to be had."""
    of_module = {}
    for model_type in architectures():
        if model_type not in UNAVAILABLE:
            of_module.setdefault(CONFIG_MAPPING[model_type].__module__, model_type)
    return tuple(of_module.values())


def make(model_type: str, class_name: str) -> nn.Module:
    """Return a model without memory: full width, few layers."""
    config = small_config(model_type)
    with torch.device("meta"), no_init_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, class_name)(config)


def make_first(model_type: str) -> tuple[str, nn.Module]:
    """Return the first class of a type that can be made, with its name.

    Raises:
        ValueError: when none can.
    """
    for name in architectures()[model_type]:
        try:
            return name, make(model_type, name)
        except _REFUSALS:
            continue
    raise ValueError(f"No class of {model_type!r} can be made from its default configuration.")


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
