"""Rows of the table of support: precision, memory, batches, and what Trainer does around the training loop."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import optuna
import pytest
import torch
from safetensors.torch import load_file
from support_models import LLAMA, llama_config, maker
from support_runs import (
    ADAPTIVE,
    DUE,
    FIRST_P,
    RUN,
    STEPS,
    AtStep,
    check_close,
    check_equal,
    check_estimates,
    check_run,
    check_state_is_fp32,
    estimates,
    losses,
    optimizer_of,
    record_samples,
    statistics_of,
    weights,
)
from torch._dynamo.utils import counters
from transformers import EarlyStoppingCallback, LlamaForCausalLM, Trainer, TrainerCallback

import hf_schatten
from hf_schatten import CheckpointError, SchattenTrainer

make = maker(LlamaForCausalLM, llama_config())


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config())


def train(model, dataset, arguments, trainer_class=SchattenTrainer, **options):
    trainer = trainer_class(model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset, **options)
    trainer.train()
    return trainer


def record_batches(model):
    """Return a list that gets the token ids of every training forward."""
    batches: list[torch.Tensor] = []

    def note(module, args, kwargs):
        if module.training:
            batches.append(kwargs["input_ids"].clone())

    model.register_forward_pre_hook(note, with_kwargs=True)
    return batches


@pytest.mark.supports("Precision", "fp32", "a Trainer's run equals that of a plain PyTorch loop")
def test_fp32(model, token_dataset, training_arguments):
    alone = copy.deepcopy(model)
    batches = record_batches(model)
    options = RUN | {"save_strategy": "no", "lr_scheduler_type": "constant", "weight_decay": 0.1, "max_grad_norm": 1.0}
    trainer = train(model, token_dataset, training_arguments(**options))
    assert len(batches) == STEPS

    optimizer = hf_schatten.create_schatten_optimizer(
        alone, lr=1e-2, verbose=False, p="adaptive", p_init=FIRST_P, p_first_step=2, p_interval=6
    )
    for batch in batches:
        alone(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    check_estimates(trainer)
    check_close(weights(alone), weights(model), atol=1e-5, rtol=1e-5)
    found = torch.tensor([optimizer_of(trainer).learned_p()[name] for name in optimizer.learned_p()])
    torch.testing.assert_close(found, torch.tensor(list(optimizer.learned_p().values())), atol=1e-3, rtol=1e-3)


@pytest.mark.supports("Precision", "bf16 autocast", "weights, state and estimates are fp32")
def test_bf16_autocast(token_dataset, training_arguments):
    arguments = training_arguments(**RUN, bf16=True)
    trainer = check_run(make, token_dataset, arguments, LLAMA)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.supports(
    "Precision", "fp16 autocast", "with torch's `GradScaler`: a step that it skips counts nowhere, also where p is due"
)
def test_fp16_autocast(token_dataset, training_arguments, tmp_path):
    check_run(
        make, token_dataset, training_arguments(**RUN, fp16=True), LLAMA
    )  # on a CPU: Accelerate has no scaler there
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = torch.stack([row["input_ids"] for row in token_dataset]).to(device).view(8, 8, -1)

    def train(start=0):
        model = make().to(device).train()
        optimizer = hf_schatten.create_schatten_optimizer(
            model, 1e-2, p="adaptive", p_init=FIRST_P, p_first_step=2, p_interval=6, verbose=False
        )
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
        saved = {"model": model, "optimizer": optimizer, "scaler": scaler}
        if start:
            for name, state in torch.load(tmp_path / "state.pt").items():
                saved[name].load_state_dict(state)
        scaler.scale(torch.zeros((), device=device))  # without which its factor cannot be set
        found, skipped = [], []
        while optimizer.steps_taken() < STEPS:
            step = optimizer.steps_taken() + 1
            if step in (1, *DUE) and step not in skipped:
                scaler.update(2.0**30)
            with torch.autocast(device, torch.float16):
                loss = model(input_ids=rows[step % 8], labels=rows[step % 8]).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            optimizer.zero_grad()
            if optimizer.steps_taken() < step:
                skipped.append(step)
                scaler.update(2.0**10)
                continue
            scaler.update()
            found.append(loss.item())
            if step == STEPS // 2:
                torch.save({name: each.state_dict() for name, each in saved.items()}, tmp_path / "state.pt")
        assert skipped == [step for step in (1, *DUE) if step > start]
        assert optimizer.policy.estimates == len([step for step in DUE if step > start])
        return found, optimizer, weights(model)

    straight, optimizer, end = train()
    resumed, _, resumed_end = train(start=STEPS // 2)
    assert straight[STEPS // 2 :] == resumed
    check_equal(end, resumed_end)
    assert sum(straight[-3:]) < sum(straight[:3])
    assert FIRST_P not in optimizer.learned_p().values()
    decay = optimizer.options.p_ema_decay
    for matrix in optimizer.matrices():  # no estimate was lost
        assert matrix.statistics_weight.item() == pytest.approx(1 - decay ** len(DUE), rel=1e-9, abs=0.0)
    assert optimizer.skipped_steps() == {}
    moments = [state[key] for state in optimizer.state.values() for key in ("momentum", "exp_avg") if key in state]
    assert {value.dtype for value in (*moments, *end.values())} == {torch.float32}


@pytest.mark.supports("Precision", "bf16 parameters", "with fp32 state, also after a resume")
@pytest.mark.parametrize("trainer_class", [Trainer, SchattenTrainer])
def test_bf16_parameters(trainer_class, token_dataset, arguments):
    def make_halved():
        return make().to(torch.bfloat16)

    trainer = check_run(make_halved, token_dataset, arguments, LLAMA, trainer_class)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}


@pytest.mark.supports(
    "Memory and speed", "gradient checkpointing", "of both kinds: each input is sampled once, p is the same"
)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, model, token_dataset, training_arguments, monkeypatch):
    samples = record_samples(monkeypatch)
    plain, options = copy.deepcopy(model), RUN | {"save_strategy": "no", "gradient_accumulation_steps": 2}
    expected = train(plain, token_dataset, training_arguments(**options))
    kwargs = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    found = train(model, token_dataset, training_arguments(**options | kwargs))
    assert model.is_gradient_checkpointing
    check_estimates(found)
    assert estimates(found) == estimates(expected)
    check_equal(weights(plain), weights(model))
    assert len(samples) == 2 * len(DUE)
    for counts in samples:
        assert set(counts) == LLAMA
        assert set(counts.values()) == {2 * 8 * 16}


@pytest.fixture
def fresh_compiler():
    gc.collect()  # probes of other tests
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def check_compiled(backend, model, dataset, training_arguments):
    plain, options = copy.deepcopy(model), RUN | {"save_strategy": "no"}
    expected = train(plain, dataset, training_arguments(**options))
    found = train(model, dataset, training_arguments(**options, torch_compile=True, torch_compile_backend=backend))
    assert counters["stats"]["unique_graphs"] == 1  # the layers' inputs are sampled outside it
    check_estimates(found)
    torch.testing.assert_close(losses(found), losses(expected), atol=1e-3, rtol=1e-3)
    first, reference = (estimates(trainer)[DUE[0]] for trainer in (found, expected))
    for name, p in reference.items():
        torch.testing.assert_close(1 / first[name], 1 / p, atol=1e-3, rtol=1e-2)


@pytest.mark.supports("Memory and speed", "`torch_compile`", "one graph; steps that estimate p run eagerly")
def test_torch_compile(model, token_dataset, training_arguments, fresh_compiler):
    check_compiled("aot_eager", model, token_dataset, training_arguments)


@pytest.mark.slow
@pytest.mark.supports("Memory and speed", "`torch_compile` with inductor", "the same")
def test_torch_compile_with_inductor(model, token_dataset, training_arguments, fresh_compiler):
    check_compiled("inductor", model, token_dataset, training_arguments)


@pytest.mark.supports(
    "Batches", "gradient accumulation", "8 × 1 and 1 × 8 give the same p and the same update to 1e-5"
)
def test_accumulation(model, token_dataset, training_arguments):
    start, ends, learned, chosen_from = weights(model), [], [], []
    for batch, micro_batches in ((8, 1), (1, 8)):
        model.load_state_dict(start)
        arguments = training_arguments(
            **RUN
            | {
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": micro_batches,
                "max_steps": DUE[0],
                "save_strategy": "no",
            }
        )
        trainer = train(model, token_dataset, arguments)
        check_estimates(trainer, DUE[:1])
        learned.append(torch.tensor(list(optimizer_of(trainer).learned_p().values())))
        chosen_from.append(statistics_of(trainer))
        ends.append(weights(model))
    torch.testing.assert_close(learned[0].reciprocal(), learned[1].reciprocal(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*chosen_from, atol=1e-5, rtol=1e-5)
    assert chosen_from[0].std() > 0.1
    updates = [{name: value - start[name] for name, value in end.items()} for end in ends]
    check_close(*updates, atol=1e-5, rtol=1e-5)


@pytest.mark.supports(
    "Batches", "`max_grad_norm`", "clips gradients, never the update: p and the matrices' steps stay"
)
def test_max_grad_norm(model, token_dataset, training_arguments):
    start, runs = weights(model), []
    for limit in (0.0, 0.05):  # 0 means no clipping
        model.load_state_dict(start)
        seen: list[float] = []

        def note(step, seen=seen):
            norms = [parameter.grad.norm() for parameter in model.parameters()]
            seen.append(torch.stack(norms).norm().item())

        options = {"optim_args": f"p=adaptive,p_init={FIRST_P},p_first_step=1", "max_grad_norm": limit, "max_steps": 1}
        arguments = training_arguments(**RUN | options | {"save_strategy": "no"})
        trainer = train(model, token_dataset, arguments, callbacks=[AtStep(note)])
        runs.append((seen, estimates(trainer)[1], weights(model)))
    (free, p, unclipped), (clipped, p_clipped, end) = runs
    assert free[0] > 0.5
    torch.testing.assert_close(clipped[0], 0.05, atol=1e-6, rtol=1e-4)
    for name, value in p.items():
        torch.testing.assert_close(1 / p_clipped[name], 1 / value, atol=1e-4, rtol=1e-4)
    check_close({name: unclipped[name] for name in LLAMA}, {name: end[name] for name in LLAMA}, atol=1e-5, rtol=1e-4)


class Scripted:
    """A metric whose values are given, so that the test knows the best checkpoint."""

    def __init__(self, *values: float) -> None:
        self._values = iter(values)

    def __call__(self, prediction) -> dict[str, float]:
        return {"score": next(self._values)}


BY_SCORE = {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 3, "metric_for_best_model": "score"}


@pytest.mark.supports("Checkpoints", "`load_best_model_at_end`", "ends with the best checkpoint's weights")
@pytest.mark.parametrize("trainer_class", [Trainer, SchattenTrainer])
def test_load_best_model_at_end(trainer_class, model, token_dataset, training_arguments):
    arguments = training_arguments(**RUN | BY_SCORE, load_best_model_at_end=True)
    scores = Scripted(1, 4, 2, 3)
    trainer = train(model, token_dataset, arguments, trainer_class, compute_metrics=scores)
    check_estimates(trainer)
    folder = Path(arguments.output_dir)
    assert trainer.state.best_model_checkpoint == str(folder / "checkpoint-6")
    check_equal(load_file(folder / "checkpoint-6" / "model.safetensors"), weights(model))
    last = load_file(folder / "checkpoint-12" / "model.safetensors")
    assert all(not torch.equal(last[name], model.state_dict()[name]) for name in LLAMA)


@pytest.mark.supports(
    "Checkpoints", "`save_only_model`", "a resume is refused by name, since there is no optimizer state"
)
@pytest.mark.parametrize("trainer_class", [Trainer, SchattenTrainer])
def test_save_only_model(trainer_class, model, token_dataset, training_arguments):
    arguments = training_arguments(**RUN, save_only_model=True)
    train(model, token_dataset, arguments, trainer_class)
    checkpoint = Path(arguments.output_dir) / "checkpoint-6"
    names = {path.name for path in checkpoint.iterdir()}
    assert "model.safetensors" in names
    assert not any("optimizer" in name or "scheduler" in name for name in names)
    before = weights(model)
    resumed = trainer_class(model=model, args=arguments, train_dataset=token_dataset)
    with pytest.raises(
        (RuntimeError, CheckpointError), match=r"optimizer state was not loaded|holds no optimizer state"
    ):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    check_equal(load_file(checkpoint / "model.safetensors"), weights(model))
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.supports("Checkpoints", "`save_total_limit`", "what is kept can be resumed")
def test_save_total_limit(model, token_dataset, training_arguments):
    arguments = training_arguments(**RUN | {"save_steps": 3, "save_total_limit": 2})
    expected = train(model, token_dataset, arguments)
    folder = Path(arguments.output_dir)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-9"]
    assert hf_schatten.load_learned_p(folder / "checkpoint-12") == optimizer_of(expected).learned_p()
    resumed = SchattenTrainer(model=make(), args=arguments, train_dataset=token_dataset)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-9"))
    check_equal(weights(model), weights(resumed.model))


@pytest.mark.supports("Runs", "early stopping", "after it the model's inputs are no longer sampled")
def test_early_stopping(model, token_dataset, training_arguments, monkeypatch):
    cadence = {"optim_args": f"p=adaptive,p_init={FIRST_P},p_interval=4,p_first_step=7"}  # due after the end, too
    arguments = training_arguments(**RUN | BY_SCORE | cadence, load_best_model_at_end=True)
    callbacks, metrics = [EarlyStoppingCallback(early_stopping_patience=1)], Scripted(2, 1)
    trainer = train(model, token_dataset, arguments, callbacks=callbacks, compute_metrics=metrics)
    assert trainer.state.global_step == 6
    check_estimates(trainer, [4])
    check_state_is_fp32(trainer)
    samples = record_samples(monkeypatch)
    model.train()(**{name: value[None] for name, value in token_dataset[0].items()}).loss.backward()
    optimizer_of(trainer).policy._probe.take()
    assert samples == []


@pytest.mark.supports(
    "Runs", "hyper-parameter search", "`Trainer.hyperparameter_search` with optuna; `optim_args` can be searched"
)
def test_hyperparameter_search(token_dataset, training_arguments):
    arguments = training_arguments(**RUN | {"save_strategy": "no"})
    ends = []

    class Note(TrainerCallback):
        def on_train_end(self, args, state, control, optimizer=None, model=None, **kwargs):
            ends.append((args.optim_args, args.learning_rate, optimizer.optimizer, estimates(trainer), model))

    trainer = SchattenTrainer(
        model_init=lambda trial=None: make(),
        args=arguments,
        train_dataset=token_dataset,
        eval_dataset=token_dataset,
        callbacks=[Note()],
    )
    choices = [f"{ADAPTIVE},p_estimator={name}" for name in ("lanczos", "exact")]

    def space(trial):
        return {
            "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2, log=True),
            "optim_args": trial.suggest_categorical("optim_args", choices),
        }

    best = trainer.hyperparameter_search(
        space,
        n_trials=2,
        direction="minimize",
        backend="optuna",
        sampler=optuna.samplers.GridSampler({"learning_rate": [1e-2], "optim_args": choices}),
    )
    assert {optim_args for optim_args, *_ in ends} == set(choices)
    for optim_args, learning_rate, optimizer, logged, _ in ends:
        assert optimizer.options.p_estimator == optim_args.rpartition("=")[2]
        assert optimizer.defaults["lr"] == learning_rate
        assert list(logged) == DUE
        assert FIRST_P not in logged[DUE[0]].values()
    assert ends[0][2] is not ends[1][2]
    assert ends[0][3] != ends[1][3]
    assert best.hyperparameters["optim_args"] in choices


@pytest.mark.supports("Runs", "`Trainer.train` twice", "goes on with weights, state and p; hooks are not doubled")
@pytest.mark.parametrize("trainer_class", [Trainer, SchattenTrainer])
def test_train_twice(trainer_class, model, token_dataset, training_arguments, monkeypatch):
    samples = record_samples(monkeypatch)
    trainer = train(model, token_dataset, training_arguments(**RUN | {"save_strategy": "no"}), trainer_class)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    first, optimizer, at_first = losses(trainer), optimizer_of(trainer), statistics_of(trainer)
    trainer.train()
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert optimizer_of(trainer) is optimizer
    assert optimizer.steps_taken() == 2 * STEPS
    assert list(estimates(trainer)) == [6, 12]  # the optimizer's steps 18 and 24
    assert not torch.equal(statistics_of(trainer), at_first)
    assert sum(losses(trainer)) < sum(first)
    assert len(samples) == len(DUE) + 2
    for counts in samples:
        assert set(counts.values()) == {8 * 16}
