"""Sampled rows of layers that tensor parallelism cuts, made whole.

A process sees some of the input features of a row-parallel layer. All processes that share the layer see the same
tokens, and the probe keeps the same rows on each of them, so that the rows of all, side by side, are those of one
process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from hf_schatten.distributed.pieces import experts_here, gathered_features, is_sharded
from hf_schatten.optim.matrix import Matrix


def whole_rows(sampled: Mapping[str, Tensor], matrices: Iterable[Matrix]) -> dict[str, Tensor]:
    """Return sampled inputs with all features; every process must call it, with the matrices in the same order."""
    whole = dict(sampled)
    done: set[str] = set()
    for matrix in matrices:
        parameter, name = matrix.parameter, matrix.input_name
        if not is_sharded(parameter) or parameter.ndim > 3 or matrix.group["filters"]:
            continue
        if name in whole and name not in done:
            done.add(name)
            side = 0 if matrix.group["transposed"] else 1
            whole[name] = gathered_features(parameter, whole[name], parameter.ndim - 2 + side)
    return whole


def is_computed_here(matrix: Matrix) -> bool:
    """Return whether this process computes with a matrix, and not with other experts of its stack alone."""
    return not matrix.expert or int(matrix.expert) in experts_here(matrix.parameter)
