"""What users try first: each works, or ends in one sentence that names the fix."""

from __future__ import annotations

import copy
import logging
import math
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainerCallback

import hf_schatten
from hf_schatten import (
    CheckpointError,
    OptionError,
    RoutingError,
    SchattenOptions,
    SchattenP,
    SchattenTrainer,
    create_schatten_optimizer,
    load_learned_p,
    route_parameters,
)


def test_the_version_is_that_of_the_installed_package():
    assert hf_schatten.__version__ == version("hf_schatten")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda model: model.parameters(), r"got generator: its modules, and not model\.parameters\(\), say"),
        (lambda model: list(model.named_parameters()), r"got list: its modules, and not model\.parameters\(\)"),
        (lambda model: model.state_dict(), "got OrderedDict: its modules"),
        (lambda model: "gpt2", r"got str: load it first, as in AutoModelForCausalLM\.from_pretrained\('gpt2'\)"),
    ],
)
def test_something_else_than_a_model_is_refused(given, message, gpt2):
    for function in (create_schatten_optimizer, route_parameters):
        with pytest.raises(TypeError, match=rf"^Expected a model \(torch\.nn\.Module\), {message}"):
            function(given(gpt2))


VALUES = {
    "p": ("4", 4.0),
    "p_interval": (np.int64(50), 50),
    "probe_rows": (torch.tensor(64), 64),
    "momentum": ("0.9", 0.9),
    "p_max": ("inf", math.inf),
    "nesterov": ("false", False),
    "exclude": ("*.mlp.*;*.gate", ("*.mlp.*", "*.gate")),
    "p_overrides": (["*.c_proj:2"], ("*.c_proj:2",)),
    "p_init": (Path("run") / "checkpoint-500", str(Path("run") / "checkpoint-500")),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_may_be_text_or_of_another_library(name):
    given, expected = VALUES[name]
    found = getattr(SchattenOptions(**{"p": "adaptive", name: given}), name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"p": "fast"}, "p='fast' is not allowed: it takes 'adaptive', 'schedule', a number or inf"),
        ({"p": None}, "p=None is not allowed: it takes 'adaptive'"),
        ({"p": [4]}, r"p=\[4\] is not allowed: it takes 'adaptive'"),
        ({"p": torch.ones(2)}, r"p=tensor\(\[1\., 1\.\]\) is not allowed: it takes 'adaptive'"),
        ({"p": True}, "p=True is not allowed: it takes 'adaptive'"),
        ({"p_interval": 2.5}, "p_interval=2.5 is not allowed: it takes a whole number"),
        ({"p_interval": "often"}, "p_interval='often' is not allowed: it takes a whole number"),
        ({"momentum": None}, "momentum=None is not allowed: it takes a number"),
        ({"momentum": "nan"}, "momentum=nan is not allowed: 0 <= momentum < 1"),
        ({"nesterov": "maybe"}, "nesterov='maybe' is not allowed: it takes true or false"),
        ({"nesterov": 1}, "nesterov=1 is not allowed: it takes true or false"),
        ({"exclude": 3}, "exclude=3 is not allowed: it takes patterns joined by ';', or a list of patterns"),
        ({"exclude": ["*.a", 3]}, r"exclude=\['\*.a', 3\] is not allowed: it takes patterns"),
        ({"p_overrides": {"*.a": 4}}, r"p_overrides=\{'\*.a': 4\} is not allowed: it takes patterns"),
        ({"scale": ["muon"]}, r"scale=\['muon'\] is not allowed: it takes a name"),
        ({"p_schedule": 4}, "p_schedule=4 is not allowed: it takes a text"),
        ({"p_max": "high"}, "p_max='high' is not allowed: it takes a number or none"),
        ({"p_init": True}, "p_init=True is not allowed: it takes a number, none, or the folder of a checkpoint"),
        ({"target": None}, "target=None is not allowed: it takes a name or a function"),
    ],
)
def test_a_value_of_another_type_is_refused(values, message):
    for make in (lambda: SchattenOptions(**values), lambda: SchattenOptions.from_optim_args(values)):
        with pytest.raises(OptionError, match=f"^{message}"):
            make()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"p": 4, "p_interval": 50}, "Without effect with p=4: p_interval=50."),
        ({"p": "inf", "p_estimator": "exact", "p_max": -5}, "Without effect with p=inf: p_estimator=exact, p_max=-5."),
        ({"p": "schedule", "p_schedule": "4:inf:9", "probe_rows": 64}, "with p=schedule: probe_rows=64."),
        ({"p": "adaptive", "p_schedule": "4:-5"}, "Without effect with p=adaptive: p_schedule=4:-5."),
        ({"p_interval": 50}, "Without effect with p=-4.0: p_interval=50."),
        ({"p": 4, "momentum": 0.5, "p_overrides": "*.c_proj:2"}, None),
        ({"p": "adaptive", "p_interval": 50}, None),
        ({"p": 4, "p_interval": 50, "report": "none"}, "Without effect with p=4: p_interval=50."),
    ],
)
def test_options_without_effect_are_named(options, sentence, gpt2, caplog):
    create_schatten_optimizer(gpt2, **options)
    assert sentence in caplog.text if sentence else not caplog.text


