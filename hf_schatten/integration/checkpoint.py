"""The optimizer's state on disk: ``optimizer.safetensors`` and ``optimizer_config.json``, and no pickle.

``optimizer.safetensors`` holds every state tensor under ``<parameter name>/<state name>``; a matrix's learned p is
``<parameter name>/p``. ``optimizer_config.json`` holds the format version, the options and the parameter groups. Both
are written under a temporary name and renamed, the configuration last: where it exists, the state is whole.

A Trainer that finds no ``optimizer.pt`` resumes with a new optimizer and a new schedule and says nothing. So there is
one, without state, that every other optimizer refuses.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeAlias

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_schatten.distributed.pieces import is_sharded, like, local, whole
from hf_schatten.matrices.layout import matrix_name
from hf_schatten.optim.matrix import MOMENTUM, P, layout_of
from hf_schatten.optim.saved_state import (
    OPTIONS,
    STATE_ELSEWHERE,
    CheckpointError,
    of_schedule,
    present_group,
    require_same_parameters,
    require_same_state,
)
from hf_schatten.optim.schatten_p import SchattenP
from hf_schatten.optim.state import expected_state
from hf_schatten.option_text import json_ready
from hf_schatten.report.log import TRAINER_STATE_FILE, checkpoints_of

logger = logging.getLogger(__name__)

Folder: TypeAlias = str | os.PathLike[str]

STATE_FILE = "optimizer.safetensors"
CONFIG_FILE = "optimizer_config.json"
LEARNED_P_FILE = "learned_p.json"
FORMAT_VERSION = 4
_READ_VERSIONS = (3, FORMAT_VERSION)  # 3 had other names of groups and options, see present_group
_TORCH_FILE = "optimizer.pt"  # what a plain Trainer writes


def save_optimizer(optimizer: SchattenP, folder: Folder, *, write: bool = True) -> None:
    """Write the optimizer's state and configuration into a checkpoint folder.

    Where parameters, which need names, are sharded, every process must call this; one of them is to write.
    """
    folder = Path(folder)
    tensors = {}
    for name, parameter in _named_parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            gathered = whole(value.detach())
            if write:
                tensors[f"{name}/{key}"] = gathered.cpu().contiguous()
    if not write:
        return
    config = {
        "format_version": FORMAT_VERSION,
        "package_version": version("hf_schatten"),
        "options": optimizer.state_dict().get(OPTIONS),
        "groups": [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups],
    }
    _replace(folder / STATE_FILE, lambda path: save_file(tensors, path))
    _write_json(folder / CONFIG_FILE, config)


def write_refusal(folder: Folder) -> None:
    """Write the ``optimizer.pt`` that makes other trainers stop instead of resuming without the optimizer's state.

    ``torch.optim`` refuses it for its number of groups, and :class:`hf_schatten.SchattenP` with the fix.
    """
    refusal = {"state": {}, "param_groups": [], STATE_ELSEWHERE: STATE_FILE}
    _replace(Path(folder) / _TORCH_FILE, lambda path: torch.save(refusal, path))


def write_learned_p(optimizer: SchattenP, folder: Folder) -> None:
    """Write the learned p beside a state that :func:`load_learned_p` cannot read: a plain ``Trainer``'s under FSDP.

    Where the checkpoint's folder does not exist, or its state can be read, nothing is written.
    """
    folder = Path(folder)
    if folder.is_dir() and not ((folder / STATE_FILE).exists() or (folder / _TORCH_FILE).exists()):
        _write_json(folder / LEARNED_P_FILE, optimizer.learned_p())


def is_foreign(folder: Folder) -> bool:
    """Return whether a plain ``Trainer`` wrote the optimizer's state in the folder, into ``optimizer.pt``."""
    return (Path(folder) / _TORCH_FILE).exists() and not _has_own_state(Path(folder))


def _has_own_state(folder: Path) -> bool:
    return (folder / STATE_FILE).exists() or (folder / CONFIG_FILE).exists()


