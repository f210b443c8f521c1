"""From a model to its optimizer: routing, parameter groups and the policy of p, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_schatten.adaptive.adaptation import Adaptation
from hf_schatten.adaptive.transfer import Transfer
from hf_schatten.distributed.processes import is_main_process, refuse_unsupported_engines
from hf_schatten.linalg.targets import POWER, TargetFunction, target_name
from hf_schatten.matrices.layout import matches, matrix_name
from hf_schatten.matrices.routing import Route, require_matches, route_parameters
from hf_schatten.optim.coupling import WeightFunction
from hf_schatten.optim.policy import Policy, ScheduledP
from hf_schatten.optim.schatten_p import SchattenP
from hf_schatten.options import CouplingWeights, SchattenOptions

Group = dict[str, Any]


def create_schatten_optimizer(
    model: nn.Module,
    lr: float = 1e-3,
    *,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    coupling_weights: CouplingWeights | WeightFunction = "uniform",
    target: str | TargetFunction = POWER,
    verbose: bool = True,
    **options: Any,
) -> SchattenP:
    """Make the optimizer of a model: matrices to the Schatten-p update, everything else to AdamW.

    With the default ``p="adaptive"``, hooks on the model sample the inputs of the routed layers on due steps, and
    the optimizer re-estimates each matrix' p in its own ``step()``: a bare training loop needs nothing else.

    Args:
        model: a ``PreTrainedModel``, a PEFT model or any ``nn.Module``; of the latter, name the output head in
            ``exclude``.
        lr: learning rate of AdamW; that of the matrices is ``lr * schatten_lr_ratio``. With the default scale rule
            AdamW's customary values fit both. Default 1e-3.
        weight_decay: decoupled weight decay of matrices and embeddings; vectors get none. Default 0.1.
        betas: AdamW's decays, the second of them the preconditioner's too. Default (0.9, 0.999).
        eps: AdamW's epsilon, and the preconditioner's. Default 1e-8.
        coupling_weights: the option of this name, or a function from a matrix' name and its (out, in) to its weight,
            above 0; a function is not written to checkpoints. Default ``uniform``.
        target: the option of this name, or a function of a NumPy array of singular values in (0, 1], relative to the
            matrix' Schatten-8 norm, that replaces σ^{1/p}; of a function, checkpoints hold the name. It is fitted
            here, which takes seconds. Default ``power``.
        verbose: print the routing table, which ``report="none"`` leaves out too, and a fitted target's accuracy, on
            the main process. Default True.
        **options: fields of :class:`SchattenOptions`, such as ``p=4`` or ``p_interval=50``.

    Raises:
        OptionError: on an unknown or malformed option.
        ValueError: when a function given as target has values that are not finite, or all zero.
        RoutingError: when no matrix is routed, or a pattern matches nothing.
        CheckpointError: when the checkpoint of ``p_init`` cannot be read, or has no matrix of this model.
        UnsupportedEngineError: when the model is wrapped by DeepSpeed or FSDP version 1.

    Example:
        >>> optimizer = hf_schatten.create_schatten_optimizer(model, lr=1e-3, p_interval=50)
        >>> loss = model(**batch).loss
        >>> loss.backward()
        >>> optimizer.step()
    """
    named_weights = {} if callable(coupling_weights) else {"coupling_weights": coupling_weights}
    parsed = SchattenOptions.from_mapping(options | named_weights | {"target": target_name(target)})
    refuse_unsupported_engines(model)
    routing = route_parameters(
        model,
        parsed.exclude,
        split_fused=parsed.split_fused,
        fused_parts=parsed.fused_parts,
        split_heads=parsed.split_heads,
    )
    if verbose and parsed.report != "none" and is_main_process():
        print(f"schatten_p routes the parameters of {type(model).__name__} as follows:\n{routing}", flush=True)
    matrices, others = routing.to("schatten_p"), routing.to("adamw")
    names = [name for route in matrices for name in _matrix_names(route)]
    require_matches("p_overrides", parsed.overrides, names)
    transferred = Transfer.of(parsed, names) if isinstance(parsed.p_init, str) else None
    if transferred is not None and verbose and is_main_process():
        print(transferred, flush=True)
    first_p = partial(_first_p, options=parsed, transferred=transferred.p if transferred else {})
    groups = [
        *_spectral_groups(matrices, weight_decay, parsed.initial_p, first_p),
        *_adamw_group((route for route in others if route.decay), weight_decay),
        *_adamw_group((route for route in others if not route.decay), 0.0),
    ]
    optimizer = SchattenP(
        groups,
        lr,
        p=parsed.initial_p,
        momentum=parsed.momentum,
        nesterov=parsed.nesterov,
        step_rule=parsed.step_rule,
        scale=parsed.scale,
        coupling_order=parsed.coupling_order,
        coupling_weights=coupling_weights,
        precondition=parsed.precondition,
        precondition_exponent=parsed.precondition_exponent,
        lr_ratio=parsed.schatten_lr_ratio,
        betas=betas,
        eps=eps,
        ns_steps=parsed.ns_steps,
        compute_dtype=None if parsed.compute_dtype == "auto" else getattr(torch, parsed.compute_dtype),
        target=target,
        workspace_mib=parsed.workspace_mib,
        share_work=parsed.share_work,
        share_processes=parsed.share_processes,
        buffer_mib=parsed.buffer_mib,
    )
    optimizer.options = parsed
    if verbose and is_main_process() and parsed.target != POWER:
        accuracy = optimizer.target.accuracy(parsed.ns_steps)
        print(f"schatten_p's target {optimizer.target.name}: {accuracy}.", flush=True)
    free = [name for name in names if not any(matches(pattern, name) for pattern in parsed.overrides)]
    policy = _policy(model, matrices, free, parsed)
    if policy is not None:
        optimizer.follow(policy)
    return optimizer


def _matrix_names(route: Route) -> list[str]:
    return [matrix_name(route.name, part) for part in route.layout.part_names(route.parameter.shape)]


def _spectral_groups(
    routes: Iterable[Route], weight_decay: float, p: float, first_p: Callable[[str], float]
) -> list[Group]:
    """Return one parameter group for each layout; their number does not depend on any p, which a resume may change."""
    groups: dict[Any, Group] = {}
    for route in routes:
        group = groups.setdefault(
            route.layout,
            {
                "params": [],
                "weight_decay": weight_decay,
                "spectral": True,
                "transposed": route.layout.transposed,
                "sections": route.layout.sections,
                "blocks": route.layout.blocks,
                "p_by_parameter": {},
            },
        )
        group["params"].append((route.name, route.parameter))
        own = tuple(first_p(name) for name in _matrix_names(route))
        if set(own) != {p}:
            group["p_by_parameter"][route.name] = own
    return list(groups.values())


def _first_p(name: str, options: SchattenOptions, transferred: Mapping[str, float]) -> float:
    otherwise = transferred.get(name, options.initial_p)
    return next((p for pattern, p in options.overrides.items() if matches(pattern, name)), otherwise)


def _adamw_group(routes: Iterable[Route], weight_decay: float) -> list[Group]:
    """Return the parameter group of these routes as a list, empty when there are none."""
    named = [(route.name, route.parameter) for route in routes]
    return [{"params": named, "weight_decay": weight_decay, "spectral": False}] if named else []


def _policy(
    model: nn.Module, routes: Sequence[Route], names: Sequence[str], options: SchattenOptions
) -> Policy | None:
    """Return what changes the p of the named matrices, None where it is fixed."""
    if options.p == "schedule":
        return ScheduledP(options.p_start, options.p_end, options.p_steps, names)
    if options.p == "adaptive" and names:
        layers = {route.name: route.module for route in routes if not set(_matrix_names(route)).isdisjoint(names)}
        return Adaptation(model, layers, _groups(names, options.p_groups), options)
    return None


def _groups(names: Sequence[str], patterns: Sequence[str]) -> dict[str, int]:
    """Return a number for each matrix: its own, or that of the first matrix that matches the same pattern."""
    require_matches("p_groups", patterns, names)
    first: dict[str, int] = {}
    groups = {}
    for number, name in enumerate(names):
        pattern = next((pattern for pattern in patterns if matches(pattern, name)), name)
        groups[name] = first.setdefault(pattern, number)
    return groups
