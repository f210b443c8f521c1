"""Processes of one group that do not train one model together: each gets what it would get alone, and is told so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from processes import outcomes, together
from torch import Tensor, nn

import hf_schatten
from hf_schatten import SchattenP
from hf_schatten.distributed.processes import process_count, process_rank

STEPS = 9
COUNT = 2
OPTIONS = {"p_interval": 3, "p_first_step": 2, "p": "adaptive", "p_max": 1000.0}
Weights = dict[str, Tensor]


def model_of(width: int = 8, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 6))


def backward(model: nn.Module, seed: int) -> None:
    """Compute new gradients on data that a seed gives."""
    rows = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(rows).sub(rows.flip(1)).square().mean().backward()


def optimizer_of(model: nn.Module, **options: Any) -> SchattenP:
    return hf_schatten.create_schatten_optimizer(model, 1e-2, verbose=False, **OPTIONS | options)


def average(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor.div_(process_count())


def result(optimizer: SchattenP, model: nn.Module) -> Weights:
    learned = {f"p of {name}": torch.tensor(p) for name, p in optimizer.learned_p().items()}
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()} | learned


def train_alone(rank: int, model: nn.Module | None = None, **options: Any) -> Weights:
    """Train on the data of a rank, whether a process group exists or not."""
    model = model or model_of()
    optimizer = optimizer_of(model, **options)
    for step in range(STEPS):
        backward(model, 100 * rank + step)
        optimizer.step()
    return result(optimizer, model)


def other_data(rank: int) -> Weights:
    return train_alone(rank)


def other_models(rank: int) -> Weights:
    return train_alone(rank, model_of(8 + 2 * rank))


def other_options(rank: int) -> Weights:
    model = model_of()
    optimizer = optimizer_of(model, p_overrides=[f"0:{2 + rank}"])
    for step in range(STEPS):
        backward(model, step)  # the same gradients at the first step
        optimizer.step()
    return result(optimizer, model)


def other_data_from_the_second_step(rank: int) -> Weights:
    model = model_of()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        backward(model, step + 100 * rank * (step > 0))
        optimizer.step()
    return result(optimizer, model)


def a_rank_without_matrices(rank: int) -> Weights:
    torch.manual_seed(0)
    weights = {"matrix": nn.Parameter(torch.randn(6, 4))} if rank == 0 else {"vector": nn.Parameter(torch.randn(4))}
    optimizer = SchattenP([{"params": list(weights.items()), "spectral": rank == 0}])
    for _ in range(STEPS):
        for weight in weights.values():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}


def two_optimizers_in_turn(rank: int) -> Weights:
    """Step a generator and its discriminator as a GAN's, each process on its own data."""
    generator, discriminator = model_of(seed=1), model_of(seed=2)
    optimizers = optimizer_of(discriminator), optimizer_of(generator)
    for step in range(STEPS):
        noise = torch.randn(16, 6, generator=torch.Generator().manual_seed(100 * rank + step))
        for optimizer, sign in zip(optimizers, (1, -1), strict=True):
            generator.zero_grad()
            discriminator.zero_grad()
            (sign * discriminator(generator(noise)).square().mean()).backward()
            optimizer.step()
    weights = {f"discriminator {name}": tensor for name, tensor in result(optimizers[0], discriminator).items()}
    return weights | result(optimizers[1], generator)


ALONE: dict[str, Callable[[int], Weights]] = {
    case.__name__: case
    for case in (
        *(other_data, other_models, other_options, other_data_from_the_second_step),
        *(a_rank_without_matrices, two_optimizers_in_turn),
    )
}


def local_sgd() -> Weights:
    """Average the weights after every fourth step, as accelerate's LocalSGD does."""
    model = model_of()
    optimizer = optimizer_of(model, p=4.0)
    for step in range(1, STEPS):
        backward(model, 100 * process_rank() + step)
        optimizer.step()
        if step % 4 == 0:
            average([parameter.detach() for parameter in model.parameters()])
    return result(optimizer, model)


def local_sgd_of_accelerate() -> Weights:
    model = model_of()
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model, p=4.0))
    with LocalSGD(accelerator=accelerator, model=prepared, local_sgd_steps=4) as averaging:
        for step in range(1, STEPS):
            backward(prepared, 100 * process_rank() + step)
            optimizer.step()
            averaging.step()
    return result(optimizer.optimizer, model)


def local_sgd_of_one_process() -> Weights:
    models = [model_of() for _ in range(COUNT)]
    optimizers = [optimizer_of(model, p=4.0) for model in models]
    for step in range(1, STEPS):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            backward(model, 100 * rank + step)
            optimizer.step()
        if step % 4 == 0:
            for parameters in zip(*(model.parameters() for model in models), strict=True):
                mean = torch.stack([parameter.detach() for parameter in parameters]).mean(0)
                for parameter in parameters:
                    parameter.detach().copy_(mean)
    return result(optimizers[0], models[0])


