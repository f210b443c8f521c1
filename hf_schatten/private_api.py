"""All that the package uses of torch, transformers and accelerate without their promise to keep it, in one place.

:data:`NAMES` lists it. ``tests/test_private_api.py`` has a canary for each entry, and fails on a use that is not
listed. ``torch._foreach_*`` is not here: torch documents it, as beta. What has a public form is used in that form.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer

# By package: the lowest version in pyproject.toml, and the one that the tests run with. Both have every name.
VERSIONS = {"transformers": ("5.3.0", "5.23.0")}


class PrivateApiError(ImportError):
    """A private name that is needed, and gone from the installed version; the message says what to install."""


@dataclass(frozen=True)
class PrivateName:
    """One name without a promise."""

    path: str  # module and attributes, joined by a colon
    purpose: str  # what would not work without it

    def resolve(self) -> Any:
        """Return the object.

        Raises:
            PrivateApiError: when it is gone.
        """
        module, _, attributes = self.path.partition(":")
        try:
            found = importlib.import_module(module)
            for attribute in attributes.split("."):
                found = getattr(found, attribute)
        except (ImportError, AttributeError) as error:
            package = module.partition(".")[0]
            lowest, tested = VERSIONS[package]
            raise PrivateApiError(
                f"{package} {version(package)} has no {self.path.replace(':', '.')}, without which hf_schatten cannot "
                f"{self.purpose}. Versions {lowest} to {tested} have it: pip install {package}=={tested}."
            ) from error
        return found


# To be added to: functions by optimizer name, and the callbacks, classes or instances, that every Trainer gets.
HANDLERS = PrivateName("transformers.trainer_optimizer:_OPTIMIZER_HANDLERS", "make optim='schatten_p' valid")
CALLBACKS = PrivateName("transformers.trainer:DEFAULT_CALLBACKS", "log p in every Trainer")
# What Python's enum fills when the class is made, and never again.
ENUM_NAMES, ENUM_MEMBERS, ENUM_VALUES = (
    PrivateName(f"transformers.training_args:OptimizerNames.{attribute}", "make optim='schatten_p' valid")
    for attribute in ("_member_names_", "_member_map_", "_value2member_map_")
)
PROGRESS = PrivateName("transformers.trainer:DEFAULT_PROGRESS_CALLBACK", "keep p by layer off the progress bar")
PRINTER = PrivateName("transformers.trainer:PrinterCallback", "keep p by layer off the terminal")
SCHEDULER_FILE = PrivateName(
    "transformers.trainer:SCHEDULER_NAME", "save the learning-rate schedule where a Trainer reads it"
)

# Methods of Trainer that SchattenTrainerMixin overrides or calls, and hf_schatten.run wraps, with the parameters that
# we rely on. Were one renamed, ours would never be called, and a checkpoint would lose what it should hold.
TRAINER_METHODS: dict[str, tuple[PrivateName, tuple[str, ...]]] = {
    method: (PrivateName(f"transformers:Trainer.{method}", purpose), parameters)
    for method, purpose, parameters in (
        ("_get_output_dir", "find a run's checkpoints", ("trial",)),
        ("_save_checkpoint", "mark a checkpoint as incomplete while it is written", ("model", "trial")),
        ("_save_rng_state", "wait until every process has saved", ("output_dir",)),
        ("_save_optimizer_and_scheduler", "save the optimizer's state as safetensors", ("output_dir",)),
        ("_load_optimizer_and_scheduler", "load the optimizer's state exactly", ("checkpoint",)),
        ("_load_from_checkpoint", "load weights under their files' names", ("resume_from_checkpoint", "model")),
        ("_load_best_model", "load the best weights under their files' names", ()),
    )
}

NAMES: tuple[PrivateName, ...] = (
    *(HANDLERS, CALLBACKS, ENUM_NAMES, ENUM_MEMBERS, ENUM_VALUES, PROGRESS, PRINTER, SCHEDULER_FILE),
    *(name for name, _ in TRAINER_METHODS.values()),
)

# Components that torch's wrappers (torch.compile, checkpoint_wrapper) put into a parameter's name.
WRAPPER_COMPONENTS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


def replace_in_trainer(name: PrivateName, ours: type, theirs: type) -> None:
    """Replace a callback class that every Trainer looks up by a subclass; another, such as a notebook's, stays."""
    if name.resolve() is theirs:
        module, _, attribute = name.path.partition(":")
        setattr(importlib.import_module(module), attribute, ours)


