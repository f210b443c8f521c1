"""Processes that have different work: a last batch of another size, and experts that only some send tokens to."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import outcomes, together
from small_gpt2 import (
    arguments,
    assert_equal,
    assert_near,
    assert_same_p,
    exponents,
    model,
    sequences,
    sequences_alike,
    trained,
)
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import MixtralConfig, MixtralForCausalLM

import hf_schatten
from hf_schatten import SchattenTrainer

# Rows of an epoch, rows of a micro-batch over both processes, whether accelerate fills the last batch up, and the
# rows that the processes have in it.
EPOCHS: dict[str, tuple[int, int, bool]] = {
    "4 and 1 rows": (21, 8, False),
    "4 and 4 rows, 3 of them filled up": (21, 8, True),
    "4 and none, filled up": (20, 8, True),
    "2 micro-batches and 1": (21, 4, True),
}
COMPARABLE = "4 and 1 rows"  # with one process: filling up repeats rows


def rows_alike() -> list[dict[str, Tensor]]:
    """Return an epoch of 4, 4 and 4 rows, and the same, 4 times the same row, and 1 such row."""
    rows = sequences(9)
    return rows[:4] * 2 + rows[4:8] * 2 + rows[8:] * 5


def train(folder: Path, name: str, alike: bool = False) -> dict[str, Any]:
    rows, micro_batch, even = EPOCHS[name]
    trainer = SchattenTrainer(
        model(),
        arguments(
            folder / name,
            micro_batch,
            num_train_epochs=4,
            # Due is the last step of each epoch.
            optim_args="p=adaptive,p_interval=3,p_first_step=3,p_max=1000",
            dataloader_drop_last=False,
            accelerator_config={"even_batches": even},
        ),
        train_dataset=rows_alike() if alike else sequences(rows),
    )
    seen: list[int] = []
    step = trainer.training_step

    def count_rows(module: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        seen.append(len(inputs["input_ids"]))
        return step(module, inputs, *args, **kwargs)

    trainer.training_step = count_rows
    return trained(trainer) | {"rows": seen}


def train_all(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: train(folder, name) for name in EPOCHS} | {"alike": train(folder, COMPARABLE, alike=True)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return what each of two processes gets of each setting."""
    folder = tmp_path_factory.mktemp("pair")
    return together(train_all, 2, folder, folder)


@pytest.mark.parametrize("name", EPOCHS)
def test_the_last_uneven_batch_deadlocks_nobody(name, pair):
    first, second = (results[name] for results in pair)
    epochs = {
        "4 and 1 rows": ([4, 4, 4], [4, 4, 1]),
        "4 and 4 rows, 3 of them filled up": ([4, 4, 4], [4, 4, 4]),
        "4 and none, filled up": ([4, 4, 4], [4, 4, 4]),
        "2 micro-batches and 1": ([2] * 6, [2] * 6),
    }
    assert (first["rows"], second["rows"]) == tuple(rows * 4 for rows in epochs[name])
    assert list(first["p"]) == [3, 6, 9, 12]
    assert first["p"] == second["p"]
    assert_equal(second["weights"], first["weights"])


def test_an_uneven_batch_is_that_of_one_process(pair, tmp_path):
    alone, two = train(tmp_path, COMPARABLE, alike=True), pair[0]["alike"]
    assert alone["rows"] == [8, 8, 5] * 4
    assert [results["alike"]["rows"] for results in pair] == [[4, 4, 4] * 4, [4, 4, 1] * 4]
    inside = (exponents(alone["p"]) > 0.002) & (exponents(alone["p"]) < 0.998)
    assert inside.sum() >= 3
    assert_same_p(two["p"], alone["p"])
    assert_near(two["weights"], alone["weights"])


