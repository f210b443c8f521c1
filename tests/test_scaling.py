"""The rules that pin the norm of an update."""

from __future__ import annotations

import math

import pytest
import torch

from hf_schatten import SchattenP
from hf_schatten.linalg import schatten_norm
from hf_schatten.matrices.layout import Layout
from hf_schatten.optim.matrix import Matrix
from hf_schatten.optim.step_rules import Update, step_rule_of
from hf_schatten.options import SchattenOptions

S = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
SHAPES = [(8, 8), (4, 16), (16, 4)]


def update_norm(scale, m, n, s, own, *, beta1=0.9, lr_ratio=1.0):
    """Return the Frobenius norms that a rule gives to directions of the norms ``own``, at the exponents s."""
    group = {**vars(Layout()), "betas": (beta1, 0.999), "lr_ratio": lr_ratio}
    matrix = Matrix("w", "w", torch.zeros(m, n), 0, group, {})
    directions = torch.zeros(len(s), *matrix.wide_shape, dtype=s.dtype)
    directions[:, 0, 0] = own
    update = Update([matrix] * len(s), directions, s, torch.ones_like(s), own.square())
    return step_rule_of(SchattenOptions(p=2.0, scale=scale)).factors(update) * own


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_match_rms_adamw_gives_entries_of_adamws_size_at_every_exponent(m, n):
    norms = update_norm("match_rms_adamw", m, n, S, torch.ones_like(S))
    torch.testing.assert_close(norms / math.sqrt(m * n), torch.full_like(S, 0.2), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_muon_is_the_polar_factors_norm_times_the_aspect_factor(m, n):
    norms = update_norm("muon", m, n, S, torch.ones_like(S))
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
    norms = update_norm("none", 4, 16, S, own, lr_ratio=2.0)
    torch.testing.assert_close(norms, own, atol=0.0, rtol=0.0)


def test_adams_norm_in_interpolate_is_that_of_adam_on_noise():
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, 0.999))
    for _ in range(200):
        before = parameter.detach().clone()
        parameter.grad = torch.randn(64, 64)
        optimizer.step()
    norm = update_norm("interpolate", 64, 64, torch.ones(1), torch.ones(1))[0]
    torch.testing.assert_close((parameter.detach() - before).norm(), norm, atol=0.0, rtol=0.05)


def one_step(p, shape=(24, 40), lr=1.0, **options):
    """Return the change of a matrix by one step along a gradient of a given spectrum."""
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
    gradient = U * torch.arange(1, len(U.mT) + 1, dtype=torch.float64) ** -0.7 @ Vh
    weights = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    weights.grad = gradient
    SchattenP([weights], lr=lr, p=p, ns_steps=8, weight_decay=0, **options).step()
    return weights.detach()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 4.0, 10.0])
def test_schatten_pins_the_norm_whose_steepest_descent_the_update_is(p, shape):
    norm = schatten_norm(one_step(p, shape, scale="schatten"), p + 1)
    torch.testing.assert_close(norm.item(), 0.2 * math.sqrt(40), atol=0.0, rtol=0.01)


@pytest.mark.parametrize("p", [math.inf, -10.0, -5.0])
def test_schatten_is_match_rms_adamw_from_muons_end_on(p):
    expected = one_step(p, scale="match_rms_adamw")
    torch.testing.assert_close(one_step(p, scale="schatten"), expected, atol=1e-12, rtol=1e-12)


def test_schatten_comes_near_match_rms_adamw_towards_muons_end():
    ratios = [
        (one_step(p, scale="schatten").norm() / one_step(p, scale="match_rms_adamw").norm()).item()
        for p in (1.0, 2.0, 4.0, 16.0, 1e4)
    ]
    assert ratios == sorted(ratios)
    assert ratios[-1] == pytest.approx(1.0, rel=0.02, abs=0.0)


def test_schatten_without_a_schatten_norm_is_match_rms_adamw():
    for options in ({"precondition": "adam"}, {"target": "soft_threshold:0.1"}):
        expected = one_step(2.0, scale="match_rms_adamw", **options)
        torch.testing.assert_close(one_step(2.0, scale="schatten", **options), expected, atol=1e-12, rtol=1e-12)


def test_schatten_of_nothing_is_nothing():
    weights = torch.nn.Parameter(torch.ones(4, 6))
    weights.grad = torch.zeros(4, 6)
    SchattenP([weights], lr=1.0, p=2.0, weight_decay=0, scale="schatten").step()
    torch.testing.assert_close(weights.detach(), torch.ones(4, 6), atol=0.0, rtol=0.0)
