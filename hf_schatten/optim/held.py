"""What the groups of an optimizer hold: parameters, or the flat partitions that DeepSpeed ZeRO has made of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_schatten.distributed.pieces import Partitioned
from hf_schatten.distributed.zero import Fragment, is_partitioned, partitions_of, pieces_of_partitions
from hf_schatten.matrices.engines import UnsupportedEngineError
from hf_schatten.optim.adamw import AVERAGE, SQUARES
from hf_schatten.optim.matrix import MOMENTUM, PER_MATRIX, Group, State, layout_of, named_parameters
from hf_schatten.optim.plan import Planner
from hf_schatten.optim.policy import Optimized, Policy
from hf_schatten.optim.saved_state import CheckpointError, Loading, present_group, require_own_state
from hf_schatten.optim.state import new_state, require_matrix


class Holding(Protocol):
    """An optimizer as it is seen here."""

    param_groups: list[dict[str, Any]]
    state: Any


_WHOLE = MOMENTUM, AVERAGE, SQUARES  # state of the size of a parameter


class Parameters:
    """Groups that hold the parameters themselves, all of which each call of ``step`` updates.

    Attributes:
        states: of each parameter.
        planner: of this call.
    """

    loading = Loading

    def __init__(self, optimizer: Holding, new_planner: Callable[[], Planner]) -> None:
        self._optimizer = optimizer
        self._every = optimizer.param_groups
        self.planner = new_planner()

    @property
    def states(self) -> Any:
        """The state of each parameter."""
        return self._optimizer.state

    @property
    def every(self) -> list[Group]:
        """All groups of the optimizer: stages 1 and 2 of DeepSpeed ZeRO show one at a time while they step it."""
        if len(self._optimizer.param_groups) >= len(self._every):
            self._every = self._optimizer.param_groups
        return self._every

    @property
    def groups(self) -> list[Group]:
        """All groups, of parameters."""
        return self._optimizer.param_groups

    def begin(self) -> list[Group]:
        """Begin a call of ``step``, and return the groups that it updates."""
        return self.groups

    def create_state(self, groups: Iterable[Group], coupling_order: float | None) -> None:
        """Create the state of every parameter that has none: sharded checkpoints are loaded into what exists."""
        for group in groups:
            for name, parameter in named_parameters(group):
                if parameter not in self.states:
                    if group["spectral"]:
                        require_matrix(name, parameter, group, coupling_order)
                    self.states[parameter] = new_state(name, parameter, group)

    def before_update(self, policy: Policy, optimizer: Optimized) -> None:
        """Let the policy change p, once in a training step."""
        policy.before_update(optimizer)

    def end(self, policy: Policy | None, optimizer: Optimized) -> None:
        """End a call of ``step``: a policy, if any, prepares the next training step, once in a training step."""
        if policy is not None:
            policy.after_update(optimizer)


class Partitions(Parameters):
    """Groups that hold partitions, each of which a call of its own updates.

    The state of a partition is one vector of each kind of its size, and the numbers of its parameters and matrices,
    which every process has. So DeepSpeed's checkpoints hold all of it. Parameters and their states are views.

    Args:
        optimizer: whose groups these are.
        every: all of them.
        new_planner: makes the planner of a partition.
        parameter_of: finds a parameter of the model by its name.

    Raises:
        UnsupportedEngineError: when another engine has made them.
    """

    def __init__(
        self,
        optimizer: Holding,
        every: list[Group],
        new_planner: Callable[[], Planner],
        parameter_of: Callable[[str], Any] | None,
    ) -> None:
        self._optimizer = optimizer
        self._every = every
        if parameter_of is None or not all("param_names" in group for group in every):
            raise UnsupportedEngineError(
                "The training engine has replaced the matrices by flat tensors, and SchattenP does not know whose "
                "elements they hold: make it by hf_schatten.create_schatten_optimizer(model), which knows the model."
            )
        names = [group["param_names"] for group in every]
        self._partitions = partitions_of(every, [[parameter_of(name) for name in of_group] for of_group in names])
        self._views: list[Group] = []
        self._states: dict[Tensor, State] = {}
        self._planners = [new_planner() for _ in self._partitions]
        for partition, pieces in zip(self._partitions, pieces_of_partitions(self._partitions), strict=True):
            self._views.append(
                {
                    "param_names": [names[partition.group][fragment.number] for fragment in partition.fragments],
                    "params": [
                        Partitioned(fragment.shape, _piece(partition.flat, fragment), of_fragment)
                        for fragment, of_fragment in zip(partition.fragments, pieces, strict=True)
                    ],
                }
            )
        self._bound: dict[int, list[Tensor]] = {}
        self._present = [0]
        self._checked = False
        self._coupling_order: float | None = None

    @property
    def planner(self) -> Planner:  # type: ignore[override]
        """The planner of the partitions that this call updates."""
        return self._planners[self._present[0]]

    @property
    def states(self) -> Mapping[Tensor, State]:
        """The state of each parameter that has one."""
        self._bind()
        return self._states

    @property
    def groups(self) -> list[Group]:
        """All partitions as groups of their parameters, with what their groups say now."""
        every = self.every
        for partition, view in zip(self._partitions, self._views, strict=True):
            group = every[partition.group]
            view.update({key: value for key, value in group.items() if key not in ("params", "param_names")})
        return self._views

    def begin(self) -> list[Group]:
        """Begin a call of ``step``, and return the partitions that it updates, with their gradients.

        Raises:
            UnsupportedEngineError: when DeepSpeed steps tensors that it did not make of this model.
        """
        called = {id(flat) for group in self._optimizer.param_groups for flat in group["params"]}
        self._present = [number for number, each in enumerate(self._partitions) if id(each.flat) in called]
        if not self._present:
            raise UnsupportedEngineError(
                "DeepSpeed steps tensors that it did not make of this model: make a new optimizer for a new engine."
            )
        if not self._checked:  # a state that is loaded comes before the weights
            for partition in self._partitions:
                partition.check()
            self._checked = True
        groups = self.groups
        for number in self._present:
            partition, view = self._partitions[number], groups[number]
            gradient = partition.flat.grad
            for fragment, parameter in zip(partition.fragments, view["params"], strict=True):
                parameter.piece = _piece(partition.flat, fragment)
                parameter.grad = None if gradient is None else parameter.of(_piece(gradient, fragment))
        return [groups[number] for number in self._present]

    def create_state(self, groups: Iterable[Group], coupling_order: float | None) -> None:
        """Create the state of those of the groups that have none."""
        self._coupling_order = coupling_order
        for number, view in enumerate(self._views):
            flat = self._partitions[number].flat
            created = self._optimizer.state.get(flat)  # DeepSpeed makes an empty one when it looks
            if created or not any(view is group for group in groups):
                continue
            for name, parameter in named_parameters(view) if view["spectral"] else ():
                require_matrix(name, parameter, view, coupling_order)
            self._optimizer.state[flat] = self._joined_state(number)

    def before_update(self, policy: Policy, optimizer: Optimized) -> None:
        """Let the policy see all gradients before the first call of a training step: those to come, unclipped."""
        if self._present[0]:
            return
        others = [number for number in range(len(self._partitions)) if number not in self._present]
        self.create_state(self._views, self._coupling_order)
        for number in others:
            gradients = self._partitions[number].reduced()
            for fragment, parameter, gradient in zip(
                self._partitions[number].fragments, self._views[number]["params"], gradients, strict=True
            ):
                found = parameter.piece.new_empty(0) if gradient is None else gradient[: fragment.numel]
                assert found.numel() == fragment.numel, "DeepSpeed keeps gradients elsewhere"
                parameter.grad = parameter.of(found)
        super().before_update(policy, optimizer)
        for number in others:
            for parameter in self._views[number]["params"]:
                parameter.grad = None

    def end(self, policy: Policy | None, optimizer: Optimized) -> None:
        """End a call of ``step``: after the last of a training step, a policy prepares the next one."""
        for number in self._present:
            for parameter in self._views[number]["params"]:
                parameter.grad = None
        if self._present[-1] == len(self._partitions) - 1:
            super().end(policy, optimizer)

    def _joined_state(self, number: int) -> State:
        """Return the new state of a partition."""
        flat, view = self._partitions[number].flat, self.groups[number]
        none = flat.detach()[:0]
        names, parameters = view["param_names"], view["params"]
        states = [new_state(name, each.of(none), view) for name, each in zip(names, parameters, strict=True)]
        joined: State = {}
        for key, first in states[0].items():
            each = [state[key] for state in states]
            if key in _WHOLE:
                joined[key] = torch.zeros_like(flat, dtype=first.dtype, requires_grad=False)
            else:
                joined[key] = torch.cat(each) if key in PER_MATRIX else torch.stack(each)
        return joined

    def loading(self, present: Sequence[Group], defaults: Collection[str], keeps_options: bool) -> Loading:  # type: ignore[override]
        """Return what a state_dict goes through on its way into the optimizer."""
        expected = {partition.flat: self._joined_state(number) for number, partition in enumerate(self._partitions)}
        return _LoadingPartitions(present, defaults, keeps_options, expected)

    def _bind(self) -> None:
        """Make the states of parameters views of those of the partitions, where these are new tensors."""
        for number, (partition, view) in enumerate(zip(self._partitions, self._views, strict=True)):
            joined = self._optimizer.state.get(partition.flat)
            if not joined:
                continue
            values = list(joined.values())
            before = self._bound.get(number, [])
            if len(before) == len(values) and all(map(operator.is_, before, values)):
                continue
            self._bound[number] = values
            counts = self._counts(number)
            for key, value in joined.items():
                if key in PER_MATRIX:
                    views: Iterable[Tensor] = value.split(counts)
                elif key in _WHOLE:
                    views = [
                        parameter.of(_piece(value, fragment))
                        for parameter, fragment in zip(view["params"], partition.fragments, strict=True)
                    ]
                else:
                    views = value.unbind()
                for parameter, of_parameter in zip(view["params"], views, strict=True):
                    self._states.setdefault(parameter, {})[key] = of_parameter

    def _counts(self, number: int) -> list[int]:
        """Return how many matrices each parameter of a partition consists of."""
        view = self.groups[number]
        layout = layout_of(view) if view["spectral"] else None
        return [len(layout.part_names(parameter.shape)) if layout else 0 for parameter in view["params"]]


class _LoadingPartitions(Loading):
    """A state_dict of partitions, which has the partitions of as many processes, of the same groups."""

    def __init__(
        self,
        present: Sequence[Group],
        defaults: Collection[str],
        keeps_options: bool,
        expected: Mapping[Tensor, State],
    ) -> None:
        self._present = present
        self._defaults = defaults
        self._keeps_options = keeps_options
        self._of_partitions = expected
        self._given: dict[str, Any] = {}

    def prepare(self, optimizer: Any, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state_dict with groups of the present structure.

        Raises:
            CheckpointError: when it is of other parameters, or of other partitions of them.
            ValueError: when it is another optimizer's.
        """
        require_own_state(state_dict)
        saved = list(map(present_group, state_dict["param_groups"]))
        if [group.get("param_names") for group in saved] != [group["param_names"] for group in self._present]:
            raise CheckpointError(
                "The optimizer's saved state is of other parameters, or in other groups: resume with the model, the "
                "options and the engine that wrote it, or start a new run from the model's weights."
            )
        groups = [self._to_load(*pair) for pair in zip(self._present, saved, strict=True)]
        self._given = {**state_dict, "param_groups": groups}
        for expected, found in self._pairs():
            shapes = [{key: tuple(value.shape) for key, value in state.items()} for state in (found, expected)]
            if shapes[0] != shapes[1]:
                raise CheckpointError(
                    f"The optimizer's saved state of a partition has the shapes {shapes[0]}, and this run needs "
                    f"{shapes[1]}: resume with the stage of ZeRO, the processes and the options that wrote it."
                )
        return self._given

    def restore(self, states: Mapping[Tensor, State]) -> None:
        """Give what torch has loaded the dtypes and devices in which state is kept."""
        for expected, found in self._pairs():
            for key, value in expected.items():
                value.copy_(found[key])
        for flat, expected in self._of_partitions.items():
            states[flat].update(expected)

    def _pairs(self) -> Iterator[tuple[State, State]]:
        """Yield the state that each partition gets, and the saved one, where it is saved."""
        flats = [flat for group in self._present for flat in group["params"]]
        numbers = [number for group in self._given["param_groups"] for number in group["params"]]
        for flat, number in zip(flats, numbers, strict=True):
            if number in self._given["state"]:
                yield self._of_partitions[flat], self._given["state"][number]


def held_by(
    optimizer: Holding,
    new_planner: Callable[[], Planner],
    parameter_of: Callable[[str], Any] | None,
    known: Parameters | None,
) -> Parameters:
    """Return what the groups of an optimizer hold, given what they held before."""
    if isinstance(known, Partitions):
        return known
    known = known or Parameters(optimizer, new_planner)
    if is_partitioned(known.every):
        return Partitions(optimizer, known.every, new_planner, parameter_of)
    return known


def _piece(flat: Tensor, fragment: Fragment) -> Tensor:
    return flat.detach().narrow(0, fragment.offset, fragment.numel)