def run_out_of_batches(options: dict[str, Any]) -> int:
    """Take the steps of a process that has fewer batches than the other, inside torch's ``join``."""
    torch.manual_seed(0)
    # Of one matrix each process would compute the update itself.
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 6))
    wrapped = DistributedDataParallel(model)
    optimizer = hf_schatten.create_schatten_optimizer(model, verbose=False, **options)
    steps = 0
    with wrapped.join():
        for batch in torch.randn(4 - 2 * dist.get_rank(), 3, 6):
            wrapped(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    return steps


def test_a_process_without_batches_needs_options_that_exchange_nothing(tmp_path):
    assert together(run_out_of_batches, 2, tmp_path, {"p": 3.0, "share_work": False}) == [4, 2]
    for outcome in outcomes(run_out_of_batches, 2, tmp_path, {"p": 3.0}, timeout=timedelta(seconds=3)):
        assert outcome.exit_code == 1  # and no deadlock
        assert "RuntimeError" in outcome.error


# Experts that the tokens of each process go to, on each step; on the due steps 2 and 4, one is reached by nobody.
REACHED = [[(0, 1), (0, 2)]] * 3 + [[(0, 1), (0, 3)]] * 2
DUE, PROCESSES, FIRST_P = (2, 4), 2, 1000.0


class Routing:
    """Sends every token to one of the experts of its process, in turn; one process alone has the tokens of both."""

    step = 0

    def __call__(self, router: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, _, chosen = output
        ranks = [dist.get_rank()] if dist.is_initialized() else range(PROCESSES)
        tokens = len(chosen) // len(ranks)
        chosen = torch.cat([torch.tensor(REACHED[self.step][rank]).repeat(tokens // 2) for rank in ranks])[:, None]
        return logits, logits.softmax(dim=-1).gather(1, chosen), chosen


def train_experts(alike: bool) -> dict[str, Any]:
    """Train experts.

    Args:
        alike: both processes have the same tokens, and all statistics are those of one process: in one layer, since
            the inputs of a second one depend on the experts of the first. Otherwise those of expert 0, which both
            processes reach, are not, and weights that move would differ.
    """
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1 if alike else 2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        num_local_experts=4,
        num_experts_per_tok=1,
    )
    mixtral, routing = MixtralForCausalLM(config), Routing()
    for layer in mixtral.model.layers:
        layer.mlp.gate.register_forward_hook(routing)
    options = {"p": "adaptive", "p_estimator": "exact", "p_interval": 2, "p_first_step": 2, "p_max": FIRST_P}
    optimizer = hf_schatten.create_schatten_optimizer(mixtral, lr=1e-3 if alike else 0.0, verbose=False, **options)
    wrapped = DistributedDataParallel(mixtral) if dist.is_initialized() else mixtral
    dataset = (sequences_alike if alike else sequences)(len(REACHED) * 8)
    rows = torch.stack([row["input_ids"] for row in dataset]).view(len(REACHED), 8, -1)
    mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4) if dist.is_initialized() else slice(None)
    estimates = []
    for routing.step, batch in enumerate(rows[:, mine]):
        wrapped(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if routing.step + 1 in DUE:
            estimates.append(
                {matrix.name: (matrix.p.item(), matrix.statistics.clone()) for matrix in optimizer.matrices()}
            )
    weights = {name: tensor.detach().clone() for name, tensor in mixtral.named_parameters()}
    return {"estimates": estimates, "weights": weights}


def train_experts_both_ways() -> dict[str, Any]:
    return {alike: train_experts(alike) for alike in (True, False)}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Return what each of two processes gets of the same tokens, and of different ones."""
    return together(train_experts_both_ways, PROCESSES, tmp_path_factory.mktemp("experts"))


def matrices_of(expert, alike):
    parts = (f"gate_up_proj.{expert}.gate", f"gate_up_proj.{expert}.up", f"down_proj.{expert}")
    return [f"model.layers.{layer}.mlp.experts.{part}" for layer in range(1 if alike else 2) for part in parts]


@pytest.mark.parametrize("alike", [True, False])
def test_an_expert_without_tokens_on_a_process_learns_from_the_others(alike, experts):
    alone = train_experts(alike)
    first, second = (results[alike] for results in experts)
    assert_equal(second["weights"], first["weights"])
    if alike:
        assert_near(first["weights"], alone["weights"])
    inside = 0
    for estimates in zip(first["estimates"], second["estimates"], alone["estimates"], strict=True):
        # Of different tokens, expert 0 has the mean of two curves.
        for name in [name for expert in range(not alike, 4) for name in matrices_of(expert, alike)]:
            (p, statistics), (p_of_second, statistics_of_second), (expected_p, expected) = (e[name] for e in estimates)
            assert p == p_of_second
            assert torch.equal(statistics, statistics_of_second), name
            assert 1 / p == pytest.approx(1 / expected_p, abs=1e-6, rel=0), name
            torch.testing.assert_close(statistics, expected, atol=1e-6, rtol=1e-5)
            inside += 1.002 < p < 500
    assert inside >= 4  # p is not only at the ends of its range


@pytest.mark.parametrize("alike", [True, False])
def test_an_expert_without_tokens_anywhere_keeps_its_p_and_learns_later(alike, experts):
    early, late = experts[0][alike]["estimates"]
    assert {early[name][0] for name in matrices_of(3, alike)} == {FIRST_P}
    assert {late[name][0] for name in matrices_of(3, alike)} != {FIRST_P}
    for name in matrices_of(2, alike):  # reached on the first due step only
        assert late[name][0] == early[name][0]
        assert torch.equal(late[name][1], early[name][1])
    assert all(statistics.isfinite().all() for estimate in (early, late) for _, statistics in estimate.values())
