"""Parameters and gradients of every kind: each works as in torch, or is refused with its name and the fix."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hf_schatten
from hf_schatten import SchattenP
from hf_schatten.integration.checkpoint import load_optimizer, save_optimizer

BETA = 0.9


def optimizer_of(*parameters, spectral=True, **options):
    named = [(f"weight{number}", parameter) for number, parameter in enumerate(parameters)]
    return SchattenP([{"params": named, "spectral": spectral}], lr=0.1, **options)


def step(optimizer, *gradients):
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


@pytest.mark.parametrize("spectral", [True, False])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 3, 4), (3, 0, 4), (2, 0, 1, 1)])
def test_a_parameter_without_elements_is_left_out(shape, spectral):
    empty, whole, alone = (
        nn.Parameter(torch.empty(shape)),
        nn.Parameter(torch.ones(3, 4)),
        nn.Parameter(torch.ones(3, 4)),
    )
    both, one = optimizer_of(empty, whole, spectral=spectral), optimizer_of(alone, spectral=spectral)
    for _ in range(2):
        gradient = torch.randn(3, 4)
        step(both, torch.empty(shape), gradient)
        step(one, gradient)
    assert torch.equal(whole, alone)
    again = optimizer_of(empty, whole, spectral=spectral)
    again.load_state_dict(both.state_dict())
    step(again, torch.empty(shape), gradient)


@pytest.mark.parametrize("p", [1.0, 4.0, math.inf, -5.0])
@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1), (3, 1, 4), (2, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_vector_moves_along_its_momentum_by_the_pinned_length(shape, p, dtype):
    """A matrix with a side of 1 has one singular value, so that every p gives it the direction of its momentum."""
    weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
    gradient = torch.randn(shape).to(dtype)
    step(optimizer_of(weight, p=p, scale="match_rms_adamw", weight_decay=0.0), gradient)
    matrices = gradient.double().view(shape[0] if len(shape) == 3 else 1, -1)
    length = 0.1 * 0.2 * math.sqrt(matrices.shape[1])
    expected = -length * matrices / matrices.norm(dim=1, keepdim=True)
    rounding = max(torch.finfo(dtype).eps, 0.02)  # of the Newton-Schulz table
    torch.testing.assert_close(weight.detach().double().view_as(expected), expected, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("kind", ["complex64", "complex128"])
def test_complex_parameters_are_updated_as_by_torch_and_refused_as_matrices(kind):
    dtype = getattr(torch, kind)
    weight, reference = (nn.Parameter(torch.ones(3, 4, dtype=dtype)) for _ in range(2))
    ours = optimizer_of(weight, spectral=False, weight_decay=0.1)
    theirs = torch.optim.AdamW([reference], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        gradient = torch.randn(3, 4, dtype=dtype)
        step(ours, gradient)
        step(theirs, gradient)
    assert torch.equal(weight, reference)
    with pytest.raises(ValueError, match=r"'weight0' is complex.*spectral=False"):
        step(optimizer_of(weight), gradient)


@pytest.mark.parametrize("spectral", [True, False])
def test_a_sparse_gradient_is_refused_with_the_fix_and_nothing_moves(spectral):
    sparse, dense = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    gradient = torch.sparse_coo_tensor(torch.tensor([[0, 1]]), torch.ones(2, 4), (3, 4), check_invariants=True)
    with pytest.raises(ValueError, match=r"'weight1' is sparse.*sparse=False"):
        step(optimizer_of(dense, sparse, spectral=spectral), torch.ones(3, 4), gradient)
    assert torch.equal(dense, torch.ones(3, 4))


def test_a_sparse_embedding_is_refused_by_its_name():
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = hf_schatten.create_schatten_optimizer(model, verbose=False)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"'0.weight' is sparse"):
        optimizer.step()


@pytest.mark.parametrize("spectral", [True, False])
def test_elements_that_share_memory_are_refused(spectral):
    with pytest.raises(ValueError, match=r"'weight0' share one place.*clone"):
        step(optimizer_of(nn.Parameter(torch.ones(4).expand(3, 4)), spectral=spectral), torch.ones(3, 4))


def test_parameters_that_share_memory_are_updated_in_turn():
    memory = torch.zeros(3, 4)
    one, two = nn.Parameter(memory), nn.Parameter(memory)
    step(optimizer_of(one, two, weight_decay=0.0), torch.ones(3, 4), torch.ones(3, 4))
    alone = nn.Parameter(torch.zeros(3, 4))
    step(optimizer_of(alone, weight_decay=0.0), torch.ones(3, 4))
    torch.testing.assert_close(memory, 2 * alone.detach(), rtol=1e-6, atol=1e-7)


GRADIENTS = {
    "one number": ((3, 4), lambda: torch.randn(()).expand(3, 4)),
    "one row": ((3, 4), lambda: torch.randn(4).expand(3, 4)),
    "of experts": ((2, 3, 4), lambda: torch.randn(4).expand(2, 3, 4)),
    "of filters": ((3, 4, 2, 2), lambda: torch.randn(()).expand(3, 4, 2, 2)),
    "channels last": ((3, 4, 2, 2), lambda: torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last)),
    "filters in any order": ((4, 3, 2, 5), lambda: torch.randn(5, 4, 2, 3).permute(1, 3, 2, 0)),
    "every second element": ((3, 4), lambda: torch.randn(6, 8)[::2, ::2]),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_strides_of_a_gradient_do_not_matter(name):
    shape, make = GRADIENTS[name]
    weight, reference = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    ours, other = optimizer_of(weight), optimizer_of(reference)
    for _ in range(2):
        gradient = make()
        step(ours, gradient)
        step(other, gradient.contiguous())
    torch.testing.assert_close(weight, reference, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_none_now_and_then_leaves_its_matrix_alone():
    """Each matrix goes where it would go with an optimizer of its own that steps where it has a gradient."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    references = [nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    optimizer, others = optimizer_of(*weights), [optimizer_of(reference) for reference in references]
    for number in range(6):
        gradients = [torch.randn(3, 4), torch.randn(3, 4) if number % 3 else None]
        step(optimizer, *gradients)
        for other, gradient in zip(others, gradients, strict=True):
            if gradient is not None:
                step(other, gradient)
    for weight, reference in zip(weights, references, strict=True):
        torch.testing.assert_close(weight, reference, rtol=1e-5, atol=1e-6)


