"""The geometry of one matrix' gradient after dualization under every Schatten norm.

Source: F. L. Cesista 2025, "Steepest Descent Under Schatten-p Norms", section "What does the dualizer actually do?".
Its p is the order r of the norm here; r = 2 is SGD, r = inf is Muon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_schatten.linalg import coupling_factors
from hf_schatten.matrices.layout import layer_name, matrix_name
from hf_schatten.matrices.routing import Route, route_parameters

ORDERS = (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, math.inf)
FIT_FROM = 32  # the order from which on the quadratic decay, an asymptote, is fitted

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerGeometry:
    """One matrix' gradient after dualization under every norm of `ORDERS`; arrays (orders,).

    Attributes:
        name: of the layer.
        variance: of the singular values t of the dualized gradient T, over those whose gradient is not zero.
        relative_size: ‖T‖_F / ‖W‖_F.
        stable_rank: ‖T‖_F² / ‖T‖_2².
        log_variance: variance of ln σ of the gradient's singular values σ, what proposition 5 multiplies.
    """

    name: str
    variance: Array
    relative_size: Array
    stable_rank: Array
    log_variance: float

    @property
    def kind(self) -> str:
        """What it has in common with a layer of the other blocks: its name after the last number."""
        parts = self.name.split(".")
        last = max((index for index, part in enumerate(parts) if part.isdigit()), default=-1)
        return ".".join(parts[last + 1 :]) or self.name


@dataclass(frozen=True)
class QuadraticDecay:
    """The fit ``variance = constant / (order - 1)²``.

    Attributes:
        constant: geometric mean of ``variance · (order - 1)²``.
        r_squared: share of the variation of log(variance) that it explains.
        exponent: of ``order - 1`` where it is fitted too; -2 in the limit.
    """

    constant: float
    r_squared: float
    exponent: float


def matrix_views(routes: Iterable[Route], tensor_of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """Return the matrices (rows, columns) of routed parameters by name, as stored.

    Args:
        routes: of the matrices.
        tensor_of: what is looked at: the parameter itself, its gradient.
    """
    return {
        matrix_name(route.name, part): route.layout.matrix(tensor_of(route.parameter), index)
        for route in routes
        for index, part in enumerate(route.layout.part_names(route.parameter.shape))
    }


def measure(model: nn.Module) -> list[LayerGeometry]:
    """Return the geometry of every matrix that has a finite gradient other than zero."""
    routes = [route for route in route_parameters(model).to("schatten_p") if route.parameter.grad is not None]
    weights = matrix_views(routes, lambda parameter: parameter.detach())
    gradients = matrix_views(routes, lambda parameter: parameter.grad)  # type: ignore[arg-type, return-value]
    return [
        layer_geometry(layer_name(name), gradient, weights[name])
        for name, gradient in gradients.items()
        if gradient.isfinite().all() and gradient.any()
    ]


def layer_geometry(name: str, gradient: Tensor, weight: Tensor) -> LayerGeometry:
    """Measure one gradient, of any dtype and scale, in float64.

    One SVD serves all orders: the singular values of `hf_schatten.linalg.dualizer` are the dual vector of the
    gradient's, which `coupling_factors` returns.

    Args:
        name: of the layer.
        gradient: matrix (m, n), not zero.
        weight: matrix (m, n).
    """
    sigma = torch.linalg.svdvals(gradient.double()).cpu()
    sigma = sigma[sigma > max(gradient.shape) * torch.finfo(sigma.dtype).eps * sigma[0]]  # (rank,)
    dualized = torch.stack([coupling_factors(sigma, order) for order in ORDERS])  # (orders, rank)
    squares = dualized.square()
    weight_norm = torch.linalg.vector_norm(weight, dtype=torch.float64).cpu()
    return LayerGeometry(
        name,
        dualized.var(1, correction=0).numpy(),
        (squares.sum(1).sqrt() / weight_norm).numpy(),
        (squares.sum(1) / squares.amax(1)).numpy(),
        sigma.log().var(correction=0).item(),
    )


def fit_decay(variance: Array) -> QuadraticDecay | None:
    """Fit proposition 5's decay to variances (orders,) at the finite orders from 32 on; None where one is zero."""
    pairs = [(order, value) for order, value in zip(ORDERS, variance, strict=True) if FIT_FROM <= order < math.inf]
    orders, values = np.array(pairs).T
    if not (values > 0).all():
        return None
    x, y = np.log(orders - 1), np.log(values)
    scaled = y + 2 * x
    unexplained = ((scaled - scaled.mean()) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    return QuadraticDecay(float(np.exp(scaled.mean())), float(1 - unexplained), float(np.polyfit(x, y, 1)[0]))
