"""What a user of torch does with a model and its optimizer besides training: copies, pickles, loads, schedules."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import weakref
from functools import partial
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

from hf_schatten import CheckpointError, SchattenP, create_schatten_optimizer
from hf_schatten.integration.checkpoint import load_optimizer, save_optimizer

FIRST = {"p_first_step": 2, "p_interval": 3, "p": "adaptive", "exclude": ["head"], "verbose": False}


class Net(nn.Module):
    """Two matrices and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


def made(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    net = Net().to(dtype)
    return net, create_schatten_optimizer(net, 1e-2, **FIRST | options)


def train(net, optimizer, steps, scheduler=None):
    for step in steps:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step)).to(net.first.weight.dtype)
        net(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(2.0)
        elif scheduler is not None:
            scheduler.step()


def check_alike(net, optimizer, other_net, other_optimizer):
    """Hold weights and p to be the same in every bit."""
    for expected, found in zip(net.parameters(), other_net.parameters(), strict=True):
        assert torch.equal(expected, found)
    assert optimizer.learned_p() == other_optimizer.learned_p()


def saved_and_loaded(something):
    file = io.BytesIO()
    torch.save(something, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(net):
    model = swa_utils.AveragedModel(net)
    model.update_parameters(net)
    return model.module


def sent(net):
    return pickle.loads(bytes(ForkingPickler.dumps(net)))


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded, averaged, sent], ids=lambda each: each.__name__)
def test_a_copy_of_the_model_is_not_sampled(copied):
    net, optimizer = made()
    train(net, optimizer, [1])  # the next step estimates p
    other = copied(net)
    expected, alone = made()
    train(expected, alone, range(1, 4))
    other(torch.ones(16, 6)).sum().backward()
    train(net, optimizer, [2, 3])
    other(torch.ones(16, 6)).sum().backward()
    assert optimizer.policy.estimates == 2
    check_alike(expected, alone, net, optimizer)
    copy_alone = create_schatten_optimizer(other, 1e-2, **FIRST)
    train(other, copy_alone, range(1, 4))
    assert copy_alone.policy.estimates == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded], ids=lambda each: each.__name__)
@pytest.mark.parametrize("options", [{}, {"p": "schedule", "p_schedule": "4:inf:6"}, {"p": 4}], ids=str)
@pytest.mark.parametrize("owned", [False, True])
def test_copies_of_model_and_optimizer_go_on_as_the_originals(copied, options, owned):
    net, optimizer = made(**options)
    first = 2
    if owned:
        net.optimizer = optimizer  # so that the copy of its probe is made before that of the model is whole
        first = 4  # no step that estimates p
    train(net, optimizer, range(1, first))
    other, other_optimizer = copied((net, optimizer))
    before = copy.deepcopy(net.state_dict())
    train(other, other_optimizer, range(first, 9))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    train(net, optimizer, range(first, 9))
    check_alike(net, optimizer, other, other_optimizer)
    if not options:
        assert other_optimizer.policy.estimates == optimizer.policy.estimates == 3  # steps 2, 3 and 6


def test_a_copy_has_a_worker_thread_of_its_own():
    net, optimizer = made(p_async=True)
    train(net, optimizer, [1, 2])  # whose measurement is perhaps under way
    other, other_optimizer = copy.deepcopy((net, optimizer))
    train(other, other_optimizer, range(3, 7))
    other_optimizer.policy._pending.result(timeout=60)
    train(other, other_optimizer, [7])
    assert other_optimizer.policy.estimates > optimizer.policy.estimates
    for each in (optimizer, other_optimizer):
        each.stop_following()


def _train_elsewhere(net, optimizer, queue):
    train(net, optimizer, [2, 3])
    queue.put((optimizer.learned_p(), optimizer.policy.estimates))


@pytest.mark.slow
def test_a_spawned_process_gets_model_and_optimizer():
    net, optimizer = made()
    train(net, optimizer, [1])
    alone = copy.deepcopy((net, optimizer))  # the process shares the memory of the others
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_train_elsewhere, args=(net, optimizer, queue))
    process.start()
    learned_p, estimates = queue.get()
    process.join()
    train(*alone, [2, 3])
    assert torch.equal(net.first.weight, alone[0].first.weight)
    assert (learned_p, estimates) == (alone[1].learned_p(), 2)


