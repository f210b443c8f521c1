"""Optimizers of other packages in a comparison: which parameters they get, and Muon against torch's own."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.comparison import torch_muon
from benchmarks.comparison.peers import peer_optimizer
from hf_schatten import route_parameters


class WithMuonsGroups(torch.optim.SGD):
    """An optimizer whose groups say which use Muon, as those of other packages do."""

    def __init__(self, params, lr, use_adjusted_lr=False):
        self.adjusts = use_adjusted_lr
        super().__init__(params, lr)


def test_peers_get_the_matrices_of_our_routing_and_one_rate(monkeypatch):
    monkeypatch.setattr(torch.optim, "WithMuonsGroups", WithMuonsGroups, raising=False)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4))
    heads = ("4.weight",)
    plain = peer_optimizer("torch.optim.RMSprop", model, 3e-3, 0.1, heads)
    assert [group["weight_decay"] for group in plain.param_groups] == [0.1, 0.0]
    assert [len(group["params"]) for group in plain.param_groups] == [3, 3]
    muons = peer_optimizer("torch.optim.WithMuonsGroups", model, 3e-3, 0.1, heads)
    assert muons.adjusts
    assert [group["use_muon"] for group in muons.param_groups] == [True, False, False]
    assert muons.param_groups[0]["params"] == [model[0].weight, model[2].weight]
    assert muons.param_groups[1]["params"] == [model[4].weight]
    assert all(group["lr"] == 3e-3 for group in muons.param_groups)


def test_the_baseline_is_torch_muon_on_the_routed_matrices_and_adamw_on_the_rest(gpt2):
    torch.manual_seed(0)
    reference = type(gpt2)(gpt2.config)
    reference.load_state_dict(gpt2.state_dict())
    options = {"betas": (0.9, 0.999), "eps": 1e-8}
    optimizer = torch_muon.MuonAndAdamW(gpt2, lr=1e-2, weight_decay=0.1, **options)
    routed = {route.name for route in route_parameters(reference).to("schatten_p")}
    decayed = {route.name: route.decay for route in route_parameters(reference).routes}
    named = dict(reference.named_parameters())
    muon = torch.optim.Muon([named[name] for name in routed], 1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    others = [
        {
            "params": [W for name, W in named.items() if name not in routed and decayed[name] is decay],
            "weight_decay": x,
        }
        for decay, x in ((True, 0.1), (False, 0.0))
    ]
    adamw = torch.optim.AdamW(others, 1e-2, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for step in range(3):
        for name, W in gpt2.named_parameters():
            W.grad = torch.randn_like(W)
            named[name].grad = W.grad.clone()
        optimizer.step()
        scheduler.step()
        for other in (muon, adamw):
            for group in other.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            other.step()
    for name, W in gpt2.named_parameters():
        torch.testing.assert_close(W, named[name], atol=0, rtol=0)


def test_the_baseline_leaves_what_muon_does_not_take_to_adamw():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(4, 4))
    optimizer = torch_muon.MuonAndAdamW(model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)
    assert [[W.ndim for W in group["params"]] for group in optimizer.param_groups] == [[2], [4], [1, 1]]
