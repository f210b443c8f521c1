"""What a layer multiplies its weight with: rows of its input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hf_schatten.adaptive.row_sample import on_device_of
from hf_schatten.distributed.pieces import experts_here, local
from hf_schatten.matrices.anatomy import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from hf_schatten.matrices.engines import UnsupportedEngineError
from hf_schatten.private_api import apply_gate, has_gate


class Mask(NamedTuple):
    """Which tokens of a forward are real."""

    shape: tuple[int, ...]  # (batch, length)
    real: Tensor  # their positions, flattened, on the device


Masks = Mapping[str, Mask]  # by argument name

_CONVOLUTIONS = CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS
_EXPERTS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Rows:
    """Input rows of one matrix in one forward, read only where they are picked."""

    expert: str  # whose rows they are, or the group of a convolution; "" for a layer without
    count: int
    pick: Callable[[Tensor], Tensor]  # from indices (k,) on the host, below `count`, to a copy of those rows, (k, n)


def masks_of(arguments: Mapping[str, Any]) -> Masks:
    """Return the two-dimensional attention masks among a model's arguments by keyword. Waits for the device."""
    given = {name: arguments.get(name) for name in ("attention_mask", "decoder_attention_mask")}
    return {
        name: Mask(tuple(mask.shape), mask.flatten().nonzero().flatten())
        for name, mask in given.items()
        if isinstance(mask, Tensor) and mask.ndim == 2
    }


def shows_inputs(name: str, module: nn.Module) -> bool:
    """Return whether a module's forward is called with the inputs of its routed parameter, by the parameter's name.

    Other modules read their parameters and hand on something else: see :class:`FunctionalUses`.
    """
    attribute = name.rpartition(".")[2]
    if has_gate(module):  # the experts of transformers, which share this interface
        return attribute in _EXPERTS
    weight = getattr(module, attribute)
    return attribute == "weight" and (weight.ndim != 3 or isinstance(module, (nn.Bilinear, *_CONVOLUTIONS)))


def token_rows(name: str, inputs: Tensor, masks: Masks) -> Rows:
    """Return the rows of real tokens of inputs (..., n)."""
    return _tokens(inputs.reshape(-1, inputs.shape[-1]), _real_tokens(name, inputs.shape[:-1], masks))


def input_rows(name: str, module: nn.Module, args: tuple[Any, ...], masks: Masks) -> Iterator[Rows]:
    """Yield the input rows of a routed parameter, by its name and what its module's forward was called with.

    A linear layer has one row for each token, a convolution, for each of its groups, one for each position of its
    filters, and a layer of experts, for each of them, those of the tokens that are routed to it. Padding has none:
    ``masks`` are the model's.
    """
    attribute = name.rpartition(".")[2]
    if isinstance(module, _CONVOLUTIONS):
        groups = args[0].detach().chunk(module.groups, dim=-len(module.kernel_size) - 1)
        for number, channels in enumerate(groups):
            if isinstance(module, CONVOLUTIONS):
                rows = _patches(module, channels)
            else:
                rows = _tokens(_channels_last(channels, module).flatten(0, -2), None)
            yield replace(rows, expert=str(number) if len(groups) > 1 else "")
    elif isinstance(module, nn.Bilinear):
        first, second = (each.detach() for each in args[:2])
        yield token_rows(name, (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2), masks)
    elif getattr(module, attribute).ndim == 3:
        yield from _expert_rows(attribute, module, args[0], args[1], masks)
    else:
        yield token_rows(name, args[0].detach(), masks)


def _tokens(rows: Tensor, real: Tensor | None) -> Rows:
    if real is None:
        return Rows("", len(rows), lambda index: rows[on_device_of(rows, index)])
    return Rows("", len(real), lambda index: rows[real[on_device_of(real, index)]])


def _real_tokens(name: str, leading: torch.Size, masks: Masks) -> Tensor | None:
    """Return the positions of real tokens among the flattened leading dimensions, or None where no mask fits.

    An encoder-decoder has two masks. Where both fit, a layer of the decoder takes the decoder's.
    """
    in_decoder = any("decoder" in component for component in name.split("."))
    for argument in sorted(masks, key=lambda argument: argument.startswith("decoder") != in_decoder):
        mask = masks[argument]
        if leading in (mask.shape, (math.prod(mask.shape),)):
            return mask.real
    return None


