"""The probe counts every training row once, whatever wraps the forward, and touches no random generator."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_schatten.probe import InputProbe, RowSample


class Net(nn.Module):
    """Two layers, the second behind a checkpoint of the asked kind."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).relu()
        if self.use_reentrant is None:
            return self.second(hidden)
        return checkpoint(self.second, hidden, use_reentrant=self.use_reentrant)


def armed_probe(net: nn.Module, capacity: int = 1000) -> InputProbe:
    probe = InputProbe(net, {"first": net.first, "second": net.second}, capacity)
    probe.armed = True
    return probe


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_each_row_is_sampled_once_over_accumulated_micro_batches(use_reentrant):
    torch.manual_seed(0)
    net = Net(use_reentrant)
    probe = armed_probe(net)
    batches = torch.randn(3, 5, 2, 3)  # micro-batches × sequences × tokens × features
    for batch in batches:
        net(batch).sum().backward()
        with torch.no_grad():
            net(batch)  # a reference forward, as preference training makes
        net.eval()
        net(batch)
        net.train()
    samples = probe.take()
    torch.testing.assert_close(samples["first"], batches.reshape(-1, 3), atol=0.0, rtol=0.0)
    expected = net.first(batches).relu().reshape(-1, 4).detach()
    torch.testing.assert_close(samples["second"], expected, atol=1e-6, rtol=1e-6)


def test_nothing_is_sampled_unless_armed():
    net = Net(None)
    probe = armed_probe(net)
    probe.armed = False
    net(torch.randn(2, 3)).sum().backward()
    assert probe.take() == {}


def test_take_forgets_and_remove_ends():
    net = Net(None)
    probe = armed_probe(net)
    net(torch.randn(2, 3)).sum().backward()
    assert set(probe.take()) == {"first", "second"}
    assert probe.take() == {}
    probe.remove()
    net(torch.randn(2, 3)).sum().backward()
    assert probe.take() == {}


def test_the_global_random_generator_is_untouched():
    net = Net(None)
    probe = armed_probe(net, capacity=4)
    batch = torch.randn(64, 3)
    before = torch.get_rng_state()
    net(batch)
    probe.take()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("capacity", [1, 7, 64, 1000])
@pytest.mark.parametrize("pieces", [2, 8, 37])
def test_the_sample_does_not_depend_on_the_micro_batches(capacity, pieces):
    rows = torch.arange(600.0).unsqueeze(1)
    whole, cut = RowSample(capacity), RowSample(capacity)
    whole.add(rows)
    for piece in rows.tensor_split(pieces):
        cut.add(piece)
    assert torch.equal(whole.rows(), cut.rows())
    assert len(whole.rows()) <= capacity


def test_the_sample_is_spread_evenly_over_positions_of_a_sequence():
    length = 64  # a power of two, with which a fixed stride would meet the same positions again and again
    sample = RowSample(capacity=1024)
    sample.add(torch.arange(64 * length).unsqueeze(1) % length)
    counts = torch.bincount(sample.rows().flatten(), minlength=length)
    assert 0.8 * 1024 < len(sample.rows()) <= 1024
    assert counts.max() - counts.min() <= 0.5 * counts.float().mean()
