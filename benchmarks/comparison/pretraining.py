"""Pretraining of GPT-2's shapes on a corpus of C source: the trainings that take a whole GPU.

"gpt2 small" is long: 100 million tokens. Those of three widths have six layers and 8 million tokens, so that a sweep
of each ends in minutes. All have 1024 tokens of context, and need the file that
:mod:`benchmarks.comparison.corpus` makes.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.comparison.corpus import DEFAULT, LENGTH, Corpus, load
from benchmarks.comparison.regime import Regime, Training

_ATTENTION = "causal_sdpa"
_HEAD = 64  # width

GPT2_KINDS = {
    "query": "*.c_attn.weight.q*",
    "key": "*.c_attn.weight.k*",
    "value": "*.c_attn.weight.v*",
    "attention output": "*.attn.c_proj.weight",
    "up": "*.c_fc.weight",
    "down": "*.mlp.c_proj.weight",
}


def _causal_attention(*arguments: Any, **options: Any) -> tuple[Tensor, None]:
    return sdpa_attention_forward(*arguments, **(options | {"is_causal": True}))


# Transformers makes no mask for attention that it does not know. For its own "sdpa" it makes one where the model is
# compiled by torch before 2.14, and with a mask there is no flash attention.
AttentionInterface.register(_ATTENTION, _causal_attention)


def gpt2(vocabulary: int, layers: int, width: int) -> GPT2LMHeadModel:
    """Return a new GPT-2 without dropout, with heads of width 64 and a context of 1024 tokens."""
    config = GPT2Config(
        vocab_size=vocabulary,
        n_layer=layers,
        n_embd=width,
        n_head=width // _HEAD,
        n_positions=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation=_ATTENTION,  # type: ignore[call-arg] # a field of all configurations
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # its default, of which it warns: that would split the compiled graph
    return model


_load = lru_cache(maxsize=1)(load)


def from_corpus(seed: int, *, layers: int, width: int, sequences: int, path: Path = DEFAULT) -> Training:
    """Return the training of a new GPT-2 on a corpus.

    Validation has batches of the same shape, since another one would be compiled anew.

    Args:
        seed: of weights and order.
        layers: number.
        width: a multiple of 64.
        sequences: of a step, 1024 tokens each.
        path: of the corpus.

    Raises:
        CorpusError: when there is none.
    """
    corpus: Corpus = _load(path)
    torch.manual_seed(seed)
    model = gpt2(corpus.vocabulary, layers, width)
    validation = tuple((each,) for each in corpus.validation(sequences))
    return Training(model, lambda step: (corpus.batch(step, sequences, seed),), _loss, validation)


def _loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    loss: Tensor = model(input_ids=batch[0], labels=batch[0]).loss  # in float32, inside the compiled graph
    return loss


_regime = partial(Regime, weight_decay=0.1, rates=(4e-3, 8e-3), kinds=GPT2_KINDS, on_gpu=True)

PRETRAINING: dict[str, Regime] = {
    "gpt2 small": _regime(
        partial(from_corpus, layers=12, width=768, sequences=64),
        1536,
        adamw_rates=(5e-4, 1e-3),
        interval=100,
        evaluations=16,
        tokens=1536 * 64 * LENGTH,
        summary="GPT-2 small's shape on the Linux kernel, 1,536 steps of 64 × 1,024 tokens, bfloat16, compiled",
    ),
    **{
        f"gpt2 width {width}": _regime(
            partial(from_corpus, layers=6, width=width, sequences=32),
            256,
            adamw_rates=(1e-3, 2e-3),
            evaluations=8,
            tokens=256 * 32 * LENGTH,
            summary=f"A GPT-2 with 6 layers of width {width} on the Linux kernel, 256 steps of 32 × 1,024 tokens",
        )
        for width in (256, 512, 768)
    },
}
