"""Adapters of PEFT: which of their parameters are factors of a matrix product, and how these are read as matrices.

An adapter adds a product of small matrices, its factors, to the weight of a layer. Factors are matrices; scales,
rotations, spectra and prompts are not. PEFT names the two factors of a low-rank product ``…_A`` and ``…_B``, those of
LoHa ``hada_w…`` and those of LoKr ``lokr_w…``.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import nn

from hf_schatten.matrices.layout import Layout

_FACTOR = re.compile(r"(\w+_)?[AB]|hada_w[12]_[ab]|lokr_w[12](_[ab])?")
_OUTPUT_FACTOR = "lora_B"  # whose outputs are those of the adapted layer


class Adapter(NamedTuple):
    """What a parameter of an adapter belongs to."""

    layer: Any  # PEFT's, which has the adapted module and the parameter
    attribute: str  # of the layer, which has the parameter

    @property
    def adapted(self) -> nn.Module:
        """The adapted module of the model."""
        module = self.layer
        while hasattr(module, "base_layer"):  # PEFT nests layers that adapt several parameters of one module
            module = module.base_layer
        return module

    @property
    def is_factor(self) -> bool:
        """Whether the parameter is a factor of a matrix product."""
        return _FACTOR.fullmatch(self.attribute) is not None

    @property
    def has_outputs_of_layer(self) -> bool:
        """Whether the outputs of the parameter are those of the adapted layer."""
        return self.attribute == _OUTPUT_FACTOR

    def layout(self, shape: tuple[int, ...]) -> Layout | None:
        """Return how a factor for a stack of experts is read: a matrix for each expert; None for any other.

        All experts' A, (rank, in) each, lie one below the other. Of their B, (out, rank) each, the columns alternate.
        """
        experts = getattr(self.layer, "num_experts", 1)
        if experts == 1:
            return None
        first = self.attribute.endswith("A")
        rank = shape[0 if first else 1] // experts
        parts = tuple((str(expert), rank if first else 1) for expert in range(experts))
        return Layout(parts=parts) if first else Layout(parts=parts, blocks=rank, cuts_inputs=True)


def adapter_of(model: nn.Module, name: str) -> Adapter | None:
    """Return the adapter that has a parameter of this name, None where it is not one of an adapter."""
    components = name.split(".")
    for end in range(len(components) - 1, -1, -1):
        layer = model.get_submodule(".".join(components[:end]))
        if hasattr(layer, "base_layer") and hasattr(layer, "adapter_layer_names"):
            attribute = components[end]
            return None if attribute == "base_layer" else Adapter(layer, attribute)
    return None
