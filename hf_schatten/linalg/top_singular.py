"""The direction ``u₁ v₁ᵀ`` of the largest singular value, by power iteration: the steepest descent of order 1."""

import torch
from torch import Tensor


def top_singular_direction(X: Tensor, *, squarings: int = 6) -> Tensor:
    """The rank-1 matrix ``u₁ v₁ᵀ``, i.e. the target ``1[σ = σ_max]`` ("Interpolating Between SGD and Muon").

    No polynomial of Newton–Schulz's degree separates σ_max from its neighbour. Power iteration does, here by
    repeated squaring of the smaller Gram matrix: ``(X Xᵀ)^{2^squarings}`` tends to a multiple of ``u₁ u₁ᵀ``,
    whose column with the largest diagonal element is the start of a last step. It needs no random start and is
    deterministic.

    Args:
        X: Matrices, shape (..., m, n), float32 or float64.
        squarings: Matrix products of the smaller side; the neighbour is suppressed by ``(σ₂/σ₁)^{2^(squarings + 1)}``,
            1/600 at a gap of 5 % by default.

    Returns:
        Tensor of X's shape and dtype, of Frobenius norm 1; zero for a zero matrix.
    """
    if X.shape[-2] > X.shape[-1]:
        return top_singular_direction(X.mT, squarings=squarings).mT
    tiny = torch.finfo(X.dtype).tiny
    X = X / X.abs().amax((-2, -1), keepdim=True).clamp(tiny)
    power = X @ X.mT  # (..., m, m)
    for _ in range(squarings):
        power = power / torch.linalg.matrix_norm(power, keepdim=True).clamp(tiny)
        power = power @ power
    largest = power.diagonal(dim1=-2, dim2=-1).argmax(-1)
    u = power.take_along_dim(largest[..., None, None], -1)  # (..., m, 1)
    v = _normalised(X.mT @ _normalised(u))  # (..., n, 1)
    return _normalised(X @ v) @ v.mT


def _normalised(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp(torch.finfo(x.dtype).tiny)