def averaged(zero_redundancy: bool = False, turns: int = 1) -> Weights:
    """Train with gradients that are averaged, by one optimizer or by several in turn."""
    models = [model_of(seed=turn) for turn in range(turns)]
    optimizers: list[Any] = [optimizer_of(model, p=4.0) for model in models]
    matrices = [parameter for parameter in models[0].parameters() if parameter.ndim == 2]
    if zero_redundancy:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns of what torch itself has deprecated

        optimizers = [ZeroRedundancyOptimizer(matrices, SchattenP, lr=1e-2, p=4.0)]
    elif turns == 1:
        optimizers = [SchattenP(matrices, lr=1e-2, p=4.0)]
    for step in range(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            if process_count() > 1:
                backward(model, 100 * process_rank() + step)
                average([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
            else:
                of_ranks = []
                for rank in range(COUNT):
                    backward(model, 100 * rank + step)
                    of_ranks.append([parameter.grad for parameter in model.parameters()])
                for parameter, *gradients in zip(model.parameters(), *of_ranks, strict=True):
                    parameter.grad = sum(gradients) / COUNT
            optimizer.step()
    return {f"{turn} {name}": t.detach() for turn, model in enumerate(models) for name, t in model.named_parameters()}


TOGETHER: dict[str, dict[str, Any]] = {"zero": {"zero_redundancy": True}, "one": {}, "two in turn": {"turns": 2}}


class Warnings(logging.Handler):
    """Keeps the messages of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        logging.getLogger("hf_schatten").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def taken(self) -> list[str]:
        messages, self.messages = self.messages, []
        return [message for message in messages if "computes all its updates" in message]


def all_cases() -> dict[str, Any]:
    warnings, found = Warnings(), {}
    for name, case in ALONE.items():
        found[name] = {"weights": case(process_rank()), "warnings": warnings.taken()}
    for case in (local_sgd, local_sgd_of_accelerate):
        found[case.__name__] = {"weights": case(), "warnings": warnings.taken()}
    for name, settings in TOGETHER.items():
        found[name] = {"weights": averaged(**settings), "warnings": warnings.taken()}
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return together(all_cases, COUNT, tmp_path_factory.mktemp("agreement"))


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("name", ALONE)
def test_a_process_that_trains_for_itself_gets_what_it_would_get_without_the_others(name, pair):
    for rank, results in enumerate(pair):
        assert_same(results[name]["weights"], ALONE[name](rank))


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("other_data", "gradients of the processes differ (first seen at step 1)"),
        ("other_data_from_the_second_step", "gradients of the processes differ (first seen at step 2)"),
        ("other_models", "step other parameters, or by other rules"),
        ("other_options", "step other parameters, or by other rules"),
        ("a_rank_without_matrices", "step other parameters"),
        ("local_sgd", "gradients of the processes differ"),
        ("local_sgd_of_accelerate", "gradients of the processes differ"),
        ("zero", "step other parameters"),
    ],
)
def test_it_is_told_so_once(name, cause, pair):
    for results in pair:
        (message,) = results[name]["warnings"]
        assert cause in message
        assert "DDP" in message


def test_each_optimizer_finds_out_for_itself(pair):
    for results in pair:
        assert len(results["two_optimizers_in_turn"]["warnings"]) == 2
        assert not results["one"]["warnings"]
        assert not results["two in turn"]["warnings"]


@pytest.mark.parametrize("name", ["local_sgd", "local_sgd_of_accelerate"])
def test_averages_of_weights_are_those_of_copies_that_train_alone(name, pair):
    expected = local_sgd_of_one_process()
    for results in pair:
        assert_same(results[name]["weights"], expected)


@pytest.mark.parametrize("name", TOGETHER)
def test_averaged_gradients_give_what_one_process_gets(name, pair):
    expected = averaged(**TOGETHER[name] | {"zero_redundancy": False})
    for results in pair:
        assert_same(results[name]["weights"], expected)


def step_on_one(first: int) -> None:
    """Step on all processes ``first`` times, then on the first process alone, while the others wait for it."""
    model = model_of()
    optimizer = optimizer_of(model, p=4.0)
    for step in range(first + 1 if process_rank() == 0 else first):
        backward(model, step)
        optimizer.step()
    dist.monitored_barrier(timeout=timedelta(seconds=10))


@pytest.mark.parametrize("first", [0, 4])
def test_a_process_that_steps_alone_ends_with_the_cause(first, tmp_path):
    ends = outcomes(step_on_one, COUNT, tmp_path, first, timeout=timedelta(seconds=2))
    assert "take the steps of SchattenP together, and not all came" in ends[0].error
    assert "share_work=false" in ends[0].error
    assert ends[1].exit_code != 0
