"""Canaries for what torch and transformers do not promise to keep, and a guard against further uses of such names."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DefaultFlowCallback, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments
from transformers import trainer as transformers_trainer
from transformers.training_args import OptimizerNames

import hf_schatten
from hf_schatten import SchattenTrainer, private_api
from hf_schatten.adaptive import probe
from hf_schatten.private_api import NAMES, TRAINER_METHODS, VERSIONS, PrivateApiError, PrivateName

PACKAGE = Path(hf_schatten.__file__).parent
ROOT = Path(__file__).parents[1]
SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.path.partition(":")[2])
def test_every_name_exists(name):
    assert name.resolve() is not None


def test_the_versions_are_the_ones_of_requirements_and_tests():
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for package, (lowest, tested) in VERSIONS.items():
        assert f"{package}=={tested}" in (ROOT / "constraints.txt").read_text().splitlines()
        (allowed,) = (entry for entry in requirements if entry.startswith(package))
        assert lowest.startswith(re.search(r">=([\d.]+)", allowed)[1])


@pytest.mark.parametrize("path", ["transformers.trainer:GONE", "transformers.gone:X", "transformers:Trainer._gone"])
def test_what_is_gone_is_named_with_the_version_to_install(path):
    with pytest.raises(
        PrivateApiError,
        match=rf"transformers [\d.]+ has no {path.replace(':', '.')}, without which hf_schatten cannot do it\."
        r" Versions 5\.3\.0 to .* have it: pip install transformers==[\d.]+\.",
    ):
        PrivateName(path, "do it").resolve()


def test_a_trainer_without_one_of_the_methods_is_refused_at_first_use(gpt2, training_arguments, monkeypatch):
    monkeypatch.delattr(Trainer, "_save_rng_state")
    with pytest.raises(PrivateApiError, match=r"has no Trainer|has no transformers\.Trainer\._save_rng_state"):
        SchattenTrainer(gpt2, training_arguments())


# What each of them does for us


def test_a_handler_is_called_for_its_name_and_a_member_is_found_in_every_way(training_arguments):
    assert "schatten_p" in private_api.HANDLERS.resolve()
    factory, _ = Trainer.get_optimizer_cls_and_kwargs(training_arguments(), None)
    assert factory.__module__.startswith("hf_schatten")
    member = OptimizerNames("schatten_p")
    assert OptimizerNames.__members__["SCHATTEN_P"] is OptimizerNames["SCHATTEN_P"] is member in list(OptimizerNames)
    assert member in {"schatten_p"}  # hashed as its value, as the keys of the handlers are


def test_the_callbacks_of_the_module_are_those_of_every_trainer(gpt2, training_arguments, monkeypatch):
    class Bar(DefaultFlowCallback):
        pass

    monkeypatch.setattr(transformers_trainer, "DEFAULT_CALLBACKS", [])
    monkeypatch.setattr(transformers_trainer, "DEFAULT_PROGRESS_CALLBACK", Bar)
    monkeypatch.setattr(transformers_trainer, "PrinterCallback", DefaultFlowCallback)
    for disabled, expected in ((False, Bar), (True, DefaultFlowCallback)):
        trainer = Trainer(gpt2, training_arguments(disable_tqdm=disabled))
        assert [type(callback) for callback in trainer.callback_handler.callbacks] == [expected]


def test_a_progress_bar_that_is_not_transformers_own_stays(monkeypatch):
    class Notebook(DefaultFlowCallback):
        pass

    monkeypatch.setattr(transformers_trainer, "DEFAULT_PROGRESS_CALLBACK", Notebook)
    private_api.replace_in_trainer(private_api.PROGRESS, int, str)
    assert transformers_trainer.DEFAULT_PROGRESS_CALLBACK is Notebook


@pytest.mark.parametrize(("name", "entry"), TRAINER_METHODS.items())
def test_a_method_takes_what_we_give_and_get(name, entry):
    _, parameters = entry
    assert tuple(inspect.signature(getattr(Trainer, name)).parameters)[1:] == parameters


def test_trainer_calls_the_methods_of_a_save_and_a_resume(gpt2, token_dataset, training_arguments, monkeypatch):
    called = []

    def watched(name, method):
        def call(self, *args, **kwargs):
            called.append(name)
            return method(self, *args, **kwargs)

        return call

    for name in TRAINER_METHODS:
        monkeypatch.setattr(Trainer, name, watched(name, getattr(Trainer, name)))
    saving = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    for steps, resume in ((1, None), (2, True)):
        arguments = training_arguments(max_steps=steps, load_best_model_at_end=True, optim_args="p=4", **saving)
        trainer = Trainer(gpt2, arguments, train_dataset=token_dataset, eval_dataset=token_dataset[:4])
        trainer.train(resume_from_checkpoint=resume)
    assert set(called) == set(TRAINER_METHODS)
    written = {path.name for path in (Path(arguments.output_dir) / "checkpoint-2").iterdir()}
    assert private_api.SCHEDULER_FILE.resolve() in written


def test_wrappers_put_the_listed_components_into_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layer = nn.Linear(2, 2)
    wrapped = {"_orig_mod": torch.compile(layer), "_checkpoint_wrapped_module": checkpoint_wrapper(layer)}
    assert set(wrapped) == private_api.WRAPPER_COMPONENTS
    for component, module in wrapped.items():
        assert component in next(name for name, _ in nn.Sequential(module).named_parameters()).split(".")


def test_experts_have_the_gate_that_makes_their_hidden_features():
    sizes = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=9, num_local_experts=2))
    experts = model.model.layers[0].mlp.experts
    assert private_api.has_gate(experts)
    assert not private_api.has_gate(model.model.layers[0].mlp)
    gate_up = torch.randn(3, 12)
    expected = torch.nn.functional.silu(gate_up[:, :6]) * gate_up[:, 6:]
    torch.testing.assert_close(private_api.apply_gate(experts, gate_up), expected, atol=1e-6, rtol=1e-6)


# Public forms of what used to be private


def test_a_checkpoint_and_an_offload_pack_what_autograd_saves():
    found = []

    def layer(x):
        found.append((probe._autograd_packs(), probe._inside_backward()))
        return x * x

    x = torch.ones(2, requires_grad=True)
    layer(x)
    with torch.autograd.graph.save_on_cpu():
        layer(x)
        assert probe._autograd_packs()  # asking leaves the hooks in place
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert found == [(False, False), (True, False), (True, False), (True, True)]
    assert not probe._autograd_packs()
    assert not probe._inside_backward()


# No further uses


def private_names(tree):
    """Yield (line, name) of attributes and imports of a name, or module, that begins with one underscore."""
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Attribute):
            found = [node.attr]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("hf_schatten"):
            found = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            found = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # of getattr, hasattr and setattr
            found = [node.value] if node.value.isidentifier() else []
        yield from ((node.lineno, name) for name in found if re.match(r"_[A-Za-z]", name))


def defined_names(tree):
    """Yield the functions, classes, variables and attributes of self that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") else []


