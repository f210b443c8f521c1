"""Training on two processes is training on one: the same p and the same weights for the same global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from collectives import METHODS, counted
from processes import together
from small_gpt2 import (
    GLOBAL_BATCH,
    MATRICES,
    arguments,
    assert_equal,
    assert_near,
    assert_same_p,
    assert_same_sizes,
    exponents,
    model,
    sequences,
    sequences_alike,
    trained,
)

from hf_schatten import SchattenTrainer

STEPS = 30
DIFFERENT = "different rows"  # on the two processes, which otherwise have the same
# Sizes of a micro-batch over all processes, and options.
SETTINGS: dict[str, tuple[int, str]] = {
    "same rows": (8, "p=adaptive"),
    "same rows, 4 micro-batches": (2, "p=adaptive"),
    DIFFERENT: (8, "p=adaptive"),
    f"{DIFFERENT}, 4 micro-batches": (2, "p=adaptive"),
    "in a worker": (8, "p=adaptive,p_async=true"),
}
EXACT = [name for name in SETTINGS if name.startswith("same rows")]
DUE = (10, 20, 30)
HASHES = 4 * 8  # bytes, by which the processes know that they take the same steps
# Bytes that processes add up: two curves of 63 nodes in float64 with a flag each, and three numbers with a flag each.
CURVES, SIZES = 2 * (63 + 1) * 8 * MATRICES, 3 * 2 * 8 * MATRICES
GATHER = "all_gather_single" if "all_gather_single" in METHODS else "_allgather_base"  # torch renames it
UPDATES = 4 * 2 * 12 * 32**2  # of all matrices in float32: each process sends a half of them


def train(folder: Path, name: str) -> dict[str, Any]:
    micro_batch, options = SETTINGS[name]
    trainer = SchattenTrainer(
        model(),
        arguments(
            folder / name,
            micro_batch,
            optim_args=f"p_interval=10,p_max=1000,{options}",
            max_steps=STEPS,
            logging_steps=10,
        ),
        train_dataset=(
            sequences(STEPS * GLOBAL_BATCH)
            if name.startswith(DIFFERENT)
            else sequences_alike(STEPS * GLOBAL_BATCH, micro_batch)
        ),
    )
    with counted(lambda: trainer.state.global_step + 1) as collectives:
        result = trained(trainer)
    return result | {"collectives": collectives}


def train_all(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: train(folder, name) for name in SETTINGS}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return what each of two processes got of each setting."""
    folder = tmp_path_factory.mktemp("pair")
    return together(train_all, 2, folder, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return what one process gets of each setting."""
    return train_all(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("name", EXACT)
def test_p_and_weights_are_those_of_one_process(name, alone, pair):
    one, two = alone[name], pair[0][name]
    assert list(one["p"]) == [10, 20, 30]
    inside = (exponents(one["p"]) > 0.002) & (exponents(one["p"]) < 0.998)
    assert inside.sum() >= 3  # p is not only at the ends of its range
    torch.testing.assert_close(two["statistics"], one["statistics"], atol=1e-5, rtol=1e-5)
    assert one["statistics"].std() > 0.1
    assert_same_p(two["p"], one["p"])
    assert_near(two["weights"], one["weights"])
    assert_same_sizes(two["sizes"], one["sizes"])


@pytest.mark.parametrize("name", SETTINGS)
def test_processes_agree_bitwise(name, pair):
    assert pair[0][name]["p"] == pair[1][name]["p"]
    assert pair[0][name]["sizes"] == pair[1][name]["sizes"]
    assert_equal(pair[1][name]["weights"], pair[0][name]["weights"])


def test_the_mean_of_statistics_is_near_that_of_the_global_batch(alone, pair):
    """Halves of the batch whose inputs differ as much as here: an approximation, and no more."""
    for name in (DIFFERENT, f"{DIFFERENT}, 4 micro-batches"):
        error = (exponents(pair[0][name]["p"]) - exponents(alone[name]["p"])).abs()
        assert error.max() <= 0.2
        assert error.median() <= 0.02
        assert error.max() > 1e-3  # the rows do differ


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_exchanges_updates_and_seldom_statistics_sizes_and_four_hashes_and_nothing_else(name, alone, pair):
    expected = []
    for step in range(1, STEPS + 1):
        measured = step in DUE and not (name == "in a worker" and step == DUE[0])  # which are those of the step before
        expected += [(step, "allreduce", HASHES)] * (step in (1, 2, 4, 8, 16))
        expected += [(step, "allreduce", CURVES)] * measured
        expected.append((step, GATHER, UPDATES))
        expected += [(step, "allreduce", SIZES)] * (step in DUE)
    for result in pair:
        assert result[name]["collectives"] == expected
    assert not alone[name]["collectives"]
