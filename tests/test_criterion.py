"""Every criterion against a brute-force maximisation of its definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_schatten import SchattenOptions
from hf_schatten.adaptive.criterion import (
    CRITERIA,
    CURVES,
    NODES,
    Estimator,
    Factor,
    Sample,
    exponent_nodes,
    maximising_exponent,
    objective_curve,
)
from hf_schatten.linalg.spectrum import exact_log_norms

EXACT = Estimator.named("exact")
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


def kronecker_objective(G, M, A, D):
    sigma_g, sigma_a, sigma_d = (np.linalg.svd(X, compute_uv=False) for X in (G, A, D))

    def objective(s):
        order = 2 * hoelder_partner(s)
        return log_norm(sigma_g, 1 + s) - log_norm(sigma_a, order) - log_norm(sigma_d, order)

    return objective


def holder_objective(G, M, A, D):
    sigma_g, sigma_a = (np.linalg.svd(X, compute_uv=False) for X in (G, A))
    return lambda s: log_norm(sigma_g, 1 + s) - log_norm(sigma_a, hoelder_partner(s))


def alignment_objective(G, M, A, D):
    U, sigma, Vh = np.linalg.svd(M, full_matrices=False)
    sigma_a = np.linalg.svd(A, compute_uv=False)
    aligned = np.einsum("mi,mn,in->i", U, G, Vh)

    def objective(s):
        gain = (aligned * sigma**s).sum()
        bound = 2 * log_norm(sigma_a, hoelder_partner(s)) + 2 * s * log_norm(sigma, 1 + s)
        return 2 * np.log(gain) - bound if gain > 0 else -np.inf

    return objective


def decrease_objective(G, M, A, D):
    U, sigma, Vh = np.linalg.svd(M, full_matrices=False)

    def objective(s):
        update = (U * sigma**s) @ Vh
        gain = (G * update).sum()
        return 2 * np.log(gain) - np.log(((A @ update.T) ** 2).sum()) if gain > 0 else -np.inf

    return objective


DEFINITIONS = {
    "kronecker": kronecker_objective,
    "holder": holder_objective,
    "alignment": alignment_objective,
    "decrease": decrease_objective,
}


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


def matrices(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return a gradient, a momentum partly aligned with it, inputs, and outputs' gradients, in random bases."""
    sigma_g, sigma_a = spectra(seed)
    rng = np.random.default_rng(1000 + seed)
    m, n = len(sigma_g), len(sigma_g) + len(sigma_a)
    bases = [np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2)]
    left = np.linalg.qr(rng.standard_normal((m, m)))[0]
    G = left @ np.diag(sigma_g) @ bases[0][:m]
    M = G + rng.uniform(0, 1) * G.std() * rng.standard_normal(G.shape)
    A = np.diag(sigma_a) @ bases[1][: len(sigma_a)]
    D = np.diag((1 + np.arange(m)) ** -rng.uniform(0.0, 0.4)) @ left.T
    return G, M, A, D


def statistics(criterion: str, G, M, A, D) -> torch.Tensor:
    G, M, A, D = (torch.as_tensor(X) for X in (G, M, A, D))
    needed = CRITERIA[criterion]
    sample = Sample(G, M if needed.needs_momentum else None, Factor(A), Factor(D) if needed.needs_outputs else None)
    return needed.statistics([sample], EXACT)[0]


def exponent(criterion: str, curves: torch.Tensor, s_min: float, s_max: float) -> torch.Tensor:
    return maximising_exponent(objective_curve(criterion, curves, s_min, s_max), s_min, s_max)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("s_range", RANGES)
def test_the_exponent_maximises_the_criterion(criterion, s_range):
    problems = [matrices(seed) for seed in range(24)]
    found = exponent(criterion, torch.stack([statistics(criterion, *problem) for problem in problems]), *s_range)
    objectives = [DEFINITIONS[criterion](*problem) for problem in problems]
    expected = torch.tensor([brute_force_exponent(objective, *s_range) for objective in objectives]).double()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0.0)
    if s_range == (0.0, 1.0):  # the problems reach both ends or the inside
        inside = ((expected > 0.01) & (expected < 0.99)).sum()
        assert 1 <= inside < 24


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scale_of_gradient_momentum_and_input_does_not_matter(criterion):
    G, M, A, D = matrices(3)
    plain, scaled = statistics(criterion, G, M, A, D), statistics(criterion, 1e-9 * G, 1e12 * M, 1e6 * A, 1e-5 * D)
    torch.testing.assert_close(plain, scaled, atol=1e-8, rtol=1e-8)


