"""AdamW's step for all parameters that are not matrices, by torch's own function, in fp32 where they are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hf_schatten.distributed.pieces import local
from hf_schatten.optim.finite_gradients import FiniteGradients
from hf_schatten.optim.matrix import STEP, Group, State, by_device, counter, named_parameters, state_dtype

AVERAGE, SQUARES = "exp_avg", "exp_avg_sq"  # as torch.optim.AdamW names them

# Where torch's fused kernel takes its numbers from the device. On a CPU it has other roundings than AdamW's default.
_FUSED = frozenset({"cuda", "xpu", "meta"})


def new_adamw_state(parameter: Tensor) -> State:
    """Return the state of a parameter that has taken no step."""
    average = torch.zeros_like(parameter, dtype=state_dtype(parameter))
    return {
        STEP: counter(parameter.device),
        AVERAGE: average,
        SQUARES: torch.zeros_like(average),
    }  # a fused kernel counts there


def adamw_step(
    group: Group, parameters: Sequence[Tensor], states: Mapping[Tensor, State], gradients: FiniteGradients
) -> None:
    """Update those parameters of a group that have a gradient, in place; none where one of these is not finite."""
    for ratio, alike in _by_ratio(group, parameters).items():
        for device, together in by_device(alike).items():
            states_of = [states[parameter] for parameter in together]
            _step_on(device, group, together, states_of, gradients, ratio=ratio)


def _by_ratio(group: Group, parameters: Sequence[Tensor]) -> dict[float, Sequence[Tensor]]:
    """Return the parameters by what multiplies their learning rate."""
    ratios = group["lr_ratio_by_parameter"]
    if not ratios:
        return {1.0: parameters}
    ratio_of = {id(parameter): ratios.get(name, 1.0) for name, parameter in named_parameters(group)}
    alike: dict[float, Any] = {}
    for parameter in parameters:
        alike.setdefault(ratio_of[id(parameter)], []).append(parameter)
    return alike


def _step_on(
    device: torch.device,
    group: Group,
    parameters: Sequence[Tensor],
    states: Sequence[State],
    gradients: FiniteGradients,
    *,
    ratio: float,
) -> None:
    finite = gradients.keeps(parameters).amin()
    has_complex = any(parameter.is_complex() for parameter in parameters)
    fused = device.type in _FUSED and not has_complex
    if not fused and not finite:  # waits for devices without a fused kernel, of which a CPU is the usual one
        return
    for state in states:
        if state[STEP].device != device:  # a loaded one may be elsewhere
            state[STEP] = state[STEP].to(device)
    # Half-precision parameters are updated through an fp32 copy, since their state is fp32.
    weights = [local(parameter) for parameter in parameters]
    masters = _in_dtype_of_state(weights)
    beta1, beta2 = group["betas"]
    adamw(
        masters,
        _in_dtype_of_state([local(parameter.grad) for parameter in parameters]),  # type: ignore[arg-type]
        [local(state[AVERAGE]) for state in states],
        [local(state[SQUARES]) for state in states],
        [],
        [state[STEP] for state in states],
        foreach=not fused,
        fused=fused,
        has_complex=has_complex,
        found_inf=(1 - finite).float() if fused else None,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=(group["lr"] if fused else float(group["lr"])) * ratio,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    copied = [index for index, weight in enumerate(weights) if weight is not masters[index]]
    if copied:
        torch._foreach_copy_([weights[index] for index in copied], [masters[index] for index in copied])


def _in_dtype_of_state(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors in the dtype of their state: themselves, or copies that are made together."""
    other = [tensor for tensor in tensors if tensor.dtype != state_dtype(tensor)]
    if not other:
        return list(tensors)
    buffer = torch.empty(sum(tensor.numel() for tensor in other), dtype=torch.float32, device=other[0].device)
    pieces = buffer.split([tensor.numel() for tensor in other])
    copies = [piece if t.ndim == 1 else piece.view(t.shape) for piece, t in zip(pieces, other, strict=True)]
    torch._foreach_copy_(copies, other)
    copy_of = dict(zip(map(id, other), copies, strict=True))
    return [copy_of.get(id(tensor), tensor) for tensor in tensors]