def test_a_group_that_is_added_after_some_steps_begins_anew():
    first, second, alone = (nn.Parameter(torch.ones(3, 4)) for _ in range(3))
    optimizer, other = optimizer_of(first), optimizer_of(alone)
    step(optimizer, torch.randn(3, 4))
    optimizer.add_param_group({"params": [("weight1", second)]})
    for _ in range(2):
        gradient = torch.randn(3, 4)
        step(optimizer, torch.randn(3, 4), gradient)
        step(other, gradient)
    torch.testing.assert_close(second, alone, rtol=1e-5, atol=1e-6)


def test_what_is_unfrozen_later_is_warned_of_once_with_a_fix_that_works(caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = hf_schatten.create_schatten_optimizer(model, 0.1, verbose=False)
    caplog.clear()

    def train():
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()

    train()
    assert not caplog.messages
    model[0].requires_grad_(True)
    before = model[0].weight.detach().clone()
    train()
    train()
    (message,) = caplog.messages
    assert "2 parameters" in message
    assert "0.weight, 0.bias" in message
    assert torch.equal(model[0].weight, before)
    optimizer.add_param_group({"params": [("0.weight", model[0].weight)], "spectral": True})
    optimizer.add_param_group({"params": [("0.bias", model[0].bias)], "spectral": False})
    train()
    assert not torch.equal(model[0].weight, before)


def test_what_is_unfrozen_and_added_at_once_is_not_warned_of(caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = hf_schatten.create_schatten_optimizer(model, 0.1, verbose=False)
    caplog.clear()
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].named_parameters("0"))[:1], "spectral": True})
    optimizer.add_param_group({"params": list(model[0].named_parameters("0"))[1:], "spectral": False})
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    assert not caplog.messages


def presence(signs: list[int], nesterov: bool) -> float:
    """Return the share of gradients other than zero among all, by the weights that the momentum gives them."""
    if nesterov:  # the last gradient comes once more
        signs = [*signs, signs[-1]]
    weights = [BETA ** (len(signs) - 1 - number) for number in range(len(signs))]
    return sum(w for w, sign in zip(weights, signs, strict=True) if sign) / sum(weights)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("p", [2.0, math.inf, -5.0])
