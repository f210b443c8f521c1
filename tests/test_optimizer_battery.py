"""What torch asks of every optimizer, asked of SchattenP through every option that changes the step.

The questions are those of ``torch.testing._internal.common_optimizers`` and of torch's own ``test_optim.py``. Muon,
whose parameters are matrices too, and AdamW answer them as a control.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, SequentialLR, StepLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal.common_optimizers import OptimizerInfo, OptimizerInput

from hf_schatten import SchattenP

STEPS: list[dict[str, Any]] = [
    {},
    {"lr": 0.01},
    {"lr": torch.tensor(0.001)},
    {"weight_decay": 0.0},
    {"weight_decay": 0.2, "maximize": True},
    {"momentum": 0.8},
    {"momentum": 0.0, "nesterov": False},
    *({"p": p} for p in (1.0, 4.0, math.inf, -5.0)),
    *({"p": 3.0, "scale": scale} for scale in ("match_rms_adamw", "muon", "interpolate", "none")),
    *({"p": 2.0, "step_rule": rule} for rule in ("ball", "regularized")),
    {"p": 2.0, "step_rule": "ball", "coupling_order": 2.0, "coupling_weights": "sqrt_n_over_m"},
    *({"p": 2.0, "precondition": kind, "betas": (0.8, 0.99), "eps": 1e-6} for kind in ("adam", "muadam")),
    {"ns_steps": 3},
    {"compute_dtype": "float32"},
    {"compute_dtype": "bfloat16"},
    *({"target": target} for target in ("soft_threshold:0.1", "soft_step:0.1", "top_k:2")),
]


def described(kwargs: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in kwargs.items()) or "default"


def inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    return [OptimizerInput(params=None, kwargs=kwargs, desc=described(kwargs)) for kwargs in STEPS]  # type: ignore[arg-type]


def info_of(optimizer: type, inputs_of: Callable[..., list[OptimizerInput]]) -> OptimizerInfo:
    return OptimizerInfo(optimizer, optim_inputs_func=inputs_of, supported_impls=(), supports_complex=False)  # type: ignore[arg-type]


INFO = info_of(SchattenP, inputs)
CONTROLS = [
    info_of(torch.optim.Muon, lambda device: [OptimizerInput(None, {"lr": 1e-2}, "Muon")]),  # type: ignore[arg-type]
    info_of(torch.optim.AdamW, lambda device: [OptimizerInput(None, {"lr": 1e-2}, "AdamW")]),  # type: ignore[arg-type]
]
KINDS = {"matrices": (((6, 4), True), ((3, 5), True)), "mixed": (((6, 4), True), ((3, 5), False), ((5,), False))}

Make = Callable[..., torch.optim.Optimizer]


def cases() -> Iterator[Any]:
    for info in (INFO, *CONTROLS):
        for each in info.optim_inputs_func(device="cpu"):
            # What couples matrices is asked of matrices alone, too.
            for kind in ("mixed", "matrices") if "coupling_order" in each.kwargs else ("mixed",):
                of_kind = kind if info is INFO else "matrices"
                yield pytest.param(info, each.kwargs, of_kind, id=f"{info.name}-{each.desc}-{of_kind}")


every = pytest.mark.parametrize(("info", "kwargs", "kind"), list(cases()))


def weights(kind: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape, _ in KINDS[kind]]


def groups_of(info: OptimizerInfo, kind: str, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Return a group for each parameter."""
    own = [{"spectral": spectral} if info is INFO else {} for _, spectral in KINDS[kind]]
    return [{"params": [parameter]} | keys for parameter, keys in zip(parameters, own, strict=True)]


def made(info: OptimizerInfo, kwargs: dict[str, Any], kind: str, parameters: list[nn.Parameter]) -> Any:
    return info.optim_cls(groups_of(info, kind, parameters), **deepcopy(kwargs))


def loss_of(parameters: list[nn.Parameter]) -> Tensor:
    """Return a convex loss whose gradients differ from element to element."""
    targets = [torch.linspace(-1, 1, each.numel(), dtype=each.dtype).cos().view(each.shape) for each in parameters]
    return sum((each - target).square().mean() for each, target in zip(parameters, targets, strict=True))  # type: ignore[return-value]


