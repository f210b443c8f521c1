"""Which parameter goes where: matrices of the backbone to the Schatten-p update, everything else to AdamW."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from accelerate.utils import extract_model_from_parallel
from torch import nn

from hf_schatten.matrices.adapters import Adapter, adapter_of
from hf_schatten.matrices.anatomy import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, Anatomy
from hf_schatten.matrices.backbones import embedding_parameters, likely_head
from hf_schatten.matrices.engines import refuse_emptied
from hf_schatten.matrices.fused_projections import Cut, cut_of, fusion_suspected
from hf_schatten.matrices.layout import Layout, layer_kind, matches
from hf_schatten.matrices.storage import Storage, layout_of_filters, storage_of
from hf_schatten.matrices.target_modules import TargetModules
from hf_schatten.option_text import parse_fused_parts
from hf_schatten.private_api import WRAPPER_COMPONENTS

Destination = Literal["schatten_p", "adamw", "frozen"]
Row = tuple[str, str, str, str]  # of the table: tensors, parameters, name, shape
_COLUMNS, _GAP = 100, "  "
_PARTS_SHOWN = 4  # of a fused projection, by name
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


class RoutingError(ValueError):
    """A model that cannot be routed; the message says why and what to change."""


@dataclass(frozen=True)
class Route:
    """Where one parameter goes and why."""

    name: str  # without wrapper components; the key of state and checkpoints
    parameter: nn.Parameter
    module: nn.Module  # that owns it
    destination: Destination
    reason: str
    layout: Layout  # the matrices that it consists of
    decay: bool  # whether weight decay applies


@dataclass(frozen=True)
class Routing:
    """The routes of a model, in the order of ``named_parameters``; ``str()`` is the printable table.

    The table has a row for each kind of parameter: what differs in the numbers of its name alone. Names in it are
    patterns of ``exclude``.
    """

    routes: tuple[Route, ...]
    warnings: tuple[str, ...] = ()  # what may not be meant

    def to(self, destination: Destination) -> tuple[Route, ...]:
        """Return the routes with this destination."""
        return tuple(route for route in self.routes if route.destination == destination)

    def __str__(self) -> str:
        kinds: dict[tuple[Destination, str], dict[str, list[Route]]] = {}
        for destination in get_args(Destination):
            for route in self.to(destination):
                of_reason = kinds.setdefault((destination, route.reason), {})
                of_reason.setdefault(layer_kind(route.name), []).append(route)
        rows = iter(_aligned([_row(*kind) for of_reason in kinds.values() for kind in of_reason.items()]))
        lines, last = [next(rows)], None
        for (destination, reason), of_reason in kinds.items():
            if destination != last:
                routes = self.to(destination)
                size = sum(route.parameter.numel() for route in routes)
                lines.append(f"{destination}: {len(routes):,} tensor{'s' * (len(routes) > 1)}, {size:,} parameters")
            lines += [f"  {reason}", *(next(rows) for _ in of_reason)]
            last = destination
        return "\n".join(lines)


def route_parameters(
    model: nn.Module,
    exclude: Sequence[str] = (),
    *,
    fused_parts: Sequence[str] = (),
    split_heads: bool = False,
    target_modules: str | Sequence[str] | None = None,
) -> Routing:
    """Decide for every parameter of a model which update it gets; ``print`` shows the result as a table.

    A parameter goes to the Schatten-p update when its module multiplies with it: linear layers, convolutions of one
    group, attention's projections, stacks of experts, a matrix for each. Embeddings and what is tied to one, stems,
    heads, routers of experts and position biases stay with AdamW, and so does a matrix with a side of length 1. An
    adapter's factors go where the weight would that they adapt.

    Args:
        model: bare, or wrapped by DDP, ``torch.compile`` or PEFT; of one without a transformers model inside, name
            the output head in ``exclude``.
        exclude: parameter name patterns (``fnmatch``) that go to AdamW whatever they are. Default none.
        fused_parts: ``pattern:part/part`` of projections that are not known, or known wrongly; see
            :func:`hf_schatten.option_text.parse_fused_parts`. Default none.
        split_heads: read queries, keys and values as a matrix for each head. Default False.
        target_modules: the modules whose matrices go to the Schatten-p update, inside the backbone or not: parts of
            names, regular expressions, or ``"all-linear"``, which is the default's rule. Default none: the backbone.

    Raises:
        TypeError: when it is not a model.
        RoutingError: when no matrix is routed, a pattern matches nothing, or parts do not divide the outputs.
        UnsupportedEngineError: when no matrix is routed because DeepSpeed ZeRO has emptied the parameters.
    """
    require_module(model)
    model = extract_model_from_parallel(model)
    targets = TargetModules(target_modules)
    anatomy = Anatomy(model)
    embeddings = embedding_parameters(model)
    adapted = any(hasattr(module, "adapter_layer_names") for module in model.modules())
    routes: list[Route] = []
    doubts: dict[str, None] = {}
    for raw_name, parameter in model.named_parameters():
        module = model.get_submodule(raw_name.rpartition(".")[0])
        name = _clean_name(raw_name)
        adapter = adapter_of(model, raw_name) if adapted else None
        storage = _stored(
            anatomy, raw_name, parameter, module, adapter, targets=targets, embeddings=embeddings, exclude=exclude
        )
        destination: Destination = "frozen"
        if parameter.requires_grad:
            destination = "schatten_p" if storage.layout else "adamw"
        layout = storage.layout or Layout()
        doubt = storage.doubt
        if storage.layout and not layout.parts:
            cut, suspected = _cut(
                anatomy,
                name,
                parameter,
                module,
                adapter,
                layout=layout,
                fused_parts=fused_parts,
                split_heads=split_heads,
            )
            layout = replace(layout, parts=cut.parts, blocks=cut.blocks)
            doubt = doubt or suspected
        routes.append(Route(name, parameter, module, destination, storage.reason, layout, _decays(raw_name, module)))
        if doubt:
            doubts[f"{layer_kind(name)}: {doubt}"] = None
    routing = Routing(tuple(routes), (*doubts, *(() if targets.given else _warnings(model, routes))))
    for entry in targets.unused([route.name for route in routing.to("schatten_p")]):
        raise RoutingError(
            f"target_modules={entry!r} (optim_target_modules of TrainingArguments) names no module with a matrix for "
            "the Schatten-p update: embeddings, what is tied to them, and vectors use AdamW."
        )
    require_matches("exclude", exclude, [route.name for route in routes])
    patterns = [parse_fused_parts(entry)[0] for entry in fused_parts]
    require_matches("fused_parts", patterns, [route.name for route in routing.to("schatten_p")])
    if not routing.to("schatten_p"):
        refuse_emptied(model)
        raise RoutingError(_nothing_routed(model, routing))
    return routing


def require_module(model: Any) -> None:
    """Refuse what is no model.

    Raises:
        TypeError: when it is not a ``torch.nn.Module``.
    """
    if isinstance(model, nn.Module):
        return
    hint = "its modules, and not model.parameters(), say which parameters are matrices"
    if isinstance(model, str):
        hint = f"load it first, as in AutoModelForCausalLM.from_pretrained({model!r})"
    raise TypeError(f"Expected a model (torch.nn.Module), got {type(model).__name__}: {hint}.")


def _warnings(model: nn.Module, routes: Iterable[Route]) -> Iterator[str]:
    """Yield what the rules have decided without knowing."""
    found, of_name = likely_head(model), {route.name: route for route in routes}
    route = of_name.get(_clean_name(f"{found[0]}.weight".removeprefix("."))) if found else None
    if found and route and route.destination == "schatten_p":
        yield (
            f"{route.name!r} maps {found[1].in_features} features to {found[1].out_features}, which no other layer "
            f"takes. If it is the output head, leave it to AdamW with exclude={route.name}."
        )


def _clean_name(name: str) -> str:
    """Remove the components that ``torch.compile`` and checkpoint wrappers insert into a parameter name."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_COMPONENTS)


