"""Spectra of matrices, and Schatten norms of many orders at once: exact, and estimated at less cost.

An estimator maps matrices (..., m, n) and inverse orders (k,) to log ‖X‖_order, (..., k) float64. All of them are
deterministic functions of each single matrix, and safe for every shape and scale. A zero matrix has a norm of -inf or
NaN; a matrix that is not finite has NaN and leaves the rest of its batch alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_schatten.linalg.estimated_spectra import lanczos_spectrum
from hf_schatten.linalg.iterate_norms import iterate_log_norms
from hf_schatten.option_names import EstimatorName

# From matrices (..., m, n) and inverse orders (k,), on the host, float64 in [0, 4/3] with 0 for the spectral norm, to
# (..., k) float64 of log ‖X‖_order. Nothing but a decomposition waits for the device.
LogNormEstimator = Callable[[Tensor, Tensor], Tensor]

# On a GPU, decompositions follow one another; `lanczos` needs one for each matrix, 3 ms on an H100. `iterates` takes
# 0.8e12 operations for 2048 × 8192, 2 ms at 400 Tflop/s, which nobody has timed.
_LARGEST_ITERATED = 2048


def exact_log_norms(X: Tensor, inverse_orders: Tensor) -> Tensor:
    """Return log ‖X‖_order from all singular values, in float64."""
    return log_schatten_norm(exact_log_spectrum(X), inverse_orders)


def exact_log_spectrum(X: Tensor) -> Tensor:
    """Return the logarithms of the singular values, from the eigenvalues of the smaller Gram matrix in float64.

    Of X (..., m, n), real, any dtype, they are (..., min(m, n)) float64, ascending; NaN for a matrix that is not
    finite. They are exact to about 1e-8 of the largest; what rounds below zero is reported as zero (-inf).
    """
    X = X.to(torch.float64)
    if X.shape[-2] > X.shape[-1]:
        X = X.mT
    gram = X @ X.mT
    finite = gram.isfinite().all(dim=-1).all(dim=-1)[..., None]  # (..., 1); eigvalsh raises on NaN
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite[..., None], gram, 0.0))
    return torch.where(finite, 0.5 * eigenvalues.clamp_min(0.0).log(), torch.nan)


def log_schatten_norm(log_spectrum: Tensor, inverse_order: Tensor, log_multiplicity: Tensor | None = None) -> Tensor:
    """Return log ‖X‖ for many Schatten orders at once; safe for every order from (0, ∞].

    With ℓ = log σ and multiplicities μ: log ‖X‖_order = ℓ_max + log(Σ μ exp(order · (ℓ − ℓ_max))) / order.

    Args:
        log_spectrum: (..., r) logarithms of singular values, -inf for a zero. The result, (..., k), is of its dtype,
            and -inf or NaN for a zero matrix.
        inverse_order: (k,) values of 1/order, at least 0; 0 is the spectral norm. Of any device.
        log_multiplicity: (..., r) logarithms of how often each singular value counts, finite. Default: once.
    """
    largest = log_spectrum.amax(dim=-1, keepdim=True)
    inverse_order = inverse_order.to(log_spectrum.device, non_blocking=True)
    # At 1/order = 0 the sum counts the multiplicity of the largest value and its factor is zero: any positive
    # stand-in for the divisor gives the exact limit.
    divisor = inverse_order.clamp_min(torch.finfo(log_spectrum.dtype).tiny).unsqueeze(-1)  # (k, 1)
    exponent = (log_spectrum - largest).unsqueeze(-2) / divisor  # (..., k, r)
    if log_multiplicity is not None:
        exponent = exponent + log_multiplicity.unsqueeze(-2)
    return largest + inverse_order * exponent.exp().sum(dim=-1).log()


def of_unit_matrices(log_norms: LogNormEstimator) -> LogNormEstimator:
    """Make an estimator for every shape, dtype and scale from one for unit matrices, see `_unit_matrices`."""

    @torch.no_grad()
    def estimate(X: Tensor, inverse_orders: Tensor) -> Tensor:
        unit, log_scale = _unit_matrices(X)
        result = log_norms(unit, inverse_orders) + log_scale  # (B, k)
        return result.reshape(*X.shape[:-2], -1)

    return estimate


def _of_spectrum(spectrum: Callable[[Tensor], tuple[Tensor, Tensor]]) -> LogNormEstimator:
    """Make an estimator from a function of unit matrices to singular values and multiplicities, both logarithms."""

    def log_norms(unit: Tensor, inverse_orders: Tensor) -> Tensor:
        log_sigma, log_multiplicity = spectrum(unit)
        return log_schatten_norm(log_sigma, inverse_orders, log_multiplicity)

    return of_unit_matrices(log_norms)


def _unit_matrices(X: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, m, n) float32 with m <= n and the largest magnitude 1, and (B, 1) float64 logarithms of the scale.

    The scale of a zero matrix is zero and that of a matrix which is not finite NaN. All ones stand in for both: no
    decomposition raises on them.
    """
    X = X.flatten(0, -3) if X.ndim > 2 else X.unsqueeze(0)
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    largest = torch.maximum(X.amax((-2, -1), keepdim=True), -X.amin((-2, -1), keepdim=True))
    regular = largest.isfinite() & (largest > 0)
    unit = (X / largest).masked_fill_(~regular, 1.0).to(torch.float32)
    log_scale = torch.where(largest.isfinite(), largest, torch.nan).to(torch.float64).log()
    return unit if X.shape[-2] <= X.shape[-1] else unit.mT, log_scale.flatten(1)


def fast_log_norms(X: Tensor, inverse_orders: Tensor) -> Tensor:
    """Return log ‖X‖_order as ``lanczos`` has it, or on an accelerator ``iterates``, but for large matrices."""
    by_products = X.device.type != "cpu" and min(X.shape[-2:]) <= _LARGEST_ITERATED
    return LOG_NORM_ESTIMATORS["iterates" if by_products else "lanczos"](X, inverse_orders)


LOG_NORM_ESTIMATORS: dict[EstimatorName, LogNormEstimator] = {
    "auto": fast_log_norms,
    "exact": exact_log_norms,
    "lanczos": _of_spectrum(lanczos_spectrum),
    "iterates": of_unit_matrices(iterate_log_norms),
}
