"""The curves of a direction against their definition, with O_s formed in float64."""

from __future__ import annotations

import pytest
import torch

from hf_schatten.linalg.direction_curves import direction_curves, iterate_direction_curves

S = torch.linspace(-0.25, 1, 11, dtype=torch.float64)


def problem(m, n, decay):
    torch.manual_seed(m)
    r = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(side, r, dtype=torch.float64)).Q for side in (m, n))
    M = 1e-3 * U @ torch.diag(torch.logspace(0, -decay, r, dtype=torch.float64)) @ V.mT
    G = M + 0.3 * M.std() * torch.randn(m, n, dtype=torch.float64)
    return M, G, 50 * torch.randn(30, n, dtype=torch.float64)


def definition(M, G, A):
    """Return gain, power sum and energy of O_s with singular values relative to the largest, (3, K)."""
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    rows = []
    for s in S:
        O_s = U @ torch.diag((sigma / sigma[0]) ** s) @ Vh
        gain = (G * O_s).sum() / G.norm()
        rows.append(torch.stack([gain, (M / sigma[0] * O_s).sum(), ((A @ O_s.mT).norm() / A.norm()) ** 2]))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8), (1, 7)])
def test_the_exact_curves_are_the_definition(shape):
    M, G, A = problem(*shape, decay=3)
    gain, log_power_sum, energy = direction_curves(M, G, A, S)
    torch.testing.assert_close(
        torch.stack([gain, log_power_sum.exp(), energy]), definition(M, G, A), atol=1e-10, rtol=1e-9
    )


@pytest.mark.parametrize("shape", [(64, 64), (48, 120), (120, 48)])
def test_the_iterates_curves_are_near_up_to_their_unit(shape):
    M, G, A = problem(*shape, decay=1.5)
    gain, log_power_sum, energy = iterate_direction_curves(M.float(), G.float(), A.float(), S)
    expected = definition(M, G, A)
    # Both have singular values in units of their own: a ratio u gives u^s, u^(1+s) and u^(2s).
    log_unit = log_power_sum[-1] / 2 - expected[1, -1].log() / 2
    for curve, reference, power in ((gain, expected[0], S), (energy, expected[2], 2 * S)):
        torch.testing.assert_close(curve, reference * (power * log_unit).exp(), atol=0.0, rtol=0.05)
    torch.testing.assert_close(log_power_sum - (1 + S) * log_unit, expected[1].log(), atol=0.05, rtol=0.0)


def test_singular_values_of_zero_stay_zero():
    M = torch.zeros(4, 4, dtype=torch.float64)
    M[0, 0] = 2.0
    gain, log_power_sum, energy = direction_curves(M, M, torch.eye(4), S)
    torch.testing.assert_close(gain, torch.ones_like(S), atol=1e-12, rtol=0.0)
    torch.testing.assert_close(log_power_sum, torch.zeros_like(S), atol=1e-12, rtol=0.0)
    torch.testing.assert_close(energy, torch.full_like(S, 0.25), atol=1e-12, rtol=0.0)
