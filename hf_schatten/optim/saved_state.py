"""What a saved state must be, and what of it counts: the parameters of this model, and the options of this run."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_schatten.matrices.layout import LAYOUT
from hf_schatten.optim.matrix import PER_MATRIX
from hf_schatten.options import OPTIMIZER_NAME, SchattenOptions

logger = logging.getLogger(__name__)

# The only hyperparameters that a schedule changes; every other one is the present run's.
SCHEDULED = ("lr", "initial_lr")

STATE_ELSEWHERE = "schatten_p_state_file"  # marks a state_dict without state, and says which file has it
OPTIONS = "schatten_p_options"  # where a state_dict has the options of the run

# Options of a group that say what its parameters are, and not how they are updated.
_STRUCTURE = "spectral", *LAYOUT, "p", "p_by_parameter", "lr_ratio_by_parameter", "param_names"
_STATE_DICT = "The optimizer's saved state"  # in messages, where no file is known


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or is not of this model; the message names the file and what is wrong."""


def require_own_state(state_dict: Mapping[str, Any]) -> None:
    """Raise unless a state_dict is one of SchattenP's, with state.

    Raises:
        ValueError: with what to do instead.
    """
    if STATE_ELSEWHERE in state_dict:
        raise ValueError(
            "optimizer.pt holds no state: hf_schatten.SchattenTrainer wrote this checkpoint, and the state into "
            f"{state_dict[STATE_ELSEWHERE]} beside it. Resume with hf_schatten.SchattenTrainer, or start a new run "
            "from the model's weights."
        )
    if any("spectral" not in group for group in state_dict["param_groups"]):
        raise ValueError(
            "The state is not SchattenP's but another optimizer's: resume with the optimizer that wrote the "
            f"checkpoint, or start a new run with {OPTIMIZER_NAME} from the model's weights."
        )


def present_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved group under the present names: the first format had ``sections`` and two of ``precondition``."""
    group = dict(group)
    if "sections" in group:
        group["parts"] = group.pop("sections")
    if group.pop("precondition_exponent", "scaled") == "fixed":
        group["precondition"] = "muadam"
    return group


def _present_options(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved options under the present names."""
    saved = dict(saved)
    if "p_start" in saved:
        start, end, steps = float(saved["p_start"]), float(saved["p_end"]), saved["p_steps"]
        saved["p_schedule"] = f"{start:g}:{end:g}" + (f":{steps}" if steps else "")
    if saved.get("precondition_exponent") == "fixed":
        saved["precondition"] = "muadam"
    return saved


def require_same_parameters(source: str, saved: Collection[str], present: Collection[str]) -> None:
    """Raise unless a saved state has the parameters of the present model, by their names.

    Raises:
        CheckpointError: with the source and the names that differ.
    """
    missing, extra = sorted(set(present) - set(saved)), sorted(set(saved) - set(present))
    differences = ", and ".join(
        f"parameters {where} ({len(names)}, such as {names[0]!r})"
        for names, where in ((missing, "are missing from it"), (extra, "are only in it"))
        if names
    )
    if differences:
        raise CheckpointError(
            f"{source} is not of this model: {differences}. Resume with the model that was trained, or start a new "
            "run from its weights."
        )


def require_same_state(
    source: str, saved: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Mapping[str, torch.Size]]
) -> None:
    """Raise unless saved states, by parameter name and state name, have the shapes that the present updates need.

    Raises:
        CheckpointError: with the source, the parameter, and the option that may have changed.
    """
    for name, state in saved.items():
        if state.keys() != expected[name].keys():
            raise CheckpointError(
                f"{source} holds {sorted(state)} for {name!r}, but its update now needs {sorted(expected[name])}: the "
                "parameter was routed elsewhere, or its second moment is kept otherwise. Use the options exclude and "
                "precondition of the run that wrote it."
            )
        for key, shape in expected[name].items():
            found = state[key].shape if isinstance(state[key], Tensor) else torch.Size()
            if found == shape:
                continue
            if key in PER_MATRIX and found[1:] == shape[1:]:
                raise CheckpointError(
                    f"{source} holds {name}/{key} of shape {tuple(found)}, and this model needs {tuple(shape)}: the "
                    "parameter consisted of another number of matrices. Use the options split_heads and fused_parts "
                    "of the run that wrote it."
                )
            raise CheckpointError(
                f"{source} holds {name}/{key} of shape {tuple(found)}, and this model needs {tuple(shape)}: the "
                "checkpoint is of another model. Resume with the model that was trained."
            )


def say_changed_options(saved: Mapping[str, Any], present: SchattenOptions) -> frozenset[str]:
    """Return the names of the options that differ from a checkpoint's, and log them as a warning.

    Args:
        saved: as :meth:`hf_schatten.SchattenOptions.as_json` gives them, now or in an earlier version.
        present: of this run, which are used.
    """
    saved = _present_options(saved)
    changed = {name: value for name, value in present.as_json().items() if saved.get(name, value) != value}
    if changed:
        logger.warning(
            "Options changed since the checkpoint was written, and the new values are used: %s.",
            ", ".join(f"{name} {saved.get(name)!r} -> {value!r}" for name, value in changed.items()),
        )
    return frozenset(changed)


def groups_to_load(
    state_dict: Mapping[str, Any],
    present: Sequence[Mapping[str, Any]],
    expected: Mapping[str, Mapping[str, torch.Size]],
    own: Collection[str],
) -> list[dict[str, Any]]:
    """Return groups of the present structure for torch to load, with the saved numbers of their parameters.

    Where parameters have names, these and not their order say which is which. Of the saved options, those in ``own``
    give way to the present ones; those of the schedule never do.

    Raises:
        CheckpointError: as :func:`require_same_parameters` and :func:`require_same_state`.
    """
    saved = list(map(present_group, state_dict["param_groups"]))
    if all("param_names" in group for group in (*saved, *present)):
        ids, names = _numbers(saved), _numbers(present).keys()
        require_same_parameters(_STATE_DICT, ids, names)
        states = {name: state_dict["state"][ids[name]] for name in names if ids[name] in state_dict["state"]}
        require_same_state(_STATE_DICT, states, expected)
        group_of = {name: group for group in saved for name in group["param_names"]}
        then = [
            group_of[group["param_names"][0]] | {"params": [ids[name] for name in group["param_names"]]}
            for group in present
        ]
    elif len(saved) == len(present):
        then = saved
    else:
        return saved  # which torch refuses
    kept = {*_STRUCTURE, *own} - {*SCHEDULED}
    return [old | {key: new[key] for key in kept if key in new} for new, old in zip(present, then, strict=True)]


def restore_dtypes(
    saved: Mapping[Any, Mapping[str, Any]],
    saved_groups: Iterable[Mapping[str, Any]],
    states: Mapping[Tensor, dict[str, Tensor]],
    groups: Iterable[Mapping[str, Any]],
) -> None:
    """Give loaded state the dtypes in which it was saved, which torch casts to the parameters'."""
    ids, parameters = ((each for group in of for each in group["params"]) for of in (saved_groups, groups))
    for number, parameter in zip(ids, parameters, strict=True):
        for key, value in saved.get(number, {}).items():
            loaded = states[parameter][key]
            if isinstance(value, Tensor) and loaded.dtype != value.dtype:
                states[parameter][key] = value.to(device=loaded.device, copy=True)


def _numbers(groups: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what groups have under ``params``, by name."""
    return {name: item for group in groups for name, item in zip(group["param_names"], group["params"], strict=True)}
