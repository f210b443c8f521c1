"""Training on two processes is training on one: the same p and the same weights for the same global batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from hf_schatten import SchattenTrainer

STEPS, LENGTH, GLOBAL_BATCH = 30, 16, 8
# Sizes of a micro-batch over all processes, and options.
SETTINGS: dict[str, tuple[int, str]] = {
    "gram": (8, "sync=gram"),
    "gram, 4 micro-batches": (2, "sync=gram"),
    "statistics": (8, "sync=statistics"),
    "statistics, 4 micro-batches": (2, "sync=statistics"),
}


def sequences():
    """Return rows of tokens of which half, those of one process, use a few tokens only."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, 60, (STEPS * GLOBAL_BATCH, LENGTH), generator=generator)
    rows[::2] %= 4
    return [{"input_ids": row, "labels": row} for row in rows]


def train(folder: Path, name: str) -> dict[str, Any]:
    micro_batch, options = SETTINGS[name]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=LENGTH, bos_token_id=0, eos_token_id=0
    )
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, key, 0.0)
    arguments = TrainingArguments(
        str(folder / name),
        optim="schatten_p",
        optim_args=f"p_interval=10,p_max=1000,{options}",
        max_steps=STEPS,
        per_device_train_batch_size=micro_batch // processes,
        gradient_accumulation_steps=GLOBAL_BATCH // micro_batch,
        train_sampling_strategy="sequential",
        learning_rate=5e-4,
        adam_epsilon=1e-6,  # a key's bias has no gradient but rounding, of which 1e-8 makes whole steps
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo" if processes > 1 else None,
        disable_tqdm=True,
    )
    assert arguments.world_size == processes
    trainer = SchattenTrainer(GPT2LMHeadModel(config), arguments, train_dataset=sequences())
    reductions = []
    original = dist.all_reduce

    def count(tensor, *args, **kwargs):
        # Trainer reduces a few numbers of its own; DistributedDataParallel does not come through here.
        reductions.append((trainer.state.global_step + 1, tensor.numel() * tensor.element_size()))
        return original(tensor, *args, **kwargs)

    dist.all_reduce = count
    try:
        trainer.train()
    finally:
        dist.all_reduce = original
    history = [entry for entry in trainer.state.log_history if "schatten_p_median" in entry]
    prefix = "schatten_p/"
    return {
        "p": [{key: p for key, p in entry.items() if key.startswith(prefix)} for entry in history],
        "weights": {key: value.clone() for key, value in trainer.model.state_dict().items()},
        "reductions": [pair for pair in reductions if pair[1] > 256],
    }


def process(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    results = {name: train(Path(folder), name) for name in SETTINGS}
    assert dist.get_world_size() == 2
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return what each of two processes got of each setting."""
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(process, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return what one process gets of each setting."""
    return {name: train(tmp_path_factory.mktemp("alone"), name) for name in SETTINGS}


def exponents(result):
    return torch.tensor([[1 / p for p in by_layer.values()] for by_layer in result["p"]], dtype=torch.float64)


@pytest.mark.parametrize("name", [name for name in SETTINGS if not name.startswith("statistics")])
def test_p_and_weights_are_those_of_one_process(name, alone, pair):
    one, two = alone[name], pair[0][name]
    assert exponents(one).shape[0] == 3  # due steps
    inside = (exponents(one) > 0.002) & (exponents(one) < 0.998)
    assert inside.sum() >= 3  # p is not only at the ends of its range
    torch.testing.assert_close(exponents(two), exponents(one), atol=1e-6, rtol=0.0)
    for key, weights in one["weights"].items():
        distance = (two["weights"][key] - weights).norm() / weights.norm().clamp_min(1e-3)
        assert distance <= 1e-5, key


@pytest.mark.parametrize("name", SETTINGS)
def test_processes_agree_bitwise(name, pair):
    assert pair[0][name]["p"] == pair[1][name]["p"]
    for key, weights in pair[0][name]["weights"].items():
        assert torch.equal(weights, pair[1][name]["weights"][key])


def test_the_mean_of_statistics_is_near_that_of_the_global_batch(alone, pair):
    """Halves of the batch whose inputs differ as much as here: an approximation, and no more."""
    for name in ("statistics", "statistics, 4 micro-batches"):
        error = (exponents(pair[0][name]) - exponents(alone[name])).abs()
        assert error.max() <= 0.2
        assert error.median() <= 0.02


def test_spectra_meet_in_one_reduction_of_a_kibibyte_a_matrix_on_due_steps_alone(pair):
    matrices = 2 * 6
    reductions = pair[0]["statistics"]["reductions"]
    assert [step for step, _ in reductions] == [10, 20, 30]
    assert all(size <= 1024 * matrices for _, size in reductions)
    gram = 8 * 2 * (3 * 32**2 + 128**2)  # of each layer's four inputs
    assert pair[0]["gram"]["reductions"] == [(10, gram), (20, gram), (30, gram)]
