"""The baseline Muon: ``torch.optim.Muon`` for the matrices that ``schatten_p`` would route, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from hf_schatten import route_parameters


class MuonAndAdamW(Optimizer):
    """Two optimizers behind one interface, for a schedule that drives both.

    ``torch.optim.Muon`` takes matrices only, so experts and filters stay with AdamW, and fused projections stay whole.
    Its updates have AdamW's size (``match_rms_adamw``), as those of ``schatten_p`` have at p = inf.

    Args:
        model: The model; its parameters are routed as ``schatten_p`` routes them.
        lr: Learning rate of both.
        weight_decay: Decoupled, of matrices and embeddings.
        betas: AdamW's.
        eps: AdamW's.
    """

    def __init__(
        self, model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
    ) -> None:
        groups: dict[str, list[torch.Tensor]] = {"muon": [], "decayed": [], "rest": []}
        for route in route_parameters(model).routes:
            if route.destination == "schatten_p" and route.parameter.ndim == 2:
                groups["muon"].append(route.parameter)
            elif route.destination != "frozen":
                groups["decayed" if route.decay else "rest"].append(route.parameter)
        muon = Muon(groups["muon"], lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        others = [
            {"params": groups[name], "weight_decay": decay}
            for name, decay in (("decayed", weight_decay), ("rest", 0.0))
            if groups[name]
        ]
        # With adapters, there may be matrices alone.
        self.optimizers = [muon, *([AdamW(others, lr, betas=betas, eps=eps)] if others else [])]
        super().__init__([{"params": group["params"]} for group in self._groups()], {"lr": lr})

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of both, at the learning rates that a schedule has set."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for own, inner in zip(self.param_groups, self._groups(), strict=True):
            inner["lr"] = own["lr"]
        for optimizer in self.optimizers:
            optimizer.step()
        return loss
