"""Tiny models that the rows of the table of support train: makers, and the names of their matrices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from itertools import count
from typing import Any

import peft
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, PreTrainedTokenizerFast, T5Config

VOCABULARY, LENGTH, LABELS = 64, 16, 4

ModelMaker = Callable[[], nn.Module]


def maker(model_class: Callable[[Any], nn.Module], config: Any) -> ModelMaker:
    """Return a function that makes the model, with other weights at each call."""
    seeds = count()

    def make() -> nn.Module:
        torch.manual_seed(next(seeds))
        return model_class(copy.deepcopy(config))

    return make


def same_base(model_class: Callable[[Any], nn.Module], config: Any) -> ModelMaker:
    """Return a function that makes the model with the same weights at each call, as adapters need it."""
    torch.manual_seed(0)
    base = model_class(copy.deepcopy(config))
    return lambda: copy.deepcopy(base)


def adapted(base: ModelMaker, **options: Any) -> ModelMaker:
    """Return a function that adds adapters with other weights at each call."""
    seeds = count()

    def make() -> nn.Module:
        model = base()
        torch.manual_seed(next(seeds))
        return peft.get_peft_model(model, peft.LoraConfig(r=4, **options))  # type: ignore[arg-type]

    return make


def layers(prefix: str, number: int, names: Iterable[str]) -> set[str]:
    """Return the names of the weights of each numbered layer."""
    return {f"{prefix}.{i}.{name}.weight" for i in range(number) for name in names}


def adapters(weights: Collection[str]) -> set[str]:
    """Return the names of the adapters of weights."""
    stems = [f"base_model.model.{name.removesuffix('.weight')}" for name in weights]
    return {f"{stem}.lora_{side}.default.weight" for stem in stems for side in "AB"}


def llama_config(**options: Any) -> LlamaConfig:
    return LlamaConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": LENGTH,
            "pad_token_id": 0,
        }
        | options
    )


ATTENTION = [f"self_attn.{part}_proj" for part in "qkvo"]
LLAMA = layers("model.layers", 2, [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"])


def t5_config() -> T5Config:
    return T5Config(
        d_model=32,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        d_kv=16,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )


_FEED_FORWARD = [f"DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")]
_T5_ENCODER = [f"layer.0.SelfAttention.{part}" for part in "qkvo"] + [f"layer.1.{name}" for name in _FEED_FORWARD]
_T5_DECODER = [
    *(f"layer.0.SelfAttention.{part}" for part in "qkvo"),
    *(f"layer.1.EncDecAttention.{part}" for part in "qkvo"),
    *(f"layer.2.{name}" for name in _FEED_FORWARD),
]
T5 = layers("encoder.block", 2, _T5_ENCODER) | layers("decoder.block", 2, _T5_DECODER)


WORDS = [f"w{i}" for i in range(30)]


def in_steps(start: int, stride: int, length: int) -> str:
    """Return words of which each is a number of places after the last."""
    return " ".join(WORDS[(start + stride * i) % len(WORDS)] for i in range(length))


def word_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each word, after those for padding, the end and others that are special."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
