"""The rules that pin the norm of an update."""

from __future__ import annotations

import math

import pytest
import torch

from hf_schatten.scaling import update_norm

S = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
SHAPES = [(8, 8), (4, 16), (16, 4)]


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_match_rms_adamw_gives_entries_of_adamws_size_at_every_exponent(m, n):
    norms = update_norm("match_rms_adamw", m, n, S, torch.ones_like(S), beta1=0.9, lr_ratio=1.0)
    torch.testing.assert_close(norms / math.sqrt(m * n), torch.full_like(S, 0.2), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_muon_is_the_polar_factors_norm_times_the_aspect_factor(m, n):
    norms = update_norm("muon", m, n, S, torch.ones_like(S), beta1=0.9, lr_ratio=1.0)
    expected = math.sqrt(min(m, n)) * math.sqrt(max(1, m / n))
    torch.testing.assert_close(norms, torch.full_like(S, expected), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("lr_ratio", [1.0, 20.0])
def test_interpolate_runs_from_adams_norm_to_the_polar_factors(m, n, lr_ratio):
    beta1, eta_adam = 0.9, 1e-3
    eta = eta_adam * lr_ratio
    norms = eta * update_norm("interpolate", m, n, S, torch.ones_like(S), beta1=beta1, lr_ratio=lr_ratio)
    adam = eta_adam * math.sqrt((1 - beta1) / (1 + beta1)) * math.sqrt(m * n)
    muon = eta * math.sqrt(min(m, n))
    expected = torch.tensor([adam, math.sqrt(adam * muon), muon], dtype=torch.float64)
    torch.testing.assert_close(norms, expected, atol=1e-12, rtol=1e-12)


def test_none_leaves_an_update_its_own_norm():
    own = torch.tensor([3.0, 0.5, 7.0], dtype=torch.float64)
    norms = update_norm("none", 4, 16, S, own, beta1=0.9, lr_ratio=2.0)
    torch.testing.assert_close(norms, own, atol=0.0, rtol=0.0)


def test_adams_norm_in_interpolate_is_that_of_adam_on_noise():
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, 0.999))
    for _ in range(200):
        before = parameter.detach().clone()
        parameter.grad = torch.randn(64, 64)
        optimizer.step()
    norm = update_norm("interpolate", 64, 64, torch.tensor(1.0), torch.tensor(1.0), beta1=0.9, lr_ratio=1.0)
    torch.testing.assert_close((parameter.detach() - before).norm(), norm, atol=0.0, rtol=0.05)
