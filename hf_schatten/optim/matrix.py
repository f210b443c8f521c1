"""One matrix of the optimizer: where it lies in its parameter, and its state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_schatten.adaptive.criterion import CURVES, NODES
from hf_schatten.linalg.coefficient_table import exponent_of
from hf_schatten.matrices.layout import Layout, matrix_name
from hf_schatten.optim.preconditioning import SECOND_MOMENTS

Group = dict[str, Any]
State = dict[str, Tensor]

# State of a parameter of matrices, by name; that in PER_MATRIX has one row for each of its matrices.
# Every key is a tensor that is created at the first step: sharded checkpoints drop what appears later.
STEP, SKIPPED, MOMENTUM, P = "step", "skipped", "momentum", "p"
STATISTICS, STATISTICS_WEIGHT = "statistics", "statistics_weight"
PER_MATRIX = P, STATISTICS, STATISTICS_WEIGHT


def if_usable(usable: Tensor, gradient: Tensor, otherwise: Tensor | float) -> Tensor:
    """Return the gradient, or something else where it is not usable.

    Nothing waits for a device. On a CPU there is nothing to wait for, and the gradient is not copied.

    Args:
        usable: a bool scalar on the gradient's device.
        gradient: may have elements that are not finite where it is not usable.
        otherwise: of the gradient's shape, or a number for all elements.
    """
    if usable.device.type == "cpu" and usable:
        return gradient
    return torch.where(usable, gradient, otherwise)


@dataclass(frozen=True)
class Matrix:
    """One matrix of a spectral group: its parameter, and where in it the matrix lies.

    Attributes:
        name: the parameter's, followed by the part's where the parameter consists of several matrices.
        parameter_name: the name of the parameter.
        parameter: the parameter that the matrix is a part of.
        index: its number among the parameter's matrices.
        group: the parameter's group.
        state: the parameter's state, empty before the first step.
        usable: whether the parameter's gradient is finite, a bool scalar on its device; None outside a step.
        average: (look-ahead) momentum, (r, c) as stored, where the state has a shard of the parameter's; else None.
    """

    name: str
    parameter_name: str
    parameter: Tensor
    index: int
    group: Group
    state: State
    usable: Tensor | None = None
    average: Tensor | None = None

    @property
    def input_name(self) -> str:
        """The name of its inputs, which the parts of a fused projection share."""
        return matrix_name(self.parameter_name, self.expert)

    @property
    def expert(self) -> str:
        """The name of the expert that it belongs to, "" where the parameter has no experts."""
        return layout_of(self.group).expert(self.parameter.shape, self.index)

    @property
    def momentum(self) -> Tensor:
        """The moving average of the gradient, (r, c) as stored."""
        return self._matrix(self.state[MOMENTUM]) if self.average is None else self.average

    @property
    def gradient(self) -> Tensor | None:
        """The gradient, (r, c) as stored, or None."""
        return None if self.parameter.grad is None else self._matrix(self.parameter.grad)

    @property
    def p(self) -> Tensor:
        """The exponent of this matrix, a scalar that may be written to."""
        return self.state[P][self.index]

    @property
    def first_p(self) -> float:
        """The exponent that it starts with."""
        count = len(layout_of(self.group).part_names(self.parameter.shape))
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
        """The shape with the shorter side first, in which equal matrices and their transposes share a batch."""
        m, n = self.shape
        return min(m, n), max(m, n)

    @property
    def learning_rate(self) -> float:
        """The present learning rate of the matrix."""
        return float(self.group["lr"]) * self.group["lr_ratio"]

    def weight_norm(self) -> Tensor:
        """Return the Frobenius norm of the weights, a scalar."""
        return torch.linalg.vector_norm(self._part(self.parameter), dtype=self.momentum.dtype)

    def look_ahead(self, out: Tensor | None = None) -> Tensor:
        """Return what the moving average would be if the gradient came once more, (r, c) as stored.

        A gradient that is not usable leaves it as it is.
        """
        gradient = self.gradient.to(self.momentum.dtype)  # type: ignore[union-attr]
        if self.usable is not None:
            gradient = if_usable(self.usable, gradient, self.momentum)
        return torch.lerp(self.momentum, gradient, 1 - self.group["momentum"], out=out)

    def write_momentum(self, wide: Tensor) -> None:
        """Write the (look-ahead) momentum into ``wide``, still with the bias of a start at zero."""
        if self.group["nesterov"] and self.average is None:
            self.look_ahead(out=self._stored(wide))
        else:
            self._stored(wide).copy_(self.momentum)

    def write_second_moment(self, wide: Tensor) -> None:
        """Write the second moment into ``wide``, still with the bias of a start at zero."""
        second_moment = SECOND_MOMENTS[self.group["precondition"]]
        layout, shape = layout_of(self.group), self.parameter.shape
        second_moment.write(self.state, layout, shape, self.index, out=self._stored(wide))

    def apply(self, wide: Tensor, factor: Tensor, keep: Tensor) -> None:
        """Decay the weights and take the step ``factor * wide``.

        Args:
            wide: of :attr:`wide_shape`.
            factor: a scalar; 0 where the gradient is not usable.
            keep: 1, or 0 where the gradient is not usable: a scalar.
        """
        weights = self._part(self.parameter)
        if self.group["weight_decay"]:
            weights.addcmul_(weights, keep, value=-self.learning_rate * self.group["weight_decay"])
        weights.addcmul_(self._stored(wide).reshape(weights.shape), factor, value=-self.learning_rate)

    def of_expert(self, tensor: Tensor) -> Tensor:
        """Return this matrix, (r, c) as stored.

        Args:
            tensor: of the parameter's shape, but with this matrix' expert alone where there are experts.
        """
        return layout_of(self.group).matrix(tensor, self._section)

    def write_step(self, wide: Tensor, whole: Tensor) -> None:
        """Write the step of this matrix to its place in a tensor as of :meth:`of_expert`."""
        place = layout_of(self.group).part(whole, self._section)
        place.copy_(self._stored(wide).reshape(place.shape))

    def apply_to_shard(self, weights: Tensor, step: Tensor) -> None:
        """Decay this process' rows of the parameter and take their step, unless the gradient is not usable."""
        assert self.usable is not None
        keep = self.usable.to(weights.dtype)
        weights.addcmul_(weights, keep, value=-self.learning_rate * self.group["weight_decay"])
        weights.addcmul_(step, keep, value=-self.learning_rate)

    @property
    def _section(self) -> int:
        """Its number among the matrices of its expert."""
        return self.index % (len(self.group["sections"]) or 1)

    @property
    def _stored_shape(self) -> tuple[int, int]:
        return layout_of(self.group).matrix_shape(self.parameter.shape, self.index)

    def _part(self, tensor: Tensor) -> Tensor:
        return layout_of(self.group).part(tensor, self.index)

    def _matrix(self, tensor: Tensor) -> Tensor:
        return layout_of(self.group).matrix(tensor, self.index)

    def _stored(self, wide: Tensor) -> Tensor:
        rows, columns = self._stored_shape
        return wide if rows <= columns else wide.mT


