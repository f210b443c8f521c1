"""What the modules of a model are: layers, embeddings, heads, routers and stacks of experts.

A module is known by its class, by the modules that it has and lies in, and by sizes: never by one name alone. Where
transformers says what something is (its layers, its base models, its input and output embeddings), its word counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from hf_schatten.matrices.backbones import backbone_modules

LAYERS = (GradientCheckpointingLayer, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# Of classes, in which words run together.
_LAYER_CLASS = re.compile(r"(Layer|Block)$")
_EMBEDDER_CLASS = re.compile(r"Embed(ding|dings|der|ders)?$")
_STEM_CLASS = re.compile(r"Embed(ding|dings|der|ders)?$|Stem(?![a-z])|Sub[sS]ampl|Feature(Encoder|Extractor)$")
_HEAD_CLASS = re.compile(r"(Heads?|Predictors?|Predictions?|Classifier|Classification)$")
_POOLING_CLASS = re.compile(r"Pool")
_ROUTER_CLASS = re.compile(r"Router|Gating$|TopK\w*Gate$|M[oO]EGate$|GateNetwork|Routing")
_EXPERT = re.compile(r"expert", re.IGNORECASE)
_MIXTURE = re.compile(r"expert|moe(?![a-z])", re.IGNORECASE)
# Of attributes, in which underscores separate words.
_EMBEDDER_NAME = re.compile(r"(^|_)(embed|embeds|embedding|embeddings|embedder|patcher|patch_proj\w*)($|_)")
_POSITION_NAME = re.compile(r"(^|_)(rel|relative)_pos|position|(^|_)bias($|_)")
_HEAD_NAME = re.compile(
    r"(^|_)(heads?|classifier|predictor|predictions?|scores?|logits|loss)$|^predict_|(^|_)score_"
    r"|^(class|bbox|box|boxes|mask)_(embed|labels)$|^qa_outputs$"
)
_NORM_NAME = re.compile(r"norm\d*$")
_ROUTER_NAME = re.compile(r"(^|_)(router|routers|routing)($|_)")
# Sizes of what a head writes, by the names that configurations have for them.
_OUTPUT_SIZES = re.compile(r"^num_labels$|(^|_)vocab_size$|(^|_)codebook_size$|^num_classes$|(^|_)output_vocab")
_HIDDEN_SIZES = re.compile(r"hidden_size$|^d_model$|^(n_)?embd$|_dim$|^dim$")


@dataclass(frozen=True)
class Site:
    """A module, and what it lies in."""

    module: nn.Module
    attributes: tuple[str, ...]  # of the path from the model, without the names of wrappers
    ancestors: tuple[nn.Module, ...]  # from the model down, without the module
    in_layer: bool  # whether it lies in a layer of a transformer, or is one
    own: tuple[tuple[str, nn.Module], ...]  # (attribute, module) from it up to what its layer or pretrained model has

    @property
    def parent(self) -> nn.Module | None:
        """The module that has it, None for the model."""
        return self.ancestors[-1] if self.ancestors else None

    @property
    def within_pretrained(self) -> Iterator[nn.Module]:
        """What it lies in, up to its innermost pretrained model."""
        return takewhile(lambda module: not isinstance(module, PreTrainedModel), reversed(self.ancestors))

    @property
    def pretrained(self) -> PreTrainedModel | None:
        """The innermost pretrained model that it lies in."""
        found = (module for module in (self.module, *reversed(self.ancestors)) if isinstance(module, PreTrainedModel))
        return next(found, None)


class Anatomy:
    """What the modules of one model are.

    Args:
        model: bare, or with adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sites: dict[int, Site] = {}
        self._backbone = backbone_modules(model)
        modules = dict(model.named_modules())
        for path, module in modules.items():
            names = path.split(".") if path else []
            parent = self._sites[id(modules[path.rpartition(".")[0]])] if names else None
            above = (*parent.ancestors, parent.module) if parent else ()
            ends = isinstance(module, PreTrainedModel) or _is_layer(module)
            own = ((names[-1], module), *parent.own) if parent and not ends else ()
            in_layer = _is_layer(module) or (parent is not None and parent.in_layer)
            self._sites[id(module)] = Site(module, tuple(names), above, in_layer, own)
        layers = [site for site in self._sites.values() if isinstance(site.module, LAYERS)]
        self._having_layers = {id(above) for site in layers for above in site.ancestors}

    def site(self, module: nn.Module) -> Site:
        """Return where a module lies."""
        return self._sites[id(module)]

    def role(self, attribute: str, parameter: nn.Parameter, module: nn.Module) -> str | None:
        """Return why a parameter of two dimensions or more is no matrix of the network's body, None where it is.

        Args:
            attribute: its name in the module.
            parameter: the parameter.
            module: that has it.
        """
        site = self.site(module)
        rules: tuple[tuple[str, Callable[[], bool]], ...] = (
            ("router of experts", lambda: id(module) in self._routers or _is_router(site)),
            ("outside the backbone (task head)", lambda: not site.in_layer and self._outside_backbone(site)),
            ("head: writes labels, scores or boxes", lambda: self._is_head(site, parameter)),
            ("convolution before or between the layers (stem)", lambda: self._is_stem(site)),
            ("part of an embedding", lambda: self._is_embedder(site)),
            ("part of a norm", lambda: any(_is_norm(*each) for each in site.own)),
            (
                "bias of positions or experts",
                lambda: bool(site.attributes and _POSITION_NAME.search(self._own_name(site, attribute))),
            ),
        )
        return next((role for role, holds in rules if holds()), None)

    @staticmethod
    def _own_name(site: Site, attribute: str) -> str:
        return site.attributes[-1] if attribute == "weight" else attribute

    def _outside_backbone(self, site: Site) -> bool:
        model = site.pretrained
        if model is None:
            return id(site.module) not in self._backbone
        if model.base_model is model or self._holds(model.base_model, site):
            return False
        return not any(_POOLING_CLASS.search(type(module).__name__) for _, module in site.own)

    @staticmethod
    def _holds(module: nn.Module, site: Site) -> bool:
        return any(above is module for above in (site.module, *site.ancestors))

    def _is_head(self, site: Site, parameter: nn.Parameter) -> bool:
        if site.in_layer:
            return False
        for name, module in site.own:
            kind = type(module).__name__
            if id(module) in self._having_layers or _POOLING_CLASS.search(kind):
                break
            if _HEAD_NAME.search(name) or _HEAD_CLASS.search(kind):
                return True
        model, outputs = site.pretrained, len(parameter)
        if model is None or outputs == parameter[0].numel() or outputs in _sizes(model.config, _HIDDEN_SIZES):
            return False
        return outputs in _sizes(model.config, _OUTPUT_SIZES)

    def _is_stem(self, site: Site) -> bool:
        if not isinstance(site.module, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS):
            return False
        if any(_STEM_CLASS.search(type(module).__name__) for module in site.within_pretrained):
            return True
        model = site.pretrained
        return not site.in_layer and model is not None and id(model) in self._having_layers

    def _is_embedder(self, site: Site) -> bool:
        for name, module in site.own:
            if id(module) in self._having_layers:
                return False
            if _EMBEDDER_CLASS.search(type(module).__name__) or _EMBEDDER_NAME.search(name):
                return True
        return False

    def experts(self, attribute: str, parameter: nn.Parameter, module: nn.Module) -> int:
        """Return how many experts a parameter stacks, 0 where it stacks none.

        Experts are counted by the module's or its parent's own number of experts, by the scores of a router beside
        them, or, where the class says that it has experts, by the first dimension.
        """
        site = self.site(module)
        owners = [owner for owner in (module, site.parent) if owner is not None]
        counts = {
            value
            for owner in owners
            for name, value in vars(owner).items()
            if _EXPERT.search(name) and type(value) is int and value > 1
        }
        if parameter.ndim == 2:  # one under the other
            named = _EXPERT.search(type(module).__name__) and not isinstance(module, nn.Linear | Conv1D)
            return next((n for n in sorted(counts) if named and len(parameter) > n and len(parameter) % n == 0), 0)
        count, *sides = parameter.shape
        if parameter.ndim != 3 or min(sides) == 1:
            return 0
        if count in counts or _EXPERT.search(type(module).__name__):
            return count
        scored = any(outputs == count for owner in owners for _, outputs in _linear_children(owner))
        return count if scored and 1 < count <= min(sides) else 0

    def expert_inputs(self, module: nn.Module) -> set[int]:
        """Return the sizes that may be those of a token: what the routers beside read, and the hidden size."""
        site = self.site(module)
        beside = [owner for owner in (module, site.parent) if owner is not None]
        sizes = {inputs for owner in beside for inputs, _ in _linear_children(owner) if inputs}
        for name in ("input_size", "in_features", "hidden_size", "hidden_dim"):
            if type(getattr(module, name, None)) is int:
                return {getattr(module, name)}
        return sizes

    @cached_property
    def _routers(self) -> set[int]:
        """The modules that have as many outputs as there are experts beside them, by id."""
        found: set[int] = set()
        for mixture, count in self._mixtures():
            for path, module in mixture.named_modules():
                if not _EXPERT.search(path) and _outputs(module) == count:
                    found.add(id(module))
        return found

    def _mixtures(self) -> Iterator[tuple[nn.Module, int]]:
        """Yield each module that has experts, with their number."""
        for site in list(self._sites.values()):
            module = site.module
            if isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) > 1 and site.parent is not None:
                names = (site.attributes[-1], type(module).__name__, type(next(iter(module.children()))).__name__)
                if any(_MIXTURE.search(name) for name in names):
                    yield site.parent, len(module)
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and not isinstance(module, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS):
                    count = self.experts(name, parameter, module)
                    if count:
                        inside = _EXPERT.search(type(module).__name__) and site.parent is not None
                        yield (site.parent if inside else module), count  # type: ignore[misc]


