"""Cadence, range, smoothing and isolation of the estimation of p, in a bare PyTorch loop."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hf_schatten
from hf_schatten.criterion import holder_exponent, holder_statistics
from hf_schatten.linalg.spectrum import exact_log_spectrum


class Regression:
    """A two-layer network with its optimizer, and a step on random data."""

    def __init__(self, *, steps: int, seed: int = 0, **options) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
        self.batches = torch.randn(steps, 32, 12) * torch.linspace(0.1, 3, 12)
        self.targets = torch.randn(steps, 32, 8)
        self.optimizer = hf_schatten.create_schatten_optimizer(self.model, verbose=False, **options)
        self.gradients: list[torch.Tensor] = []

    def step(self, index: int, micro_batches: int = 1) -> dict[str, float]:
        pieces = zip(self.batches[index].chunk(micro_batches), self.targets[index].chunk(micro_batches), strict=True)
        for inputs, targets in pieces:
            ((self.model(inputs) - targets).square().mean() / micro_batches).backward()
        self.gradients.append(self.model[0].weight.grad.clone())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.optimizer.learned_p()


def test_p_changes_on_due_steps_only():
    run = Regression(steps=20, p_interval=6, p_first_step=4, p_init=7.0)
    history = [run.step(index)["2.weight"] for index in range(20)]
    changed = [step for step in range(1, 21) if history[step - 1] != (history[step - 2] if step > 1 else 7.0)]
    assert changed == [4, 6, 12, 18]
    assert run.optimizer.adaptation.estimates == 4


def test_p_follows_the_moving_average_of_the_holder_statistics():
    run = Regression(steps=6, p_interval=2, p_first_step=1, p_ema_decay=0.7, p_max=50.0)
    average = 0.0
    for index in range(6):
        p = run.step(index)["0.weight"]
        if index + 1 in (1, 2, 4, 6):
            spectra = (exact_log_spectrum(x) for x in (run.gradients[index], run.batches[index]))
            average = 0.7 * average + 0.3 * holder_statistics(*spectra)
            expected = 1 / holder_exponent(average, 1 / 50, 1.0)
        torch.testing.assert_close(p, expected.item(), atol=1e-4, rtol=1e-5)


def test_p_stays_in_its_range():
    run = Regression(steps=4, p_interval=1, p_min=2.0, p_max=2.5)
    for index in range(4):
        assert all(2.0 - 1e-6 <= p <= 2.5 + 1e-6 for p in run.step(index).values())


def test_micro_batches_do_not_change_p_or_the_weights():
    whole, cut = (Regression(steps=5, p_interval=2, p_first_step=1, probe_rows=16) for _ in range(2))
    for index in range(5):
        p_whole, p_cut = whole.step(index), cut.step(index, micro_batches=8)
        for name, p in p_whole.items():
            torch.testing.assert_close(1 / p_cut[name], 1 / p, atol=1e-5, rtol=0.0)
    for a, b in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_adaptation_leaves_the_random_generator_alone():
    states = []
    for p in ("adaptive", 3.0):
        run = Regression(steps=4, p=p, p_interval=1)
        torch.manual_seed(5)
        for index in range(4):
            run.step(index)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_loaded_state_continues_exactly_on_both_sides_of_a_due_step():
    for stop in (3, 4, 5):  # due at 4 and 8
        straight, first = (Regression(steps=9, p_interval=4, p_first_step=2) for _ in range(2))
        for index in range(9):
            straight.step(index)
        for index in range(stop):
            first.step(index)
        second = Regression(steps=9, p_interval=4, p_first_step=2)
        second.model.load_state_dict(first.model.state_dict())
        second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
        for index in range(stop, 9):
            second.step(index)
        assert second.optimizer.learned_p() == straight.optimizer.learned_p()
        for a, b in zip(straight.model.parameters(), second.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_layer_without_inputs_keeps_its_p_and_is_named(caplog):
    run = Regression(steps=2, p_interval=1, p_init=9.0)
    run.model[2].eval()
    p = run.step(0)
    run.step(1)
    assert p["2.weight"] == 9.0
    assert p["0.weight"] != 9.0
    assert caplog.text.count("No training input of 1 of the routed layers") == 1
    assert "2.weight" in caplog.text


def test_a_zero_gradient_keeps_p():
    run = Regression(steps=1, p_interval=1, p_init=9.0)
    run.model(run.batches[0])
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    assert set(run.optimizer.learned_p().values()) == {9.0}


def test_a_phantom_step_of_zero_gradients_and_zero_lr_changes_nothing():
    """FSDP2's loading of optimizer state takes such a step to make the state, then loads over it."""
    run = Regression(steps=8, p_interval=4, p_first_step=1)
    for index in range(4):
        run.step(index)
    saved, weights = copy.deepcopy(run.optimizer.state_dict()), copy.deepcopy(run.model.state_dict())
    again = Regression(steps=8, p_interval=4, p_first_step=1)
    again.model.load_state_dict(weights)
    for group in again.optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in again.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    again.optimizer.step()
    again.optimizer.zero_grad()
    again.optimizer.load_state_dict(saved)
    for index in range(4, 8):
        assert run.step(index) == again.step(index)
    for a, b in zip(run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_after_stop_adapting_p_stays_and_the_model_has_no_hooks():
    run = Regression(steps=3, p_interval=1)
    before = run.step(0)
    run.optimizer.stop_adapting()
    assert run.step(1) == before
    assert not any(module._forward_pre_hooks for module in run.model.modules())


def test_a_closure_adapts_as_the_plain_loop_does():
    plain, closed = (Regression(steps=4, p_interval=2, p_first_step=1) for _ in range(2))

    for index in range(4):

        def closure(index=index):
            closed.optimizer.zero_grad()
            loss = (closed.model(closed.batches[index]) - closed.targets[index]).square().mean()
            loss.backward()
            return loss

        closed.optimizer.step(closure)
        assert plain.step(index) == closed.optimizer.learned_p()
    for a, b in zip(plain.model.parameters(), closed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_both_architectures_learn_a_p_for_every_matrix(name, request):
    model = request.getfixturevalue(name)
    optimizer = hf_schatten.create_schatten_optimizer(model, verbose=False, p_interval=1, p_init=33.0)
    tokens = torch.randint(0, 64, (4, 16))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    learned = optimizer.learned_p()
    assert set(learned) == {route.name for route in hf_schatten.route_parameters(model).to("schatten_p")}
    assert all(1.0 <= p <= 100.01 and p != 33.0 for p in learned.values())