def show_through_accelerate(*methods: str) -> None:
    """Let what Accelerate wraps an optimizer in show these methods of it, as it shows those of torch's optimizers."""
    for method in methods:
        if not hasattr(AcceleratedOptimizer, method):
            setattr(AcceleratedOptimizer, method, property(partial(_of_wrapped, method)))


def _of_wrapped(method: str, wrapper: Any) -> Any:
    """Return a method of the optimizer in a wrapper; DeepSpeed's own wrapper is inside of Accelerate's."""
    inner = wrapper.optimizer
    while not hasattr(inner, method) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    return getattr(inner, method)


def add_optimizer_name(name: str) -> str:
    """Add a member to transformers' enumeration of optimizers, and return it; ``name`` is in lower case, and new.

    Argument parsers list the members, so a lookup hook is not enough.
    """
    names, members, values = (entry.resolve() for entry in (ENUM_NAMES, ENUM_MEMBERS, ENUM_VALUES))
    enumeration: Any = importlib.import_module("transformers.training_args").OptimizerNames
    attribute = name.upper()
    member: Any = str.__new__(enumeration, name)
    member._name_, member._value_ = attribute, name
    member.__objclass__, member._sort_order_ = enumeration, len(names)
    # Pickled as a plain string, so that training_args.bin loads where this package is not installed.
    member.__reduce_ex__ = lambda protocol: (str, (name,))
    type.__setattr__(enumeration, attribute, member)
    names.append(attribute)
    members[attribute] = member
    values[name] = member
    return member


def require_trainer_methods() -> None:
    """Refuse a transformers whose Trainer has other methods than those that are overridden.

    Raises:
        PrivateApiError: when one is gone.
    """
    for name, _ in TRAINER_METHODS.values():
        name.resolve()


def has_gate(experts: Any) -> bool:
    """Return whether a module is one of transformers' layers of experts, by its interface."""
    return hasattr(experts, "_apply_gate")


def apply_gate(experts: Any, gate_up: Any) -> Any:
    """Return what the experts' ``down_proj`` gets, (tokens, features), of the outputs (tokens, 2 features) before."""
    return experts._apply_gate(gate_up)


class ZeroParameter:
    """A parameter of a model that DeepSpeed has wrapped, with what it notes in it (checked with 0.19)."""

    def __init__(self, parameter: Any) -> None:
        self._parameter = parameter

    @property
    def is_of_stage_1_or_2(self) -> bool:
        """Whether stage 1 or 2 has made partitions of the parameters."""
        return hasattr(self._parameter, "_hp_mapping")

    @property
    def stage_3(self) -> Any:
        """The optimizer of stage 3, None where another stage has wrapped the model."""
        return getattr(self._parameter, "_z3_optimizer", None)

    @property
    def processes(self) -> Any:
        """The process group that its elements are shared out to."""
        return self._parameter.ds_process_group if self.stage_3 else self._parameter._dp_group

    @property
    def fragment(self) -> tuple[int, int, int]:
        """The first of its elements in this process' partition, how many there are, and where; stages 1 and 2."""
        mapping = self._parameter._hp_mapping
        if mapping is None:
            return 0, 0, 0
        of_parameter = mapping.lp_fragment_address
        return of_parameter.start, of_parameter.numel, mapping.hp_fragment_address.start

    def reduced_gradient(self) -> Any:
        """Return the gradient of these elements before a step, a vector, None where there are none."""
        mapping = self._parameter._hp_mapping
        if mapping is None:
            return None
        return mapping.get_lp_grad_fragment(self._parameter._index_in_param_group).flatten()


def tensor_without_elements(cls: Any, shape: Any, like: Any) -> Any:
    """Return a tensor of a subclass that has a shape, and dtype and device of another, and no elements."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
