"""Gradients that are not finite: the step is skipped for their matrix, counted and reported; nothing is poisoned."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_schatten import SchattenP, create_schatten_optimizer
from hf_schatten.optim.schatten_p import _REPORT_INTERVAL

BAD = [math.nan, math.inf, -math.inf]


def training(**options):
    """Return two matrices and a vector, their optimizer, and a function that takes a step on a seed's gradients."""
    torch.manual_seed(0)
    parameters = {
        "first": nn.Parameter(torch.randn(6, 8, dtype=torch.float64)),
        "second": nn.Parameter(torch.randn(6, 8, dtype=torch.float64)),
        "vector": nn.Parameter(torch.randn(5, dtype=torch.float64)),
    }
    matrices = {"params": [(name, parameters[name]) for name in ("first", "second")]}
    vectors = {"params": [("vector", parameters["vector"])], "spectral": False}
    optimizer = SchattenP([matrices, vectors], lr=0.1, **options)

    def step(seed, **spoiled):
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in parameters.items():
            parameter.grad = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            if name in spoiled:
                parameter.grad.view(-1)[3] = spoiled[name]
        optimizer.step()

    return parameters, optimizer, step


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("precondition", ["none", "adam", "muadam"])
@pytest.mark.parametrize("step_rule", ["pinned", "regularized"])
@pytest.mark.parametrize("spoiled_step", [0, 2])
def test_a_matrix_trains_as_if_the_step_had_not_been(bad, nesterov, precondition, step_rule, spoiled_step):
    options = {"p": 2.0, "nesterov": nesterov, "precondition": precondition, "step_rule": step_rule}
    spoiled, optimizer, step = training(**options)
    reference, _, reference_step = training(**options)
    for seed in range(5):
        if seed == spoiled_step:
            before = spoiled["first"].detach().clone()
            step(seed, first=bad)
            torch.testing.assert_close(spoiled["first"].detach(), before, atol=0, rtol=0)
            continue
        step(seed)
        reference_step(seed)
    torch.testing.assert_close(spoiled["first"], reference["first"], atol=1e-13, rtol=1e-13)
    assert optimizer.skipped_steps() == {"first": 1}


def test_the_other_parameters_take_their_step():
    spoiled, _, step = training(p=2.0)
    reference, _, reference_step = training(p=2.0)
    for seed in range(3):
        step(seed, first=math.nan)
        reference_step(seed)
    for name in ("second", "vector"):
        torch.testing.assert_close(spoiled[name], reference[name], atol=0, rtol=0)


def test_coupled_matrices_go_on():
    parameters, _, step = training(p=2.0, step_rule="ball", coupling_order=2)
    step(0)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    step(1, first=math.inf)
    assert torch.equal(parameters["first"], before["first"])
    assert parameters["second"].isfinite().all()
    assert not torch.equal(parameters["second"], before["second"])


