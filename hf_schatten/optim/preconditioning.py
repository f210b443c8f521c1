"""Element-wise preconditioning by the second moment of the gradient, around the spectral power.

With Adam's second moment V of an (m, n) matrix, averaged with decay β₂ and bias-corrected, its preconditioner is
``D = (√V + ε)^{2e}``, and the direction ``O = D ∘ spectral_power(D ∘ M)``: steepest descent in the Schatten-(p + 1)
norm of ``W / D``. The exponent e is either

``adam``
    ``-1/(2(p + 1))``: p = 1 is Adam, ``M / (√V + ε)``, and p = ∞ is Muon. Beyond Muon (p ≤ -4) it stays 0.
``muadam``
    ``-1/4``: p = 1 is Adam, p = ∞ is MuAdam.

Sources: T. Massena, C. Friedrich and M. Serrurier 2026, "From SGD to Muon: Adaptive Optimization via Schatten-p
Norms"; for MuAdam, A. Veprikov et al. 2025, "Preconditioned Norms: A Unified Framework for Steepest Descent,
Quasi-Newton and Adaptive Methods".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_schatten.exponent import exponent_of
from hf_schatten.linalg.many_matrices import inner_products
from hf_schatten.optim.finite_gradients import FiniteGradients
from hf_schatten.optim.matrix import SKIPPED, STEP, Group, Matrix, State, bias_corrections
from hf_schatten.option_names import Precondition

SECOND_MOMENT = "second_moment"

# Of momenta M (B, m, n) and p (B,): O (B, m, n), and ``⟨M, O⟩`` and ``⟨O, O⟩``, (2, B).
Direction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Directions(NamedTuple):
    """Directions of a stack, and what step rules ask of them."""

    directions: Tensor  # (B, m, n)
    products: Tensor  # ⟨M, O⟩ of what the spectral power takes and what it gives, (B,)
    squares: Tensor  # squared Frobenius norms of the directions, (B,)


class Preconditioner:
    """What momenta are divided by before the spectral power, and its results after it; this one is nothing.

    Attributes:
        rectangles: temporaries of a matrix's shape that it needs while a stack is updated.
        takes_half_precision: whether momenta may come in the dtype of products.
    """

    rectangles = 0
    takes_half_precision = True

    def new_state(self, average: Tensor) -> State:
        """Return the state before the first step, given one of the state's shape, dtype and device."""
        return {}

    def advance(self, group: Group, parameter: Tensor, state: State, gradients: FiniteGradients) -> None:
        """Take the gradient of a parameter into its state, which stays as it is where that is not finite."""

    def directions(self, matrices: Sequence[Matrix], momenta: Tensor, p: Tensor, direction: Direction) -> Directions:
        """Return the directions of a stack, given bias-corrected momenta (B, m, n), which may be overwritten."""
        directions, products = direction(momenta, p)
        return Directions(directions, *products.unbind())


class AdamPreconditioner(Preconditioner):
    """Roots of Adam's second moment: one number for each element, in fp32 4 bytes a parameter.

    Args:
        power: from spectral exponents s (B,) to 2e, the power of ``√V + ε`` that the preconditioner is.
    """

    rectangles = 1
    takes_half_precision = False

    def __init__(self, power: Callable[[Tensor], Tensor]) -> None:
        self.power = power

    def new_state(self, average: Tensor) -> State:  # noqa: D102
        return {SECOND_MOMENT: torch.zeros_like(average)}

    def advance(self, group: Group, parameter: Tensor, state: State, gradients: FiniteGradients) -> None:  # noqa: D102
        squares, beta2 = state[SECOND_MOMENT], group["betas"][1]
        gradient = gradients.gradient(parameter, squares.dtype, 0.0)
        decay = 1 - (1 - beta2) * gradients.keep(parameter)
        squares.mul_(decay).addcmul_(gradient, gradient, value=1 - beta2)

    def directions(  # noqa: D102
        self, matrices: Sequence[Matrix], momenta: Tensor, p: Tensor, direction: Direction
    ) -> Directions:
        divisors = torch.empty_like(momenta)
        for matrix, slot in zip(matrices, divisors, strict=True):
            matrix.stored(slot).copy_(matrix.of(matrix.state[SECOND_MOMENT]))
        for matrix, slot in zip(matrices, divisors, strict=True):
            counters = [matrix.state[STEP]], matrix.state[SKIPPED][None]
            slot.div_(bias_corrections(*counters, matrix.group["betas"][1]).to(momenta.dtype))
            slot.sqrt_().add_(matrix.group["eps"])
        power = self.power(exponent_of(p).to(momenta.dtype))  # (B,)
        preconditioners = divisors.pow_(power[:, None, None])
        directions, (products, _) = direction(momenta.mul_(preconditioners), p)
        found = preconditioners.mul_(directions)
        return Directions(found, products, inner_products(found, found)[1])


def _scaled(s: Tensor) -> Tensor:
    s = s.clamp_min(0.0)
    return -s / (1 + s)


PRECONDITIONERS: dict[Precondition, Preconditioner] = {
    "none": Preconditioner(),
    "adam": AdamPreconditioner(_scaled),
    "muadam": AdamPreconditioner(lambda s: torch.full_like(s, -0.5)),
}
