"""A small GPT-2 without dropout, and sequences whose spectra differ between processes, for training runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from hf_schatten import SchattenTrainer
from hf_schatten.integration.callback import SchattenCallback, unwrap_optimizer

LENGTH, GLOBAL_BATCH = 16, 8
MATRICES = 2 * 6
P_PREFIX = "schatten_p/"
SIZE_PREFIXES = "schatten_stable_rank/", "schatten_relative_size/"  # of the updates


def model() -> GPT2LMHeadModel:
    """Return two layers with the same weights at every call."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=LENGTH, bos_token_id=0, eos_token_id=0
    )
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, key, 0.0)
    return GPT2LMHeadModel(config)


def sequences(count: int) -> list[dict[str, Tensor]]:
    """Return rows of tokens of which every second uses a few tokens only."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, 60, (count, LENGTH), generator=generator)
    rows[::2] %= 4
    return [{"input_ids": row, "labels": row} for row in rows]


def sequences_alike(count: int, micro_batch: int = GLOBAL_BATCH, shares: int = 2) -> list[dict[str, Tensor]]:
    """Return rows of which every micro-batch holds the same ones once for each share.

    Taken in their order, the mean of the processes' statistics is exactly that of one process.

    Args:
        count: of all rows.
        micro_batch: rows of one over all processes.
        shares: a multiple of the number of processes.
    """
    distinct, share = sequences(count // shares), micro_batch // shares
    return [row for start in range(0, len(distinct), share) for row in distinct[start : start + share] * shares]


def arguments(folder: Path, micro_batch: int = GLOBAL_BATCH, **overrides: Any) -> TrainingArguments:
    """Return arguments with which a step sees GLOBAL_BATCH rows, whatever the number of processes.

    Args:
        folder: of the run.
        micro_batch: rows of one over all processes.
        **overrides: other arguments.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    values = {
        "output_dir": str(folder),
        "optim": "schatten_p",
        "per_device_train_batch_size": micro_batch // processes,
        "gradient_accumulation_steps": GLOBAL_BATCH // micro_batch,
        "train_sampling_strategy": "sequential",
        "learning_rate": 3e-4,
        "adam_epsilon": 1e-6,  # a key's bias has no gradient but rounding, of which 1e-8 makes whole steps
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "ddp_backend": "gloo" if processes > 1 else None,
        "disable_tqdm": True,
    }
    made = TrainingArguments(**(values | overrides))
    assert made.world_size == processes
    return made


def trained(trainer: SchattenTrainer, resume: bool = False) -> dict[str, Any]:
    """Train without pictures; return weights, and by step the logged losses, p of matrices and sizes of updates."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, SchattenCallback):
            callback._draw = lambda *args: None  # takes longer than the training
    trainer.train(resume_from_checkpoint=resume or None)
    log = trainer.state.log_history
    return {
        "weights": {key: value.clone() for key, value in trainer.model.state_dict().items()},
        "losses": {entry["step"]: entry["loss"] for entry in log if "loss" in entry},
        "p": {
            entry["step"]: {key.removeprefix(P_PREFIX): p for key, p in entry.items() if key.startswith(P_PREFIX)}
            for entry in log
            if "schatten_p_median" in entry
        },
        "statistics": _statistics(trainer),
        "sizes": {
            entry["step"]: {key: size for key, size in entry.items() if key.startswith(SIZE_PREFIXES)}
            for entry in log
            if "schatten_p_median" in entry
        },
    }


def _statistics(trainer: SchattenTrainer) -> Tensor:
    """Return what p is chosen from, (matrices, curves, nodes)."""
    optimizer = unwrap_optimizer(trainer.optimizer)
    assert optimizer is not None
    return torch.stack([matrix.statistics for matrix in optimizer.matrices()])


def exponents(by_step: dict[int, dict[str, float]]) -> Tensor:
    """Return 1 / p, (due steps, matrices), in the order of the matrices' names."""
    rows = [[1 / by_layer[name] for name in sorted(by_layer)] for by_layer in by_step.values()]
    return torch.tensor(rows, dtype=torch.float64)


def assert_same_p(found: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]) -> None:
    """Compare 1 / p of the same due steps and matrices."""
    assert {step: p.keys() for step, p in found.items()} == {step: p.keys() for step, p in expected.items()}
    torch.testing.assert_close(exponents(found), exponents(expected), atol=1e-6, rtol=0.0)


def assert_same_sizes(found: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]) -> None:
    """Compare stable ranks and relative sizes of the updates of the same due steps and matrices."""
    assert found.keys() == expected.keys()
    for step, sizes in expected.items():
        assert len(sizes) == len(SIZE_PREFIXES) * MATRICES
        # Where p is large, float32 rounds the stable ranks of momenta that have not the full rank.
        assert found[step] == pytest.approx(sizes, rel=5e-3, abs=0), step


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare weights: the distance of every tensor is at most 1e-5 of its norm."""
    assert found.keys() == expected.keys()
    for key, weights in expected.items():
        distance = (found[key] - weights).norm() / weights.norm().clamp_min(1e-3)
        assert distance <= 1e-5, (key, float(distance))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare weights bitwise."""
    assert found.keys() == expected.keys()
    for key, weights in expected.items():
        assert torch.equal(found[key], weights), key
