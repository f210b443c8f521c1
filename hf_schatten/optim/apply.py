"""The end of a step: the one place where the weights of matrices are written."""

from __future__ import annotations

import torch

from hf_schatten.distributed.owners import Delivered
from hf_schatten.distributed.pieces import local
from hf_schatten.linalg.many_matrices import add_updates
from hf_schatten.optim.finite_gradients import FiniteGradients
from hf_schatten.optim.matrix import Group, learning_rate


def apply_updates(delivered: Delivered, gradients: FiniteGradients) -> None:
    """Decay weights and add their updates."""
    items, weights, places, updates, factors = delivered
    groups = {id(item.group): item.group for item in items}
    of_group = {number: _rates(group) for number, group in groups.items()}  # a tensor is read once for each
    rates = [[item.own_ratio * rate for rate in of_group[id(item.group)]] for item in items]
    rate, decay = torch.tensor(rates, dtype=torch.float64).to(factors.device, non_blocking=True).unbind(1)
    kept = decay * gradients.keeps([item.parameter for item in items])
    add_updates(list(map(local, weights)), places, updates, factors * rate, kept)


def _rates(group: Group) -> tuple[float, float]:
    """Return what updates of a group and its weights are multiplied by before they are subtracted."""
    rate = learning_rate(group)
    return -rate if group["maximize"] else rate, rate * group["weight_decay"]
