"""Runs an unmodified script with ``--optim schatten_p`` available: ``python -m hf_schatten.run SCRIPT.py …``.

Also ``-m MODULE …`` for a module, and behind ``accelerate launch -m`` or ``torchrun -m``. The script finds itself as
Python would have started it. What trains without the optimizer is reported.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import os
import runpy
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from torch import distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from hf_schatten.integration.callback import ignored, unwrap_optimizer
from hf_schatten.integration.checkpoint import naming_damaged_files
from hf_schatten.integration.converted_weights import load_converted_weights
from hf_schatten.integration.registration import is_registered
from hf_schatten.options import OPTIMIZER_NAME
from hf_schatten.private_api import CALLBACKS, require_trainer_methods

_PROGRAM = "python -m hf_schatten.run"
_USAGE = f"""usage: {_PROGRAM} SCRIPT.py [ARGUMENT …]
       {_PROGRAM} -m MODULE [ARGUMENT …]

Runs a script or module that trains with transformers' Trainer, as python would, with the optimizer {OPTIMIZER_NAME}
available: add "--optim {OPTIMIZER_NAME}" to its arguments, and its options as "--optim_args name=value,name=value".
Also after "accelerate launch -m" and "torchrun -m" in place of "python -m"."""


def main() -> None:
    """Run the script or module named on the command line as ``__main__``, with the rest as its arguments.

    The exit status is the script's own, and 2 when the command line names nothing that can be run.
    """
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(_USAGE)
        return
    of_module = arguments[:1] == ["-m"]
    target = arguments[1:] if of_module else arguments
    if not target or target[0].startswith("-"):
        _refuse(f"{_USAGE}\n\nerror: name a script, or a module after -m; its own options come after it")
    watch = _Watch()
    CALLBACKS.resolve().append(watch)
    _resume_as_this_package_does()
    sys.argv = target
    try:
        (_run_module if of_module else _run_script)(target[0])
    except SystemExit as end:
        if not end.code:
            _leave_processes()
        raise
    watch.report_end(target[0])
    _leave_processes()


def _leave_processes() -> None:
    """End what connects this process with others, which a script may leave to the end of Python.

    By then gloo's threads may still hold tensors, and the one that frees them aborts a process that has trained. After
    an error nothing is done: NCCL would wait for the others.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _run_script(script: str) -> None:
    """Run a file as ``python SCRIPT.py`` does.

    Not by ``runpy.run_path``, which leaves a relative path relative in ``__file__`` and sets no ``sys.path``.
    """
    path = os.path.join(os.getcwd(), script)
    if not os.path.isfile(path):
        _refuse(f"error: there is no script {path!r}{_hint(Path(path))}")
    loader = SourceFileLoader("__main__", path)
    module = ModuleType("__main__")
    module.__file__, module.__loader__ = path, loader
    sys.modules["__main__"] = module  # where pickle, and processes that are spawned, look for the script's classes
    if not sys.flags.safe_path:
        _enter_folder(os.path.dirname(os.path.realpath(path)))
    exec(loader.source_to_code(loader.get_data(path), path), module.__dict__)


def _enter_folder(folder: str) -> None:
    """Make the folder's modules importable in place of the working directory's, which ``python -m`` has put first."""
    if sys.path[:1] == [os.getcwd()]:
        del sys.path[0]
    sys.path.insert(0, folder)


def _run_module(name: str) -> None:
    """Run a module, or a package's ``__main__``, as ``python -m`` does."""
    if name.endswith(".py"):
        _refuse(f"error: {name!r} is a file and no module: leave -m out")
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # the package is there, and lacks one of its own requirements
        spec = None
    if not spec:
        _refuse(f"error: there is no module named {name!r} in this environment")
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _resume_as_this_package_does() -> None:
    """Let every Trainer load a checkpoint whose file names the weights otherwise, and name one that is damaged.

    In the runner only: a program that imports this package keeps transformers' Trainer as it is.
    """
    require_trainer_methods()
    load, load_best = Trainer._load_from_checkpoint, Trainer._load_best_model
    load_optimizer = Trainer._load_optimizer_and_scheduler

    @functools.wraps(load)
    def load_from_checkpoint(self: Trainer, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with naming_damaged_files(resume_from_checkpoint):
            if not load_converted_weights(self.model if model is None else model, resume_from_checkpoint):
                load(self, resume_from_checkpoint, model)

    @functools.wraps(load_best)
    def load_best_model(self: Trainer) -> None:
        if not load_converted_weights(self.model, str(self.state.best_model_checkpoint)):
            load_best(self)

    @functools.wraps(load_optimizer)
    def load_optimizer_and_scheduler(self: Trainer, checkpoint: str | None) -> None:
        with naming_damaged_files(str(checkpoint)):
            load_optimizer(self, checkpoint)

    Trainer._load_from_checkpoint = load_from_checkpoint  # type: ignore[method-assign]
    Trainer._load_best_model = load_best_model  # type: ignore[method-assign]
    Trainer._load_optimizer_and_scheduler = load_optimizer_and_scheduler  # type: ignore[method-assign]


class _Watch(TrainerCallback):
    """Says so when a Trainer trains with another optimizer, which would otherwise pass for a run with this one."""

    _trained = False

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare what was asked for with what trains."""
        self._trained = True
        optimizer = kwargs.get("optimizer")
        if unwrap_optimizer(optimizer) is not None:
            return
        name = getattr(args.optim, "value", args.optim)
        if not is_registered(name):
            _warn(f"training uses optim={name!r}: add --optim {OPTIMIZER_NAME} to the script's arguments")
        elif clause := ignored(args, optimizer):
            _warn(clause)

    def report_end(self, target: str) -> None:
        """Warn when no Trainer has trained at all."""
        if not self._trained:
            _warn(f"{target} has ended, and no Trainer in it has trained, so {OPTIMIZER_NAME} was not used")


def _hint(path: Path) -> str:
    """Return what may have been meant by a path that does not exist."""
    if path.is_dir():
        return ", which is a folder: name a file in it, or run a package with -m"
    if not path.parent.is_dir():
        return f": the folder {str(path.parent)!r} does not exist"
    names = [other.name for other in path.parent.iterdir() if other.suffix == ".py"]
    similar = difflib.get_close_matches(path.name, names, n=1)
    return f". Did you mean {similar[0]!r}?" if similar else ""


def _refuse(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)


def _warn(message: str) -> None:
    """Print it, once for all processes; a script's settings of logging cannot hide it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"hf_schatten.run: warning: {message}.", file=sys.stderr)


if __name__ == "__main__":
    main()