def load_optimizer(optimizer: SchattenP, folder: Folder) -> None:
    """Load the state that :func:`save_optimizer` wrote, after checking that it is this model's.

    What a learning-rate schedule changes comes from the checkpoint. All other options are the present optimizer's;
    those that differ from the checkpoint's are logged as a warning.

    Raises:
        CheckpointError: when a file is missing, truncated, foreign, of another format version or of another model.
            The optimizer is unchanged then.
    """
    folder = Path(folder)
    if not _has_own_state(folder):
        raise CheckpointError(
            f"{folder} holds no optimizer state (was it saved with save_only_model?): start a new run from its "
            "weights."
        )
    config = _read_config(folder / CONFIG_FILE)
    saved = _read_state(folder / STATE_FILE)
    names = dict(_named_parameters(optimizer))
    require_same_parameters(str(folder / STATE_FILE), saved, names)
    require_same_state(str(folder / STATE_FILE), saved, expected_state(optimizer.param_groups))
    schedules = {
        name: of_schedule(group, optimizer.defaults)
        for group in map(present_group, config["groups"])
        for name in group["param_names"]
    }
    state_dict = optimizer.state_dict()
    ids = dict(zip(names, (i for group in state_dict["param_groups"] for i in group["params"]), strict=True))
    state_dict["state"] = {
        ids[name]: {key: _as_the_parameter(value, names[name]) for key, value in state.items()}
        for name, state in saved.items()
    }
    for group in state_dict["param_groups"]:
        scheduled = schedules[group["param_names"][0]]
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in scheduled.items()})
    optimizer.load_state_dict(state_dict | {OPTIONS: config["options"]})


