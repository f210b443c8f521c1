"""From a model to its optimizer: routing, parameter groups and the policy of p, in one call."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from hf_schatten.adaptive.adaptation import Adaptation
from hf_schatten.adaptive.schedule import ScheduledP
from hf_schatten.adaptive.transfer import Transfer
from hf_schatten.distributed.processes import is_main_process
from hf_schatten.integration.checkpoint import load_learned_p
from hf_schatten.integration.engine_arguments import refuse_unsupported_accelerator
from hf_schatten.integration.rules import Rules
from hf_schatten.integration.unfreezing import watch_frozen
from hf_schatten.matrices.engines import in_their_shapes, refuse_unsupported_engines
from hf_schatten.matrices.layout import matches, matrix_name
from hf_schatten.matrices.routing import Route, RoutingError, require_matches, require_module, route_parameters
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
    param_groups: Iterable[Any] | None = None,
    target_modules: str | Sequence[str] | None = None,
    verbose: bool = True,
    **fields: Any,
) -> SchattenP:
    """Make the optimizer of a model: matrices to the Schatten-p update, all other parameters to AdamW.

    With ``p="adaptive"``, hooks on the model sample the inputs of the routed layers on due steps, and the optimizer
    re-estimates the p of each matrix in its own ``step()``: a bare training loop needs nothing else.

    Args:
        model: a ``PreTrainedModel``, a PEFT model or any ``nn.Module``; of the latter, name the output head in
            ``exclude``.
        lr: learning rate of AdamW; that of the matrices is ``lr * schatten_lr_ratio``. Default 1e-3.
        options: of the update and of the estimation of p. Default None: made of ``fields``.
        weight_decay: decoupled weight decay of matrices and embeddings; vectors get none. Default 0.1.
        betas: AdamW's decays, the second of them the preconditioner's too. Default (0.9, 0.999).
        eps: AdamW's epsilon, and the preconditioner's. Default 1e-8.
        param_groups: parameters of the model, ``(name, parameter)`` pairs or groups of them, as ``torch.optim`` takes
            them and a Trainer makes them. What a group holds, such as ``lr`` or ``weight_decay``, is its parameters';
            what is in none of them is not trained. Default none: all parameters; vectors get no weight decay.
        target_modules: the modules whose matrices use the Schatten-p update, as ``optim_target_modules`` of
            ``TrainingArguments``: parts of names, regular expressions, or ``"all-linear"``. Default none: all of the
            backbone.
        verbose: print the routing table, and a fitted target's accuracy, on the main process, unless the option
            ``report`` is ``none``. Default True.
        **fields: of :class:`hf_schatten.SchattenOptions`, in place of ``options``, such as ``p=4``. Default none.

    Returns:
        the optimizer, whose groups name the model's parameters.

    Raises:
        TypeError: when ``model`` is not a model.
        OptionError: when an option is unknown or malformed.
        ValueError: when a function given as target has values that are not finite, or all zero.
        RoutingError: when no matrix is routed, a pattern matches nothing, or groups have parameters of another model.
        CheckpointError: when the checkpoint of ``p_init`` cannot be read, or has no matrix of this model.
        UnsupportedEngineError: when DeepSpeed or FSDP version 1 has wrapped the model, or the Accelerator
            uses an engine, or settings of one, that are not supported.
    """
    require_module(model)
    options = SchattenOptions.given(options, fields)
    refuse_unsupported_engines(model)
    refuse_unsupported_accelerator()
    with in_their_shapes(model):
        return _created(
            model,
            options,
            weight_decay,
            param_groups=param_groups,
            target_modules=target_modules,
            verbose=verbose,
            lr=lr,
            betas=betas,
            eps=eps,
        )


def _created(
    model: nn.Module,
    options: SchattenOptions,
    weight_decay: float,
    *,
    param_groups: Iterable[Any] | None,
    target_modules: str | Sequence[str] | None,
    verbose: bool,
    **of_adamw: Any,
) -> SchattenP:
    """Make the optimizer of a model whose parameters have their shapes."""
    talks = verbose and options.report != "none" and is_main_process()
    say: Callable[[object], None] = partial(print, flush=True) if talks else lambda text: None
    routing = route_parameters(
        model,
        options.exclude,
        fused_parts=options.fused_parts,
        split_heads=options.split_heads,
        target_modules=target_modules,
    )
    if is_main_process() and (idle := options.without_effect()):
        logger.warning(
            "Without effect with p=%s: %s. Leave them out, or set p=adaptive or p=schedule, which they are for.",
            options.p,
            ", ".join(idle),
        )
    say(f"schatten_p routes the parameters of {type(model).__name__} as follows:\n{routing}")
    if is_main_process():
        for warning in routing.warnings:
            logger.warning(warning)
    rules = Rules.of(options, routing, weight_decay, param_groups)
    if options.lr_ratios:
        say(rules)
    matrices, others = rules.trained(routing.to("schatten_p")), rules.trained(routing.to("adamw"))
    if not matrices:
        raise RoutingError("The parameter groups have no matrix for the Schatten-p update: use optim='adamw_torch'.")
    names = [name for route in matrices for name in _matrix_names(route)]
    require_matches("p_overrides", options.overrides, names)
    first_p = dict.fromkeys(names, options.initial_p)
    if isinstance(options.p_init, str):
        transfer = Transfer.of(options, names, load_learned_p)
        first_p |= transfer.p
        say(transfer)
    overrides = reversed(options.overrides.items())  # so that of several that match, the first counts
    overridden = {name: p for pattern, p in overrides for name in names if matches(pattern, name)}
    groups = [
        *_spectral_groups(matrices, rules, options.initial_p, first_p | overridden),
        *_adamw_groups(others, rules),
    ]
    optimizer = SchattenP(groups, options, **of_adamw)
    if options.target != POWER:
        say(f"schatten_p's target {optimizer.target.name}: {optimizer.target.accuracy(options.ns_steps)}.")
    policy = _policy(model, matrices, [name for name in names if name not in overridden], options)
    if policy is not None:
        optimizer.follow(policy)
    watch_frozen(model, optimizer)
    modules = {route.name: weakref.ref(route.module) for route in (*matrices, *others)}
    optimizer.parameter_of = lambda name: getattr(modules[name](), name.rpartition(".")[2])
    return optimizer


def _matrix_names(route: Route) -> list[str]:
    return [matrix_name(route.name, part) for part in route.layout.part_names(route.parameter.shape)]


def _spectral_groups(routes: Iterable[Route], rules: Rules, p: float, first_p: Mapping[str, float]) -> list[Group]:
    """Return one parameter group for each layout and group of the caller's."""
    groups: dict[Any, Group] = {}
    for route in routes:
        group = groups.setdefault(
            (route.layout, rules.number[route.name]), rules.group(route, spectral=True) | vars(route.layout)
        )
        rules.add(route, group)
        each_p = tuple(first_p[name] for name in _matrix_names(route))
        if set(each_p) != {p}:
            group.setdefault("p_by_parameter", {})[route.name] = each_p
    return list(groups.values())


def _adamw_groups(routes: Iterable[Route], rules: Rules) -> list[Group]:
    """Return one parameter group for each group of the caller's, in their order."""
    groups: dict[int, Group] = {}
    for route in routes:
        rules.add(route, groups.setdefault(rules.number[route.name], rules.group(route, spectral=False)))
    return [groups[number] for number in sorted(groups)]


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
