"""Stable rank and relative size of the updates of a due step, as logs show them.

Both are quantities of F. L. Cesista 2025, "Steepest Descent Under Schatten-p Norms".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hf_schatten.distributed.pieces import local
from hf_schatten.distributed.processes import mean_over_processes
from hf_schatten.distributed.sharded import on_owners
from hf_schatten.linalg.many_matrices import inner_products
from hf_schatten.optim.matrix import Matrix, state_dtype

_POWER_ITERATIONS = 20


class UpdateSizes:
    """What processes know of one step: each of the updates that it computes and the weights that it owns."""

    def __init__(self) -> None:
        self._norms: dict[str, Tensor] = {}  # of the weights before the update
        self._updates: dict[str, tuple[Tensor, Tensor]] = {}  # stable rank, and Frobenius norm times learning rate

    def begin(self, matrices: Iterable[Matrix]) -> None:
        """Take the norms of the weights, before the update; every process must call it."""
        self._updates.clear()
        self._norms = {
            matrix.name: torch.linalg.vector_norm(W, dtype=state_dtype(matrix.parameter))
            for matrix, W in on_owners(matrices, lambda matrix: matrix.parameter)
        }

    def observe(self, matrices: Sequence[Matrix], directions: Tensor, factors: Tensor) -> None:
        """Take the updates of a stack: ``factors`` (B,) times ``directions`` (B, m, n), m <= n."""
        squared = inner_products(directions, directions)[1]
        ranks = squared / _spectral_norms(directions).square()
        rates = torch.tensor([matrix.learning_rate for matrix in matrices], dtype=factors.dtype)
        sizes = squared.sqrt() * factors * rates.to(factors.device, non_blocking=True)
        names = [matrix.name for matrix in matrices]
        self._updates |= dict(zip(names, zip(ranks.unbind(), sizes.unbind(), strict=True), strict=True))

    def end(self, matrices: Sequence[Matrix], alone: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """Return stable rank ‖ΔW‖²_F / ‖ΔW‖²₂ and relative size ‖ΔW‖_F / ‖W‖_F, scalars, by the matrix's name.

        Those of matrices that no process has updated are missing. Every process must call it.

        Args:
            matrices: in the same order on every process.
            alone: whether this process trains for itself.
        """
        if alone:
            norms = [self._norms[name] for name in self._updates]
            sizes = [size for _, size in self._updates.values()]
            relative = torch._foreach_div(sizes, norms) if sizes else []
            return {name: (self._updates[name][0], each) for name, each in zip(self._updates, relative, strict=True)}
        columns = (
            {name: rank for name, (rank, _) in self._updates.items()},
            {name: size for name, (_, size) in self._updates.items()},
            self._norms,
        )
        names = [matrix.name for matrix in matrices]
        device = local(matrices[0].parameter).device
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        values = torch.stack([column.get(name, nothing).double() for column in columns for name in names])
        known = torch.tensor([name in column for column in columns for name in names], device=device)
        means, known = mean_over_processes(values[:, None], known)
        ranks, sizes, norms = means.view(len(columns), -1)
        return {
            name: (ranks[number], sizes[number] / norms[number]) for number, name in enumerate(names) if known[number]
        }


def _spectral_norms(X: Tensor) -> Tensor:
    """Return the largest singular value of each matrix (B, m, n) from below, to a few per cent: float32 at least."""
    # Not ones: beside a LayerNorm every row of a gradient sums to zero, and they would leave rounding to start from.
    start = torch.arange(X.shape[2], device=X.device, dtype=torch.float32).cos().to(X.dtype)
    # Rows and not columns: batched products of a matrix and a column are slow.
    v = start.expand(X.shape[0], 1, -1)
    for _ in range(_POWER_ITERATIONS):
        v = (v @ X.mT) @ X
        v = v / torch.linalg.vector_norm(v, dim=2, keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
    return torch.linalg.vector_norm((v @ X.mT).to(state_dtype(X)), dim=(1, 2))
