"""AdamW's step for all parameters that are not matrices, by torch's own function, in fp32 where they are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hf_schatten.distributed.sharded import local
from hf_schatten.optim.finite_gradients import FiniteGradients
from hf_schatten.optim.matrix import STEP, Group, State, by_device, state_dtype

AVERAGE, SQUARES = "exp_avg", "exp_avg_sq"  # as torch.optim.AdamW names them

# Where torch's fused kernel takes its numbers from the device. On a CPU it has other roundings than AdamW's default.
_FUSED = frozenset({"cuda", "xpu", "meta"})


def new_adamw_state(parameter: Tensor) -> State:
    """Return the state of a parameter that has taken no step."""
    average = torch.zeros_like(parameter, dtype=state_dtype(parameter))
    step = torch.zeros((), device=parameter.device)  # where a fused kernel counts
    return {STEP: step, AVERAGE: average, SQUARES: torch.zeros_like(average)}


def adamw_step(
    group: Group, parameters: Sequence[Tensor], states: Mapping[Tensor, State], gradients: FiniteGradients
) -> None:
    """Update those parameters of a group that have a gradient, in place; none where one of these is not finite."""
    for device, together in by_device(parameters).items():
        _step_on(device, group, together, [states[parameter] for parameter in together], gradients)


def _step_on(
    device: torch.device,
    group: Group,
    parameters: Sequence[Tensor],
    states: Sequence[State],
    gradients: FiniteGradients,
) -> None:
    finite = gradients.keeps(parameters).amin()
    fused = device.type in _FUSED
    if not fused and not finite:  # waits for devices without a fused kernel, of which a CPU is the usual one
        return
    for state in states:
        state[STEP] = state[STEP].to(device)  # a loaded one may be elsewhere
    # Half-precision parameters are updated through an fp32 copy, since their state is fp32.
    masters = [local(parameter).to(state_dtype(parameter)) for parameter in parameters]
    beta1, beta2 = group["betas"]
    adamw(
        masters,
        [local(parameter.grad).to(state_dtype(parameter)) for parameter in parameters],  # type: ignore[arg-type]
        [local(state[AVERAGE]) for state in states],
        [local(state[SQUARES]) for state in states],
        [],
        [state[STEP] for state in states],
        foreach=not fused,
        fused=fused,
        found_inf=(1 - finite).float() if fused else None,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    copied = [pair for pair in zip(map(local, parameters), masters, strict=True) if pair[0].dtype != pair[1].dtype]
    if copied:
        torch._foreach_copy_(*map(list, zip(*copied, strict=True)))