def _channels_last(features: Tensor, module: Any) -> Tensor:
    """Return features (N, channels, ...) or (channels, ...) of a convolution with the channels at the end."""
    return features.movedim(-len(module.kernel_size) - 1, -1)


def _patches(module: Any, inputs: Tensor) -> Rows:
    """What the filters of a group see: rows (in · kernel), one for each example and position."""
    dims = len(module.kernel_size)
    examples = inputs if inputs.ndim == dims + 2 else inputs.unsqueeze(0)  # (N, in, ...)
    padding = _padding(module)
    counts = [
        (size + sum(both) - gap * (kernel - 1) - 1) // step + 1
        for size, both, kernel, step, gap in zip(
            examples.shape[2:], padding, module.kernel_size, module.stride, module.dilation, strict=True
        )
    ]

    def pick(index: Tensor) -> Tensor:
        index = on_device_of(examples, index)
        coordinates: list[Tensor] = []
        position = index
        for dim in reversed(range(dims)):
            start = position % counts[dim] * module.stride[dim]
            position = position // counts[dim]
            offsets = module.dilation[dim] * torch.arange(module.kernel_size[dim], device=examples.device)
            shape = [1] * dims
            shape[dim] = -1
            coordinates.insert(0, start.view(-1, *[1] * dims) + offsets.view(shape))  # (k, ..., kernel, ...)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = pad(examples, [side for both in reversed(padding) for side in both], mode)
        example = position.view(-1, *[1] * dims)
        patches = padded.movedim(1, -1)[(example, *coordinates)]  # (k, kernel..., in)
        return patches.movedim(-1, 1).flatten(1)

    return Rows("", len(examples) * math.prod(counts), pick)


def _padding(module: Any) -> list[tuple[int, int]]:
    """Return what a convolution adds on either side of each dimension."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        total = [gap * (size - 1) for gap, size in zip(module.dilation, module.kernel_size, strict=True)]
        return [(both // 2, both - both // 2) for both in total]
    return [(int(side), int(side)) for side in module.padding]


def _expert_rows(attribute: str, experts: nn.Module, hidden: Tensor, chosen: Tensor, masks: Masks) -> Iterator[Rows]:
    """Yield the rows of each expert that has any, from tokens (N, features) and the experts of each token (N, k)."""
    hidden = hidden.detach().reshape(-1, hidden.shape[-1])
    real = _real_tokens("", hidden.shape[:1], masks)
    stack = getattr(experts, attribute)
    for expert in experts_here(stack) if attribute == "down_proj" else range(stack.shape[0]):
        tokens = (chosen == expert).any(dim=-1).nonzero().flatten()
        if real is not None:
            tokens = tokens[torch.isin(tokens, real)]
        if len(tokens):
            rows = _tokens(hidden, tokens)
            if attribute == "down_proj":
                rows = replace(rows, pick=partial(_activated, experts, expert, rows.pick))
            yield replace(rows, expert=str(expert))


@torch.no_grad()
def _activated(experts: Any, expert: int, pick: Callable[[Tensor], Tensor], index: Tensor) -> Tensor:
    """What an expert's ``down_proj`` gets, which exists inside its forward only."""
    gated = getattr(experts, "has_gate", True)
    first, bias = ("gate_up_proj", "gate_up_proj_bias") if gated else ("up_proj", "up_proj_bias")
    expert -= experts_here(getattr(experts, first)).start
    stack = local(getattr(experts, first))
    if not stack.numel():
        raise UnsupportedEngineError(
            f"The weights of {type(experts).__name__} are elsewhere when its inputs are sampled, as under stage 3 of "
            "DeepSpeed ZeRO: give p a number, or use stage 2."
        )
    weight = stack[expert]
    hidden = pick(index).to(weight.dtype)
    features = hidden @ (weight if getattr(experts, "is_transposed", False) else weight.mT)
    if getattr(experts, "has_bias", False):
        features += local(getattr(experts, bias))[expert]
    return apply_gate(experts, features) if gated else experts.act_fn(features)