def test_no_module_uses_a_private_name_of_others_but_the_one_that_lists_them():
    own = {name for tree in SOURCES.values() for name in defined_names(tree)} - set(TRAINER_METHODS)
    # Without an underscore, and without documentation.
    undocumented = {"DEFAULT_CALLBACKS", "DEFAULT_PROGRESS_CALLBACK", "SCHEDULER_NAME", "get_fsdp_ckpt_kwargs"}
    used = []
    for path, tree in SOURCES.items():
        place = str(path.relative_to(PACKAGE))
        if place == "private_api.py":
            continue
        of_trainer = set(TRAINER_METHODS) if place in ("integration/trainer.py", "run.py") else set()
        names = [(line, name) for line, name in private_names(tree) if name not in own | of_trainer]
        names += [(node.lineno, node.attr) for node in ast.walk(tree) if getattr(node, "attr", None) in undocumented]
        used += [f"{place}:{line} {name}" for line, name in names if not name.startswith("_foreach_")]
    assert not used, "list it in hf_schatten/private_api.py, with a canary here"


def test_no_class_overrides_a_private_method_that_is_not_listed():
    overridden = set()
    for module in pkgutil.walk_packages([str(PACKAGE)], "hf_schatten."):
        if module.name.endswith("__main__"):
            continue
        for _, ours in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            bases = [base for base in ours.__mro__ if not base.__module__.startswith(("hf_schatten", "typing"))]
            bases += [Trainer] if issubclass(ours, hf_schatten.SchattenTrainerMixin) else []
            if ours.__module__.startswith("hf_schatten") and not issubclass(ours, tuple):
                overridden |= {
                    name
                    for name in vars(ours)
                    if re.match(r"_[a-z]", name) and name != "_abc_impl" and any(hasattr(base, name) for base in bases)
                }
    assert overridden == set(TRAINER_METHODS) - {"_get_output_dir"}


def test_the_beta_operations_on_lists_exist():
    names = {
        node.attr
        for tree in SOURCES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_foreach_")
    }
    assert names
    assert not [name for name in names if not callable(getattr(torch, name, None))]


def test_arguments_of_a_trainer_still_name_the_optimizer_by_its_enumeration(tmp_path):
    assert type(TrainingArguments(output_dir=str(tmp_path), optim="schatten_p").optim) is OptimizerNames