@pytest.mark.parametrize("options", [{}, {"scale": "muon"}, {"precondition": "adam"}, {"step_rule": "ball"}], ids=str)
def test_an_expert_without_tokens_comes_to_rest(p, nesterov, options):
    """Lengths are those of an expert with tokens, times the share of gradients that are not zero in the momentum."""
    if options.get("step_rule") == "ball" and p < 0:
        pytest.skip("its p is at least 1")
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(2, 6, 4, dtype=torch.float64))
    optimizer = optimizer_of(weight, p=p, momentum=BETA, nesterov=nesterov, weight_decay=0.0, **options)
    gradient, signs = torch.randn(2, 6, 4, dtype=torch.float64), [1, 1, 0, 1, *[0] * 120]
    for number, sign in enumerate(signs, start=1):
        before = weight.detach().clone()
        step(optimizer, torch.stack([gradient[0], sign * gradient[0]]))  # the same matrix with tokens and without
        busy, idle = (weight.detach() - before).flatten(1).norm(dim=1).tolist()
        assert idle == pytest.approx(busy * presence(signs[:number], nesterov), rel=2e-2, abs=1e-12)
    assert idle < 1e-6
    moved = weight.detach()[1].clone()
    step(optimizer, torch.stack([gradient[0], 0 * gradient[0]]))
    assert (weight.detach()[1] - moved).norm() < 1e-6


def test_gradients_of_zeros_do_nothing_where_the_length_is_the_momentums_own():
    """``p=1`` with ``scale=none`` is SGD, whose steps grow smaller by themselves."""
    weight, reference = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(6, 4))
    ours = optimizer_of(weight, p=1.0, scale="none", momentum=BETA, nesterov=False, weight_decay=0.0)
    average, gradient = torch.zeros(6, 4), torch.randn(6, 4)
    for number in range(1, 40):
        now = gradient * (number % 3 == 0)
        step(ours, now)
        average = BETA * average + (1 - BETA) * now
        reference.data -= 0.1 * average / (1 - BETA**number)
    torch.testing.assert_close(weight, reference, rtol=1e-4, atol=1e-6)


def test_a_step_that_is_skipped_is_no_gradient_of_zeros():
    weight, reference = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(6, 4))
    ours, other = optimizer_of(weight), optimizer_of(reference)
    for number in range(6):
        gradient = torch.randn(6, 4)
        step(ours, gradient if number % 2 else torch.full((6, 4), math.nan))
        if number % 2:
            step(other, gradient)
    torch.testing.assert_close(weight, reference, rtol=1e-5, atol=1e-6)


def test_a_gradient_too_small_for_its_norm_is_not_zero():
    """The Euclidean norm of such a gradient in float32 is 0, and the largest of its elements is not."""
    weight = nn.Parameter(torch.zeros(6, 4))
    optimizer = optimizer_of(weight)
    step(optimizer, torch.full((6, 4), 1e-30))
    assert not optimizer.state[weight]["absence"].any()


def test_a_state_of_before_gradients_of_zeros_were_counted_is_loaded():
    weight = nn.Parameter(torch.ones(6, 4))
    saved, fresh = optimizer_of(weight), optimizer_of(weight)
    step(saved, torch.randn(6, 4))
    state = saved.state_dict()
    del state["state"][0]["absence"]
    fresh.load_state_dict(state)
    step(fresh, torch.randn(6, 4))
    assert fresh.state[weight]["absence"].tolist() == [0.0]


def test_a_file_of_before_gradients_of_zeros_were_counted_is_loaded(tmp_path):
    weight = nn.Parameter(torch.ones(6, 4))
    saved, fresh = optimizer_of(weight), optimizer_of(weight)
    step(saved, torch.randn(6, 4))
    save_optimizer(saved, tmp_path)
    tensors = load_file(tmp_path / "optimizer.safetensors")
    save_file(
        {name: each for name, each in tensors.items() if "absence" not in name}, tmp_path / "optimizer.safetensors"
    )
    load_optimizer(fresh, tmp_path)
    assert fresh.state[weight]["absence"].tolist() == [0.0]
    assert fresh.steps_taken() == 1