def _row(kind: str, routes: Sequence[Route]) -> Row:
    """Return the cells of the parameters of one kind."""
    size = sum(route.parameter.numel() for route in routes)
    shapes = {_shown_shape(route): None for route in routes}
    shape = next(iter(shapes)) if len(shapes) == 1 else f"{len(shapes)} shapes"
    return f"{len(routes):,}", f"{size:,}", kind, shape


def _shown_shape(route: Route) -> str:
    """Return (out, in) of a parameter that consists of matrices, the number of experts before it, and its parts."""
    if route.destination != "schatten_p":
        return ""
    shape = tuple(route.parameter.shape)
    if route.layout.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    parts = [name for name, _ in route.layout.parts]
    named = "/".join(parts) if 0 < len(parts) <= _PARTS_SHOWN else f"{len(parts)} parts" if parts else ""
    return f"{shape} {named}".rstrip()


def _shortened(name: str, length: int) -> str:
    """Return a pattern of at most this length for a kind: without ``weight``, then without its first components."""
    if len(name) <= length:
        return name
    parts = name.removesuffix(".weight").split(".")
    while len(".".join(parts)) > length and len(parts) > 2:
        parts = ["*", *parts[2:]]
    return ".".join(parts)


def _aligned(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a heading and of rows, names shortened to where the shapes fit beside them."""
    rows = [("  tensors", "parameters", "name", "(out, in)"), *rows]
    tensors, parameters = (max(len(row[column]) for row in rows) for column in (0, 1))
    room = _COLUMNS - tensors - parameters - 2 * len(_GAP)
    beside_shape = room - len(_GAP) - max(len(shape) for *_, shape in rows)
    rows = [(*row[:2], _shortened(row[2], beside_shape if row[3] else room), row[3]) for row in rows]
    names = max(len(name) for *_, name, shape in rows if shape)
    for count, size, name, shape in rows:
        yield _GAP.join((count.rjust(tensors), size.rjust(parameters), name.ljust(names), shape)).rstrip()


def _decays(name: str, module: nn.Module) -> bool:
    """Return whether weight decay applies, as a Trainer decides for its own optimizers."""
    return not (isinstance(module, nn.LayerNorm) or _UNDECAYED.search(name.lower()))


def _cut(
    anatomy: Anatomy,
    name: str,
    parameter: nn.Parameter,
    module: nn.Module,
    adapter: Adapter | None,
    *,
    layout: Layout,
    fused_parts: Sequence[str],
    split_heads: bool,
) -> tuple[Cut, str]:
    """Return how the outputs of a parameter's matrices are cut, and what it may be where that is not known."""
    shape = layout.matrix_shape(parameter.shape, 0)
    outputs, inputs = shape[layout.transposed], shape[not layout.transposed]
    of_layer = adapter is not None and adapter.has_outputs_of_layer
    site = anatomy.site(adapter.layer if adapter and of_layer else module)
    owner = adapter.adapted if adapter and of_layer else module
    config = getattr(site.pretrained, "config", None)
    try:
        cut = cut_of(
            name, outputs, owner, config, fused_parts=fused_parts, split_heads=split_heads, above=site.ancestors
        )
    except ValueError as error:
        raise RoutingError(str(error)) from error
    chosen = any(matches(parse_fused_parts(entry)[0], name) for entry in fused_parts)
    if cut.parts or adapter or chosen or not site.in_layer or len(parameter.shape) > 2:
        return cut, ""
    held, kind = fusion_suspected(name, outputs, inputs, config), layer_kind(name)
    advice = f"say fused_parts={kind}:{held}, or {kind}: to keep it"
    doubt = f"its {outputs} outputs may be {held} in one, and are read as one matrix: {advice}"
    return cut, doubt if held else ""


def _stored(
    anatomy: Anatomy,
    name: str,
    parameter: nn.Parameter,
    module: nn.Module,
    adapter: Adapter | None,
    *,
    targets: TargetModules,
    embeddings: set[int],
    exclude: Sequence[str],
) -> Storage:
    """Return what a parameter stores for this package: no matrices where another rule than its module's decides."""
    home = adapter.adapted if adapter else module  # an adapter goes where the weight would that it adapts
    own = {id(parameter)} | ({id(weight) for weight in home.parameters(recurse=False)} if adapter else set())
    rules = (
        (not parameter.requires_grad, "requires no gradient"),
        (any(matches(pattern, _clean_name(name)) for pattern in exclude), "excluded by option"),
        (not embeddings.isdisjoint(own), "embedding, or tied to one"),
        (parameter.ndim < 2, "vector or scalar"),
    )
    reason = next((reason for holds, reason in rules if holds), None)
    if reason:
        return Storage(None, reason)
    attribute, weight = name.rpartition(".")[2], getattr(home, "weight", None)
    role = anatomy.role("weight" if adapter else attribute, parameter if weight is None else weight, home)
    if role and not targets.given:
        return Storage(None, role)
    if adapter:
        storage = _of_adapter(anatomy, adapter, parameter, module)
    else:
        storage = storage_of(anatomy, attribute, parameter, module)
    if storage.layout is None:
        return storage
    if 1 in storage.layout.matrix_shape(parameter.shape, 0):
        return Storage(None, "a side of length 1")
    if targets.given and not targets.has(_clean_name(name)):
        return Storage(None, "not in target_modules")
    return storage if role else replace(storage, reason=f"{storage.reason} in the backbone")


def _of_adapter(anatomy: Anatomy, adapter: Adapter, parameter: nn.Parameter, module: nn.Module) -> Storage:
    """Return what an adapter stores: matrices where the weight is one that it adapts, and it is a factor."""
    owner, adapted = type(adapter.layer).__name__, adapter.adapted
    if isinstance(adapted, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS):
        convolution = storage_of(anatomy, "weight", parameter, adapted)
        if convolution.layout is None:
            return convolution
    if of_experts := adapter.layout(tuple(parameter.shape)):
        return Storage(of_experts, f"matrix of {owner}")
    if not adapter.is_factor or (parameter.ndim > 2 and isinstance(module, nn.ParameterDict | nn.ParameterList)):
        return Storage(None, f"owned by {owner}")
    of_filters = isinstance(module, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS)
    return Storage(
        layout_of_filters(module) if of_filters else Layout(filters=parameter.ndim > 2), f"matrix of {owner}"
    )


def require_matches(option: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Refuse patterns of an option without a match.

    Raises:
        RoutingError: when one matches no name.
    """
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            shown = ", ".join(names[:3])
            raise RoutingError(f"{option} has {pattern!r}, which matches nothing; names look like {shown}.")


def _nothing_routed(model: nn.Module, routing: Routing) -> str:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return (
            f"All parameters of {type(model).__name__} are frozen, so there is nothing to train; set "
            "requires_grad on some, or attach an adapter."
        )
    return (
        f"No matrix of {type(model).__name__} is routed to the Schatten-p update: there is nothing to orthogonalise. "
        "Use AdamW, optim='adamw_torch'. The routes are:\n" + str(routing)
    )
