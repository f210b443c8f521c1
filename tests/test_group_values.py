"""What a parameter group may hold: every value is checked where it enters, and where it is edited later."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hf_schatten
from hf_schatten import OptionError, SchattenP

BAD: dict[str, list[Any]] = {
    "lr": [-1.0, math.nan, math.inf, "1e-3", None, True, torch.tensor([1e-3, 1e-3]), torch.tensor(-1.0)],
    "weight_decay": [-1.0, math.nan, "0.1"],
    "eps": [-1.0, math.nan],
    "betas": [0.9, (0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan), ("0.9", "0.99")],
    "momentum": [1.5, 1.0, -0.1, math.nan, "0.9"],
    "lr_ratio": [0.0, -1.0, math.inf, math.nan, "1"],
    "p": [0.5, -3.0, math.nan],
    "step_rule": ["bal"],
    "scale": ["adam"],
    "precondition": ["shampoo"],
}
ELSEWHERE = {
    "ns_steps": 4,
    "foreach": True,
    "fused": True,
    "capturable": True,
    "differentiable": True,
    "amsgrad": True,
}
CASES = [(name, value) for name, values in BAD.items() for value in values]


def matrices(count=1):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(6, 4)) for _ in range(count)]


def step(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def in_constructor(name, value):
    SchattenP([{"params": matrices(), name: value}])


def in_added_group(name, value):
    optimizer = SchattenP(matrices())
    try:
        optimizer.add_param_group({"params": matrices(), name: value})
    finally:
        assert len(optimizer.param_groups) == 1


def edited_later(name, value):
    optimizer = SchattenP(matrices())
    step(optimizer)
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    optimizer.param_groups[0][name] = value
    try:
        for _ in range(2):  # the second refuses it too
            with pytest.raises(OptionError):
                step(optimizer)
        step(optimizer)
    finally:
        assert torch.equal(optimizer.param_groups[0]["params"][0], before)


@pytest.mark.parametrize(("name", "value"), [*CASES, *ELSEWHERE.items()], ids=str)
@pytest.mark.parametrize("enter", [in_constructor, in_added_group, edited_later])
def test_a_value_out_of_range_is_refused_by_name(enter: Callable[[str, Any], None], name, value):
    with pytest.raises(OptionError, match=f"{name}=.*not"):
        enter(name, value)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, value in CASES if name in ("lr", "eps", "betas")])
def test_the_factory_refuses_them_too(name, value):
    with pytest.raises(OptionError, match=rf"\b{name}\b"):
        hf_schatten.create_schatten_optimizer(nn.Sequential(nn.Linear(4, 6)), verbose=False, **{name: value})


@pytest.mark.parametrize("key", ELSEWHERE)
def test_what_asks_for_nothing_is_allowed(key):
    step(SchattenP([{"params": matrices(), key: False}, {"params": matrices(), key: None}]))


def test_notes_of_others_in_a_group_are_left_alone():
    step(SchattenP([{"params": matrices(), "name": "decoder", "initial_lr": 1.0, "lr_scale": 0.5}]))


@pytest.mark.parametrize("key", ["spectral", "transposed", "precondition", "parts"])
def test_what_the_state_depends_on_cannot_change_after_a_step(key):
    values = {"spectral": False, "transposed": True, "precondition": "adam", "parts": (("a", 2), ("b", 4))}
    optimizer = SchattenP(matrices())
    optimizer.param_groups[0][key] = values[key]
    optimizer.param_groups[0][key] = optimizer.defaults[key]
    step(optimizer)
    optimizer.param_groups[0][key] = values[key]
    with pytest.raises(OptionError, match=f"{key}=.*new optimizer"):
        step(optimizer)
    optimizer.param_groups[0][key] = optimizer.defaults[key]
    step(optimizer)


def test_an_edited_p_is_the_p_of_the_matrices():
    edited, reference = matrices(2), matrices(2)
    optimizer = SchattenP([{"params": [("one", edited[0])]}, {"params": [("two", edited[1])]}], p=2.0)
    other = SchattenP([{"params": [("one", reference[0])], "p": 4.0}, {"params": [("two", reference[1])]}], p=2.0)
    optimizer.param_groups[0]["p"] = 4.0  # before the first step
    for p in (4.0, math.inf):
        optimizer.param_groups[0]["p"] = p
        if other.state:
            next(other.matrices()).p.fill_(p)
        step(optimizer)
        step(other)
        assert list(optimizer.learned_p().values()) == [p, 2.0]
    assert all(torch.equal(one, two) for one, two in zip(edited, reference, strict=True))


def test_a_p_that_is_learned_cannot_be_edited():
    model = nn.Sequential(nn.Linear(4, 6))
    optimizer = hf_schatten.create_schatten_optimizer(model, p="adaptive", verbose=False)
    step(optimizer)
    optimizer.param_groups[0]["p"] = 4.0
    for _ in range(2):
        with pytest.raises(OptionError, match=r"p=4.0 .*p=adaptive.*p_overrides"):
            step(optimizer)
    optimizer.stop_following()
    step(optimizer)
    assert set(optimizer.learned_p().values()) == {4.0}


@pytest.mark.parametrize("spectral", [True, False])
def test_maximize_goes_up_as_far_as_its_opposite_goes_down(spectral):
    (up,), (down,) = matrices(), matrices()
    climber = SchattenP([{"params": [up], "spectral": spectral}], maximize=True, weight_decay=0.1, p=3.0)
    walker = SchattenP([{"params": [down], "spectral": spectral}], weight_decay=0.1, p=3.0)
    for _ in range(3):
        gradient = torch.randn(6, 4)
        up.grad, down.grad = -gradient, gradient
        climber.step()
        walker.step()
    torch.testing.assert_close(up, down, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("lr", [torch.tensor(0.01), torch.tensor([0.01]), np.float64(0.01), np.float32(0.01), 1])
def test_a_learning_rate_of_any_kind_of_number_is_that_number(lr):
    pair = []
    for rate in (lr, float(lr)):
        weights = matrices(2)
        optimizer = SchattenP([{"params": weights[:1]}, {"params": weights[1:], "spectral": False}], lr=rate)
        step(optimizer)
        step(optimizer)
        pair += weights
    assert torch.equal(pair[0], pair[2])
    assert torch.equal(pair[1], pair[3])


def test_a_schedule_moves_a_tensor_as_it_moves_a_number():
    pair = []
    for rate in (torch.tensor(0.5), 0.5):
        weights = matrices()
        optimizer = SchattenP(weights, lr=rate)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(3):
            step(optimizer)
            schedule.step()
        pair += weights
    assert torch.equal(*pair)


def run(start, steps, interval):
    """Take steps in float32 whatever the default dtype is; return weights, counters and numbers of estimates.

    Where ``start`` is above 0, the counters go from 1 to this number after the first step.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.float32), nn.LayerNorm(4, dtype=torch.float32))
    optimizer = hf_schatten.create_schatten_optimizer(model, 1e-3, verbose=False, p="adaptive", p_interval=interval)
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(8, 4, generator=generator, dtype=torch.float32)
    estimates = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()
        estimates.append(optimizer.policy.estimates)
        for state in optimizer.state.values() if start and len(estimates) == 1 else ():
            state["step"].fill_(start)
    counters = [float(state["step"]) for state in optimizer.state.values()]
    return [weight.detach().clone() for weight in model.parameters()], counters, estimates


