"""Sampled rows of layers that tensor parallelism cuts, made whole.

A process sees some of the features of a layer that is cut along them: of the outputs of a column-parallel layer, of
the inputs of a row-parallel one. All processes that share the layer see the same tokens, and the probe keeps the same
rows on each of them, so that the rows of all, side by side, are those of one process.
"""

from __future__ import annotations

from collections.abc import Iterable

from hf_schatten.adaptive.probe import Sampled
from hf_schatten.distributed.pieces import experts_here, gathered_features, is_sharded
from hf_schatten.optim.matrix import Matrix


def whole_rows(sampled: Sampled, matrices: Iterable[Matrix]) -> Sampled:
    """Return samples with all features; every process must call it, with the matrices in the same order."""
    inputs, outputs = dict(sampled.inputs), dict(sampled.outputs)
    done: set[tuple[int, str]] = set()
    for matrix in matrices:
        parameter, reads = matrix.parameter, 0 if matrix.group["transposed"] else 1
        if not is_sharded(parameter) or parameter.ndim > 3 or matrix.group["filters"]:
            continue
        sides = (inputs, matrix.input_name, reads), (outputs, matrix.parameter_name, 1 - reads)
        for samples, name, side in sides:
            if name in samples and (side, name) not in done:
                done.add((side, name))
                samples[name] = gathered_features(parameter, samples[name], parameter.ndim - 2 + side)
    return Sampled(inputs, outputs)


def is_computed_here(matrix: Matrix) -> bool:
    """Return whether this process computes with a matrix, and not with other experts of its stack alone."""
    return not matrix.expert or int(matrix.expert) in experts_here(matrix.parameter)
