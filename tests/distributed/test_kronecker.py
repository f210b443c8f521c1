"""The default criterion where p lies inside its range: two processes and one choose the same p from one batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import together
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import hf_schatten

STEPS, ROWS = 30, 1024  # rows that differ
DUE = [10, 20, 30]
SHARES = 2  # of the same rows in a micro-batch, one for each process; of DIFFERENT rows, there is one
DIFFERENT = "different rows"
# Dtype and micro-batches. float32 rounds what every process adds up, which the choice of p amplifies.
SETTINGS = {
    "float64": (torch.float64, 1),
    "float64, 4 micro-batches": (torch.float64, 4),
    "float32": (torch.float32, 1),
    DIFFERENT: (torch.float32, 1),
}
TOLERANCE = {"float64": 1e-6, "float64, 4 micro-batches": 1e-6, "float32": 1e-5, DIFFERENT: 0.1}  # of 1 / p


def batches(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs (steps, rows, 24) of two spectra, which every process has, and noisy targets (steps, rows, 9)."""
    generator = torch.Generator().manual_seed(4)
    teacher = torch.randn(24, 2, generator=generator) @ torch.randn(2, 9, generator=generator)
    x = torch.randn(STEPS, ROWS, 24, generator=generator)
    x[:, 1::2] *= torch.logspace(0, -1.5, 24)
    y = x @ teacher + 3 * torch.randn(STEPS, ROWS, 9, generator=generator)
    return x.to(dtype), y.to(dtype)


def train(name: str) -> dict[str, Any]:
    dtype, micro_batches = SETTINGS[name]
    shares = 1 if name == DIFFERENT else SHARES
    rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(24, 33), nn.Tanh(), nn.Linear(33, 20), nn.Tanh(), nn.Linear(20, 9)).to(dtype)
    optimizer = hf_schatten.create_schatten_optimizer(
        model, 1e-3, verbose=False, p_interval=10, p_first_step=10, probe_rows=shares * ROWS
    )
    wrapped = DistributedDataParallel(model) if count > 1 else model
    exponents = []
    for step, (x, y) in enumerate(zip(*batches(dtype), strict=True), start=1):
        for rows in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            of_x, of_y = (each.repeat(shares, 1) for each in rows)
            loss = mse_loss(wrapped(of_x.chunk(count)[rank]), of_y.chunk(count)[rank])
            (loss / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in DUE:
            exponents.append([1 / p for p in optimizer.learned_p().values()])
    return {"s": torch.tensor(exponents, dtype=torch.float64), "weights": model.state_dict()}


def train_all() -> dict[str, dict[str, Any]]:
    assert dist.get_world_size() == 2
    return {name: train(name) for name in SETTINGS}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return together(train_all, 2, tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("name", SETTINGS)
def test_p_is_that_of_one_process(name, pair):
    alone = train(name)
    first, second = (result[name] for result in pair)
    assert torch.equal(first["s"], second["s"])
    inside = (alone["s"] > -0.199) & (alone["s"] < 0.999)
    assert inside.sum() >= 5
    torch.testing.assert_close(first["s"], alone["s"], atol=TOLERANCE[name], rtol=0.0)
    if name != DIFFERENT:  # an approximation
        for key, weights in alone["weights"].items():
            assert (first["weights"][key] - weights).norm() <= 1e-5 * weights.norm(), key
    else:
        assert (first["s"] - alone["s"]).abs().max() > 1e-6
