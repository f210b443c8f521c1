"""Where the backbone of a model ends: models of transformers inside any module, their heads and their embeddings."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel


def backbone_modules(model: nn.Module) -> set[int]:
    """Return the identities of the modules of the backbone.

    It consists of the base models of the outermost models of transformers, wherever they are: inside an adapter, a
    loss, a value head or a pair of encoders. What is around them is a head. Without such a model that trains, such as
    beside a frozen one, the whole model is the backbone.
    """
    trained: list[nn.Module] = [
        inner for inner in outermost_models(model) if any(each.requires_grad for each in inner.parameters())
    ]
    return {id(module) for inner in trained or [model] for module in getattr(inner, "base_model", inner).modules()}


def embedding_parameters(model: nn.Module) -> set[int]:
    """Return the identities of the parameters of embeddings; weights that are tied to them are the same."""
    return {id(parameter) for module in _embeddings(model) for parameter in module.parameters()}


def likely_head(model: nn.Module) -> tuple[str, nn.Linear] | None:
    """Return the last linear layer with its name where no layer takes as many inputs as it has outputs.

    A plain module does not say which layer maps to classes or to the vocabulary. None for a model that contains one of
    transformers.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not layers or any(True for _ in outermost_models(model)):
        return None
    taken = {module.in_features for _, module in layers}
    return None if layers[-1][1].out_features in taken else layers[-1]


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def outermost_models(module: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield the models of transformers inside a module, or itself, and none that lies in another."""
    if isinstance(module, PreTrainedModel):
        yield module
    else:
        for child in module.children():
            yield from outermost_models(child)


def _embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """Yield input and output embeddings of every model of transformers, and every ``nn.Embedding``."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield module
        if isinstance(module, PreTrainedModel):
            for getter in (module.get_input_embeddings, module.get_output_embeddings):
                try:
                    found = getter()
                except (NotImplementedError, AttributeError):  # two-tower models, such as CLIP, have one in each tower
                    continue
                if isinstance(found, nn.Module):
                    yield found