def test_p_that_nothing_changes_is_told_of(caplog):
    for options, told in (
        ({"p": "adaptive"}, True),
        ({"p": "schedule", "p_schedule": "4:2"}, True),
        ({"p": 4}, False),
    ):
        caplog.clear()
        W = nn.Parameter(torch.ones(4, 4))
        optimizer = SchattenP([W], **options)
        for _ in range(2):
            W.grad = torch.ones_like(W)
            optimizer.step()
        assert caplog.text.count("and nothing changes p: it stays") == int(told)
        assert caplog.text.count("create_schatten_optimizer(model), which knows the model") == int(told)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere is not a folder: give that of a checkpoint"):
        load_learned_p(tmp_path / "nowhere")


def test_p_is_to_be_had_behind_accelerate(gpt2):
    accelerator = Accelerator(cpu=True)
    model, prepared, other = accelerator.prepare(
        gpt2, create_schatten_optimizer(gpt2, p=4, verbose=False), torch.optim.AdamW(gpt2.parameters())
    )
    rows = torch.zeros(1, 8, dtype=torch.long)
    accelerator.backward(model(input_ids=rows, labels=rows).loss)
    prepared.step()
    assert prepared.learned_p() == prepared.optimizer.learned_p() != {}
    assert prepared.skipped_steps() == {}
    assert not hasattr(other, "learned_p")
    with pytest.raises(AttributeError, match="'AdamW' object has no attribute 'learned_p'"):
        other.learned_p()


@pytest.mark.parametrize("trainer_class", [Trainer, SchattenTrainer])
def test_an_optimizer_given_to_the_trainer_is_told_of(trainer_class, gpt2, token_dataset, training_arguments, caplog):
    sentence = "optim='schatten_p' has no effect: the Trainer was given an optimizer of its own, AdamW."
    for arguments, told in (
        (training_arguments(max_steps=1), True),
        (training_arguments(max_steps=1, optim="sgd"), False),
    ):
        caplog.clear()
        adamw = torch.optim.AdamW(gpt2.parameters())
        trainer_class(gpt2, arguments, train_dataset=token_dataset, optimizers=(adamw, None)).train()
        assert (sentence in caplog.messages) == told


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"p": 4, "exclude": ["*.c_proj", "*.c_fc"], "nesterov": False}, "p=4,exclude=*.c_proj;*.c_fc,nesterov=false"),
        ({"p": math.inf, "p_max": None}, "p=inf,p_max=none"),
        ("p=4,", "p=4"),
        (" p = 4 , , p_interval=50", "p=4,p_interval=50"),
        ({}, {}),
        (None, None),
    ],
)
def test_optim_args_may_be_a_mapping_or_end_with_a_comma(given, text, gpt2, token_dataset, training_arguments):
    trainer = Trainer(gpt2, training_arguments(optim_args=given), train_dataset=token_dataset)
    assert trainer.args.optim_args == text
    expected = SchattenOptions(**given) if given and isinstance(given, dict) else SchattenOptions.from_optim_args(text)
    assert trainer.create_optimizer().options == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (4, "optim_args=4 is not allowed: write a text such as 'p=adaptive,p_interval=100', or a mapping"),
        (["p=4"], r"optim_args=\['p=4'\] is not allowed"),
        ("p=adaptive,p_init=runs/p=4", "optim_args cannot hold p_init='runs/p=4': ',' and '=' separate options"),
        ({"p": "adaptive", "p_init": "runs/a,b"}, "optim_args cannot hold p_init='runs/a,b'"),
        ({"p": 4, "target": math.sqrt}, r"optimizers=\(create_schatten_optimizer\(model, target=…\), None\)"),
    ],
)
def test_optim_args_that_a_trainer_cannot_read_are_refused_when_it_is_made(given, message, gpt2, training_arguments):
    with pytest.raises(OptionError, match=message):
        Trainer(gpt2, training_arguments(optim_args=given))


def decay_groups(trainer, model):
    """Return the groups that transformers makes, with a decay and a learning rate of their own."""
    names = trainer.get_decay_parameter_names(model)
    pairs = list(model.named_parameters())
    return [
        {"params": [each for name, each in pairs if name in names], "weight_decay": 0.3},
        {"params": [each for name, each in pairs if name not in names], "weight_decay": 0.0, "lr": 0.5},
    ]


