"""Steps that differ from the one before: missing gradients, new groups, loaded states and other rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import together
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_schatten import SchattenP

SHAPES = [(6, 8), (9, 7), (5, 8), (8, 6), (7, 7), (12, 5)]
LATE = 4  # parameters from this one on belong to a group that is added after the first steps
# Parameters without a gradient on each step.
MISSING = [{0, 2}, {2}, set(), set(), {1, 5}, set(), {0, 1, 2, 3}, set(), set()]
ADDED, SAVED, LOADED, CHANGED, FIRST_STATE = 3, 4, 6, 7, 8  # steps before which these happen


def train(sharded: bool) -> dict[str, Any]:
    """Take steps with gradients that are the same on every process."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(columns, rows, bias=False) for rows, columns in SHAPES))
    if sharded:
        fully_shard(layers, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    weights = list(layers.parameters())
    optimizer = SchattenP([{"params": weights[:LATE]}], p=3.0, lr=1e-2)
    initial = optimizer.state_dict()
    generator = torch.Generator().manual_seed(1)
    after: list[list[Tensor]] = []
    for step, missing in enumerate(MISSING):
        if step == ADDED:
            optimizer.add_param_group({"params": weights[LATE:], "p": 1.5})
        if step == SAVED:
            saved = optimizer.state_dict()
            saved = saved | {"state": {key: _copied(state) for key, state in saved["state"].items()}}
        if step == LOADED:
            optimizer.load_state_dict(saved)
        if step == CHANGED:
            optimizer.param_groups[0].update(scale="muon", lr=2e-2)
        if step == FIRST_STATE:  # as it was before any step, with the group that has been added since
            groups = [initial["param_groups"][0], optimizer.state_dict()["param_groups"][1]]
            optimizer.load_state_dict(initial | {"param_groups": groups})
        for number, weight in enumerate(weights):
            gradient = torch.randn(weight.shape, generator=generator)
            if sharded:
                assert isinstance(weight, DTensor)
                gradient = distribute_tensor(gradient, weight.device_mesh, weight.placements)
            present = number not in missing and (number < LATE or step >= ADDED)
            weight.grad = gradient if present else None
        optimizer.step()
        after.append([_whole(weight.detach()).clone() for weight in weights])
    return {"after": after, "momenta": [_whole(optimizer.state[weight]["momentum"]) for weight in weights]}


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train_both_ways() -> dict[bool, dict[str, Any]]:
    return {sharded: train(sharded) for sharded in (False, True)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return what each of two processes gets of replicated and of sharded weights."""
    return together(train_both_ways, 2, tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_are_those_of_one_process_whatever_changes_between_steps(sharded, pair):
    alone = train(sharded=False)
    for result in (of_both[sharded] for of_both in pair):
        for step, (found, expected) in enumerate(zip(result["after"], alone["after"], strict=True)):
            for number, (one, other) in enumerate(zip(found, expected, strict=True)):
                torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5, msg=f"weight {number}, step {step}")
        torch.testing.assert_close(result["momenta"], alone["momenta"], atol=1e-6, rtol=1e-5)
    for before, after, missing in zip(alone["after"], alone["after"][1:], MISSING[1:], strict=False):
        assert all(torch.equal(before[number], after[number]) for number in missing)
