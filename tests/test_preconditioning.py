"""Preconditioned updates against independent ones: torch.optim and plain loops over float64 SVDs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import hf_schatten
from hf_schatten import SchattenP
from hf_schatten.integration.checkpoint import CheckpointError, load_optimizer, save_optimizer
from hf_schatten.linalg import spectral_power_svd
from hf_schatten.optim.preconditioning import PRECONDITIONERS
from hf_schatten.optim.state import expected_state

SHAPES = [(12, 12), (8, 20), (20, 8)]
STEPS, LR, DECAY, BETA, BETA2, EPS = 20, 0.02, 0.1, 0.9, 0.99, 1e-8


class ExactSchattenP(SchattenP):
    """SchattenP with the spectral power by a float64 SVD, so that only rounding is left."""

    def direction(self, momenta, p):
        return spectral_power_svd(momenta, p).to(momenta.dtype)


def polar(X):
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


def weights_and_gradients(shape, dtype=torch.float64):
    torch.manual_seed(0)
    scales = torch.logspace(-2, 1, shape[1], dtype=dtype)  # so that preconditioning matters
    return torch.randn(shape, dtype=dtype), [scales * torch.randn(shape, dtype=dtype) for _ in range(STEPS)]


def schatten(cls, W, gradients, **options):
    """Return the weights after the steps of this class of optimizer."""
    parameter = nn.Parameter(W.clone())
    defaults = {"momentum": BETA, "betas": (0.9, BETA2), "eps": EPS, "weight_decay": DECAY}
    optimizer = cls([parameter], lr=LR, **(defaults | options))
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def sgd(W, gradients, *, nesterov, norm=None):
    """``torch.optim.SGD`` with decoupled decay, and the step's norm or its bias correction in the learning rate."""
    parameter = nn.Parameter(W.clone())
    optimizer = torch.optim.SGD([parameter], momentum=BETA, nesterov=nesterov)
    buffer = torch.zeros_like(W)
    for step, gradient in enumerate(gradients, start=1):
        buffer = BETA * buffer + gradient
        ahead = BETA * buffer + gradient if nesterov else buffer
        factor = norm / ahead.norm().item() if norm else (1 - BETA) / (1 - BETA ** (step + nesterov))
        optimizer.param_groups[0]["lr"] = LR * factor
        with torch.no_grad():
            parameter.mul_(1 - LR * DECAY)
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def adamw(W, gradients):
    parameter = nn.Parameter(W.clone())
    optimizer = torch.optim.AdamW([parameter], LR, betas=(BETA, BETA2), eps=EPS, weight_decay=DECAY)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def muadam(W, gradients, exponent=-0.25, nesterov=False):
    """``V^e ∘ polar(V^e ∘ M)``, of its own norm; with the exponent 0 it is Muon."""
    W, M, V = W.clone(), torch.zeros_like(W), torch.zeros_like(W)
    for step, G in enumerate(gradients, start=1):
        M = BETA * M + (1 - BETA) * G
        V = BETA2 * V + (1 - BETA2) * G**2
        ahead = BETA * M + (1 - BETA) * G if nesterov else M
        corrected = ahead / (1 - BETA ** (step + nesterov))
        D = ((V / (1 - BETA2**step)).sqrt() + EPS) ** (2 * exponent)
        W = (1 - LR * DECAY) * W - LR * D * polar(D * corrected)
    return W


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"p": 1, "nesterov": False}, lambda W, Gs: sgd(W, Gs, nesterov=False)),
        ({"p": 1, "nesterov": True}, lambda W, Gs: sgd(W, Gs, nesterov=True)),
        (
            {"p": 1, "scale": "match_rms_adamw"},
            lambda W, Gs: sgd(W, Gs, nesterov=True, norm=0.2 * math.sqrt(W.numel())),
        ),
        ({"p": math.inf}, lambda W, Gs: muadam(W, Gs, exponent=0, nesterov=True)),
        ({"p": 1, "nesterov": False, "precondition": "adam"}, adamw),
        ({"p": 1, "nesterov": False, "precondition": "muadam"}, adamw),
        ({"p": math.inf, "precondition": "muadam"}, lambda W, Gs: muadam(W, Gs, nesterov=True)),
        ({"p": math.inf, "precondition": "adam"}, lambda W, Gs: muadam(W, Gs, exponent=0, nesterov=True)),
        ({"p": 3, "precondition": "adam"}, None),
    ],
    ids=[
        "SGD",
        "SGD Nesterov",
        "normalised SGD",
        "Muon",
        "AdamW",
        "AdamW of muadam",
        "MuAdam",
        "Muon of adam",
        "p = 3",
    ],
)
def test_the_extremes_are_the_known_optimizers_to_rounding(shape, options, reference):
    W, gradients = weights_and_gradients(shape)
    ours = schatten(ExactSchattenP, W, gradients, **({"scale": "none"} | options))
    if reference is not None:
        torch.testing.assert_close(ours, reference(W, gradients), atol=1e-10, rtol=1e-10)
    else:  # between the extremes it is none of them
        for other in (adamw(W, gradients), muadam(W, gradients), muadam(W, gradients, exponent=0)):
            assert (ours - other).abs().max() > 1e-2


@pytest.mark.parametrize("shape", SHAPES)
def test_p_one_is_adamw_with_the_real_direction_in_float32(shape):
    W, gradients = weights_and_gradients(shape, torch.float32)
    ours = schatten(SchattenP, W, gradients, p=1, nesterov=False, scale="none", precondition="adam")
    torch.testing.assert_close(ours, adamw(W, gradients), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("shape", "rtol"), [((12, 12), 0.1), ((8, 20), 0.03), ((20, 8), 0.03)])
