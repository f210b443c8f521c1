"""From a model to its optimizer: routing, parameter groups and the policy of p, in one call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from hf_schatten.adaptive.adaptation import Adaptation
from hf_schatten.adaptive.schedule import ScheduledP
from hf_schatten.adaptive.transfer import Transfer
from hf_schatten.distributed.processes import is_main_process
from hf_schatten.integration.checkpoint import load_learned_p
from hf_schatten.integration.unfreezing import watch_frozen
from hf_schatten.matrices.engines import refuse_unsupported_engines
from hf_schatten.matrices.layout import matches, matrix_name
from hf_schatten.matrices.routing import (
    Route,
    Routing,
    RoutingError,
    require_matches,
    require_module,
    route_parameters,
)
from hf_schatten.optim.matrix import Group
from hf_schatten.optim.policy import Policy
from hf_schatten.optim.schatten_p import SchattenP
from hf_schatten.option_text import POWER
from hf_schatten.options import SchattenOptions

logger = logging.getLogger(__name__)


def create_schatten_optimizer(
    model: nn.Module,
    lr: float = 1e-3,
    *,
    options: SchattenOptions | None = None,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    groups: Iterable[Any] | None = None,
    verbose: bool = True,
    **fields: Any,
) -> SchattenP:
    """Make the optimizer of a model: matrices to the Schatten-p update, all other parameters to AdamW.

    With the default ``p="adaptive"``, hooks on the model sample the inputs of the routed layers on due steps, and
    the optimizer re-estimates each matrix' p in its own ``step()``: a bare training loop needs nothing else.

    Args:
        model: a ``PreTrainedModel``, a PEFT model or any ``nn.Module``; of the latter, name the output head in
            ``exclude``.
        lr: learning rate of AdamW; that of the matrices is ``lr * schatten_lr_ratio``. Default 1e-3.
        options: of the update and of the estimation of p. Default None: made of ``fields``.
        weight_decay: decoupled weight decay of matrices and embeddings; vectors get none. Default 0.1.
        betas: AdamW's decays, the second of them the preconditioner's too. Default (0.9, 0.999).
        eps: AdamW's epsilon, and the preconditioner's. Default 1e-8.
        groups: parameters, ``(name, parameter)`` pairs or groups of them as ``torch.optim`` takes them. These
            parameters alone are trained, with the learning rate, the weight decay and the betas of their group; those
            that are not the model's use AdamW. Default None: all parameters of the model.
        verbose: print the routing table, and a fitted target's accuracy, on the main process, unless the option
            ``report`` is ``none``. Default True.
        **fields: of :class:`SchattenOptions`, in place of ``options``, such as ``p=4`` or ``p_interval=50``.

    Raises:
        TypeError: when ``model`` is not a model.
        OptionError: on an unknown or malformed option.
        ValueError: when a function given as target has values that are not finite, or all zero.
        RoutingError: when no matrix is routed, or a pattern matches nothing.
        CheckpointError: when the checkpoint of ``p_init`` cannot be read, or has no matrix of this model.
        UnsupportedEngineError: when the model is wrapped by DeepSpeed or FSDP version 1.
    """
    require_module(model)
    options = SchattenOptions.given(options, fields)
    talks = verbose and options.report != "none" and is_main_process()
    say: Callable[[object], None] = partial(print, flush=True) if talks else lambda text: None
    refuse_unsupported_engines(model)
    parts, heads = options.fused_parts, options.split_heads
    routing = route_parameters(model, options.exclude, fused_parts=parts, split_heads=heads)
    if groups is None:
        portions = _portions(routing, weight_decay)
    else:
        routing, portions = _given_portions(routing, list(groups), weight_decay)
    if is_main_process() and (idle := options.without_effect()):
        logger.warning("Without effect with p=%s: %s.", options.p, ", ".join(idle))
    say(f"schatten_p routes the parameters of {type(model).__name__} as follows:\n{routing}")
    matrices = routing.to("schatten_p")
    names = [name for route in matrices for name in _matrix_names(route)]
    require_matches("p_overrides", options.overrides, names)
    first_p = dict.fromkeys(names, options.initial_p)
    if isinstance(options.p_init, str):
        transfer = Transfer.of(options, names, load_learned_p)
        first_p |= transfer.p
        say(transfer)
    overrides = reversed(options.overrides.items())  # so that of several that match, the first counts
    overridden = {name: p for pattern, p in overrides for name in names if matches(pattern, name)}
    of_portions = [group for portion in portions for group in portion.groups(options.initial_p, first_p | overridden)]
    optimizer = SchattenP(of_portions, options, lr=lr, betas=betas, eps=eps)
    if options.target != POWER:
        say(f"schatten_p's target {optimizer.target.name}: {optimizer.target.accuracy(options.ns_steps)}.")
    policy = _policy(model, matrices, [name for name in names if name not in overridden], options)
    if policy is not None:
        optimizer.follow(policy)
    watch_frozen(model, optimizer)
    return optimizer


def _matrix_names(route: Route) -> list[str]:
    return [matrix_name(route.name, part) for part in route.layout.part_names(route.parameter.shape)]


@dataclass(frozen=True)
class _Portion:
    """Parameters that share learning rate, weight decay and betas."""

    settings: Mapping[str, Any]
    matrices: Sequence[Route]
    others: Sequence[tuple[str, Tensor]]  # names and parameters

    def groups(self, p: float, first_p: Mapping[str, float]) -> Iterator[Group]:
        """Yield a group for each layout of matrices, and one of the others, where there are any.

        Their number does not depend on any p, which a resume may change.
        """
        spectral: dict[Any, Group] = {}
        for route in self.matrices:
            own = {**self.settings, "params": [], "p_by_parameter": {}, "spectral": True}
            group = spectral.setdefault(route.layout, own | vars(route.layout))
            group["params"].append((route.name, route.parameter))
            each_p = tuple(first_p[name] for name in _matrix_names(route))
            if set(each_p) != {p}:
                group["p_by_parameter"][route.name] = each_p
        yield from spectral.values()
        if self.others:
            yield {**self.settings, "params": list(self.others), "spectral": False}


def _portions(routing: Routing, weight_decay: float) -> list[_Portion]:
    """Return all parameters of a model: those with weight decay, and those without."""
    decayed, others = ([r for r in routing.to("adamw") if r.decay == decay] for decay in (True, False))
    return [
        _Portion({"weight_decay": weight_decay}, routing.to("schatten_p"), list(map(_named, decayed))),
        _Portion({"weight_decay": 0.0}, (), list(map(_named, others))),
    ]


def _given_portions(routing: Routing, given: Sequence[Any], weight_decay: float) -> tuple[Routing, list[_Portion]]:
    """Return the routes of the parameters in given groups, and these parameters group by group.

    Raises:
        RoutingError: when no matrix is in them.
    """
    route_of = {id(route.parameter): route for route in routing.routes}
    chosen: set[str] = set()
    portions = []
    for number, group in enumerate(given if given and isinstance(given[0], Mapping) else [{"params": given}]):
        routes, outside = [], []
        params = group["params"]
        for index, each in enumerate([params] if isinstance(params, Tensor) else params):
            name, parameter = each if isinstance(each, tuple) else (f"groups.{number}.{index}", each)
            route = route_of.get(id(parameter))
            if route is None:
                outside.append((name, parameter))
            else:
                routes.append(route)
        matrices = [route for route in routes if route.destination == "schatten_p"]
        others = [_named(route) for route in routes if route.destination == "adamw"]
        settings = {"weight_decay": weight_decay} | {key: group[key] for key in group if key != "params"}
        portions.append(_Portion(settings, matrices, others + outside))
        chosen.update(route.name for route in routes)
    if not any(portion.matrices for portion in portions):
        raise RoutingError(
            "The groups hold no matrix that is routed to the Schatten-p update: are they another model's? Use "
            "optim='adamw_torch' if that is meant."
        )
    return Routing(tuple(route for route in routing.routes if route.name in chosen)), portions


def _named(route: Route) -> tuple[str, Tensor]:
    return route.name, route.parameter


def _policy(
    model: nn.Module, routes: Sequence[Route], names: Sequence[str], options: SchattenOptions
) -> Policy | None:
    """Return what changes the p of the named matrices, None where it is fixed."""
    if options.p == "schedule":
        return ScheduledP(*options.schedule, names)
    if options.p == "adaptive" and names:
        layers = {route.name: route.module for route in routes if not set(_matrix_names(route)).isdisjoint(names)}
        return Adaptation(model, layers, names, options)
    return None
