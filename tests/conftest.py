"""Small models and data that the tests share; nothing is downloaded."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile

# Read by trackio at its import; a run of the tests must not go on with the logs of the one before.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Read by torch at its import, and by the processes that tests start. One thread, for tiny products: several wait for
# each other longer than they work, and pytest-xdist has a process on every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read by Triton at its import: without a GPU, its interpreter runs the kernels.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pictures
import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainingArguments,
)

import hf_schatten  # noqa: F401 - makes optim="schatten_p" valid
from hf_schatten.linalg import compute_dtype

# Updates in float32 on every machine, whatever its CPU multiplies fast: tests of bfloat16 ask for it.
compute_dtype.CPU_MULTIPLIES_BFLOAT16 = False

VOCABULARY = 64
LENGTH = 16

pictures.install()


@pytest.hookimpl(tryfirst=True)  # before the fixtures, some of which train
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Render pictures where the test is marked to."""
    pictures.rendered = item.get_closest_marker("pictures") is not None


def pytest_collection_finish() -> None:
    """Let garbage collections, which every Trainer asks for, leave alone what exists already: a million objects."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Remove trackio's folder."""
    shutil.rmtree(os.environ["TRACKIO_DIR"], ignore_errors=True)


@pytest.fixture
def gpt2() -> PreTrainedModel:
    """Return a two-layer GPT-2 with dropout: Conv1D weights and a tied head."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=VOCABULARY, n_positions=LENGTH, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


@pytest.fixture
def llama() -> PreTrainedModel:
    """Return a two-layer Llama: nn.Linear weights, an untied head, grouped key and value heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def token_dataset() -> list[dict[str, Tensor]]:
    """Return 64 sequences in which the next token is a function of the last: learnable."""
    steps = torch.arange(LENGTH)
    rows = [(start + (start % 5 + 1) * steps) % VOCABULARY for start in range(64)]
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.fixture
def training_arguments(tmp_path: Path) -> Callable[..., TrainingArguments]:
    """Return a maker of quick TrainingArguments on the CPU with ``optim="schatten_p"``."""

    def make(**overrides: Any) -> TrainingArguments:
        arguments: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "optim": "schatten_p",
            "max_steps": 10,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "cosine",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return TrainingArguments(**(arguments | overrides))

    return make
