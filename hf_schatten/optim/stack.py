"""The update of a batch of matrices of one shape: its directions, and how far they go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_schatten.optim.coupling import WeightFunction, dual_norms, lengths_alone, lengths_coupled, unit_factors
from hf_schatten.optim.matrix import SKIPPED, STEP, Matrix
from hf_schatten.optim.preconditioning import root_exponent
from hf_schatten.optim.scaling import OwnNorms, update_norm

Direction = Callable[[Tensor, Tensor], Tensor]

# What the matrices of one batch have in common, besides shape, dtype and device.
COMMON_OPTIONS = "step_rule", "scale", "precondition", "precondition_exponent"

# Temporaries of a matrix (m, n), m <= n, while its batch is updated: momentum, normalised momentum, iterate, product
# and weighted sum; Gram matrices and polynomials of them. A preconditioner is one rectangle more.
_WORKSPACE_RECTANGLES, _WORKSPACE_SQUARES = 5, 4


class Update(NamedTuple):
    """The update of one batch before its length is known.

    Attributes:
        batch: matrices of one shape or its transpose, B of them.
        directions: (B, m, n), of any length.
        exponents: spectral exponents s, (B,).
        products: ``⟨M, O⟩`` (B,) of momenta and directions where the length of the step depends on them, else None.
    """

    batch: list[Matrix]
    directions: Tensor
    exponents: Tensor
    products: Tensor | None

    @classmethod
    def of(cls, batch: list[Matrix], direction: Direction, *, powers: bool = True) -> Update:
        """Return the update of a batch: one batched direction, each matrix with its own p.

        Args:
            batch: from :func:`batches`.
            direction: takes momenta (B, m, n) and p (B,); returns (B, m, n).
            powers: whether directions are spectral powers, which have a Schatten norm that their p asks for.
        """
        momenta = batch[0].momentum.new_empty(len(batch), *batch[0].wide_shape)
        for matrix, slot in zip(batch, momenta, strict=True):
            matrix.write_momentum(slot)
        # The bias of a look-ahead is that of one step more.
        momenta.div_(_bias_corrections(batch, momenta, [(m.group["momentum"], m.group["nesterov"]) for m in batch]))
        p = torch.stack([matrix.p for matrix in batch])  # (B,)
        preconditioners = _preconditioners(batch, momenta, p)  # (B, m, n) or None
        if preconditioners is not None:
            momenta.mul_(preconditioners)
        directions = direction(momenta, p)  # (B, m, n)
        products = None
        if batch[0].group["step_rule"] != "pinned" or (
            batch[0].group["scale"] == "schatten" and powers and preconditioners is None
        ):
            products = torch.linalg.vecdot(momenta.flatten(1), directions.flatten(1))  # (B,)
        if preconditioners is not None:
            directions = preconditioners.mul_(directions)
        return cls(batch, directions, p.reciprocal().to(momenta.dtype), products)

    def dual_norms(self) -> Tensor:
        """Return the dual norms of the momenta, (B,)."""
        return dual_norms(self.products, self.exponents)  # type: ignore[arg-type]

    def factors(self, lengths: Tensor) -> Tensor:
        """Return what the directions are multiplied by to have these lengths in their norms, both (B,)."""
        dual = self.dual_norms()
        return lengths.to(dual) * unit_factors(dual, self.exponents)

    def apply(self, factors: Tensor) -> None:
        """Decay the weights and step by the directions times ``factors`` (B,), where the gradients are usable."""
        usable = torch.stack([matrix.usable for matrix in self.batch])  # type: ignore[misc] # known within a step
        keeps = usable.to(factors.dtype)
        columns = (factors * keeps).unbind(), keeps.unbind()
        for matrix, direction, factor, keep in zip(self.batch, self.directions, *columns, strict=True):
            matrix.apply(direction, factor, keep)


def batches(matrices: Iterable[Matrix], workspace_mib: int) -> Iterator[list[Matrix]]:
    """Yield batches of one shape (or its transpose), dtype, device and kind that stay within the workspace."""
    alike: dict[Any, list[Matrix]] = {}
    for matrix in matrices:
        momentum = matrix.momentum
        kind = tuple(matrix.group[option] for option in COMMON_OPTIONS)
        alike.setdefault((matrix.wide_shape, momentum.dtype, momentum.device, kind), []).append(matrix)
    for ((m, n), dtype, *_), batch in alike.items():
        rectangles = _WORKSPACE_RECTANGLES + (batch[0].group["precondition"] != "none")
        needed = (rectangles * m * n + _WORKSPACE_SQUARES * m * m) * dtype.itemsize
        size = max(1, (workspace_mib << 20) // needed)
        yield from (batch[start : start + size] for start in range(0, len(batch), size))


def factors_alone(update: Update) -> Tensor:
    """Return what the directions are multiplied by, (B,), where every matrix is for itself."""
    rule = update.batch[0].group["step_rule"]
    if rule != "pinned":
        return update.factors(lengths_alone(rule, update.dual_norms()))
    norms = torch.linalg.matrix_norm(update.directions)  # (B,)
    return torch.where(norms > 0, _scaled_norms(update, norms) / norms, 0.0)


def _scaled_norms(update: Update, norms: Tensor) -> Tensor:
    """Return the Frobenius norms that directions of these norms are scaled to, both (B,)."""

    def scaled(kind: Any, s: Tensor, *own: Tensor) -> Tensor:
        rule, (m, n), beta1, lr_ratio = kind
        return update_norm(rule, m, n, s, OwnNorms(*own), beta1=beta1, lr_ratio=lr_ratio)

    groups = [(matrix.shape, matrix.group) for matrix in update.batch]
    kinds = [(group["scale"], shape, group["betas"][0], group["lr_ratio"]) for shape, group in groups]
    columns = [update.exponents, norms]
    if update.products is not None:
        columns.append(update.dual_norms() ** update.exponents)
    return _by_kind(scaled, kinds, columns)


def _bias_corrections(batch: list[Matrix], like: Tensor, averages: Sequence[tuple[float, bool]]) -> Tensor:
    """Return what averages that began at zero are divided by, (B, 1, 1).

    Args:
        batch: the matrices.
        like: has the dtype.
        averages: decay of each average, and whether it has seen one gradient more than steps were taken.
    """
    kinds = [(decay, m.state[STEP].item() + ahead) for m, (decay, ahead) in zip(batch, averages, strict=True)]

    def correction(kind: tuple[float, float], skipped: Tensor) -> Tensor:
        decay, steps = kind
        return 1 - decay ** (steps - skipped).clamp_min(1)

    skipped = torch.stack([matrix.state[SKIPPED] for matrix in batch])  # (B,) float64
    return _by_kind(correction, kinds, [skipped]).to(like.dtype)[:, None, None]


def _by_kind(function: Callable[..., Tensor], kinds: Sequence[Any], columns: Sequence[Tensor]) -> Tensor:
    """Compute a number for each matrix, those of one kind together; no index travels to the device, nothing waits.

    Args:
        function: from a kind and columns (k,) to numbers (k,).
        kinds: of the B matrices.
        columns: (B,) each.
    """
    numbers: dict[Any, list[int]] = {}
    for number, kind in enumerate(kinds):
        numbers.setdefault(kind, []).append(number)
    if len(numbers) == 1:
        return function(kinds[0], *columns)
    found = dict(
        pair
        for kind, own in numbers.items()
        for pair in zip(
            own, function(kind, *(torch.stack([column[i] for i in own]) for column in columns)), strict=True
        )
    )
    return torch.stack([found[number] for number in range(len(kinds))])


def lengths_together(matrices: Sequence[Matrix], duals: Tensor, order: float, weight_of: WeightFunction) -> Tensor:
    """Return how far all matrices that take a step together go, each in its own norm.

    Args:
        matrices: all of them, N of one step rule.
        duals: dual norms of their momenta, (N,).
        order: of the norm of all steps, in [1, inf].
        weight_of: weight of a matrix in that norm.

    Returns:
        (N,), for :meth:`Update.factors`.

    Raises:
        ValueError: when a weight is not above 0.
    """
    weights = torch.tensor([_weight(matrix, weight_of) for matrix in matrices], dtype=duals.dtype)
    weights = weights.to(duals.device, non_blocking=True)
    return lengths_coupled(matrices[0].group["step_rule"], duals, order, weights)


def _weight(matrix: Matrix, weight_of: WeightFunction) -> float:
    weight = weight_of(matrix.name, matrix.shape)
    if not 0 < weight < math.inf:
        raise ValueError(f"coupling_weights gives {matrix.name!r} the weight {weight!r}: return a number above 0.")
    return weight


def _preconditioners(batch: list[Matrix], like: Tensor, p: Tensor) -> Tensor | None:
    """Return the preconditioners (B, m, n) of a batch, None where it has none."""
    if batch[0].group["precondition"] == "none":
        return None
    preconditioners = torch.empty_like(like)
    for matrix, slot in zip(batch, preconditioners, strict=True):
        matrix.write_second_moment(slot)
    decays = [(matrix.group["betas"][1], False) for matrix in batch]
    preconditioners.div_(_bias_corrections(batch, like, decays)).sqrt_()
    for matrix, slot in zip(batch, preconditioners, strict=True):
        slot.add_(matrix.group["eps"])
    exponents = root_exponent(batch[0].group["precondition_exponent"], p.reciprocal().to(like.dtype))  # (B,)
    return preconditioners.pow_(exponents[:, None, None])