@pytest.mark.parametrize(("exponent", "precondition"), [(-0.25, "muadam"), (0.0, "adam")])
def test_p_infinity_with_the_real_direction_is_as_near_as_its_newton_schulz_steps(shape, rtol, exponent, precondition):
    """A square Gaussian matrix has singular values near zero, which eight steps do not lift to one."""
    W, gradients = weights_and_gradients(shape, torch.float32)
    options = {"p": math.inf, "nesterov": False, "scale": "none", "ns_steps": 8}
    ours = schatten(SchattenP, W, gradients, precondition=precondition, **options)
    expected = muadam(W.double(), [G.double() for G in gradients], exponent)
    moved = expected - (1 - LR * DECAY) ** STEPS * W
    assert (ours - expected).norm() <= rtol * moved.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_p_infinity_is_torch_muon_where_both_iterations_converge(shape):
    """torch computes in bfloat16, three digits; its coefficients here converge, unlike its defaults."""
    W, gradients = weights_and_gradients(shape, torch.float32)
    gradients = [polar(G) + 0.1 * G / G.norm() for G in gradients]  # of moderate condition
    options = {"p": math.inf, "scale": "muon", "precondition": "adam", "ns_steps": 8, "momentum": 0.2}
    ours = schatten(SchattenP, W, gradients, **options)
    theirs = nn.Parameter(W.clone())
    muon = torch.optim.Muon(
        [theirs], LR, DECAY, momentum=0.2, ns_coefficients=(2, -1.5, 0.5), ns_steps=30, adjust_lr_fn="original"
    )
    for gradient in gradients:
        theirs.grad = gradient.clone()
        muon.step()
    moved = theirs.detach() - (1 - LR * DECAY) ** STEPS * W
    assert (ours - theirs.detach()).norm() <= 0.03 * moved.norm()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("precondition", ["adam", "muadam"])
def test_gradients_of_any_size_precondition_alike(precondition, scale):
    """In float32 the squares of 1e-12 are representable, and so are those of 1e12."""
    W, gradients = weights_and_gradients((8, 20), torch.float32)
    options = {"p": 2, "precondition": precondition, "eps": 0.0}
    ours = schatten(SchattenP, W, [scale * G for G in gradients], **options)
    torch.testing.assert_close(ours, schatten(SchattenP, W, gradients, **options), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("precondition", ["adam", "muadam"])
def test_a_zero_gradient_moves_nothing_but_the_decay(precondition):
    W = torch.ones(4, 6)
    ours = schatten(SchattenP, W, [torch.zeros(4, 6)] * 2, p=2, precondition=precondition)
    torch.testing.assert_close(ours, (1 - LR * DECAY) ** 2 * W, atol=1e-7, rtol=1e-7)


def test_the_exponent_is_scaled_with_each_matrixs_own_p():
    s = torch.tensor([1.0, 0.5, 0.25, 0.0, -0.1])
    expected = [-1 / (1 / s + 1) if s > 0 else 0.0 for s in s.tolist()]  # 2e = -1/(p + 1)
    torch.testing.assert_close(PRECONDITIONERS["adam"].power(s), torch.tensor(expected), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(PRECONDITIONERS["muadam"].power(s), torch.full((5,), -0.5), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("precondition", "shapes"),
    [
        ("none", {}),
        ("adam", {"second_moment": (2, 8, 5)}),
        ("muadam", {"second_moment": (2, 8, 5)}),
    ],
)
def test_the_state_holds_what_the_group_asks_for(precondition, shapes):
    W = nn.Parameter(torch.randn(2, 8, 5, dtype=torch.bfloat16))
    group = {"params": [("w", W)], "parts": (("gate", 4), ("up", 4)), "precondition": precondition}
    plain = SchattenP([{"params": [("w", nn.Parameter(W.detach().clone()))], "parts": group["parts"]}])
    optimizer = SchattenP([group])
    W.grad = torch.randn_like(W)
    optimizer.step()
    found = {key: tuple(value.shape) for key, value in optimizer.state[W].items()}
    assert {key: found[key] for key in found.keys() - expected_state(plain.param_groups)["w"].keys()} == shapes
    assert {key: value.shape for key, value in expected_state(optimizer.param_groups)["w"].items()} == found
    assert all(optimizer.state[W][key].dtype == torch.float32 for key in shapes)


@pytest.mark.parametrize("precondition", ["adam", "muadam"])
def test_a_preconditioned_run_resumes_exactly_and_another_second_moment_is_refused(llama, tmp_path, precondition):
    twin = copy.deepcopy(llama)
    make = lambda model, kind: hf_schatten.create_schatten_optimizer(  # noqa: E731
        model, p=3, precondition=kind, verbose=False
    )
    optimizer, resumed = make(llama, precondition), make(twin, precondition)
    tokens = torch.randint(0, 64, (2, 16))

    def step(model, optimizer):
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    step(llama, optimizer)
    save_optimizer(optimizer, tmp_path)
    twin.load_state_dict(llama.state_dict())
    load_optimizer(resumed, tmp_path)
    step(llama, optimizer)
    step(twin, resumed)
    for mine, other in zip(llama.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)
    with pytest.raises(CheckpointError, match="second_moment"):
        load_optimizer(make(twin, "none"), tmp_path)


def test_an_unknown_name_is_refused_with_the_allowed_ones():
    with pytest.raises(ValueError, match="precondition='adamm' is not allowed: one of none, adam, muadam"):
        SchattenP([nn.Parameter(torch.ones(2, 2))], precondition="adamm")
