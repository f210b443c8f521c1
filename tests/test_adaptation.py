"""Cadence, range, smoothing and isolation of the estimation of p, in a bare PyTorch loop."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import hf_schatten
from hf_schatten.adaptive.criterion import Inputs, Sample, maximising_exponent, objective_curve, statistics_of
from hf_schatten.linalg.spectrum import LOG_NORM_ESTIMATORS, exact_log_norms


class Regression:
    """A two-layer network with its optimizer, and a step on random data."""

    def __init__(self, *, steps: int, seed: int = 0, **options) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
        self.batches = torch.randn(steps, 32, 12) * torch.linspace(0.1, 3, 12)
        self.targets = torch.randn(steps, 32, 8)
        options = {"p": "adaptive", "p_estimator": "exact"} | options
        self.optimizer = hf_schatten.create_schatten_optimizer(self.model, verbose=False, **options)
        self.gradients: list[torch.Tensor] = []

    def step(self, index: int, micro_batches: int = 1) -> dict[str, float]:
        pieces = zip(self.batches[index].chunk(micro_batches), self.targets[index].chunk(micro_batches), strict=True)
        for inputs, targets in pieces:
            ((self.model(inputs) - targets).square().mean() / micro_batches).backward()
        self.gradients.append(self.model[0].weight.grad.clone())
        self.last_gradient = self.model[2].weight.grad.clone()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.optimizer.learned_p()


def test_p_changes_on_due_steps_only():
    run = Regression(steps=20, p_interval=6, p_first_step=4, p_init=7.0)
    history = [run.step(index)["2.weight"] for index in range(20)]
    changed = [step for step in range(1, 21) if history[step - 1] != (history[step - 2] if step > 1 else 7.0)]
    assert changed == [4, 6, 12, 18]
    assert run.optimizer.policy.estimates == 4


def test_a_due_step_waits_for_nothing(monkeypatch):
    """A device without memory stands for an accelerator: there is nothing that could be waited for."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which does not know the device
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
        batch = torch.empty(32, 64)
    optimizer = hf_schatten.create_schatten_optimizer(model, verbose=False, p="adaptive", p_interval=1, p_first_step=1)
    for _ in range(2):
        for micro_batch in batch.chunk(2):
            model(micro_batch).sum().backward()
        optimizer.step()
    assert optimizer.policy.estimates == 2


def test_p_follows_the_moving_average_of_the_statistics():
    run = Regression(steps=6, p_interval=2, p_first_step=1, p_ema_decay=0.7, p_max=50.0)
    average = 0.0
    for index in range(6):
        p = run.step(index)["0.weight"]
        if index + 1 in (1, 2, 4, 6):
            sample = Sample(run.gradients[index], Inputs(run.batches[index]))
            average = 0.7 * average + 0.3 * statistics_of([sample], exact_log_norms)[0]
            expected = 1 / maximising_exponent(objective_curve(average, 1 / 50, 1.0), 1 / 50, 1.0)
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


def test_a_layer_without_inputs_gets_the_median_p_and_is_named(caplog):
    run = Regression(steps=2, p_interval=1, p_init=9.0)
    run.model[2].eval()
    p = run.step(0)
    run.step(1)
    assert p["2.weight"] == p["0.weight"] != 9.0
    assert caplog.text.count("No training input of 1 of the routed matrices") == 1
    assert "2.weight" in caplog.text


def test_a_due_step_without_any_gradient_changes_nothing():
    run = Regression(steps=2, p_interval=1, p_init=9.0)
    run.step(0)
    before = run.optimizer.learned_p()
    run.optimizer.step()
    assert run.optimizer.learned_p() == before
    assert run.optimizer.policy.updates == {}


def test_a_zero_gradient_keeps_p():
    run = Regression(steps=1, p_interval=1, p_init=9.0)
    run.model(run.batches[0])
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    assert set(run.optimizer.learned_p().values()) == {9.0}


