"""Training on two processes is training on one: the same p and the same weights for the same global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import together
from small_gpt2 import (
    GLOBAL_BATCH,
    MATRICES,
    arguments,
    assert_equal,
    assert_near,
    assert_same_p,
    exponents,
    model,
    sequences,
    trained,
)

from hf_schatten import SchattenTrainer

STEPS = 30
# Sizes of a micro-batch over all processes, and options.
SETTINGS: dict[str, tuple[int, str]] = {
    "gram": (8, "criterion=holder,sync=gram"),
    "gram, 4 micro-batches": (2, "criterion=holder,sync=gram"),
    "statistics": (8, "criterion=holder,sync=statistics"),
    "statistics, 4 micro-batches": (2, "criterion=holder,sync=statistics"),
    "kronecker": (8, "criterion=kronecker,sync=gram"),  # whose p are at the end of the range here
    "kronecker, 4 micro-batches": (2, "criterion=kronecker,sync=gram"),
    "kronecker, statistics": (8, "criterion=kronecker,sync=statistics"),
}
EXACT = [name for name, (_, options) in SETTINGS.items() if "gram" in options]


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
            train_sampling_strategy="sequential",  # half of the tokens' kinds are those of one process
        ),
        train_dataset=sequences(STEPS * GLOBAL_BATCH),
    )
    reductions = []
    original = dist.all_reduce

    def count(tensor, *args, **kwargs):
        # Trainer reduces a few numbers of its own; DistributedDataParallel does not come through here.
        reductions.append((trainer.state.global_step + 1, tensor.numel() * tensor.element_size()))
        return original(tensor, *args, **kwargs)

    dist.all_reduce = count
    try:
        result = trained(trainer)
    finally:
        dist.all_reduce = original
    return result | {"reductions": [pair for pair in reductions if pair[1] > 256]}


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
    assert inside.sum() >= 3 or "kronecker" in name  # p is not only at the ends of its range
    torch.testing.assert_close(two["statistics"], one["statistics"], atol=1e-5, rtol=1e-5)
    assert one["statistics"].std() > 0.1
    assert_same_p(two["p"], one["p"])
    assert_near(two["weights"], one["weights"])


@pytest.mark.parametrize("name", SETTINGS)
def test_processes_agree_bitwise(name, pair):
    assert pair[0][name]["p"] == pair[1][name]["p"]
    assert_equal(pair[1][name]["weights"], pair[0][name]["weights"])


def test_the_mean_of_statistics_is_near_that_of_the_global_batch(alone, pair):
    """Halves of the batch whose inputs differ as much as here: an approximation, and no more."""
    for name in ("statistics", "statistics, 4 micro-batches"):
        error = (exponents(pair[0][name]["p"]) - exponents(alone[name]["p"])).abs()
        assert error.max() <= 0.2
        assert error.median() <= 0.02


@pytest.mark.parametrize("name", ["statistics", "kronecker, statistics"])
def test_spectra_meet_in_one_reduction_of_a_kibibyte_a_matrix_on_due_steps_alone(name, pair):
    reductions = pair[0][name]["reductions"]
    assert [step for step, _ in reductions] == [10, 20, 30]
    assert all(size <= 1024 * MATRICES for _, size in reductions)


def test_gram_matrices_meet_in_one_reduction(pair):
    inputs = 8 * 2 * (3 * 32**2 + 128**2)  # of each layer's four inputs
    outputs = 8 * 2 * (5 * 32**2 + 128**2)  # of each layer's six matrices
    for name, size in (("gram", inputs), ("kronecker", inputs + outputs)):
        assert pair[0][name]["reductions"] == [(10, size), (20, size), (30, size)]