def settings_of(optimizer):
    """Return update, decay and learning rate of each parameter, by name."""
    return {
        name: (group["spectral"], group["weight_decay"], group["lr"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def check_groups(optimizer, model):
    """Hold that each parameter has the update of its route, and the numbers of its group."""
    routes = {route.name: route for route in route_parameters(model).routes}
    found = settings_of(optimizer)
    assert found.keys() >= routes.keys()
    for name, route in routes.items():
        assert found[name] == (route.destination == "schatten_p", *((0.3, 3e-3) if route.decay else (0.0, 0.5)))


@pytest.mark.parametrize("with_model", [False, True])
def test_the_class_and_its_arguments_make_an_optimizer_as_transformers_others_do(
    with_model, gpt2, token_dataset, training_arguments
):
    trainer = Trainer(gpt2, training_arguments(optim_args="p=4"), train_dataset=token_dataset)
    optimizer_class, kwargs = trainer.get_optimizer_cls_and_kwargs(trainer.args, *([gpt2] if with_model else []))
    optimizer = optimizer_class(decay_groups(trainer, gpt2), **kwargs)
    assert isinstance(optimizer, SchattenP)
    check_groups(optimizer, gpt2)
    whole = optimizer_class(gpt2.parameters(), **kwargs)
    assert set(settings_of(whole).values()) == {(True, 0.0, 3e-3), (False, 0.0, 3e-3)}
    trainer = Trainer(gpt2, trainer.args, train_dataset=token_dataset, optimizers=(optimizer, None))
    trainer.train()
    assert optimizer.steps_taken() == 10


def test_without_a_model_groups_are_refused(gpt2, training_arguments):
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(training_arguments())
    with pytest.raises(
        TypeError, match=r"by the modules of the model, .* get_optimizer_cls_and_kwargs\(args, model\)"
    ):
        optimizer_class(gpt2.parameters(), **kwargs)
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(training_arguments(), copy.deepcopy(gpt2))
    with pytest.raises(RoutingError, match=r"28 parameters that are not the model's"):
        optimizer_class(gpt2.parameters(), **kwargs)


class LossTrainer(SchattenTrainer):
    """A Trainer whose loss has weights, as those of sentence-transformers; these replace the groups."""

    key = "optimizer_dict"

    def __init__(self, model, *args, **kwargs):
        self.loss = nn.ModuleDict({"model": model, "classifier": nn.Linear(4, 4)})
        super().__init__(model, *args, **kwargs)

    def get_optimizer_cls_and_kwargs(self, args, model=None):
        optimizer_class, kwargs = super().get_optimizer_cls_and_kwargs(args, self.loss)
        assert not {"params", "model", "optimizer_dict"} & set(kwargs)
        return optimizer_class, kwargs | {self.key: decay_groups(self, self.loss)}


@pytest.mark.parametrize("key", ["optimizer_dict", "params", "model"])
def test_what_a_subclass_puts_in_the_place_of_the_parameters_counts(key, gpt2, token_dataset, training_arguments):
    options = {"optim_args": "p=4", "lr_scheduler_type": "constant", "max_steps": 4, "save_steps": 2}
    arguments = training_arguments(**options, save_strategy="steps")

    def trained(checkpoint=None):
        trainer = LossTrainer(copy.deepcopy(gpt2), arguments, train_dataset=token_dataset)
        trainer.key = key
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    trainer = trained()
    optimizer = trainer.optimizer.optimizer
    check_groups(optimizer, trainer.loss)
    own = [value for name, value in settings_of(optimizer).items() if name.startswith("classifier.")]
    assert own == [(False, 0.3, 3e-3), (False, 0.0, 0.5)]  # weight and bias of the loss
    resumed = trained(f"{arguments.output_dir}/checkpoint-2")
    for expected, found in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_an_attempt_that_ran_out_of_memory_leaves_nothing_in_the_optimizer(gpt2, token_dataset, training_arguments):
    class OutOfMemory(TrainerCallback):
        def __init__(self):
            self.starts = []
            self.fails = True

        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 0:
                policy = optimizer.optimizer.policy
                self.starts.append((optimizer.optimizer.steps_taken(), policy.estimates, dict(policy._probe._samples)))

        def on_step_end(self, args, state, control, **kwargs):
            if self.fails and state.global_step == 3:
                self.fails = False
                raise RuntimeError("CUDA out of memory.")

    callback = OutOfMemory()
    arguments = training_arguments(
        auto_find_batch_size=True, max_steps=4, optim_args="p=adaptive,p_interval=2,p_first_step=1,report=none"
    )
    trainer = Trainer(gpt2, arguments, train_dataset=token_dataset, callbacks=[callback])
    trainer.train()
    assert callback.starts == [(0, 0, {}), (0, 0, {})]
    assert trainer.optimizer.optimizer.steps_taken() == 4
    assert trainer.optimizer.optimizer.policy.estimates == 3  # steps 1, 2 and 4
    trainer.train()  # not an attempt: it goes on
    assert callback.starts[2] == (4, 3, {})


def test_a_model_in_evaluation_mode_is_told_of(gpt2, caplog):
    optimizer = create_schatten_optimizer(gpt2.eval(), p="adaptive", p_first_step=1, verbose=False)
    rows = torch.zeros(1, 8, dtype=torch.long)
    gpt2(input_ids=rows, labels=rows).loss.backward()
    with caplog.at_level(logging.WARNING):
        optimizer.step()
    assert "They get the median p of their kind" in caplog.text
    assert "in evaluation mode, as from_pretrained returns it: call model.train() before training" in caplog.text
