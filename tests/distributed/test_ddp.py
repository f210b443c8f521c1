"""Two real processes over gloo: p is the same on every rank and follows all ranks' data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import together
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hf_schatten
from hf_schatten.adaptive.criterion import CRITERIA, Estimator, Factor, Sample, maximising_exponent, objective_curve

EXACT = Estimator.named("exact")
STEPS, RANKS = 4, 2


def data(rank: int) -> torch.Tensor:
    """Return inputs whose spectrum depends on the rank: flat on rank 0, steep on rank 1."""
    generator = torch.Generator().manual_seed(7 + rank)
    return torch.randn(STEPS, 24, 12, generator=generator) * torch.linspace(1, 1 - 0.95 * rank, 12)


def run(rank_without_samples: int | None) -> dict[str, Any]:
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))
    optimizer = hf_schatten.create_schatten_optimizer(
        model,
        criterion="holder",
        p_estimator="exact",
        p_interval=2,
        p_first_step=1,
        p_ema_decay=0.0,
        p_max=1000.0,
        verbose=False,
    )
    wrapped = DistributedDataParallel(model)
    if rank == rank_without_samples:
        model[0].eval()  # changes nothing but that the probe passes it over
    for inputs in data(rank):
        wrapped(inputs).square().mean().backward()
        gradient = model[0].weight.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
    return {"p": optimizer.learned_p(), "gradient": gradient, "weights": model.state_dict()}


def exponent(statistics: torch.Tensor) -> torch.Tensor:
    return maximising_exponent(objective_curve("holder", statistics, 1e-3, 1.0), 1e-3, 1.0)


@pytest.mark.parametrize("rank_without_samples", [None, 1])
def test_p_is_shared_and_follows_every_ranks_inputs(tmp_path, rank_without_samples):
    first, second = together(run, RANKS, tmp_path, rank_without_samples)
    assert first["p"] == second["p"]
    assert all(torch.equal(a, b) for a, b in zip(first["weights"].values(), second["weights"].values(), strict=True))

    sampled = [rank for rank in range(RANKS) if rank != rank_without_samples]
    samples = [Sample(first["gradient"], None, Factor(data(rank)[-1])) for rank in range(RANKS)]
    curves = [CRITERIA["holder"].statistics([sample], EXACT)[0] for sample in samples]
    s = 1 / first["p"]["0.weight"]
    expected = exponent(torch.stack([curves[rank] for rank in sampled]).mean(0))
    torch.testing.assert_close(torch.tensor(s, dtype=torch.float64), expected, atol=1e-6, rtol=0.0)
    if rank_without_samples is None:  # a p from one rank's data alone would be another
        local = exponent(torch.stack(curves))
        assert ((local - s).abs() > 1e-3).all()
