"""Spectra of matrices, and Schatten norms computed from them in log space."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# From matrices (..., m, n) and inverse orders (k,), float64, to (..., k) float64 of log ‖X‖_order.
LogNormEstimator = Callable[[Tensor, Tensor], Tensor]


def exact_log_norms(X: Tensor, inverse_orders: Tensor) -> Tensor:
    """Return log ‖X‖ for many Schatten orders at once, from all singular values."""
    return log_schatten_norm(exact_log_spectrum(X), inverse_orders)


def exact_log_spectrum(X: Tensor) -> Tensor:
    """Return the logarithms of the singular values of a matrix, from the eigenvalues of its smaller Gram matrix.

    The Gram matrix is formed in float64, so that singular values are exact to about 1e-8 of the largest;
    what rounds below zero is reported as zero (-inf).

    Args:
        X: (..., m, n), real, any dtype.

    Returns:
        (..., min(m, n)) float64, ascending; NaN for a matrix that is not finite.
    """
    X = X.to(torch.float64)
    if X.shape[-2] > X.shape[-1]:
        X = X.mT
    gram = X @ X.mT
    finite = gram.isfinite().all(dim=-1).all(dim=-1)[..., None]  # (..., 1); eigvalsh raises on NaN
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite[..., None], gram, 0.0))
    return torch.where(finite, 0.5 * eigenvalues.clamp_min(0.0).log(), torch.nan)


def log_schatten_norm(log_spectrum: Tensor, inverse_order: Tensor) -> Tensor:
    """Return log ‖X‖ for many Schatten orders at once; safe for every order from (0, ∞].

    With ℓ = log σ: log ‖X‖_order = ℓ_max + log(Σ exp(order · (ℓ − ℓ_max))) / order.

    Args:
        log_spectrum: (..., r) logarithms of singular values; -inf for a zero.
        inverse_order: (k,) values of 1/order, at least 0; 0 is the spectral norm.

    Returns:
        (..., k) of the dtype of ``log_spectrum``; -inf or NaN for a zero matrix.
    """
    largest = log_spectrum.amax(dim=-1, keepdim=True)
    # At 1/order = 0 the sum counts the multiplicity of the largest value and its factor is zero: any positive
    # stand-in for the divisor gives the exact limit.
    divisor = inverse_order.clamp_min(torch.finfo(log_spectrum.dtype).tiny).unsqueeze(-1)  # (k, 1)
    relative = (log_spectrum - largest).unsqueeze(-2) / divisor  # (..., k, r)
    return largest + inverse_order * relative.exp().sum(dim=-1).log()