def test_an_optimizer_that_is_dropped_takes_its_hooks_along():
    net, optimizer = made()
    train(net, optimizer, [1])
    probe = weakref.ref(optimizer.policy._probe)
    del optimizer
    gc.collect()
    assert probe() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_two_optimizers_that_sample_one_model_are_warned_of_once(caplog):
    net, optimizer = made()
    train(net, optimizer, [1])
    second = create_schatten_optimizer(net, 1e-2, **FIRST | {"p_first_step": 1})
    assert "Two optimizers sample the inputs of first.weight, and perhaps of other layers" in caplog.text
    train(net, second, [1, 2, 3])
    assert caplog.text.count("Two optimizers sample") == 1


@pytest.mark.parametrize("end", ["stopped", "dropped"])
def test_an_optimizer_in_the_place_of_another_is_not_warned_of(end, caplog):
    net, optimizer = made()
    train(net, optimizer, [1])
    if end == "stopped":
        optimizer.stop_following()
    else:
        optimizer = None
    train(net, create_schatten_optimizer(net, 1e-2, **FIRST), range(1, 4))
    assert "two optimizers" not in caplog.text


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("then", DTYPES, ids=str)
@pytest.mark.parametrize("now", DTYPES, ids=str)
def test_a_state_goes_into_a_model_of_another_dtype(then, now):
    net, optimizer = made(dtype=then)
    train(net, optimizer, range(1, 4))
    other, loaded = made(dtype=now)
    loaded.load_state_dict(optimizer.state_dict())
    _, fresh = made(dtype=now)
    fresh.create_state()
    states = zip(optimizer.state.values(), loaded.state.values(), fresh.state.values(), strict=True)
    for saved, found, expected in states:
        for key, value in expected.items():
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], saved[key].to(value.dtype))  # rounded once at most
    train(other, loaded, range(4, 7))
    assert loaded.steps_taken() == 6


def test_a_state_goes_to_another_device():
    net, optimizer = made()
    train(net, optimizer, [1])
    on_meta = create_schatten_optimizer(Net().to("meta"), 1e-2, **FIRST)
    on_meta.load_state_dict(optimizer.state_dict())
    for group in on_meta.param_groups:
        for parameter in group["params"]:
            state = dict(on_meta.state[parameter])
            assert not state.pop("step").is_meta  # which torch leaves where it is
            assert all(value.is_meta for value in state.values())
    with torch.device("cpu"):
        elsewhere = copy.deepcopy(optimizer.state_dict())
    for state in elsewhere["state"].values():
        state["step"] = 3  # a number, as early versions of torch saved it
    net, loaded = made()
    loaded.load_state_dict(elsewhere)
    train(net, loaded, [1])
    assert loaded.steps_taken() == 4


def test_hooks_of_load_state_dict_run_before_all_and_after_all():
    W = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer, other = (SchattenP([("w", W)], p=3.0) for _ in range(2))
    W.grad = torch.ones_like(W)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["param_names"] = ["module.w"]
    seen = []

    def rename(_, state_dict):
        assert state_dict is not saved  # a shallow copy, by torch's contract
        assert state_dict["param_groups"] is saved["param_groups"]
        seen.append("first")
        group = state_dict["param_groups"][0]
        state_dict["param_groups"] = [group | {"param_names": ["w"]}]

    def replace(_, state_dict):
        seen.append("second")
        states = {0: state_dict["state"][0] | {"momentum": torch.full((4, 4), 1.001)}}
        return state_dict | {"state": states}

    other.register_load_state_dict_pre_hook(replace)
    other.register_load_state_dict_pre_hook(rename, prepend=True)
    other.register_load_state_dict_post_hook(lambda _: seen.append(other.state[W]["momentum"][0, 0].item()))
    other.load_state_dict(saved)
    assert seen == ["first", "second", torch.tensor(1.001).item()]  # in fp32, and that of the hook
    assert saved["param_groups"][0]["param_names"] == ["module.w"]
    other.load_state_dict(saved)  # our own hooks are gone
    assert len(seen) == 6


