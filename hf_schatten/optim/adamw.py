"""AdamW's step for all parameters that are not matrices, by torch's functional form, in fp32 where they are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hf_schatten.distributed.sharded import local
from hf_schatten.optim.finite_gradients import FiniteGradients
from hf_schatten.optim.matrix import STEP, Group, State, state_dtype

AVERAGE, SQUARES = "exp_avg", "exp_avg_sq"  # as torch.optim.AdamW names them


def new_adamw_state(parameter: Tensor) -> State:
    """Return the state of a parameter that has taken no step."""
    average = torch.zeros_like(parameter, dtype=state_dtype(parameter))
    return {STEP: torch.tensor(0.0), AVERAGE: average, SQUARES: torch.zeros_like(average)}


def adamw_step(
    group: Group, parameters: Sequence[Tensor], states: Mapping[Tensor, State], gradients: FiniteGradients
) -> None:
    """Update those parameters of a group that have a gradient, in place; one that is not finite counts as zero."""
    if not parameters:
        return
    own = [states[parameter] for parameter in parameters]
    # Half-precision parameters are updated through an fp32 copy, since their state is fp32.
    masters = [local(parameter).to(state_dtype(parameter)) for parameter in parameters]
    beta1, beta2 = group["betas"]
    adamw(
        masters,
        [gradients.gradient(parameter, state_dtype(parameter), 0.0) for parameter in parameters],
        [local(state[AVERAGE]) for state in own],
        [local(state[SQUARES]) for state in own],
        [],
        [state[STEP] for state in own],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    for parameter, master in zip(parameters, masters, strict=True):
        if master.data_ptr() != local(parameter).data_ptr():
            local(parameter).copy_(master)
