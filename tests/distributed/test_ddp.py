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
from hf_schatten.adaptive.criterion import Inputs, Sample, maximising_exponent, objective_curve, statistics_of
from hf_schatten.linalg.spectrum import exact_log_norms

STEPS, RANKS, S_MIN, LR = 4, 2, 1e-3, 1e-2
# Micro-batches of a step, and the rank whose inputs nobody samples.
SETTINGS: list[tuple[int, int | None]] = [(1, None), (1, 1), (3, None)]


def data(rank: int) -> torch.Tensor:
    """Return inputs whose number and spectrum depend on the rank: flat on rank 0, steep on rank 1."""
    generator = torch.Generator().manual_seed(7 + rank)
    return torch.randn(STEPS, 24 - 6 * rank, 12, generator=generator) * torch.linspace(1, 1 - 0.95 * rank, 12)


def run(micro_batches: int, rank_without_samples: int | None) -> dict[str, Any]:
    """Train, and return what the first matrix' p is chosen from on the last step, which is due."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))
    optimizer = hf_schatten.create_schatten_optimizer(
        model,
        LR,
        weight_decay=0.0,
        p="adaptive",
        p_estimator="exact",
        p_interval=2,
        p_first_step=1,
        p_ema_decay=0.0,
        p_max=1 / S_MIN,
        verbose=False,
    )
    wrapped = DistributedDataParallel(model)
    if rank == rank_without_samples:
        model[0].eval()  # changes nothing but that the probe passes it over
    for inputs in data(rank):
        for rows in inputs.chunk(micro_batches):
            (wrapped(rows).square().mean() / micro_batches).backward()
        gradient = model[0].weight.grad.clone()
        before = [matrix.weights.detach().clone() for matrix in optimizer.matrices()]
        optimizer.step()
        optimizer.zero_grad()
    matrices = list(optimizer.matrices())
    return {
        "p": optimizer.learned_p(),
        "gradient": gradient,
        "statistics": matrices[0].statistics.clone(),
        "weights": model.state_dict(),
        "before": before,
        "after": [matrix.weights.detach().clone() for matrix in matrices],
        "updates": {name: torch.stack(pair) for name, pair in optimizer.policy.updates.items()},
    }


def run_all() -> list[dict[str, Any]]:
    return [run(*setting) for setting in SETTINGS]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return what each rank gets of each setting."""
    by_rank = together(run_all, RANKS, tmp_path_factory.mktemp("ranks"))
    return dict(zip(SETTINGS, zip(*by_rank, strict=True), strict=True))


def exponent(statistics: torch.Tensor) -> torch.Tensor:
    return maximising_exponent(objective_curve(statistics, S_MIN, 1.0), S_MIN, 1.0)


@pytest.mark.parametrize("setting", SETTINGS)
def test_p_is_shared_and_follows_every_ranks_inputs(setting, results):
    _, rank_without_samples = setting
    first, second = results[setting]
    assert first["p"] == second["p"]
    assert torch.equal(first["statistics"], second["statistics"])
    assert all(torch.equal(a, b) for a, b in zip(first["weights"].values(), second["weights"].values(), strict=True))

    sampled = [rank for rank in range(RANKS) if rank != rank_without_samples]
    gradient = first["gradient"].double()
    samples = [Sample(gradient, Inputs(data(rank)[-1].double())) for rank in range(RANKS)]
    curves = statistics_of(samples, exact_log_norms)
    expected = curves[sampled].mean(0)
    torch.testing.assert_close(first["statistics"], expected, atol=1e-6, rtol=1e-6)
    s = torch.tensor(1 / first["p"]["0.weight"], dtype=torch.float64)
    torch.testing.assert_close(s, exponent(expected), atol=1e-6, rtol=0.0)
    assert S_MIN < s < 1.0
    if rank_without_samples is None:  # what one rank's data alone would give is another
        assert ((curves - expected).abs().amax(dim=(1, 2)) > 1e-3).all()
        assert ((exponent(curves) - s).abs() > 1e-3).all()


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_rank_knows_the_sizes_of_all_updates(setting, results):
    """Each rank has computed the updates of some matrices only."""
    first, second = results[setting]
    assert list(first["updates"]) == list(first["p"])
    for (name, sizes), before, after in zip(first["updates"].items(), first["before"], first["after"], strict=True):
        assert torch.equal(sizes, second["updates"][name])
        stable_rank, relative_size = sizes.tolist()
        singular_values = torch.linalg.svdvals(after.double() - before.double())
        exact = float(singular_values.square().sum() / singular_values[0] ** 2)
        assert exact * 0.999 <= stable_rank <= exact * 1.1  # the spectral norm is from below
        size = float(singular_values.norm() / before.norm())
        assert relative_size == pytest.approx(size, rel=1e-4, abs=0)
