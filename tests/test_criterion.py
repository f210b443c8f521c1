"""The criterion against a brute-force maximisation of its definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_schatten.adaptive.criterion import (
    Inputs,
    Sample,
    exponent_nodes,
    maximising_exponent,
    objective_curve,
    statistics_of,
)
from hf_schatten.linalg.spectrum import exact_log_norms
from hf_schatten.optim.matrix import CURVES, NODES

RANGES = [(0.0, 1.0), (0.01, 1.0), (0.25, 0.5), (-0.25, 1.0)]


def log_norm(sigma: np.ndarray, order: float) -> float:
    scaled = sigma / sigma.max()
    power = 0.0 if np.isinf(order) else np.log((scaled**order).sum()) / order
    return np.log(sigma.max()) + power


def hoelder_partner(s: float) -> float:
    return np.inf if s == 1 else 2 * (1 + s) / (1 - s)


def brute_force_exponent(objective, s_min: float, s_max: float) -> float:
    """Maximise over s by two passes over a fine grid."""
    low, high = s_min, s_max
    for _ in range(2):
        grid = np.linspace(low, high, 201)
        best = int(np.argmax([objective(s) for s in grid]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 200)]
    return float((low + high) / 2)


def definition(G, A):
    """Return the criterion of s: log ‖G‖_{1+s} − log ‖A‖_k."""
    sigma_g, sigma_a = (np.linalg.svd(X, compute_uv=False) for X in (G, A))
    return lambda s: log_norm(sigma_g, 1 + s) - log_norm(sigma_a, hoelder_partner(s))


def spectra(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return singular values that decay like those of gradients and activations, with a random sharpness."""
    rng = np.random.default_rng(seed)
    r, t = rng.integers(4, 60, size=2)
    sigma_g = np.exp(-rng.uniform(0, 20) * np.linspace(0, 1, r) ** rng.uniform(0.2, 2))
    sigma_a = (1 + np.arange(t)) ** -rng.uniform(0.0, 0.8)
    if seed % 3 == 0:  # an outlying direction, as in trained transformers
        sigma_a[1:] *= rng.uniform(0.05, 0.9)
    if seed % 8 == 1:
        sigma_a[:] = 1  # whitened inputs: no reason to leave gradient descent
    return sigma_g, sigma_a


def matrices(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a gradient and inputs in random bases."""
    sigma_g, sigma_a = spectra(seed)
    rng = np.random.default_rng(1000 + seed)
    m, n = len(sigma_g), len(sigma_g) + len(sigma_a)
    bases = [np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2)]
    left = np.linalg.qr(rng.standard_normal((m, m)))[0]
    return left @ np.diag(sigma_g) @ bases[0][:m], np.diag(sigma_a) @ bases[1][: len(sigma_a)]


def statistics(G, A) -> torch.Tensor:
    return statistics_of([Sample(torch.as_tensor(G), Inputs(torch.as_tensor(A)))], exact_log_norms)[0]


def exponent(curves: torch.Tensor, s_min: float, s_max: float) -> torch.Tensor:
    return maximising_exponent(objective_curve(curves, s_min, s_max), s_min, s_max)


@pytest.mark.parametrize("s_range", RANGES)
def test_the_exponent_maximises_the_criterion(s_range):
    problems = [matrices(seed) for seed in range(24)]
    found = exponent(torch.stack([statistics(*problem) for problem in problems]), *s_range)
    objectives = [definition(*problem) for problem in problems]
    expected = torch.tensor([brute_force_exponent(objective, *s_range) for objective in objectives]).double()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0.0)
    if s_range == (0.0, 1.0):  # the problems reach both ends or the inside
        inside = ((expected > 0.01) & (expected < 0.99)).sum()
        assert 1 <= inside < 24


def test_samples_are_measured_together_as_alone():
    problems = [matrices(seed) for seed in range(4)]
    shared = Inputs(torch.as_tensor(problems[0][1]))  # as of queries, keys and values
    samples = [Sample(torch.as_tensor(problems[0][0][:rows]), shared) for rows in (2, 3)]
    samples += [Sample(torch.as_tensor(G), Inputs(torch.as_tensor(A))) for G, A in problems[1:]]
    alone = torch.stack([statistics(sample.gradient, sample.inputs.rows) for sample in samples])
    torch.testing.assert_close(statistics_of(samples, exact_log_norms), alone, atol=1e-12, rtol=1e-12)


def test_scale_of_gradient_and_input_does_not_matter():
    G, A = matrices(3)
    torch.testing.assert_close(statistics(G, A), statistics(1e-9 * G, 1e6 * A), atol=1e-8, rtol=1e-8)


def test_a_flat_gradient_wants_muon_and_a_flat_input_wants_sgd():
    flat, peaked = torch.eye(30).double(), torch.diag(torch.exp(-torch.arange(30.0).double()))
    for gradient, inputs, s in ((flat, peaked, 0.0), (peaked, flat, 1.0)):
        found = exponent(statistics(gradient, inputs), 0.0, 1.0)
        torch.testing.assert_close(found, torch.tensor(s).double(), atol=1e-9, rtol=0.0)


@pytest.mark.parametrize(("a", "g"), [(0.3, 2.0), (0.45, 2.0), (0.5, 1.8), (0.2, 0.9)])
def test_power_laws_get_newtons_step_of_the_inputs_curvature(a, g):
    """The gradient i^-g over the inputs' curvature i^-2a is i^-(g s) with s = 1 - 2 a / g."""
    index = 1 + np.arange(400.0)
    found = exponent(statistics(np.diag(index**-g), np.diag(index**-a)), -0.25, 1.0)
    assert float(found) == pytest.approx(1 - 2 * a / g, rel=0.0, abs=1e-4)


def test_a_zero_gradient_or_input_has_no_finite_statistics():
    G, A = matrices(5)
    assert statistics(G, A).isfinite().all()
    assert not statistics(0 * G, A).isfinite().all()
    assert not statistics(G, 0 * A).isfinite().all()


def test_inputs_compute_their_curve_once():
    calls = []

    def counting(X, inverse_orders):
        calls.append(X)
        return exact_log_norms(X, inverse_orders)

    inputs = Inputs(torch.eye(3))
    assert torch.equal(inputs.curve(counting), inputs.curve(counting))
    assert len(calls) == 1


def test_the_nodes_span_the_exponents_and_the_curves_fit_a_kibibyte():
    nodes = exponent_nodes()
    assert nodes[0] == -0.25
    assert nodes[-1] == 1.0
    assert statistics(*matrices(0)).shape == (CURVES, NODES)
    assert CURVES * NODES * nodes.element_size() <= 1024