def named_parameters(group: Group) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, parameter) of a group; without names, the position stands in."""
    names = group.get("param_names") or [str(index) for index in range(len(group["params"]))]
    yield from zip(names, group["params"], strict=True)


def layout_of(group: Mapping[str, Any]) -> Layout:
    """Return how the parameters of a spectral group are read as matrices."""
    return Layout(group["transposed"], group["sections"], group["blocks"])


def initial_p(group: Group, name: str, count: int) -> list[float]:
    """Return the p that each of the ``count`` matrices of a parameter of this name starts with.

    Raises:
        ValueError: when one is out of range, or belongs to no norm where the step is an oracle's, or their number is
            not that of the matrices.
    """
    first = group["p_by_parameter"].get(name, group["p"])
    values = list(first) if isinstance(first, Sequence) else [first] * count
    for p in values:
        if exponent_of(p) < 0 and group["step_rule"] != "pinned":
            raise ValueError(
                f"p={p!r} is not allowed with step_rule={group['step_rule']!r}: the order p + 1 of its norm is at "
                "least 2. Use p of at least 1, or step_rule='pinned'."
            )
    if len(values) != count:
        raise ValueError(f"p={values!r} has {len(values)} values for a parameter of {count} matrices.")
    return values


def state_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's moments: at least fp32."""
    return torch.promote_types(parameter.dtype, torch.float32)


def new_matrix_state(name: str, parameter: Tensor, group: Group) -> State:
    """Return the state of a spectral group's parameter, by name, before its first step."""
    layout = layout_of(group)
    count = len(layout.part_names(parameter.shape))
    second_moment = SECOND_MOMENTS.get(group["precondition"])
    average = torch.zeros_like(parameter, dtype=state_dtype(parameter))

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=parameter.device)

    return {
        STEP: torch.tensor(0.0),  # on the host, as in torch.optim: reading it synchronises nothing
        SKIPPED: zeros(),
        MOMENTUM: average,
        **(second_moment.new_state(average, layout) if second_moment else {}),
        P: torch.tensor(initial_p(group, name, count), dtype=torch.float32, device=parameter.device),
        STATISTICS: zeros(count, CURVES, NODES),
        STATISTICS_WEIGHT: zeros(count),
    }