# In bfloat16 a counter stops at 256, in float16 at 2048.
@pytest.mark.parametrize(
    ("start", "steps", "interval", "expected_count"),
    [(2000, 60, 10, 5), pytest.param(0, 3000, 100, 31, marks=pytest.mark.slow)],
)
def test_the_default_dtype_changes_no_counter_no_estimate_and_no_weight(start, steps, interval, expected_count):
    expected_weights, counters, expected_estimates = run(start, steps, interval)
    assert counters == [max(1, start) - 1.0 + steps] * 4
    assert expected_estimates[-1] == expected_count
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            torch.set_default_dtype(dtype)
            weights, found_counters, estimates = run(start, steps, interval)
            assert found_counters == counters
            assert estimates == expected_estimates
            for found, expected in zip(weights, expected_weights, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    finally:
        torch.set_default_dtype(before)


def test_a_default_device_without_memory_holds_no_counter():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))]
    with torch.device("meta"):
        optimizer = SchattenP([{"params": weights[:1]}, {"params": weights[1:], "spectral": False}])
        optimizer.create_state()
    step(optimizer)
    step(optimizer)
    assert [float(state["step"]) for state in optimizer.state.values()] == [2.0, 2.0]


@pytest.mark.parametrize("kind", [float, int, torch.tensor, lambda step: torch.tensor(step, dtype=torch.bfloat16)])
def test_a_loaded_counter_of_any_kind_counts_on_in_float32(kind):
    saved, fresh = (SchattenP([{"params": matrices()}, {"params": matrices(), "spectral": False}]) for _ in range(2))
    step(saved)
    state = saved.state_dict()
    for of_parameter in state["state"].values():
        of_parameter["step"] = kind(256.0)
    fresh.load_state_dict(state)
    step(fresh)
    counters = [each["step"] for each in fresh.state.values()]
    assert [(float(counter), counter.dtype) for counter in counters] == [(257.0, torch.float32)] * 2


def test_a_loaded_counter_is_not_that_of_the_state_it_came_from():
    saved, fresh = SchattenP(matrices()), SchattenP(matrices())
    step(saved)
    fresh.load_state_dict(saved.state_dict())
    step(fresh)
    assert (saved.steps_taken(), fresh.steps_taken()) == (1, 2)


def test_a_key_that_an_older_state_lacks_is_the_present_groups():
    saved, fresh = SchattenP(matrices()), SchattenP(matrices(), maximize=True)
    step(saved)
    state = saved.state_dict()
    del state["param_groups"][0]["maximize"]
    fresh.load_state_dict(state)
    step(fresh)
    assert fresh.param_groups[0]["maximize"]
