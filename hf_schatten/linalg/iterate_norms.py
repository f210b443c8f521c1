"""Schatten norms by matrix products alone, from traces of Newton–Schulz iterates and of powers of the Gram matrix.

The iterates ``X_0 = X/c, X_1, …, X_K`` have singular values that saturate at different scales. With the same steps for
every order, the Gram matrices ``A_k = X_k X_kᵀ`` give ``tr A_k`` and ``⟨A_j, A_k⟩``, and a weighted sum of these
represents ``‖X/c‖_order^order``: only the weights depend on the order. Where the order is large, the traces of
``A_0^{2^j}`` are norms themselves. The norms at some fixed orders are interpolated to any other.

The singular values of ``A_k`` are squares: in half precision, the small ones of ``A_0`` are below its rounding. The
first steps therefore act on the iterates themselves. Products of float16 then give s with the errors of float32:
``benchmarks/adaptation/criterion.py``.
"""

import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from hf_schatten.linalg.constants import constant
from hf_schatten.linalg.many_matrices import inner_products
from hf_schatten.linalg.symmetric_product import commuting_product, symmetric_polynomial, symmetric_product

# Muon's step, whose slope at zero is among the steepest that keep the singular values bounded: six steps reach down to
# 1/1700 of the largest, where the float32 Gram matrix ends anyway.
STEP = (3.4445, -4.7750, 2.0315)
_STEPS = 6
_DIRECT_STEPS = 3  # of them, those that act on iterates: with two, tests/linalg/test_spectrum.py fails in float16

_SQUARINGS = 5
# Orders 2, 4, 6, 8, 12, 16, … 128: twice the powers that products of two squares of squares reach.
_POWERS = [1, 2, *(power << j for j in range(_SQUARINGS) for power in (3, 4))]
# Inverse orders at which the weights are fitted: between orders 2 and 4, and down to 3/4.
_FITTED_NODES = [0.3, 0.35, 0.4, 0.45, *(0.55 + 0.05 * j for j in range(16)), 1.34]

FIT_POINTS = 2000
_FIT_RANGE = (1e-4, 1.0)
_FIT_FLOOR = 1e-3  # of σ^order: errors are relative above and absolute below
_FIT_RIDGE = 1e-4  # keeps the weights below about 1, so that they amplify no rounding
_INNER_PRODUCTS = 4096  # at once, of parts of matrices: for all processors of a GPU to have some
_STENCIL = 4  # nodes of the local interpolation


