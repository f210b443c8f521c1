"""The holder criterion against a brute-force maximisation of its definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_schatten.criterion import NODES, exponent_nodes, holder_exponent, holder_statistics


def brute_force_exponent(sigma_g: np.ndarray, sigma_a: np.ndarray, s_min: float, s_max: float) -> float:
    """Maximise log ‖G‖_{1+1/p} − log ‖A‖_{2(p+1)/(p−1)} over s = 1/p by two passes over a fine grid."""

    def log_norm(sigma: np.ndarray, order: float) -> float:
        scaled = sigma / sigma.max()
        if np.isinf(order):
            return np.log(sigma.max())
        return np.log(sigma.max()) + np.log((scaled**order).sum()) / order

    def objective(s: float) -> float:
        k = np.inf if s == 1 else 2 * (1 + s) / (1 - s)
        return log_norm(sigma_g, 1 + s) - log_norm(sigma_a, k)

    low, high = s_min, s_max
    for _ in range(2):
        grid = np.linspace(low, high, 1001)
        best = int(np.argmax([objective(s) for s in grid]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 1000)]
    return float((low + high) / 2)


def spectra(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return singular values that decay like those of gradients and activations, with a random sharpness."""
    rng = np.random.default_rng(seed)
    r, t = rng.integers(4, 200, size=2)
    sigma_g = np.exp(-rng.uniform(0, 20) * np.linspace(0, 1, r) ** rng.uniform(0.2, 2))
    sigma_a = (1 + np.arange(t)) ** -rng.uniform(0.0, 0.8)
    if seed % 3 == 0:  # an outlying direction, as in trained transformers
        sigma_a[1:] *= rng.uniform(0.05, 0.9)
    if seed % 8 == 1:
        sigma_a[:] = 1  # whitened inputs: no reason to leave gradient descent
    return sigma_g, sigma_a


@pytest.mark.parametrize("s_range", [(0.0, 1.0), (0.01, 1.0), (0.25, 0.5), (-0.25, 1.0)])
def test_the_exponent_maximises_the_criterion(s_range):
    pairs = [spectra(seed) for seed in range(40)]
    statistics = torch.stack([holder_statistics(*(torch.tensor(x).log() for x in pair)) for pair in pairs])
    found = holder_exponent(statistics, *s_range)
    expected = torch.tensor([brute_force_exponent(*pair, *s_range) for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0.0)
    if s_range == (0.0, 1.0):  # the spectra reach both ends and the inside
        assert (expected < 1e-3).any()
        assert (expected > 0.999).any()
        assert ((expected > 0.1) & (expected < 0.9)).sum() >= 5


def test_scale_of_gradient_and_input_does_not_matter():
    sigma_g, sigma_a = (torch.tensor(x) for x in spectra(3))
    plain = holder_statistics(sigma_g.log(), sigma_a.log())
    scaled = holder_statistics((1e-9 * sigma_g).log(), (1e6 * sigma_a).log())
    torch.testing.assert_close(plain, scaled, atol=1e-9, rtol=1e-9)


def test_a_flat_gradient_wants_muon_and_a_flat_input_wants_sgd():
    flat, peaked = torch.zeros(30, dtype=torch.float64), -torch.arange(30, dtype=torch.float64)
    wants_muon = holder_exponent(holder_statistics(flat, peaked), 0.0, 1.0)
    wants_sgd = holder_exponent(holder_statistics(peaked, flat), 0.0, 1.0)
    torch.testing.assert_close(wants_muon, torch.tensor(0.0).double(), atol=1e-9, rtol=0.0)
    torch.testing.assert_close(wants_sgd, torch.tensor(1.0).double(), atol=1e-9, rtol=0.0)


def test_an_average_that_starts_at_zero_needs_no_bias_correction():
    statistics = torch.stack([holder_statistics(*(torch.tensor(x).log() for x in spectra(i))) for i in range(5)])
    torch.testing.assert_close(
        holder_exponent(0.2 * statistics, 0.0, 1.0), holder_exponent(statistics, 0.0, 1.0), atol=1e-9, rtol=0.0
    )


def test_a_zero_matrix_has_no_finite_statistics():
    zero = torch.full((4,), -torch.inf, dtype=torch.float64)
    assert not holder_statistics(zero, torch.zeros(4, dtype=torch.float64)).isfinite().all()


def test_the_nodes_span_the_exponents_and_fit_a_kibibyte_per_layer():
    nodes = exponent_nodes()
    assert nodes[0] == -0.25
    assert nodes[-1] == 1.0
    assert 2 * NODES * nodes.element_size() <= 1024