def test_adamw_skips_the_step():
    spoiled, _, step = training()
    parameter = nn.Parameter(spoiled["vector"].detach().clone())
    reference = torch.optim.AdamW([parameter], 0.1, weight_decay=0.1)
    for seed in range(4):
        step(seed, **({"vector": math.nan} if seed == 1 else {}))
        if seed != 1:
            parameter.grad = spoiled["vector"].grad.clone()
            reference.step()
    torch.testing.assert_close(spoiled["vector"], parameter, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_a_bf16_parameter_keeps_its_bits(seed):
    torch.manual_seed(seed)
    W = nn.Parameter(torch.randn(8, 8).bfloat16())
    before = W.detach().clone()
    optimizer = SchattenP([W], lr=0.1)
    W.grad = torch.full_like(W, math.nan)
    optimizer.step()
    assert torch.equal(W, before)
    assert not any(value.isnan().any() for value in optimizer.state[W].values())


def test_skipped_steps_are_reported_once_in_an_interval(caplog):
    _, _, step = training()
    with caplog.at_level(logging.WARNING, logger="hf_schatten"):
        step(0, first=math.nan)
        for seed in range(1, _REPORT_INTERVAL - 1):
            step(seed)
        assert not caplog.records
        for seed in range(2 * _REPORT_INTERVAL):
            step(seed)
    (record,) = caplog.records
    assert "of first, 1 steps" in record.getMessage()


def test_only_the_matrix_that_skipped_more_than_all_others_is_named(caplog):
    _, optimizer, step = training()
    with caplog.at_level(logging.WARNING, logger="hf_schatten"):
        step(0, first=math.nan, second=math.nan)
        optimizer.report_skipped()
        step(1, second=math.nan)
        optimizer.report_skipped()
        step(2)
        optimizer.report_skipped()  # nothing new
    alike, apart = (record.getMessage() for record in caplog.records)
    assert "2 of them skipped 1 steps." in alike
    assert "first" not in alike
    assert "look for the layer" not in alike
    assert "of second, 2 steps in all" in apart


@pytest.fixture
def spoiled_trainer(gpt2, training_arguments, token_dataset, caplog):
    """Return a function that trains six steps, with one spoiled gradient, and returns the Trainer and its warnings."""

    def train(bad, **arguments):
        arguments = training_arguments(optim_args="p=adaptive,p_interval=2,p_first_step=2", max_steps=6, **arguments)
        trainer, calls = Trainer(gpt2, arguments, train_dataset=token_dataset), []

        def spoil(gradient):
            calls.append(1)
            return torch.full_like(gradient, bad) if len(calls) == 4 else gradient  # on a step that estimates p

        gpt2.transformer.h[0].mlp.c_fc.weight.register_hook(spoil)
        with caplog.at_level(logging.WARNING, logger="hf_schatten"):
            trainer.train()
        assert all(parameter.isfinite().all() for parameter in gpt2.parameters())
        return trainer, [
            record.getMessage() for record in caplog.records if record.name == "hf_schatten.optim.finite_gradients"
        ]

    return train


@pytest.mark.parametrize(("bad", "max_grad_norm"), [(math.nan, 1.0), (math.nan, 0.0), (math.inf, 0.0)])
def test_a_trainer_spreads_one_over_all_matrices_and_warns_at_the_end(spoiled_trainer, bad, max_grad_norm):
    trainer, (warning,) = spoiled_trainer(bad, max_grad_norm=max_grad_norm)
    skipped = trainer.optimizer.optimizer.skipped_steps()
    assert set(skipped.values()) == {1}
    assert len(skipped) == 8  # every routed parameter
    assert "The gradients of 8 of the matrices" in warning
    assert "names no layer" in warning


def test_clipping_leaves_an_infinite_gradient_to_its_matrix(spoiled_trainer):
    trainer, (warning,) = spoiled_trainer(math.inf)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert trainer.optimizer.optimizer.skipped_steps() == {name: 1}
    assert f"of {name}, 1 steps in all" in warning


def test_a_trainer_logs_how_many(spoiled_trainer):
    trainer, _ = spoiled_trainer(math.nan)
    history = trainer.state.log_history
    logged = {entry["step"]: entry.get("schatten_skipped_steps") for entry in history if "loss" in entry}
    assert logged == {1: None, 2: None, 3: None, 4: 1, 5: 1, 6: 1}


def test_training_under_amp_goes_on_after_an_overflow():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    optimizer = create_schatten_optimizer(model, 1e-2, p="adaptive", p_interval=2, p_first_step=2, verbose=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    inputs, targets = torch.randn(32, 8), torch.randn(32, 8)
    losses, scales = [], []
    for _ in range(60):
        with torch.autocast("cpu", torch.float16):
            outputs = model(inputs)
        loss = (outputs.float() - targets).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    assert scales[0] < 2.0**24  # the first step overflowed
    assert optimizer.steps_taken() < 60
    assert losses[-1] < 0.9 * losses[0]
    assert optimizer.skipped_steps() == {}  # the scaler skips the whole step
    assert set(optimizer.learned_p()) == {"0.weight", "2.weight"}