@pytest.mark.parametrize("estimator", ["exact", "lanczos", "iterates"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_not_measured(bad, estimator):
    run = Regression(steps=1, p_interval=1, p_init=9.0, p_estimator=estimator)
    run.model(run.batches[0]).square().mean().backward()
    run.model[0].weight.grad[1, 2] = bad
    run.optimizer.step()
    p = run.optimizer.learned_p()
    assert p["0.weight"] == p["2.weight"] != 9.0  # the median of those that were measured
    weights = {matrix.name: matrix.statistics_weight.item() for matrix in run.optimizer.matrices()}
    assert weights["0.weight"] == 0 < weights["2.weight"]


@pytest.mark.parametrize("estimator", ["exact", "lanczos", "iterates"])
def test_rows_that_are_not_finite_do_not_count(estimator):
    """Those of a step that a loss scaler skips."""
    log_norms = LOG_NORM_ESTIMATORS[estimator]
    torch.manual_seed(0)
    gradient, rows = torch.randn(16, 12), torch.randn(32, 12)
    spoiled = torch.cat([rows[:9], torch.full((1, 12), torch.inf), rows[9:], torch.full((1, 12), torch.nan)])
    found, expected = (statistics_of([Sample(gradient, Inputs(each))], log_norms) for each in (spoiled, rows))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


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


def test_after_stop_following_p_stays_and_the_model_has_no_hooks():
    run = Regression(steps=3, p_interval=1)
    before = run.step(0)
    run.optimizer.stop_following()
    assert run.step(1) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in run.model.modules())


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
    optimizer = hf_schatten.create_schatten_optimizer(model, verbose=False, p="adaptive", p_interval=1, p_init=33.0)
    tokens = torch.randint(0, 64, (4, 16))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    learned = optimizer.learned_p()
    assert set(learned) == {matrix.name for matrix in optimizer.matrices()}
    routes = hf_schatten.route_parameters(model).to("schatten_p")
    assert {matrix.parameter_name for matrix in optimizer.matrices()} == {route.name for route in routes}
    assert all(-0.25 - 1e-6 <= 1 / p <= 1.0 and p != 33.0 for p in learned.values())


def due_steps(**options) -> list[int]:
    run = Regression(steps=1, **options)
    return [step for step in range(1, 200) if run.optimizer.policy.is_due(step)]


def test_due_are_the_first_step_and_every_multiple_of_the_interval():
    assert due_steps(p_interval=50, p_first_step=3) == [3, 50, 100, 150]


def test_overrides_keep_their_p_and_the_others_adapt():
    run = Regression(steps=2, p_interval=1, p_overrides="2.*:7", p_init=33.0)
    history = [run.step(index) for index in range(2)]
    assert [p["2.weight"] for p in history] == [7.0, 7.0]
    assert all(p["0.weight"] != 33.0 for p in history)


def test_a_pattern_without_a_match_is_an_error():
    with pytest.raises(hf_schatten.RoutingError, match=r"p_overrides has '\*\.c_proj', which matches nothing; names"):
        Regression(steps=1, p_overrides="*.c_proj:2")


class Gate:
    """An estimator that waits until it is let through, or raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.open, self.error = threading.Event(), error

    def __call__(self, X, inverse_orders):
        assert self.open.wait(timeout=30)
        if self.error:
            raise self.error
        return exact_log_norms(X, inverse_orders)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate()
    monkeypatch.setitem(LOG_NORM_ESTIMATORS, "exact", gate)
    yield gate
    gate.open.set()


def test_a_slow_worker_delays_no_step_and_its_p_is_used_from_the_step_after_it_arrives(gate):
    run = Regression(steps=8, p_interval=2, p_first_step=1, p_async=True, p_init=9.0)
    for index in range(5):  # due at 1, 2 and 4: the first is under way, the others are passed over
        assert set(run.step(index).values()) == {9.0}
    pending = run.optimizer.policy._pending
    gate.open.set()
    pending.result(timeout=30)
    measured = run.step(5)  # is due too
    assert run.optimizer.policy.estimates == 1
    assert 9.0 not in measured.values()
    sample = Sample(run.gradients[0], Inputs(run.batches[0]))
    statistics = statistics_of([sample], exact_log_norms)[0]
    expected = maximising_exponent(objective_curve(statistics, -0.25, 1.0), -0.25, 1.0)
    torch.testing.assert_close(1 / measured["0.weight"], expected.item(), atol=1e-6, rtol=1e-5)
    run.optimizer.policy._pending.result(timeout=30)  # step 6's
    run.step(6)
    assert run.optimizer.policy.estimates == 2


def test_an_error_in_the_worker_is_reported_with_its_cause_and_stops_adaptation_alone(gate, caplog):
    run = Regression(steps=4, p_interval=1, p_async=True, p_init=9.0)
    gate.error = ArithmeticError("no spectrum today")
    gate.open.set()
    run.step(0)
    run.optimizer.policy._pending.exception(timeout=30)
    weights = run.model[0].weight.clone()
    assert set(run.step(1).values()) == {9.0}
    assert not torch.equal(weights, run.model[0].weight)
    assert "The estimation of p has failed in its worker thread" in caplog.text
    assert "no spectrum today" in caplog.text
    assert run.optimizer.policy is None
    assert not any(module._forward_hooks for module in run.model.modules())


def test_a_loaded_state_drops_the_measurement_under_way(gate):
    run = Regression(steps=3, p_interval=2, p_first_step=1, p_async=True, p_init=9.0)
    state = copy.deepcopy(run.optimizer.state_dict())
    run.step(0)
    run.optimizer.load_state_dict(state)
    gate.open.set()
    assert run.optimizer.policy._pending is None
    run.step(1)
    assert run.optimizer.policy.estimates == 0


def test_a_schedule_moves_the_exponent_linearly_and_then_stays():
    run = Regression(steps=6, p="schedule", p_schedule="2:-10:4")
    s = [1 / run.step(index)["0.weight"] for index in range(6)]
    torch.testing.assert_close(s, [0.5, 0.3, 0.1, -0.1, -0.1, -0.1], atol=1e-6, rtol=0.0)


def test_a_schedule_of_unknown_length_is_an_error():
    with pytest.raises(RuntimeError, match="write it into the option p_schedule"):
        Regression(steps=1, p="schedule").step(0)


def test_stable_rank_and_relative_size_are_those_of_the_step():
    run = Regression(steps=2, p_interval=2, lr=0.01, weight_decay=0.0)
    run.step(0)
    assert not run.optimizer.policy.updates
    before = [run.model[index].weight.detach().clone() for index in (0, 2)]
    run.step(1)
    for name, index, weight in zip(("0.weight", "2.weight"), (0, 2), before, strict=True):
        update = run.model[index].weight.detach() - weight
        stable_rank, relative_size = run.optimizer.policy.updates[name]
        sigma = torch.linalg.svdvals(update.double())
        torch.testing.assert_close(stable_rank.item(), (sigma.square().sum() / sigma[0] ** 2).item(), atol=0, rtol=0.1)
        torch.testing.assert_close(relative_size.float(), update.norm() / weight.norm(), atol=1e-7, rtol=1e-3)


def test_a_choice_holds_what_p_was_chosen_from():
    run = Regression(steps=1, p_interval=1, p_max=50.0)
    run.optimizer.policy.illustrated = 1
    p = run.step(0)
    (choice,) = run.optimizer.policy.choices
    assert (choice.name, choice.step) == ("0.weight", 1)
    torch.testing.assert_close(1 / choice.chosen, p["0.weight"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(choice.gradient_spectrum, torch.linalg.svdvals(run.gradients[0]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(choice.input_spectrum, torch.linalg.svdvals(run.batches[0]), atol=1e-5, rtol=1e-5)
    best = choice.exponents[choice.objective.argmax()].item()
    assert abs(best - choice.chosen) <= (choice.exponents[1] - choice.exponents[0]).item()


def test_lora_adapters_learn_a_p_of_their_own(llama):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(llama, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    optimizer = hf_schatten.create_schatten_optimizer(
        model, verbose=False, p="adaptive", p_interval=2, p_first_step=2, p_init=33.0
    )
    tokens = torch.randint(0, 64, (4, 16))
    for _ in range(2):  # the gradient of lora_A is zero on the first step
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    learned = optimizer.learned_p()
    assert len(learned) == 2 * 2 * 2
    assert all(p != 33.0 for p in learned.values())


def averages_of(optimizer) -> torch.Tensor:
    return torch.stack([matrix.statistics for matrix in optimizer.matrices()])


def test_padding_does_not_change_what_p_is_chosen_from(llama):
    tokens = torch.randint(1, 64, (4, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    padded = [torch.nn.functional.pad(x, (0, 6)) for x in (tokens, mask)]
    learned = []
    for ids, attention_mask in ((tokens, mask), padded):
        model = copy.deepcopy(llama)
        optimizer = hf_schatten.create_schatten_optimizer(model, verbose=False, p="adaptive", p_interval=1)
        labels = ids.masked_fill(attention_mask == 0, -100)
        model(input_ids=ids, attention_mask=attention_mask, labels=labels).loss.backward()
        optimizer.step()
        learned.append(averages_of(optimizer))
    torch.testing.assert_close(*learned, atol=1e-4, rtol=1e-4)
    assert learned[0].std() > 0.01  # there was something to change


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_does_not_change_what_p_is_chosen_from(llama, use_reentrant):
    tokens = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    learned = []
    for checkpointing in (False, True):
        model = copy.deepcopy(llama)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        optimizer = hf_schatten.create_schatten_optimizer(model, verbose=False, p="adaptive", p_interval=1)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        learned.append(averages_of(optimizer))
    torch.testing.assert_close(*learned, atol=1e-6, rtol=1e-6)
    assert learned[0].std() > 0.01


def test_experts_learn_a_p_each_and_one_without_tokens_keeps_its_own():
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=30,
        num_local_experts=8,
        num_experts_per_tok=2,
        experts_implementation="eager",
    )
    model = MixtralForCausalLM(config)
    optimizer = hf_schatten.create_schatten_optimizer(model, verbose=False, p="adaptive", p_interval=1, p_init=33.0)
    tokens = torch.randint(0, 30, (1, 3))
    router = model.model.layers[0].mlp.gate
    used = set()
    router.register_forward_hook(lambda module, args, output: used.update(output[2].flatten().tolist()))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    learned = optimizer.learned_p()
    prefix = "model.layers.0.mlp.experts."
    assert 0 < len(used) < 8
    for expert in range(8):
        for part in (f"gate_up_proj.{expert}.gate", f"gate_up_proj.{expert}.up", f"down_proj.{expert}"):
            assert (learned[prefix + part] == 33.0) == (expert not in used), part


def test_a_cnn_learns_a_p_for_its_filters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten())
    optimizer = hf_schatten.create_schatten_optimizer(model, verbose=False, p="adaptive", p_interval=1, p_init=33.0)
    model(torch.randn(4, 3, 12, 12)).square().mean().backward()
    optimizer.step()
    assert list(optimizer.learned_p()) == ["2.weight"]
    assert optimizer.learned_p()["2.weight"] != 33.0
