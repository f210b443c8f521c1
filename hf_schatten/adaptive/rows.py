"""What a layer multiplies its weight with, and what comes back: rows of its input and of its output's gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hf_schatten.private_api import apply_gate

Masks = Mapping[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """Input rows of one matrix in one forward, read only where they are picked."""

    expert: str  # whose rows they are; "" for a layer without experts
    count: int
    pick: Callable[[Tensor], Tensor]  # from indices (k,) on the host, below `count`, to a copy of those rows, (k, n)


def input_rows(name: str, module: nn.Module, args: tuple[Any, ...], masks: Masks) -> Iterator[Rows]:
    """Yield the input rows of a routed parameter, by its name and what its module's forward was called with.

    A linear layer has one row for each token, a convolution one for each position of its filters, and a layer of
    experts, for each of them, those of the tokens that are routed to it. Padding has none: ``masks`` are the model's
    two-dimensional attention masks (batch, length) by argument name, nonzero for real tokens.
    """
    attribute = name.rpartition(".")[2]
    if isinstance(module, nn.Conv2d):
        yield _patches(module, args[0])
    elif getattr(module, attribute).ndim == 3:
        yield from _expert_rows(attribute, module, args[0], args[1], masks)
    else:
        inputs = args[0].detach()
        rows = inputs.reshape(-1, inputs.shape[-1])
        yield _tokens(rows, _real_tokens(name, inputs.shape[:-1], masks))


def output_rows(name: str, module: nn.Module, masks: Masks) -> Callable[[Tensor], Rows] | None:
    """Return what makes rows (k, out), one for each of :func:`input_rows`, of the gradient of a parameter's output.

    None for a layer of experts, whose outputs exist inside its forward only.
    """
    if getattr(module, name.rpartition(".")[2]).ndim == 3:
        return None
    in_channels = isinstance(module, nn.Conv2d)

    def rows_of(gradient: Tensor) -> Rows:
        gradient = gradient.movedim(-3, -1) if in_channels else gradient
        rows = gradient.reshape(-1, gradient.shape[-1])
        return _tokens(rows, None if in_channels else _real_tokens(name, gradient.shape[:-1], masks))

    return rows_of


def _tokens(rows: Tensor, real: Tensor | None) -> Rows:
    if real is None:
        return Rows("", len(rows), lambda index: rows[index.to(rows.device)])
    return Rows("", len(real), lambda index: rows[real[index.to(real.device)]])


def _real_tokens(name: str, leading: torch.Size, masks: Masks) -> Tensor | None:
    """Return the positions of real tokens among the flattened leading dimensions, or None where no mask fits.

    An encoder-decoder has two masks. Where both fit, a layer of the decoder takes the decoder's.
    """
    in_decoder = any("decoder" in component for component in name.split("."))
    for argument in sorted(masks, key=lambda argument: argument.startswith("decoder") != in_decoder):
        mask = masks[argument]
        if leading in (mask.shape, torch.Size([mask.numel()])):
            return mask.flatten().nonzero().flatten()
    return None


def _patches(module: nn.Conv2d, inputs: Tensor) -> Rows:
    """What the filters see: rows (in · h · w), one for each image and position."""
    inputs = inputs.detach()
    images = inputs if inputs.ndim == 4 else inputs.unsqueeze(0)  # (N, in, H, W)
    (top, bottom), (left, right) = _padding(module)
    (h, w), (step_y, step_x), (gap_y, gap_x) = module.kernel_size, module.stride, module.dilation
    down = (images.shape[2] + top + bottom - gap_y * (h - 1) - 1) // step_y + 1
    across = (images.shape[3] + left + right - gap_x * (w - 1) - 1) // step_x + 1

    def pick(index: Tensor) -> Tensor:
        index = index.to(images.device)[:, None, None]  # (k, 1, 1)
        position = index % (down * across)
        y = position // across * step_y + gap_y * torch.arange(h, device=images.device)[:, None]  # (k, h, 1)
        x = position % across * step_x + gap_x * torch.arange(w, device=images.device)  # (k, 1, w)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = pad(images, (left, right, top, bottom), mode)
        patches = padded[index // (down * across), :, y, x]  # (k, h, w, in)
        return patches.permute(0, 3, 1, 2).flatten(1)

    return Rows("", len(images) * down * across, pick)


def _padding(module: nn.Conv2d) -> list[tuple[int, int]]:
    """Return what a convolution adds on either side, of the height and of the width."""
    if module.padding == "valid":
        return [(0, 0), (0, 0)]
    if module.padding == "same":
        total = [gap * (size - 1) for gap, size in zip(module.dilation, module.kernel_size, strict=True)]
        return [(both // 2, both - both // 2) for both in total]
    return [(int(side), int(side)) for side in module.padding]


def _expert_rows(attribute: str, experts: nn.Module, hidden: Tensor, chosen: Tensor, masks: Masks) -> Iterator[Rows]:
    """Yield the rows of each expert that has any, from tokens (N, features) and the experts of each token (N, k)."""
    hidden = hidden.detach().reshape(-1, hidden.shape[-1])
    real = _real_tokens("", hidden.shape[:1], masks)
    for expert in range(getattr(experts, attribute).shape[0]):
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
    weight = experts.gate_up_proj[expert]
    hidden = pick(index).to(weight.dtype)
    gate_up = hidden @ (weight if getattr(experts, "is_transposed", False) else weight.mT)
    if getattr(experts, "has_bias", False):
        gate_up += experts.gate_up_proj_bias[expert]
    return apply_gate(experts, gate_up)
