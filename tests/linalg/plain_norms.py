"""Norms and inner products as they are defined, for the tests of the oracles."""

from collections.abc import Sequence

import torch
from torch import Tensor

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_norm(X: Tensor, order: float) -> Tensor:
    sigma = torch.linalg.svdvals(X)
    largest = sigma[..., :1].clamp_min(1e-300)  # so that no power overflows
    return largest.squeeze(-1) * torch.linalg.vector_norm(sigma / largest, order, dim=-1)


def mixed_norm(
    blocks: Sequence[Tensor], orders: Sequence[float], outer_order: float, weights: Sequence[float]
) -> Tensor:
    norms = [w * plain_norm(X, order) for X, order, w in zip(blocks, orders, weights, strict=True)]
    return torch.linalg.vector_norm(torch.stack(norms, -1), outer_order, dim=-1)


def inner(X: Tensor, Y: Tensor) -> Tensor:
    return (X * Y).sum((-2, -1))


def inner_blocks(X: Sequence[Tensor], Y: Sequence[Tensor]) -> Tensor:
    return sum((inner(A, B) for A, B in zip(X, Y, strict=True)), torch.zeros(()))
