"""``optim="schatten_p"`` in every form that transformers takes it; a canary for the private registries it uses."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments
from transformers import trainer as transformers_trainer
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.training_args import OptimizerNames

from hf_schatten import SchattenCallback, SchattenP, UnsupportedEngineError
from hf_schatten.integration.registration import register, register_optimizer


def test_the_name_is_a_member_like_any_other():
    member = OptimizerNames("schatten_p")
    assert member in list(OptimizerNames)
    assert OptimizerNames["SCHATTEN_P"] is member
    assert member == "schatten_p"
    assert member.value == "schatten_p"
    assert member in _OPTIMIZER_HANDLERS
    assert SchattenCallback in transformers_trainer.DEFAULT_CALLBACKS


def test_registering_again_changes_nothing():
    before = list(OptimizerNames), list(transformers_trainer.DEFAULT_CALLBACKS)
    register()
    assert (list(OptimizerNames), list(transformers_trainer.DEFAULT_CALLBACKS)) == before


@pytest.fixture
def heavy_sgd():
    """Register a name of our own for torch's SGD, and take it away again."""
    name = "heavy_sgd"

    def handler(context):
        return torch.optim.SGD, {"lr": 7.0, "momentum": float(context.optim_args["heaviness"])}

    register_optimizer(name, handler)
    yield name, handler
    member = OptimizerNames(name)
    del OptimizerNames._value2member_map_[name], OptimizerNames._member_map_[name.upper()], _OPTIMIZER_HANDLERS[name]
    OptimizerNames._member_names_.remove(name.upper())
    type.__delattr__(OptimizerNames, member.name)


def test_any_further_optimizer_can_be_registered(heavy_sgd, gpt2, tmp_path):
    name, handler = heavy_sgd
    register_optimizer(name, handler)  # again
    flags = ["--output_dir", str(tmp_path), "--optim", name, "--optim_args", "heaviness=0.75", "--use_cpu"]
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(flags)
    optimizer = transformers_trainer.Trainer(model=gpt2, args=arguments).create_optimizer()
    assert type(optimizer) is torch.optim.SGD
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (7.0, 0.75)
    assert type(pickle.loads(pickle.dumps(arguments.optim))) is str
    assert list(OptimizerNames)[-1] == name


def test_a_name_that_another_optimizer_has_is_refused(heavy_sgd):
    _, handler = heavy_sgd
    before = dict(_OPTIMIZER_HANDLERS)
    for taken in ("adamw_torch", "schatten_p", "Heavy_SGD"):
        with pytest.raises(ValueError, match=f"optim='{taken}' is taken by another optimizer"):
            register_optimizer(taken, handler)
    assert before == _OPTIMIZER_HANDLERS


def test_a_reloaded_module_may_register_again(heavy_sgd):
    name, handler = heavy_sgd

    def anew(context):
        raise NotImplementedError

    anew.__module__, anew.__qualname__ = handler.__module__, handler.__qualname__
    register_optimizer(name, anew)
    assert _OPTIMIZER_HANDLERS[name] is anew


@pytest.mark.parametrize("arguments_class", [TrainingArguments, Seq2SeqTrainingArguments])
def test_constructor_command_line_and_json_take_it(arguments_class, tmp_path):
    values = {"output_dir": str(tmp_path), "optim": "schatten_p", "optim_args": "p=adaptive,p_interval=50"}
    by_constructor = arguments_class(**values)
    flags = [text for name, value in values.items() for text in (f"--{name}", value)]
    (by_flags,) = HfArgumentParser(arguments_class).parse_args_into_dataclasses(flags)
    (tmp_path / "arguments.json").write_text(json.dumps(values))
    (by_json,) = HfArgumentParser(arguments_class).parse_json_file(tmp_path / "arguments.json")
    for arguments in (by_constructor, by_flags, by_json):
        assert arguments.optim == "schatten_p"
        assert arguments.optim_args == "p=adaptive,p_interval=50"
        assert json.loads(arguments.to_json_string())["optim"] == "schatten_p"


def test_set_optimizer_takes_it(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path)).set_optimizer("schatten_p", learning_rate=1e-3)
    assert arguments.optim == "schatten_p"


def test_training_args_bin_loads_without_the_package(tmp_path):
    path = tmp_path / "training_args.bin"
    torch.save(TrainingArguments(output_dir=str(tmp_path), optim="schatten_p", use_cpu=True), path)
    program = (
        "import sys, torch; arguments = torch.load(sys.argv[1], weights_only=False); "
        "assert 'hf_schatten' not in sys.modules; print(arguments.optim)"
    )
    result = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "schatten_p", result.stderr


