"""Element-wise preconditioning by the second moment of the gradient, around the spectral power.

With the second moment V of an (m, n) matrix, averaged with decay β₂ and bias-corrected, its preconditioner is
``D = (√V + ε)^{2e}``, and the update ``O = D ∘ spectral_power(D ∘ M)``: steepest descent in the Schatten-(p + 1) norm
of ``W / D``. The exponent e is either

``scaled``
    ``-1/(2(p + 1))``: p = 1 is Adam, ``M / (√V + ε)``, and p = ∞ is Muon. Beyond Muon (p ≤ -4) it stays 0.
``fixed``
    ``-1/4``: p = 1 is Adam, p = ∞ is MuAdam.

Sources: T. Massena, C. Friedrich and M. Serrurier 2026, "From SGD to Muon: Adaptive Optimization via Schatten-p
Norms"; for MuAdam, A. Veprikov et al. 2025, "Preconditioned Norms: A Unified Framework for Steepest Descent,
Quasi-Newton and Adaptive Methods"; for the factors, N. Shazeer and M. Stern 2018, "Adafactor: Adaptive Learning Rates
with Sublinear Memory Cost", algorithm 1, as in Y. Luo et al. 2023, "CAME: Confidence-guided Adaptive Memory Efficient
Optimization".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hf_schatten.matrices.layout import Layout
from hf_schatten.options import Precondition, PreconditionExponent

State = dict[str, Tensor]

SECOND_MOMENT = "second_moment"
SECOND_MOMENT_ROWS, SECOND_MOMENT_COLUMNS = "second_moment_rows", "second_moment_columns"


class SecondMoment(Protocol):
    """How the second moments of a parameter's matrices are kept in its state."""

    def new_state(self, average: Tensor, layout: Layout) -> State:
        """Return the state before the first step: zeros.

        Args:
            average: of the parameter's shape, and of the dtype and device of the state.
            layout: how the parameter is read as matrices.
        """

    def advance(self, state: State, gradient: Tensor, layout: Layout, beta2: float, usable: Tensor) -> None:
        """Average the square of a gradient of the parameter's shape into the state.

        Args:
            state: of the parameter.
            gradient: of its shape.
            layout: how the parameter is read as matrices.
            beta2: decay of the average.
            usable: whether the gradient is finite, a bool scalar; the state stays as it is where not.
        """

    def write(self, state: State, layout: Layout, shape: Sequence[int], index: int, out: Tensor) -> None:
        """Write the second moment of one matrix, not bias-corrected.

        Args:
            state: of the parameter.
            layout: how the parameter is read as matrices.
            shape: the parameter's.
            index: number of the matrix.
            out: (r, c), the matrix as stored.
        """


class FullSecondMoment:
    """Adam's: one number for each element, in fp32 4 bytes a parameter."""

    def new_state(self, average: Tensor, layout: Layout) -> State:  # noqa: D102 - the protocol's
        return {SECOND_MOMENT: torch.zeros_like(average)}

    def advance(  # noqa: D102
        self, state: State, gradient: Tensor, layout: Layout, beta2: float, usable: Tensor
    ) -> None:
        gradient = torch.where(usable, gradient, 0.0)
        state[SECOND_MOMENT].mul_(_decay(beta2, usable)).addcmul_(gradient, gradient, value=1 - beta2)

    def write(  # noqa: D102
        self, state: State, layout: Layout, shape: Sequence[int], index: int, out: Tensor
    ) -> None:
        out.copy_(layout.matrix(state[SECOND_MOMENT], index))


class FactoredSecondMoment:
    """Adafactor's: means R (r,) of each row and C (c,) of each column, ``V ≈ R C / mean(R)``.

    In fp32 4 (r + c) bytes for an (r, c) matrix; filters (out, in, h, w) are (out, in · h · w). The factors of all
    matrices of a parameter follow one another, in the order of their numbers. Exact where V has rank one.
    """

    def new_state(self, average: Tensor, layout: Layout) -> State:  # noqa: D102
        experts = average.shape[0] if average.ndim == 3 else 1
        rows, columns = _sizes(layout, average.shape)
        return {
            SECOND_MOMENT_ROWS: average.new_zeros(experts * sum(rows)),
            SECOND_MOMENT_COLUMNS: average.new_zeros(experts * sum(columns)),
        }

    def advance(  # noqa: D102
        self, state: State, gradient: Tensor, layout: Layout, beta2: float, usable: Tensor
    ) -> None:
        gradient = torch.where(usable, gradient, 0.0)
        for index in range(len(layout.part_names(gradient.shape))):
            G = layout.matrix(gradient, index)  # (r, c)
            for means, dim in zip(_factors(state, layout, gradient.shape, index), (1, 0), strict=True):
                mean_squares = torch.linalg.vector_norm(G, dim=dim).square_().div_(G.shape[dim])
                means.mul_(_decay(beta2, usable)).add_(mean_squares, alpha=1 - beta2)

    def write(  # noqa: D102
        self, state: State, layout: Layout, shape: Sequence[int], index: int, out: Tensor
    ) -> None:
        row_means, column_means = _factors(state, layout, shape, index)
        mean = row_means.mean()
        relative = torch.where(mean > 0, row_means / mean, row_means)  # first, for R C may underflow
        torch.mul(relative[:, None], column_means, out=out)


SECOND_MOMENTS: dict[Precondition, SecondMoment] = {"adam": FullSecondMoment(), "adafactor": FactoredSecondMoment()}


def root_exponent(rule: PreconditionExponent, s: Tensor) -> Tensor:
    """Return 2e, the power of ``√V + ε`` that the preconditioner is.

    Args:
        rule: of the exponent.
        s: spectral exponents 1/p, any shape.

    Returns:
        Tensor of the shape, dtype and device of ``s``: in terms of s, ``-s/(1 + s)`` where it is scaled.
    """
    return _ROOT_EXPONENTS[rule](s)


def _decay(beta2: float, usable: Tensor) -> Tensor:
    """Return β₂, or 1 where the gradient is not usable, as a float64 scalar."""
    return 1 - (1 - beta2) * usable.double()


def _scaled(s: Tensor) -> Tensor:
    s = s.clamp_min(0.0)
    return -s / (1 + s)


_ROOT_EXPONENTS: dict[PreconditionExponent, Callable[[Tensor], Tensor]] = {
    "scaled": _scaled,
    "fixed": lambda s: torch.full_like(s, -0.5),
}


def _sizes(layout: Layout, shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the numbers of rows and of columns, as stored, of each matrix of one expert."""
    shapes = [layout.matrix_shape(shape, index) for index in range(len(layout.sections) or 1)]
    return [r for r, _ in shapes], [c for _, c in shapes]


def _factors(state: State, layout: Layout, shape: Sequence[int], index: int) -> tuple[Tensor, Tensor]:
    """Return views of the row means (r,) and column means (c,) of one matrix."""
    rows, columns = _sizes(layout, shape)
    return _slice(state[SECOND_MOMENT_ROWS], rows, index), _slice(state[SECOND_MOMENT_COLUMNS], columns, index)


def _slice(means: Tensor, sizes: Sequence[int], index: int) -> Tensor:
    expert, section = divmod(index, len(sizes))
    return means.narrow(0, expert * sum(sizes) + sum(sizes[:section]), sizes[section])
