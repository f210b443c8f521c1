"""The optimizers that are compared, by a text: AdamW, Muon, options of the Schatten-p update, and its controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.comparison.peers import peer_optimizer
from benchmarks.comparison.torch_muon import MuonAndAdamW
from hf_schatten import SchattenP, create_schatten_optimizer
from hf_schatten.exponent import MIN_EXPONENT, p_of
from hf_schatten.optim.policy import Optimized, Policy

if TYPE_CHECKING:
    from benchmarks.comparison.regime import Regime

SHUFFLED = "shuffled:"  # before options

_BETAS = (0.9, 0.95)
_LARGEST_RANDOM = 0.2  # 1/p of a random p


class Shuffled(Policy):
    """Has another policy estimate, and gives each matrix the p of another one: a control of one permutation a run."""

    def __init__(self, inner: Policy, seed: int) -> None:
        super().__init__(inner.matrices)
        self._inner, self._seed = inner, seed
        self._estimated: list[torch.Tensor] = []  # before the permutation

    def before_update(self, optimizer: Optimized) -> None:
        """Estimate from what would be each matrix' own p, and permute."""
        matrices = list(optimizer.matrices())
        for matrix, p in zip(matrices, self._estimated, strict=False):
            matrix.p.copy_(p)
        self._inner.before_update(optimizer)
        self._estimated = [matrix.p.clone() for matrix in matrices]
        order = torch.randperm(len(matrices), generator=torch.Generator().manual_seed(self._seed)).tolist()
        for matrix, number in zip(matrices, order, strict=True):
            matrix.p.copy_(self._estimated[number])

    def observe(self, *arguments: Any) -> None:
        """Let the other policy see the updates."""
        self._inner.observe(*arguments)

    def after_update(self, optimizer: Optimized) -> None:
        """Let the other policy prepare the next step."""
        self._inner.after_update(optimizer)


def make_optimizer(candidate: str, regime: Regime, model: nn.Module, rate: float, seed: int) -> torch.optim.Optimizer:
    """Make the optimizer of a run.

    Args:
        candidate: ``adamw``, or with another second beta ``adamw:0.999``; ``muon``; ``random`` (1/p of each matrix is
            drawn once); the class of another package (:mod:`benchmarks.comparison.peers`); options of the optimizer
            such as ``p=-5``, these after ``shuffled:``, or before kinds of layers with another p: ``p=-4@query=inf``.
        regime: what is trained.
        model: its model.
        rate: learning rate.
        seed: of what is random in a candidate.
    """
    common: dict[str, Any] = {"weight_decay": regime.weight_decay, "betas": _BETAS}
    if candidate.startswith("adamw"):
        common["betas"] = (_BETAS[0], float(candidate.partition(":")[2] or _BETAS[1]))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        vectors = [parameter for parameter in trained if parameter.ndim < 2]
        matrices = [parameter for parameter in trained if parameter.ndim >= 2]
        groups: list[dict[str, Any]] = [
            {"params": matrices},
            *([{"params": vectors, "weight_decay": 0.0}] if vectors else []),
        ]
        return torch.optim.AdamW(groups, rate, **common)
    if candidate == "muon":
        return MuonAndAdamW(model, lr=rate, eps=1e-8, **common)
    if "=" not in candidate and "." in candidate:
        return peer_optimizer(candidate, model, rate, regime.weight_decay, regime.heads)
    text, *kinds = candidate.removeprefix(SHUFFLED).split("@")
    options: dict[str, Any] = dict(pair.split("=") for pair in ("p=-4" if text == "random" else text).split(","))
    if options["p"] == "schedule":
        options["p_schedule"] += f":{regime.steps}"
    elif options["p"] == "adaptive":
        options["p_interval"] = regime.interval
    p_of_kind = dict(each.split("=") for each in kinds)
    options["p_overrides"] = tuple(f"{regime.kinds[kind]}:{p}" for kind, p in p_of_kind.items())
    if text == "random":
        plain = make_optimizer("p=-4", regime, model, rate, seed)
        assert isinstance(plain, SchattenP)
        options["p_overrides"] = _random_p([matrix.name for matrix in plain.matrices()], seed)
    exclude = tuple(regime.heads)
    optimizer = create_schatten_optimizer(model, rate, exclude=exclude, verbose=False, **common, **options)
    if candidate.startswith(SHUFFLED) and optimizer.policy is not None:
        optimizer.policy = Shuffled(optimizer.policy, seed)  # follow() would take the other policy's hooks away
    return optimizer


def _random_p(names: Sequence[str], seed: int) -> tuple[str, ...]:
    """Return an override for each matrix, 1/p uniform in [-0.25, 0.2]."""
    drawn = torch.rand(len(names), generator=torch.Generator().manual_seed(seed))
    exponents = MIN_EXPONENT + (_LARGEST_RANDOM - MIN_EXPONENT) * drawn.double()
    return tuple(f"{name}:{p_of(s)!r}" for name, s in zip(names, exponents.tolist(), strict=True))
