"""The state of parameters: what it consists of, created at the first step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hf_schatten.distributed.pieces import is_sharded, pieces_of
from hf_schatten.matrices.engines import UnsupportedEngineError
from hf_schatten.optim import matrix as of_matrix
from hf_schatten.optim.adamw import new_adamw_state
from hf_schatten.optim.matrix import Group, State, counter, initial_p, layout_of, named_parameters, state_dtype
from hf_schatten.optim.preconditioning import PRECONDITIONERS


def new_state(name: str, parameter: Tensor, group: Group) -> State:
    """Return the state of a parameter, by name, before its first step."""
    if not group["spectral"]:
        return new_adamw_state(parameter)
    count = len(layout_of(group).part_names(parameter.shape))
    average = torch.zeros_like(parameter, dtype=state_dtype(parameter))

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=parameter.device)

    return {
        of_matrix.STEP: counter("cpu"),  # on the host, as in torch.optim: reading it synchronises nothing
        of_matrix.SKIPPED: zeros(),
        of_matrix.MOMENTUM: average,
        **PRECONDITIONERS[group["precondition"]].new_state(average),
        of_matrix.P: torch.tensor(initial_p(group, name, count), dtype=torch.float32, device=parameter.device),
        of_matrix.STATISTICS: zeros(count, of_matrix.CURVES, of_matrix.NODES),
        of_matrix.STATISTICS_WEIGHT: zeros(count),
        of_matrix.ABSENCE: zeros(count),
    }


def expected_state(groups: Iterable[Group]) -> dict[str, State]:
    """Return the state that each parameter has or will have, by name, or group and position where it has none.

    What a state has on its parameter's device is on the device "meta" here.
    """
    states = {}
    for number, group in enumerate(groups):
        for name, parameter in named_parameters(group):
            state = new_state(name, torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), group)
            states[name if "param_names" in group else f"{number}.{name}"] = state
    return states


def require_matrix(name: str, parameter: Tensor, group: Group, coupling_order: float | None) -> None:
    """Raise unless a named parameter of a spectral group still consists of matrices, and of whole ones where needed.

    Raises:
        UnsupportedEngineError: when an engine has replaced the matrices by shards or flat pieces.
        ValueError: when its elements lie in memory as those of no matrix.
    """
    if is_sharded(parameter):
        pieces_of(name, parameter)
        for option, value in (("precondition", group["precondition"]), ("coupling_order", coupling_order)):
            if value not in ("none", None):
                raise UnsupportedEngineError(
                    f"{option}={value!r} is not supported where the parameters are sharded: leave it out, or use DDP."
                )
    layout = layout_of(group)
    for index in range(len(layout.part_names(parameter.shape)) if not is_sharded(parameter) else 0):
        try:
            layout.place(parameter, index)
        except ValueError as error:
            raise ValueError(f"{name!r} is no matrix in memory: {error}.") from error
