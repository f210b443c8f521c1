"""What the scripts of this folder are run with: data that can be learned, tiny models, a tokenizer, arguments."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, GPT2Config, PretrainedConfig, PreTrainedTokenizerFast, Trainer, ViTConfig
from transformers import trainer as transformers_trainer

SCRIPTS = Path(__file__).parent
SUBJECTS, VERBS = ("the cat", "a dog", "my horse", "your bird"), ("sees", "hears", "likes", "knows")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = tuple(dict.fromkeys(" ".join(SUBJECTS + VERBS).split()))

# Six steps that log everything and save in the middle. p is estimated at steps 2, 4 and 6.
STEPS, MIDDLE, DUE = 6, 3, [2, 4, 6]
TRAINING = {
    "--do_train": None,
    "--do_eval": None,
    "--max_steps": STEPS,
    "--save_steps": MIDDLE,
    "--logging_steps": 1,
    "--per_device_train_batch_size": 4,
    "--learning_rate": 3e-3,
    "--warmup_steps": 2,
    "--report_to": "none",
    "--use_cpu": None,
    "--disable_tqdm": "true",
}
SCHATTEN = {"--optim": "schatten_p", "--optim_args": "p=adaptive,p_interval=2,p_first_step=2"}  # layers differ


def flags(*tables: dict[str, object]) -> list[str]:
    """Return the command line of these options; later tables win, and None is a flag without a value."""
    options = {name: value for table in tables for name, value in table.items()}
    return [str(text) for item in options.items() for text in item if text is not None]


def restore_after_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo at the end of a test what the runner changes in its process."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(transformers_trainer, "DEFAULT_CALLBACKS", list(transformers_trainer.DEFAULT_CALLBACKS))
    for method in ("_load_from_checkpoint", "_load_best_model", "_load_optimizer_and_scheduler"):
        monkeypatch.setattr(Trainer, method, getattr(Trainer, method))


def sentence(source: random.Random) -> str:
    subject = source.choice(SUBJECTS)
    return f"{subject} {VERBS[SUBJECTS.index(subject)]} {source.choice(SUBJECTS)}"


def language_modeling(folder: Path) -> dict[str, object]:
    """Write what ``language_modeling.py`` reads, and return its options."""
    source = random.Random(0)
    for name, count in (("train.txt", 80), ("valid.txt", 20)):
        (folder / name).write_text("".join(sentence(source) + "\n" for _ in range(count)))
    _save(GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=16, **_vocabulary()), folder / "gpt2")
    return {
        "--config_name": folder / "gpt2",
        "--train_file": folder / "train.txt",
        "--validation_file": folder / "valid.txt",
        "--cache_dir": folder / "cache",
    }


def text_classification(folder: Path) -> dict[str, object]:
    """Write what ``text_classification.py`` reads, and return its options."""
    source = random.Random(0)
    for name, count in (("train.jsonl", 48), ("valid.jsonl", 12)):
        first, second = ([sentence(source) for _ in range(count)] for _ in range(2))
        label = [" ".join(pair.split()[0] for pair in pairs) for pairs in zip(first, second, strict=True)]
        rows = [
            {"sentence1": a, "sentence2": b, "label": "same" if len(set(c.split())) == 1 else "other"}
            for a, b, c in zip(first, second, label, strict=True)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        **_vocabulary(),
    )
    _save(config, folder / "bert")
    return {
        "--config_name": folder / "bert",
        "--train_file": folder / "train.jsonl",
        "--validation_file": folder / "valid.jsonl",
        "--cache_dir": folder / "cache",
    }


def image_classification(folder: Path) -> dict[str, object]:
    """Write what ``image_classification.py`` reads, and return its options: bright images above or below."""
    source = np.random.default_rng(0)
    for number in range(40):
        name = ("above", "below")[number % 2]
        pixels = source.integers(0, 100, (8, 8, 3), dtype=np.uint8)
        pixels[: 4 if name == "above" else None, :][-4:] += 100
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    config.save_pretrained(folder / "vit")
    return {
        "--config_name": folder / "vit",
        "--train_dir": folder / "images",
        "--cache_dir": folder / "cache",
        "--remove_unused_columns": "false",
    }


def _vocabulary() -> dict[str, int]:
    return {"vocab_size": len(SPECIAL + WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _save(config: PretrainedConfig, folder: Path) -> None:
    """Save a model's configuration with a tokenizer of the words above."""
    config.save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