@contextmanager
def naming_damaged_files(checkpoint: Folder) -> Iterator[None]:
    """Turn errors of readers that name no file, such as torch's and safetensors', into one that does.

    Raises:
        CheckpointError: when a file of the checkpoint is truncated, missing or of another kind.
    """
    try:
        yield
    except (SafetensorError, OSError, EOFError, UnpicklingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        raise CheckpointError(
            f"A file of {checkpoint} is truncated, missing or of another kind ({error}): resume from an earlier "
            "checkpoint."
        ) from error


def mark_incomplete(folder: Folder) -> None:
    """Make :func:`newest_complete_checkpoint` pass over a folder, which may not exist, until it is written again."""
    (Path(folder) / TRAINER_STATE_FILE).unlink(missing_ok=True)


def newest_complete_checkpoint(output_dir: Folder) -> Path | None:
    """Return the newest ``checkpoint-<step>`` whose writing was finished, None where there is none.

    A Trainer writes ``trainer_state.json`` last. Newer folders, which a run that was killed while it saved has left,
    are logged as a warning.
    """
    skipped = []
    for folder in checkpoints_of(Path(output_dir)):
        try:
            json.loads((folder / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            skipped.append(folder.name)
            continue
        if skipped:
            logger.warning(
                "%s is resumed: the writing of %s was not finished, because the run ended while it saved. Delete what "
                "is incomplete.",
                *(folder, ", ".join(skipped)),
            )
        return folder
    return None


def require_same_checkpoint(checkpoint: Path | None) -> None:
    """Refuse to resume checkpoints of several names; all processes must call it.

    Machines without a common folder may have different ones, and would go on from different steps.

    Raises:
        CheckpointError: when the names differ.
    """
    names = gather_object([checkpoint.name if checkpoint else "none"])
    if len(set(names)) > 1:
        found = ", ".join(f"{name} (process {rank})" for rank, name in enumerate(names))
        raise CheckpointError(
            f"The processes would resume different checkpoints: {found}. Copy the one to resume to all machines, and "
            "pass its folder as resume_from_checkpoint."
        )


def load_learned_p(checkpoint: Folder) -> dict[str, float]:
    """Return the learned p of every matrix in a checkpoint.

    Args:
        checkpoint: folder ``checkpoint-<step>`` of a ``SchattenTrainer``, or of a plain ``Trainer``.

    Returns:
        p by the matrix's name: the parameter's, and the part's where it has several.

    Raises:
        CheckpointError: when the folder holds no such state, or the file cannot be read.
    """
    folder = Path(checkpoint)
    if (folder / STATE_FILE).is_file():
        states = _read_state(folder / STATE_FILE, only=(P, MOMENTUM))
        return _p_by_matrix(states, _read_config(folder / CONFIG_FILE)["groups"])
    if (folder / _TORCH_FILE).is_file():
        return _learned_p_of_torch_file(folder / _TORCH_FILE)
    if (folder / LEARNED_P_FILE).is_file():
        content = json.loads((folder / LEARNED_P_FILE).read_text(encoding="utf-8"))
        return {name: float(p) for name, p in content.items()}
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give that of a checkpoint, such as run/checkpoint-500.")
    files = STATE_FILE, _TORCH_FILE, LEARNED_P_FILE
    found = [path for path in checkpoints_of(folder) if any((path / name).exists() for name in files)]
    hint = f" Did you mean {found[0]}?" if found else ""
    raise CheckpointError(f"{folder} has no {STATE_FILE}.{hint}")


def _as_the_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a state tensor sharded as the parameter is, if it has its shape."""
    if not is_sharded(parameter) or value.shape != parameter.shape:
        return value
    return like(value.to(local(parameter).device), parameter)


def _p_by_matrix(states: Mapping[str, Mapping[str, Tensor]], groups: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the p of every matrix by its name, from the states of its parameters and the groups of a checkpoint."""
    layouts = {name: layout_of(group) for group in map(present_group, groups) for name in group["param_names"]}
    return {
        matrix_name(name, part): p
        for name, state in states.items()
        if P in state
        for part, p in zip(layouts[name].part_names(state[MOMENTUM].shape), state[P].tolist(), strict=True)
    }


def _named_parameters(optimizer: SchattenP) -> Iterator[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        if "param_names" not in group:
            raise ValueError(
                "The optimizer's parameters have no names, by which a checkpoint is keyed; pass (name, parameter) "
                "pairs, or use hf_schatten.create_schatten_optimizer(model)."
            )
        if len(group["param_names"]) != len(group["params"]):
            raise ValueError(
                "The optimizer's parameters are partitions of DeepSpeed ZeRO, whose own checkpoints hold their state: "
                "call save_checkpoint and load_checkpoint of the engine, or save_state and load_state of Accelerate."
            )
        yield from zip(group["param_names"], group["params"], strict=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(json_ready(content), indent=2, allow_nan=False) + "\n"
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, and rename it: what has the name is whole."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        message = f"{path} is missing, so the checkpoint is incomplete: resume from an earlier one."
        raise CheckpointError(message) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): resume from an earlier checkpoint.") from error
    found = config.get("format_version") if isinstance(config, dict) else None
    if found not in _READ_VERSIONS:
        raise CheckpointError(
            f"{path} has format_version {found!r}, and this version of hf_schatten reads "
            f"{' and '.join(map(str, _READ_VERSIONS))}: resume with the version that wrote it."
        )
    if not isinstance(config.get("groups"), list):
        raise CheckpointError(f"{path} has no list of groups, so it is damaged: resume from an earlier checkpoint.")
    return config


def _read_state(path: Path, only: Container[str] | None = None) -> dict[str, dict[str, Tensor]]:
    """Return the state tensors by parameter name and state name, all or only those of the given state names."""
    states: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - a file handle, no mapping
                name, _, state_name = key.rpartition("/")
                if only is None or state_name in only:
                    states.setdefault(name, {})[state_name] = file.get_tensor(key)
    except FileNotFoundError as error:
        message = f"{path} is missing, so the optimizer cannot resume; was the checkpoint saved with save_only_model?"
        raise CheckpointError(message) from error
    except (SafetensorError, OSError) as error:
        message = f"{path} is truncated or no safetensors file ({error}): resume from an earlier checkpoint."
        raise CheckpointError(message) from error
    return states


def _learned_p_of_torch_file(path: Path) -> dict[str, float]:
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
        if STATE_ELSEWHERE in state_dict:
            raise ValueError(f"{state_dict[STATE_ELSEWHERE]} has it, and is missing")
        groups, states = state_dict["param_groups"], state_dict["state"]
        named = (pair for group in groups for pair in zip(group["param_names"], group["params"], strict=True))
        return _p_by_matrix({name: states[index] for name, index in named if index in states}, groups)
    except Exception as error:  # whatever torch raises on a truncated or foreign file
        raise CheckpointError(f"{path} is not a state of SchattenP ({error}).") from error
