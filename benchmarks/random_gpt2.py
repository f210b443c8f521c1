"""A GPT-2 with random weights and random tokens: what it costs to train does not depend on what it learns."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel


@dataclass(frozen=True)
class Setting:
    """A training whose steps are measured.

    Attributes:
        device: Where it runs.
        layers: Blocks of the GPT-2.
        width: Model width.
        sequences: Sequences in a step.
        length: Tokens in a sequence.
        vocabulary: Tokens of the (random) text.
    """

    device: str
    layers: int
    width: int
    sequences: int
    length: int
    vocabulary: int


def random_gpt2(setting: Setting) -> tuple[GPT2LMHeadModel, Tensor]:
    """Return a model and the tokens of a step, (sequences, length), the same at every call."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=setting.layers,
        n_embd=setting.width,
        n_head=max(1, setting.width // 64),
        n_positions=setting.length,
        vocab_size=setting.vocabulary,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).to(torch.device(setting.device))  # type: ignore[arg-type] # a wrapped method
    return model, torch.randint(setting.vocabulary, (setting.sequences, setting.length)).to(setting.device)


def loss_of(model: GPT2LMHeadModel, tokens: Tensor) -> Tensor:
    """Return the loss, on an accelerator as ``Trainer`` computes it with ``bf16=True``."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.device.type != "cpu"):
        loss = model(input_ids=tokens, labels=tokens).loss
    assert loss is not None
    return loss