def test_the_factory_gets_the_arguments_of_the_command_line(gpt2, training_arguments):
    arguments = training_arguments(
        optim_args="p=3,momentum=0.8", learning_rate=0.5, weight_decay=0.25, adam_beta1=0.7, adam_epsilon=1e-4
    )
    optimizer = transformers_trainer.Trainer(model=gpt2, args=arguments).create_optimizer()
    assert isinstance(optimizer, SchattenP)
    fused, matrices, decayed, rest = optimizer.param_groups
    assert fused["parts"] == (("q", 32), ("k", 32), ("v", 32))
    assert (matrices["spectral"], matrices["p"], matrices["momentum"]) == (True, 3.0, 0.8)
    assert [group["weight_decay"] for group in (fused, matrices, decayed, rest)] == [0.25, 0.25, 0.25, 0.0]
    assert all(group["lr"] == 0.5 for group in optimizer.param_groups)
    assert rest["betas"] == (0.7, 0.999)
    assert rest["eps"] == 1e-4


def plugin(**config):
    """Return what a Trainer's arguments have of a configuration of DeepSpeed, which need not be installed."""
    return SimpleNamespace(hf_ds_config=SimpleNamespace(config=config))


STAGE_2 = {"zero_optimization": {"stage": 2}}
REFUSED = [
    ({"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 1}}, "does not support FSDP version 1"),
    ({"parallelism_config": SimpleNamespace(cp_size=2, sp_size=1)}, "does not support cp_size=2"),
    ({"parallelism_config": SimpleNamespace(cp_size=1, sp_size=4)}, "does not support sp_size=4"),
    ({"deepspeed_plugin": plugin()}, "the configuration has stage 0"),
    (
        {"deepspeed_plugin": plugin(optimizer={"type": "Muon"}, **STAGE_2)},
        "names the optimizer 'Muon', which would train in the place of schatten_p",
    ),
    (
        {"deepspeed_plugin": plugin(zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}})},
        r"zero_optimization\.offload_optimizer\.device='cpu' of DeepSpeed",
    ),
    (
        {"deepspeed_plugin": plugin(zero_optimization={"stage": 3, "offload_param": {"device": "cpu"}})},
        r"zero_optimization\.offload_param\.device='cpu'",
    ),
    (
        {"deepspeed_plugin": plugin(zero_optimization={"stage": 1, "round_robin_gradients": True})},
        r"zero_optimization\.round_robin_gradients=True",
    ),
    ({"deepspeed_plugin": plugin(checkpoint={"load_universal": True}, **STAGE_2)}, r"checkpoint\.load_universal=True"),
    (
        {"deepspeed_plugin": plugin(tensor_parallel={"autotp_size": 2}, **STAGE_2)},
        r"tensor_parallel\.autotp_size=2 of DeepSpeed: leave it out; use the tensor parallelism of transformers",
    ),
]


@pytest.mark.parametrize(("argument", "message"), REFUSED)
def test_engines_and_their_settings_are_refused_by_name(gpt2, training_arguments, argument, message):
    arguments = training_arguments()
    for name, value in argument.items():
        setattr(arguments, name, value)  # their constructors need the engine itself
    with pytest.raises(UnsupportedEngineError, match=message):
        transformers_trainer.Trainer.get_optimizer_cls_and_kwargs(arguments, gpt2)
    with pytest.raises(UnsupportedEngineError, match=message):
        SchattenCallback().on_init_end(arguments, None, None, model=gpt2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_of_deepspeed_are_taken(gpt2, training_arguments, stage):
    arguments = training_arguments()
    offload = {"offload_optimizer": {"device": "none"}}
    arguments.deepspeed_plugin = plugin(zero_optimization={"stage": stage, **offload}, bf16={"enabled": True})
    found, _ = transformers_trainer.Trainer.get_optimizer_cls_and_kwargs(arguments, gpt2)
    assert issubclass(found, SchattenP)


def test_fsdp_version_2_is_taken(gpt2, training_arguments):
    arguments = training_arguments()
    arguments.fsdp, arguments.fsdp_plugin_args = True, {"fsdp_version": 2}
    found, _ = transformers_trainer.Trainer.get_optimizer_cls_and_kwargs(arguments, gpt2)
    assert issubclass(found, SchattenP)
