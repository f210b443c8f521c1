"""From a model to its optimizer: routing, parameter groups and the estimation of p, in one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .adaptation import Adaptation
from .distributed import is_main_process, refuse_unsupported_engines
from .optimizer import SchattenP
from .options import SchattenOptions
from .routing import Route, route_parameters


def create_schatten_optimizer(
    model: nn.Module,
    lr: float = 1e-3,
    *,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    verbose: bool = True,
    **options: Any,
) -> SchattenP:
    """Make the optimizer of a model: matrices to the Schatten-p update, everything else to AdamW.

    With the default ``p="adaptive"``, hooks on the model sample the inputs of the routed layers on due steps, and
    the optimizer re-estimates each layer's p in its own ``step()``: a bare training loop needs nothing else.

    Args:
        model: a ``PreTrainedModel``, a PEFT model or any ``nn.Module``; of the latter, name the output head in
            ``exclude``.
        lr: learning rate of AdamW; that of the matrices is ``lr * schatten_lr_ratio``. With the default scale rule
            AdamW's customary values fit both. Default 1e-3.
        weight_decay: decoupled weight decay of matrices and embeddings; vectors get none. Default 0.1.
        betas: AdamW's decays. Default (0.9, 0.999).
        eps: AdamW's epsilon. Default 1e-8.
        verbose: print the routing table, on the main process. Default True.
        **options: fields of :class:`SchattenOptions`, such as ``p=4`` or ``p_interval=50``.

    Raises:
        OptionError: on an unknown or malformed option.
        RoutingError: when no matrix is routed, or an ``exclude`` pattern matches nothing.
        UnsupportedEngineError: when the model is wrapped by DeepSpeed or FSDP version 1.

    Example:
        >>> optimizer = hf_schatten.create_schatten_optimizer(model, lr=1e-3, p_interval=50)
        >>> loss = model(**batch).loss
        >>> loss.backward()
        >>> optimizer.step()
    """
    parsed = SchattenOptions.from_mapping(options)
    refuse_unsupported_engines(model)
    routing = route_parameters(model, parsed.exclude)
    if verbose and is_main_process():
        print(f"schatten_p routes the parameters of {type(model).__name__} as follows:\n{routing}", flush=True)
    matrices, others = routing.to("schatten_p"), routing.to("adamw")
    groups = [
        *_group(
            (route for route in matrices if not route.transposed),
            weight_decay,
            spectral=True,
            transposed=False,
        ),
        *_group((route for route in matrices if route.transposed), weight_decay, spectral=True, transposed=True),
        *_group((route for route in others if route.decay), weight_decay, spectral=False),
        *_group((route for route in others if not route.decay), 0.0, spectral=False),
    ]
    optimizer = SchattenP(
        groups,
        lr,
        p=parsed.initial_p,
        momentum=parsed.momentum,
        nesterov=parsed.nesterov,
        scale=parsed.scale,
        lr_ratio=parsed.schatten_lr_ratio,
        betas=betas,
        eps=eps,
        ns_steps=parsed.ns_steps,
        workspace_mib=parsed.workspace_mib,
    )
    optimizer.options = parsed
    if parsed.adaptive:
        optimizer.adapt(Adaptation(model, {route.name: route.module for route in matrices}, parsed))
    return optimizer


def _group(routes: Iterable[Route], weight_decay: float, **flags: bool) -> list[dict[str, Any]]:
    """Return the parameter group of these routes as a list, empty when there are none."""
    named = [(route.name, route.parameter) for route in routes]
    return [{"params": named, "weight_decay": weight_decay, **flags}] if named else []