def test_hooks_of_state_dict_see_all_of_it():
    _, optimizer = made()
    seen = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before"))
    optimizer.register_state_dict_post_hook(lambda _, state_dict: seen.append(set(state_dict)) or {"mine": state_dict})
    assert list(optimizer.state_dict()) == ["mine"]
    assert seen == ["before", {"state", "param_groups", "schatten_p_options"}]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("key", ["lr", "momentum", "nesterov", "lr_ratio", "eps", "scale", "p_by_parameter", "parts"])
def test_what_a_saved_group_lacks_is_the_present_ones(named, key):
    def optimizer_of(W, b):
        matrices, others = ([("w", W)], [("b", b)]) if named else ([W], [b])
        return SchattenP([{"params": matrices}, {"params": others, "spectral": False}], p=3.0, lr=0.5, momentum=0.7)

    parameters = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    optimizer, other = optimizer_of(*parameters), optimizer_of(*parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group[key]
    other.load_state_dict(saved)
    assert [group[key] for group in other.param_groups] == [group[key] for group in optimizer.param_groups]
    other.step()
    del saved["state"][0]["skipped"]
    with pytest.raises(CheckpointError, match=r"holds .*'momentum', .* but its update now needs .*'skipped'"):
        other.load_state_dict(saved)


SCHEDULES = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.9),
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 3),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 7]),
    "ConstantLR": lambda optimizer: lr_scheduler.ConstantLR(optimizer, 0.5, 7),
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 8),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 8),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 1e-3, 1e-2, 3),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1e-2, 14),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)], [3]
    ),
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
    "SWALR": lambda optimizer: swa_utils.SWALR(optimizer, 5e-3, 4),
}


def test_every_schedule_of_torch_is_here():
    assert set(lr_scheduler.__all__) - {"LRScheduler"} == set(SCHEDULES) - {"SWALR"}


def nameless(seed=0):
    """Return a model, and an optimizer without names whose options are not kept."""
    torch.manual_seed(seed)
    net = Net()
    matrices, others = ([each for each in net.parameters() if (each.ndim == 2) == two] for two in (True, False))
    return net, SchattenP([{"params": matrices}, {"params": others, "spectral": False}], p=3.0, lr=1e-2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("way", ["state_dict", "optimizer first", "nameless", "file"])
def test_a_resume_under_a_schedule_is_exact(schedule, way, tmp_path):
    make = nameless if way == "nameless" else partial(made, p=4)
    net, optimizer = make()
    scheduler = SCHEDULES[schedule](optimizer)
    train(net, optimizer, range(1, 6), scheduler)
    rate = optimizer.param_groups[0]["lr"]

    other, resumed = make(seed=1)
    again = SCHEDULES[schedule](resumed)
    other.load_state_dict(net.state_dict())
    if way == "file":
        save_optimizer(optimizer, tmp_path)
        load_optimizer(resumed, tmp_path)
    elif way == "optimizer first":
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    if way in ("state_dict", "nameless"):
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group, loaded in zip(optimizer.param_groups, resumed.param_groups, strict=True):
        assert {**group, "params": None} == {**loaded, "params": None}

    train(net, optimizer, range(6, 12), scheduler)
    train(other, resumed, range(6, 12), again)
    check_alike(net, optimizer, other, resumed)
    rates = {rate, 1e-2, optimizer.param_groups[0]["lr"]}
    assert len(rates) > 1  # the schedule has done something


@pytest.mark.parametrize("schedule", ["OneCycleLR", "CyclicLR"])
def test_a_schedule_that_cycles_the_momentum_cycles_that_of_the_matrices(schedule):
    net, optimizer = made(p=4)
    scheduler = SCHEDULES[schedule](optimizer)
    expected = made(p=4)
    for step in range(1, 8):
        beta = optimizer.param_groups[0]["betas"][0]
        for group in expected[1].param_groups:
            group.update(lr=optimizer.param_groups[0]["lr"], momentum=beta, betas=(beta, 0.999))
        train(*expected, [step])
        train(net, optimizer, [step], scheduler)
        assert {group["momentum"] for group in optimizer.param_groups if group["spectral"]} == {beta}
    check_alike(*expected, net, optimizer)