def iterate_log_norms(X: Tensor, inverse_orders: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return log ‖X‖, (B, k) float64, at inverse orders (k,), float64 in [0, 4/3].

    Args:
        X: (B, m, n) float32, m <= n, whose elements are 1 at most.
        inverse_orders: on the host; 0 is the spectral norm.
        dtype: of the products. Default: float16 on an accelerator, else float32.
    """
    powers, fitted = (constant(tuple(values), X.device) for values in (_POWERS, _FITTED_NODES))
    interpolation = _interpolation(tuple(inverse_orders.tolist()), X.device)
    X = X.to(dtype or _default_dtype(X)).contiguous()
    gram = symmetric_product(X, X.mT)
    log_traces = _log_traces_of_powers(gram)  # (B, powers)
    power_norms = log_traces / (2 * powers)
    # The Schatten-128 norm: at least the largest singular value, and at most 6 % more at rank 1700.
    log_norm = power_norms[:, -1:]
    sixth_and_eighth = (log_traces - 2 * powers * log_norm)[:, 2:4].exp()
    sums = torch.cat([_features(X, gram, log_norm), sixth_and_eighth], -1) @ _weights(X.device).mT
    fitted_norms = log_norm + fitted * sums.clamp_min(torch.finfo(sums.dtype).tiny).log()
    return torch.cat([power_norms, fitted_norms], -1) @ interpolation.mT


def _default_dtype(X: Tensor) -> torch.dtype:
    # The largest element of a Gram matrix is n at most.
    in_range = X.shape[-1] <= torch.finfo(torch.float16).max
    return torch.float16 if in_range and X.device.type != "cpu" else torch.float32


def _log_traces_of_powers(gram: Tensor) -> Tensor:
    """Logarithms of ``tr gram^power`` for `_POWERS`, (B, powers) float64."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)
    power, squared_norm = gram, inner_products(gram, gram)[1]
    found = [squared_norm]
    for _ in range(_SQUARINGS):
        unit = torch.div(power, squared_norm.sqrt()[:, None, None], out=torch.empty_like(power))
        power = symmetric_product(unit, unit)
        product, squared_norm = inner_products(unit, power)
        found += [product, squared_norm]
    logs = torch.stack(found, -1).double().log() @ _recurrence(gram.device).mT
    return torch.cat([trace.log()[:, None], logs], -1)


@lru_cache(maxsize=8)
def _recurrence(device: torch.device) -> Tensor:
    """What makes logarithms of traces of powers from those of what is found on the way, (powers - 1, found)."""
    found = torch.eye(1 + 2 * _SQUARINGS, dtype=torch.float64)
    log_scale = 0.5 * found[0]  # of gram^{2^j}, which has it as its norm
    rows = [2 * log_scale]
    for product, squared_norm in zip(found[1::2], found[2::2], strict=True):
        rows.append(3 * log_scale + product)
        log_scale = 2 * log_scale + 0.5 * squared_norm
        rows.append(2 * log_scale)
    return torch.stack(rows).to(device)


def _features(X: Tensor, gram: Tensor, log_norm: Tensor) -> Tensor:
    """``tr A_k`` and ``⟨A_j, A_k⟩``, j <= k, of the iterates' Gram matrices, (B, features) float64."""
    count, m, _ = gram.shape
    iterates = gram.new_empty(_STEPS + 1, count, m, m)
    inverse = (-log_norm).exp().to(torch.float32).unsqueeze(-1)
    torch.mul(gram, inverse.square(), out=iterates[0])
    latest = torch.mul(X, inverse, out=torch.empty_like(X))
    a, b, c = (inverse.new_full((count,), coefficient) for coefficient in STEP)
    polynomial = torch.empty_like(gram)
    for k, (A, following) in enumerate(pairwise(iterates)):
        symmetric_polynomial(A, a, b, c, polynomial)
        if k < _DIRECT_STEPS:
            latest = torch.bmm(polynomial, latest)
            symmetric_product(latest, latest.mT, out=following)
        else:
            commuting_product(commuting_product(polynomial, A), polynomial, out=following)
    traces = iterates.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64).mT
    parts = math.gcd(m, 1 << max(1, _INNER_PRODUCTS // count).bit_length() - 1)
    flat = iterates.view(_STEPS + 1, count * parts, -1).transpose(0, 1)  # (B · parts, K + 1, m² / parts)
    products = symmetric_product(flat, flat.mT, out=inverse.new_empty(count * parts, _STEPS + 1, _STEPS + 1))
    products = products.view(count, parts, _STEPS + 1, _STEPS + 1).sum(1, dtype=torch.float64)
    j, k = torch.triu_indices(_STEPS + 1, _STEPS + 1, device=gram.device)
    return torch.cat([traces, products[:, j, k]], -1)


def _scalar_features(x: Tensor) -> Tensor:
    """What a singular value x of X/c contributes to the features and to orders 6 and 8, (points, features)."""
    a, b, c = STEP
    squares = [x**2]
    for _ in range(_STEPS):
        A = squares[-1]
        squares.append(A * (a + A * (b + A * c)) ** 2)
    A = torch.stack(squares, -1)
    j, k = torch.triu_indices(_STEPS + 1, _STEPS + 1)
    return torch.cat([A, A[:, j] * A[:, k], x[:, None] ** 6, x[:, None] ** 8], -1)


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    """Weights of the features at the fitted nodes, (nodes, features): ridge regression on a log-uniform grid."""
    x = fit_points()
    target = x ** constant(tuple(_FITTED_NODES), x.device)[:, None].reciprocal()  # (nodes, points)
    precision = 1 / (target.clamp_min(_FIT_FLOOR) * FIT_POINTS**0.5)
    design = _scalar_features(x) * precision[..., None]  # (nodes, points, features)
    return ridge_regression(design, (target * precision)[..., None]).squeeze(-1).to(device)


def fit_points() -> Tensor:
    """Return singular values, relative to a norm, that weights of iterates are fitted on: log-uniform, float64."""
    low, high = torch.tensor(_FIT_RANGE, dtype=torch.float64).log10()
    return torch.logspace(low, high, FIT_POINTS, dtype=torch.float64)


def ridge_regression(design: Tensor, targets: Tensor) -> Tensor:
    """Return weights (..., features, k) of features (..., points, features) to targets (..., points, k), float64."""
    ridge = _FIT_RIDGE**2 * torch.eye(design.shape[-1], dtype=torch.float64)
    return torch.linalg.solve(design.mT @ design + ridge, design.mT @ targets)


@lru_cache(maxsize=16)
def _interpolation(x: tuple[float, ...], device: torch.device) -> Tensor:
    """Return what interpolates between norms at powers and fitted nodes, by cubics through four of them, (k, …)."""
    host = torch.device("cpu")
    nodes = torch.cat([0.5 / constant(tuple(_POWERS), host), constant(tuple(_FITTED_NODES), host)])
    points = constant(x, host)
    ascending = nodes.argsort()
    left = (torch.searchsorted(nodes[ascending], points) - _STENCIL // 2).clamp(0, len(nodes) - _STENCIL)
    index = ascending[left[:, None] + torch.arange(_STENCIL)]  # (k, 4)
    near = nodes[index]
    apart = torch.eye(_STENCIL, dtype=torch.bool)
    numerator = torch.where(apart, 1.0, (points[:, None] - near)[:, None, :])  # (k, 4, 4)
    denominator = torch.where(apart, 1.0, near[:, :, None] - near[:, None, :])
    weights = points.new_zeros(len(x), len(nodes))
    return weights.scatter_(1, index, (numerator / denominator).prod(-1)).to(device)