def train(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(parameters).backward()
        optimizer.step()


def copied(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


SCHEDULES: list[Callable[[torch.optim.Optimizer], Any]] = [
    lambda optimizer: None,
    lambda optimizer: StepLR(optimizer, step_size=10, gamma=0.9),
    lambda optimizer: ReduceLROnPlateau(optimizer, patience=1),
    lambda optimizer: SequentialLR(optimizer, [LinearLR(optimizer), ExponentialLR(optimizer, 0.95)], [5]),
]


@every
def test_it_goes_the_right_way(info, kwargs, kind):
    parameters = weights(kind)
    optimizer = made(info, kwargs, kind, parameters)
    first = loss_of(parameters).item()
    train(optimizer, parameters, 10)
    assert (loss_of(parameters).item() > first) == kwargs.get("maximize", False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=["none", "StepLR", "ReduceLROnPlateau", "SequentialLR"])
@pytest.mark.parametrize("kwargs", [{}, {"p": 2.0, "step_rule": "ball"}, {"maximize": True}], ids=described)
def test_it_goes_the_right_way_under_a_schedule(kwargs, kind, schedule):
    parameters = weights(kind)
    optimizer = made(INFO, kwargs, kind, parameters)
    scheduler = schedule(optimizer)
    first = loss_of(parameters).item()
    for _ in range(15):
        train(optimizer, parameters, 1)
        if scheduler is not None:
            scheduler.step(*[loss_of(parameters).item()] * isinstance(scheduler, ReduceLROnPlateau))
    assert (loss_of(parameters).item() > first) == kwargs.get("maximize", False)


@every
def test_strides_of_parameters_do_not_matter(info, kwargs, kind):
    plain, strided = weights(kind), []
    for parameter in plain:
        memory = torch.empty(*parameter.shape, 2)[..., 0]
        strided.append(nn.Parameter(memory.copy_(parameter.detach())))
    for parameters in (plain, strided):
        train(made(info, kwargs, kind, parameters), parameters)
    for one, two in zip(plain, strided, strict=True):
        torch.testing.assert_close(one, two.detach().clone(), rtol=1e-4, atol=1e-6)


@every
def test_a_group_has_values_of_its_own(info, kwargs, kind):
    """A learning rate of 0 stops one group alone, and its weight decay with it."""
    parameters = weights(kind)
    before = copied(parameters)
    optimizer = info.optim_cls(
        [
            group | ({"lr": 0.0} if number == 0 else {})
            for number, group in enumerate(groups_of(info, kind, parameters))
        ],
        **deepcopy(kwargs),
    )
    train(optimizer, parameters)
    assert torch.equal(parameters[0], before[0])
    assert not torch.equal(parameters[1], before[1])


@every
def test_no_gradients_no_step(info, kwargs, kind):
    parameters = weights(kind)
    before = copied(parameters)
    optimizer = made(info, kwargs, kind, parameters)
    optimizer.step()
    train(optimizer, parameters)
    after = copied(parameters)
    optimizer.zero_grad()
    optimizer.step()
    assert_equal(parameters, after)
    assert not torch.equal(before[0], after[0])


@every
def test_gradients_of_zeros_leave_weight_decay_alone(info, kwargs, kind):
    parameters = weights(kind)
    before = copied(parameters)
    optimizer = made(info, kwargs, kind, parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, old, group in zip(parameters, before, optimizer.param_groups, strict=True):
        kept = 1 - float(group["lr"]) * group["weight_decay"]
        torch.testing.assert_close(parameter.detach(), kept * old, rtol=1e-6, atol=0.0)


@every
def test_it_goes_on_from_a_saved_state_in_every_bit(info, kwargs, kind):
    parameters = weights(kind)
    optimizer = made(info, kwargs, kind, parameters)
    train(optimizer, parameters)
    others = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    memory = io.BytesIO()
    torch.save(optimizer.state_dict(), memory)
    memory.seek(0)
    restored = made(info, kwargs, kind, others)
    restored.load_state_dict(torch.load(memory, weights_only=True))
    train(optimizer, parameters)
    train(restored, others)
    assert_equal(parameters, others)


@every
def test_a_state_does_not_depend_on_when_it_is_asked_for(info, kwargs, kind):
    one, two = weights(kind), weights(kind)
    asked, silent = made(info, kwargs, kind, one), made(info, kwargs, kind, two)
    for _ in range(3):
        train(asked, one, 1)
        asked.state_dict()
        train(silent, two, 1)
    assert_equal(one, two)


@every
def test_copies_and_pickles_step_alike_and_keep_public_attributes(info, kwargs, kind):
    parameters = weights(kind)
    optimizer = made(info, kwargs, kind, parameters)
    train(optimizer, parameters)
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    before, copies = copied(parameters), [deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    stepped = []
    for copy in copies:
        assert {name for name in vars(copy) if not name.startswith("_")} == public
        stepped.append([parameter for group in copy.param_groups for parameter in group["params"]])
        for parameter, original in zip(stepped[-1], parameters, strict=True):
            parameter.grad = original.grad.clone()  # which a copy of a parameter lacks
        copy.step()
    assert_equal(parameters, before)
    optimizer.step()
    for own in stepped:
        assert_equal(own, parameters)


@every
def test_a_closure_gives_the_loss_and_the_gradients(info, kwargs, kind):
    one, two = weights(kind), weights(kind)
    optimizer, other = made(info, kwargs, kind, one), made(info, kwargs, kind, two)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(one)
        loss.backward()
        return loss

    expected = loss_of(one).item()
    assert optimizer.step(closure).item() == expected
    train(other, two, 1)
    assert_equal(one, two)


@every
def test_names_of_parameters_change_no_step_and_may_be_absent_from_a_state(info, kwargs, kind):
    plain, named = weights(kind), weights(kind)
    without = made(info, kwargs, kind, plain)
    groups = [
        group | {"params": [(f"weight{number}", group["params"][0])]}
        for number, group in enumerate(groups_of(info, kind, named))
    ]
    having = info.optim_cls(groups, **deepcopy(kwargs))
    train(without, plain)
    train(having, named)
    assert_equal(plain, named)
    for optimizer, state in ((without, having.state_dict()), (having, without.state_dict())):
        optimizer.load_state_dict(state)
    train(without, plain)
    train(having, named)
    assert_equal(plain, named)


@every
def test_parameters_of_several_dtypes_are_updated_each_as_alone(info, kwargs, kind):
    dtypes = torch.float32, torch.float64, torch.bfloat16
    together, alone = weights(kind), weights(kind)
    for parameters in (together, alone):
        for number, parameter in enumerate(parameters):
            parameters[number] = nn.Parameter(parameter.detach().to(dtypes[number]))
    if kwargs.get("coupling_order") is None:
        train(made(info, kwargs, kind, together), together)
        for number, parameter in enumerate(alone):
            group = groups_of(info, kind, alone)[number]
            train(info.optim_cls([group], **deepcopy(kwargs)), [parameter])
        for one, two in zip(together, alone, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-2 if one.dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_and_a_tensor_are_the_same_learning_rate(kind):
    for kwargs in STEPS:
        pair = []
        for lr in (0.01, torch.tensor(0.01, dtype=torch.float64)):
            parameters = weights(kind)
            train(made(INFO, kwargs | {"lr": lr}, kind, parameters), parameters)
            pair.append(parameters)
        assert_equal(*pair)


def test_hooks_of_steps_are_called_around_each_step_in_their_order():
    parameters, calls = weights("mixed"), []
    optimizer = made(INFO, {}, "mixed", parameters)
    handles = [
        register_optimizer_step_pre_hook(lambda *arguments: calls.append("global before")),
        register_optimizer_step_post_hook(lambda *arguments: calls.append("global after")),
        optimizer.register_step_pre_hook(lambda *arguments: calls.append("before")),
        optimizer.register_step_post_hook(lambda *arguments: calls.append("after")),
    ]
    train(optimizer, parameters, 1)
    for handle in handles:
        handle.remove()
    train(optimizer, parameters, 1)
    assert calls == ["global before", "before", "after", "global after"]


@every
def test_state_exists_after_a_step_and_defaults_stay_as_they_were(info, kwargs, kind):
    parameters = weights(kind)
    optimizer = made(info, kwargs, kind, parameters)
    defaults = deepcopy(optimizer.defaults)
    assert not optimizer.state
    train(optimizer, parameters, 1)
    assert optimizer.state.keys() == set(parameters)
    assert all(optimizer.state.values())
    assert optimizer.defaults == defaults
    assert "lr" in repr(optimizer)
    for group in optimizer.param_groups:
        assert defaults.keys() <= group.keys()


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (nn.Parameter(torch.ones(3, 4)), TypeError, "iterable"),
        ([], ValueError, "empty parameter list"),
        (["weight"], TypeError, "can only optimize Tensors"),
        ([nn.Parameter(torch.ones(3, 4)) * 2], ValueError, "non-leaf"),
        ([nn.Parameter(torch.ones(4))], ValueError, "spectral=False"),
        ([nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))], ValueError, "complex"),
        ([{"params": [("a", nn.Parameter(torch.ones(3, 4))), nn.Parameter(torch.ones(3, 4))]}], ValueError, "name"),
    ],
)
def test_wrong_parameters_are_refused_when_the_optimizer_is_made(params, error, message):
    with pytest.raises(error, match=message):
        SchattenP(params)


def test_a_parameter_twice_is_refused_across_groups_and_warned_of_in_one():
    weight = nn.Parameter(torch.ones(3, 4))
    with pytest.raises(ValueError, match="more than one parameter group"):
        SchattenP([{"params": [weight]}, {"params": [weight], "spectral": False}])
    with pytest.warns(UserWarning, match="duplicate"):
        SchattenP([weight, weight])
