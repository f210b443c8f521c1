"""How modules store matrices in their parameters: which parameters hold matrices, and in which layout."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers.pytorch_utils import Conv1D

from hf_schatten.matrices.anatomy import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, Anatomy
from hf_schatten.matrices.layout import Layout

_IMAGE_CHANNELS = 4  # a convolution of so few channels reads images or a waveform: an embedding

# Parameters that modules of transformers multiply by themselves, by class and name. The first dimension is the input's
# where `transposed`, the output's elsewhere, and `filters` makes one side of all the others.
_READ_BY_OWNER = {
    **{("XLNetRelativeAttention", name): Layout(transposed=True, filters=True) for name in "qkvr"},
    ("XLNetRelativeAttention", "o"): Layout(filters=True),
    ("FunnelRelMultiheadAttention", "r_kernel"): Layout(transposed=True, filters=True),
    **{("ZambaMambaMixer", name): Layout() for name in ("x_proj_weight", "dt_proj_weight")},  # one for each head
    **{(f"{name}MultiModalProjector", "mm_input_projection_weight"): Layout(transposed=True)
       for name in ("Gemma3", "T5Gemma2")},
}  # fmt: skip

# What parameters are called that are no matrices: they are added, looked up, scale features or gate a recurrence.
_NO_MATRIX = re.compile(
    r"bias|(^|_)emb|pos(?![a-z])|position|token|quer(y|ies)$|latent|probe|prompt|pad_|codevector|codebook|memory"
    r"|scale|gamma|beta|alpha|temperature|time_mix|translate|mask|rel_pos|object_pointer|feature?_extensor"
    r"|(input|recurrent)_gate_weight|const$|^A(_log)?$|^D$|state|^hc_|^fn$|^base$|^b[12]$"
)


@dataclass(frozen=True)
class Storage:
    """What is stored in a parameter.

    Attributes:
        layout: of its matrices, None where it holds none.
        reason: why it holds none, or what holds them.
        doubt: what had to be guessed, "" where nothing was.
    """

    layout: Layout | None
    reason: str
    doubt: str = ""


def storage_of(anatomy: Anatomy, attribute: str, parameter: nn.Parameter, module: nn.Module) -> Storage:
    """Return what a parameter of two dimensions or more stores, by its name in the module that owns it."""
    owner = type(module).__name__
    if isinstance(module, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS):
        return _of_convolution(attribute, module)
    layout = _layout_of_standard(attribute, parameter, module) or _READ_BY_OWNER.get((owner, attribute))
    if layout:
        return Storage(layout, f"matrix of {owner}")
    rules = (
        (isinstance(module, ParametrizationList), "weight or spectral norm computes the weight of it"),
        (isinstance(module, nn.RNNBase | nn.RNNCellBase), f"recurrent weight of {owner}"),
        (max(parameter.shape) == parameter.numel(), "vector or scalar"),
        (isinstance(module, nn.Linear | Conv1D) or _NO_MATRIX.search(attribute), f"{attribute} of {owner}"),
    )
    reason = next((reason for holds, reason in rules if holds), None)
    if reason is None and anatomy.experts(attribute, parameter, module):
        return _of_experts(anatomy, attribute, parameter, module)
    doubt = f"what {owner} does with {attribute!r} is not known, so it trains with AdamW"
    return Storage(None, reason) if reason else Storage(None, f"owned by {owner}", doubt)


def _layout_of_standard(attribute: str, parameter: nn.Parameter, module: nn.Module) -> Layout | None:
    """Return the layout of a weight of torch's layers and of those that are called as ``nn.Linear`` is."""
    if isinstance(module, nn.MultiheadAttention):
        return Layout() if attribute.endswith("proj_weight") else None
    if attribute != "weight":
        return None
    if isinstance(module, nn.Bilinear):
        return Layout(filters=True)
    linear = isinstance(module, nn.Linear | Conv1D) or _is_like_linear(module, parameter)
    return Layout(transposed=isinstance(module, Conv1D)) if linear else None


def _is_like_linear(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Return whether a module calls its sizes as ``nn.Linear`` does: a quantised or parallel linear layer."""
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return parameter.ndim == 2 and sizes == tuple(parameter.shape)


def _of_convolution(attribute: str, module: nn.Module) -> Storage:
    owner = type(module).__name__
    assert isinstance(module, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS)
    if attribute != "weight":  # weight_g and weight_v of the older weight norm
        return Storage(None, "weight or spectral norm computes the weight of it")
    if module.in_channels <= _IMAGE_CHANNELS:
        return Storage(None, "convolution of an image's channels")
    if 1 < module.groups in (module.in_channels, module.out_channels):
        return Storage(None, f"{owner} of single channels (depthwise)")
    return Storage(layout_of_filters(module), f"matrix of {owner}")


def layout_of_filters(module: Any) -> Layout:
    """Return the layout of a convolution's weight: a matrix for each group, named by its number, or one."""
    transposed = isinstance(module, TRANSPOSED_CONVOLUTIONS)  # whose weight is stored (in, out, ...)
    filters = isinstance(module, nn.Conv1d | nn.ConvTranspose1d)  # with more dimensions they are known by their number
    rows = len(module.weight) // module.groups
    parts = tuple((str(group), rows) for group in range(module.groups)) if module.groups > 1 else ()
    return Layout(transposed, parts, cuts_inputs=transposed and module.groups > 1, filters=filters)


def _of_experts(anatomy: Anatomy, attribute: str, parameter: nn.Parameter, module: nn.Module) -> Storage:
    """Return the layout of stacked experts: how each is stored, and whether it is a fused gate and up-projection."""
    owner = type(module).__name__
    reason = f"matrix of {owner}"
    count = anatomy.experts(attribute, parameter, module)
    if parameter.ndim == 2:
        if min(parameter.shape) <= count or "bias" in attribute:
            return Storage(None, f"{attribute} of {owner}, a vector for each expert")
        rows = len(parameter) // count
        parts = tuple((str(expert), rows) for expert in range(count))
        alike = [name for name, stack in module.named_parameters(recurse=False) if stack.shape == parameter.shape]
        # Tokens are rows: all but the last of several stacks read them.
        writes = len(alike) > 1 and attribute == alike[-1]
        doubt = "" if parameter.shape[1] in anatomy.expert_inputs(module) else f"{owner} does not say what a token is"
        return Storage(Layout(writes, parts, cuts_inputs=writes), reason, doubt)
    stacks = [stack for stack in module.parameters(recurse=False) if stack.ndim == 3 and min(stack.shape[1:]) > 1]
    transposed = getattr(module, "is_transposed", None)
    doubt = ""
    if transposed is None:
        transposed = _stored_transposed(stacks, anatomy.expert_inputs(module))
        if transposed is None:
            doubt = f"whether {owner} stores its experts (out, in) or (in, out) is not known; (out, in) is taken"
    return Storage(replace(Layout(), transposed=bool(transposed)), reason, doubt)


def _stored_transposed(stacks: list[nn.Parameter], inputs: set[int]) -> bool | None:
    """Return whether experts are stored (in, out): the first stack reads tokens, the last of several writes them."""
    for stack, reads in ((stacks[0], True), (stacks[-1], False)):
        rows, columns = stack.shape[1:]
        if (rows in inputs) != (columns in inputs):
            return (rows in inputs) == reads
        if len(stacks) == 1:
            break
    if len(stacks) == 1 and inputs:
        return False if stacks[0].shape[1] == stacks[0].shape[2] else None
    return None