def _is_layer(module: nn.Module) -> bool:
    """Return whether a module is one of the repeated layers of a network: attention, feed-forward or both."""
    if isinstance(module, LAYERS):
        return True
    if not _LAYER_CLASS.search(type(module).__name__):
        return False
    return sum(isinstance(inner, nn.Linear | Conv1D) for inner in module.modules()) > 1


def _is_norm(name: str, module: nn.Module) -> bool:
    """Return whether a module is a norm, and not a layer of attention between two of them (DBRX)."""
    return _NORM_NAME.search(name) is not None and "Attention" not in type(module).__name__


def _is_router(site: Site) -> bool:
    return any(_ROUTER_CLASS.search(type(module).__name__) or _ROUTER_NAME.search(name) for name, module in site.own)


def _outputs(module: nn.Module) -> int:
    if isinstance(module, Conv1D):
        return int(module.nf)
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, nn.Parameter) and weight.ndim == 2 else 0


def _linear_children(owner: nn.Module) -> Iterator[tuple[int, int]]:
    """Yield (inputs, outputs) of the modules that it has with a weight of two dimensions."""
    for child in owner.children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 2 and not isinstance(child, nn.Embedding):
            outputs, inputs = reversed(weight.shape) if isinstance(child, Conv1D) else weight.shape
            yield int(inputs), int(outputs)


def _sizes(config: Any, names: re.Pattern[str], depth: int = 0) -> Iterator[int]:
    """Yield the sizes of these names in a configuration, and in those that it consists of."""
    named = vars(config) | {"num_labels": getattr(config, "num_labels", None)}
    for name, value in named.items():
        if type(value) is int and names.search(name):
            yield value
        elif depth < 2 and hasattr(value, "to_dict") and value is not config:
            yield from _sizes(value, names, depth + 1)
