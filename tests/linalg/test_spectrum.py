"""Exact spectra and Schatten norms in log space, against torch's SVD and the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch

from hf_schatten.linalg.spectrum import exact_log_spectrum, log_schatten_norm


@pytest.mark.parametrize("shape", [(20, 20), (7, 30), (30, 7), (3, 5, 9), (1, 4), (4, 1)])
def test_the_spectrum_is_the_svds(shape):
    torch.manual_seed(0)
    X = torch.randn(shape)
    expected = torch.linalg.svdvals(X.double()).flip(-1)
    torch.testing.assert_close(exact_log_spectrum(X).exp(), expected, atol=1e-7, rtol=1e-7)


def test_a_rank_deficient_matrix_has_zero_singular_values():
    X = torch.ones(4, 6)
    spectrum = exact_log_spectrum(X).exp()
    torch.testing.assert_close(spectrum, torch.tensor([0, 0, 0, math.sqrt(24)]).double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("order", [0.8, 1.0, 1.3, 2.0, 7.0, 60.0])
def test_a_norm_is_the_p_norm_of_the_singular_values(order):
    torch.manual_seed(0)
    sigma = torch.rand(5, 12, dtype=torch.float64)
    norm = log_schatten_norm(sigma.log(), torch.tensor([1 / order], dtype=torch.float64)).exp().squeeze(-1)
    torch.testing.assert_close(norm, (sigma**order).sum(-1) ** (1 / order), atol=1e-12, rtol=1e-10)


def test_order_infinity_is_the_spectral_norm_also_with_multiplicity():
    log_spectrum = torch.tensor([0.5, 2.0, 2.0, -math.inf], dtype=torch.float64)
    norm = log_schatten_norm(log_spectrum, torch.tensor([0.0, 1e-300], dtype=torch.float64))
    torch.testing.assert_close(norm, torch.tensor([2.0, 2.0]).double(), atol=1e-12, rtol=1e-12)


def test_a_huge_norm_does_not_overflow():
    log_spectrum = torch.tensor([600.0, 500.0], dtype=torch.float64)
    norm = log_schatten_norm(log_spectrum, torch.tensor([0.5, 0.0], dtype=torch.float64))
    torch.testing.assert_close(norm, torch.tensor([600.0, 600.0]).double(), atol=1e-9, rtol=1e-9)


def test_a_matrix_with_nan_has_a_nan_spectrum_and_spoils_no_other():
    X = torch.ones(2, 3, 3)
    X[0, 1, 1] = torch.nan
    spectrum = exact_log_spectrum(X)
    assert spectrum[0].isnan().all()
    assert not spectrum[1].isnan().any()
