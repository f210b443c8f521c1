"""One matrix of the optimizer: where it lies in its parameter, and its state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_schatten.linalg.place import Place
from hf_schatten.matrices.layout import LAYOUT, Layout, matrix_name

Group = dict[str, Any]
State = dict[str, Tensor]

# State of a parameter of matrices, by name; that in PER_MATRIX has one row for each of its matrices.
# Every key is a tensor that is created at the first step: sharded checkpoints drop what appears later.
STEP, SKIPPED, MOMENTUM, P = "step", "skipped", "momentum", "p"
STATISTICS, STATISTICS_WEIGHT = "statistics", "statistics_weight"
ABSENCE = "absence"  # the moving average of whether the gradient was zero
PER_MATRIX = P, STATISTICS, STATISTICS_WEIGHT, ABSENCE

# Of the criterion, whose moving averages are state: its curves, and the points of each.
CURVES, NODES = 2, 63


@dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix of a spectral group: its parameter, and where in it the matrix lies."""

    name: str  # the parameter's, followed by the part's where the parameter consists of several matrices
    parameter_name: str
    parameter: Tensor
    index: int  # its number among the parameter's matrices
    group: Group  # the parameter's
    state: State  # the parameter's, empty before the first step

    @property
    def input_name(self) -> str:
        """The name of its inputs, which the parts of a fused projection share."""
        return matrix_name(self.parameter_name, self.expert)

    @property
    def expert(self) -> str:
        """The name of the expert that it belongs to, "" where the parameter has no experts."""
        return self.layout.expert(self.parameter.shape, self.index)

    @property
    def layout(self) -> Layout:
        """How its parameter is read as matrices."""
        return layout_of(self.group)

    @property
    def momentum(self) -> Tensor:
        """The moving average of the gradient, (r, c) as stored."""
        return self.of(self.state[MOMENTUM])

    @property
    def gradient(self) -> Tensor | None:
        """The gradient, (r, c) as stored, or None."""
        return None if self.parameter.grad is None else self.of(self.parameter.grad)

    @property
    def weights(self) -> Tensor:
        """The weights, a view in the shape in which the parameter holds them."""
        return self.layout.part(self.parameter, self.index)

    @cached_property
    def place(self) -> Place:
        """Where it lies in its parameter."""
        return self.layout.place(self.parameter, self.index)

    @cached_property
    def momentum_place(self) -> Place:
        """Where it lies in the moving average, whose strides may be others."""
        return self.layout.place(self.state[MOMENTUM], self.index)

    @property
    def p(self) -> Tensor:
        """The exponent of this matrix, a scalar that may be written to."""
        return self.state[P][self.index]

    @property
    def first_p(self) -> float:
        """The exponent that it starts with."""
        count = len(self.layout.part_names(self.parameter.shape))
        return initial_p(self.group, self.parameter_name, count)[self.index]

    @property
    def statistics(self) -> Tensor:
        """The moving average of the criterion's statistics, (CURVES, NODES); may be written to."""
        return self.state[STATISTICS][self.index]

    @property
    def statistics_weight(self) -> Tensor:
        """The sum of the weights in that moving average, a scalar; may be written to."""
        return self.state[STATISTICS_WEIGHT][self.index]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self._stored_shape
        return (columns, rows) if self.group["transposed"] else (rows, columns)

    @property
    def wide_shape(self) -> tuple[int, int]:
        """The shape with the shorter side first, in which equal matrices and their transposes share a stack."""
        m, n = self.shape
        return min(m, n), max(m, n)

    @property
    def cost(self) -> int:
        """The cost of its update, proportional to the operations of its matrix products: m² n for m <= n."""
        m, n = self.wide_shape
        return m * m * n

    @property
    def learning_rate(self) -> float:
        """The present learning rate of the matrix."""
        return learning_rate(self.group) * self.own_ratio

    @property
    def own_ratio(self) -> float:
        """What multiplies the learning rate of its parameter alone."""
        return float(self.group["lr_ratio_by_parameter"].get(self.parameter_name, 1.0))

    def of(self, tensor: Tensor) -> Tensor:
        """Return this matrix, (r, c) as stored, of a tensor of the parameter's shape."""
        return self.layout.matrix(tensor, self.index)

    def of_expert(self, tensor: Tensor) -> Tensor:
        """Return this matrix, (r, c) as stored.

        Args:
            tensor: of the parameter's shape, but with this matrix's expert alone where there are experts.
        """
        return self.layout.matrix(tensor, self._index_in_expert)

    def place_in_expert(self, tensor: Tensor) -> Tensor:
        """Return where :attr:`weights` would lie in a tensor as of :meth:`of_expert`."""
        return self.layout.part(tensor, self._index_in_expert)

    def stored(self, wide: Tensor) -> Tensor:
        """Return a tensor of :attr:`wide_shape` as (r, c), a view."""
        rows, columns = self._stored_shape
        return wide if rows <= columns else wide.mT

    @property
    def _index_in_expert(self) -> int:
        return self.index % (len(self.group["parts"]) or 1)

    @property
    def _stored_shape(self) -> tuple[int, int]:
        return self.layout.matrix_shape(self.parameter.shape, self.index)


def named_parameters(group: Group) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, parameter) of a group; without names, the position stands in."""
    names = group.get("param_names") or [str(index) for index in range(len(group["params"]))]
    yield from zip(names, group["params"], strict=True)


def learning_rate(group: Group) -> float:
    """Return the present learning rate of the matrices of a group that have no ratio of their own."""
    return float(group["lr"]) * group["lr_ratio"]


def layout_of(group: Mapping[str, Any]) -> Layout:
    """Return how the parameters of a spectral group are read as matrices."""
    return Layout(*(group[name] for name in LAYOUT))


def initial_p(group: Group, name: str, count: int) -> list[float]:
    """Return the p that each of the ``count`` matrices of a parameter of this name starts with.

    Raises:
        ValueError: when their number is not that of the matrices.
    """
    first = group["p_by_parameter"].get(name, group["p"])
    values = list(first) if isinstance(first, Sequence) else [first] * count
    if len(values) != count:
        raise ValueError(f"p={values!r} has {len(values)} values for a parameter of {count} matrices.")
    return values


def state_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's moments: at least fp32."""
    half = parameter.dtype.is_floating_point and parameter.dtype.itemsize < torch.float32.itemsize
    return torch.float32 if half else parameter.dtype


def counter(device: torch.device | str) -> Tensor:
    """Return a zero that counts steps, exactly up to 16 million, whatever the default dtype and device are."""
    return torch.zeros((), dtype=torch.float32, device=device)


def by_device(parameters: Iterable[Tensor]) -> dict[torch.device, list[Tensor]]:
    """Return the parameters of each device."""
    alike: dict[torch.device, list[Tensor]] = {}
    for parameter in parameters:
        alike.setdefault(parameter.device, []).append(parameter)
    return alike


def bias_corrections(
    steps: Sequence[Tensor], skipped: Tensor, decay: float | Tensor, ahead: float | Tensor = 0.0
) -> Tensor:
    """Return the sums of the weights in averages of gradients, (B,) float64. Nothing waits for the device.

    Args:
        steps: the steps of each parameter, B scalars on the host.
        skipped: how many of them were skipped, (B,) on the device of the result.
        decay: of the averages, a number or (B,).
        ahead: how many gradients more they have seen than steps were taken, a number or (B,) on the host.
    """
    taken = torch.stack(list(steps)).double().add_(ahead).to(skipped.device, non_blocking=True) - skipped
    return 1 - decay ** taken.clamp_min(1)