def test_a_flat_gradient_wants_muon_and_a_flat_input_wants_sgd():
    flat, peaked = torch.eye(30).double(), torch.diag(torch.exp(-torch.arange(30.0).double()))
    for gradient, inputs, s in ((flat, peaked, 0.0), (peaked, flat, 1.0)):
        for criterion in ("holder", "kronecker"):
            found = exponent(criterion, statistics(criterion, gradient, gradient, inputs, inputs), 0.0, 1.0)
            torch.testing.assert_close(found, torch.tensor(s).double(), atol=1e-9, rtol=0.0)


@pytest.mark.parametrize(("a", "b", "g"), [(0.3, 0.3, 2.0), (0.45, 0.45, 2.0), (0.5, 0.5, 1.8), (0.2, 0.2, 0.9)])
def test_power_laws_get_newtons_step_of_the_kronecker_factored_curvature(a, b, g):
    """The gradient i^-g over the curvatures i^-2a and i^-2b of the sides is i^-(g s) with s = 1 - 2 (a + b) / g."""
    index = 1 + np.arange(400.0)
    G, A, D = (np.diag(index**-decay) for decay in (g, a, b))
    found = exponent("kronecker", statistics("kronecker", G, G, A, D), -0.25, 1.0)
    assert float(found) == pytest.approx(1 - 2 * (a + b) / g, rel=0.0, abs=0.02)


def test_without_the_outputs_gradient_kronecker_is_holder():
    G, _, A, _ = (torch.as_tensor(X) for X in matrices(4))
    sample = Sample(G, None, Factor(A))
    found, expected = (CRITERIA[name].statistics([sample], EXACT)[0] for name in ("kronecker", "holder"))
    torch.testing.assert_close(found, expected, atol=0.0, rtol=0.0)


@pytest.mark.parametrize("criterion", ["alignment", "decrease"])
def test_a_momentum_that_points_uphill_at_some_exponents_is_not_chosen_there(criterion):
    G = np.diag([1.0, -0.5, -0.5, -0.5])  # along M's polar factor the loss rises, along M itself it falls
    M = np.diag([1.0, 0.1, 0.1, 0.1])
    s = exponent(criterion, statistics(criterion, G, M, np.eye(4), np.eye(4)), 0.0, 1.0)
    assert s > np.log10(1.5)  # where 1 = 3 · 0.5 · 0.1^s


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_zero_gradient_has_no_finite_statistics(criterion):
    G, M, A, D = matrices(5)
    assert not statistics(criterion, 0 * G, M, A, D).isfinite().all()
    assert not statistics(criterion, G, M, 0 * A, D).isfinite().all()
    assert statistics(criterion, G, M, A, 0 * D).isfinite().all() == (criterion != "kronecker")


def test_inputs_compute_their_curve_once():
    calls = []

    def counting(X, inverse_orders):
        calls.append(X)
        return exact_log_norms(X, inverse_orders)

    inputs = Factor(torch.eye(3))
    assert torch.equal(inputs.curve(counting), inputs.curve(counting))
    assert len(calls) == 1
    inputs.curve(counting, 2)
    assert len(calls) == 2


def test_the_nodes_span_the_exponents_and_the_default_curves_fit_a_kibibyte():
    nodes = exponent_nodes()
    assert nodes[0] == -0.25
    assert nodes[-1] == 1.0
    assert max(criterion.curves for criterion in CRITERIA.values()) == CURVES
    assert CRITERIA[SchattenOptions().criterion].curves * NODES * nodes.element_size() <= 1024


@pytest.mark.parametrize("criterion", ["alignment", "decrease"])
def test_the_iterates_choose_nearly_the_exponents_of_the_svd(criterion):
    problems = [matrices(seed) for seed in range(24)]
    chosen = []
    for name in ("exact", "iterates"):
        curves = []
        for G, M, A, _ in problems:
            sample = Sample(torch.tensor(G), torch.tensor(M), Factor(torch.tensor(A)))
            estimator = Estimator(exact_log_norms, Estimator.named(name).direction_curves)
            curves.append(CRITERIA[criterion].statistics([sample], estimator)[0])
        chosen.append(exponent(criterion, torch.stack(curves), 0.01, 1.0))
    error = (chosen[0] - chosen[1]).abs()
    assert error.median() <= 0.005
    assert error.max() <= 0.05
