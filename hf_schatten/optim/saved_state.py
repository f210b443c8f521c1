"""What a saved state must be, and what of it counts: the parameters of this model, and the options of this run."""

from __future__ import annotations

import logging
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_schatten.matrices.layout import LAYOUT
from hf_schatten.optim.matrix import ABSENCE, PER_MATRIX, STATISTICS, STATISTICS_WEIGHT, STEP, Matrix
from hf_schatten.optim.state import expected_state
from hf_schatten.options import OPTIMIZER_NAME, SchattenOptions

logger = logging.getLogger(__name__)

STATE_ELSEWHERE = "schatten_p_state_file"  # marks a state_dict without state, and says which file has it
OPTIONS = "schatten_p_options"  # where a state_dict has the options of the run

# Options of a group that say what its parameters are, and not how they are updated.
_STRUCTURE = "params", "spectral", *LAYOUT, "p", "p_by_parameter", "lr_ratio_by_parameter", "param_names"
_NEW = {ABSENCE}  # state that earlier versions did not save: it starts at zero
_STATE_DICT = "The optimizer's saved state"  # in messages, where no file is known


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or is of another model; the message names the file and what is wrong."""


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


def of_schedule(group: Mapping[str, Any], defaults: Collection[str]) -> dict[str, Any]:
    """Return what the learning-rate schedule has written into a saved group, which a resume goes on with.

    These are the rates, what a schedule keeps in a group besides, and the momenta, if it cycles them.

    Args:
        group: as :func:`present_group` returns it.
        defaults: names of the hyperparameters of every group.
    """
    scheduled = {"lr", "initial_lr"} | ({"betas", "momentum"} if "max_momentum" in group else set())
    own = {*defaults, *_STRUCTURE} - scheduled
    return {key: value for key, value in group.items() if key not in own}


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
    source: str, saved: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Raise unless saved states, by parameter name and state name, have the shapes that the present updates need.

    Raises:
        CheckpointError: with the source, the parameter, and the option that may have changed.
    """
    for name, state in saved.items():
        if state.keys() | _NEW != expected[name].keys() | _NEW:
            raise CheckpointError(
                f"{source} holds {sorted(state)} for {name!r}, but its update now needs {sorted(expected[name])}: the "
                "parameter was routed elsewhere, or its second moment is kept otherwise. Use the options exclude and "
                "precondition of the run that wrote it."
            )
        for key, shape in ((key, value.shape) for key, value in expected[name].items() if key in state):
            found = state[key].shape if isinstance(state[key], Tensor) else torch.Size()
            if found == shape or (key == STATISTICS and found[:1] == shape[:1]):  # those of another criterion restart
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


def say_changed_options(saved: Mapping[str, Any], present: SchattenOptions) -> None:
    """Log the options that differ from a checkpoint's as a warning.

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


class Loading:
    """A state_dict on its way into an optimizer: what is done to it before torch loads it, and after.

    Args:
        present: the optimizer's groups.
        defaults: names of the hyperparameters of every group.
        keeps_options: whether the present hyperparameters stay, but for those of the schedule.
    """

    def __init__(self, present: Sequence[dict[str, Any]], defaults: Collection[str], keeps_options: bool) -> None:
        self._present = present
        self._defaults = defaults
        self._keeps_options = keeps_options
        self._expected = expected_state(present)
        self._given: dict[str, Any] = {}

    @property
    def options(self) -> Mapping[str, Any] | None:
        """The options in the state_dict, None where it has none."""
        return self._given.get(OPTIONS)

    def prepare(self, optimizer: Any, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state_dict with groups of the present structure, and the saved numbers of their parameters.

        Where parameters have names, these and not their order say which is which. A hyperparameter that a saved group
        lacks is the present one.

        Raises:
            CheckpointError: as :func:`require_same_parameters` and :func:`require_same_state`.
            ValueError: as :func:`require_own_state`.
        """
        require_own_state(state_dict)
        saved = list(map(present_group, state_dict["param_groups"]))
        if all("param_names" in group for group in (*saved, *self._present)):
            saved = self._by_name(saved)
        if [len(group["params"]) for group in saved] == [len(group["params"]) for group in self._present]:
            numbers = dict(zip(self._expected, _items(saved), strict=True))
            states = state_dict["state"]
            known = {name: states[number] for name, number in numbers.items() if number in states}
            require_same_state(_STATE_DICT, known, self._expected)
            saved = [self._to_load(*pair) for pair in zip(self._present, saved, strict=True)]
        self._given = {**state_dict, "param_groups": saved}  # torch refuses other numbers of groups
        return self._given

    def restore(self, states: Mapping[Tensor, dict[str, Tensor]]) -> None:
        """Give what torch has loaded, in the parameters' dtypes, the dtypes and devices in which state is kept."""
        for number, parameter, expected in zip(
            _items(self._given["param_groups"]), _items(self._present), self._expected.values(), strict=True
        ):
            for key, value in self._given["state"].get(number, {}).items():
                loaded = torch.as_tensor(states[parameter][key])  # a step may be a number
                dtype, device = expected[key].dtype, loaded.device if expected[key].is_meta else expected[key].device
                if key == STEP or (loaded.dtype, loaded.device) != (dtype, device):  # torch shares the step
                    loaded = torch.as_tensor(value).to(device=device, dtype=dtype, copy=True)
                states[parameter][key] = loaded
            self._restart_other_statistics(states.get(parameter, {}), expected)
            if ABSENCE in expected and STATISTICS_WEIGHT in (state := states.get(parameter, {})):
                state.setdefault(ABSENCE, torch.zeros_like(state[STATISTICS_WEIGHT]))

    @staticmethod
    def _restart_other_statistics(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        """Begin the averages of an estimate again where they are those of an earlier criterion."""
        if STATISTICS in state and state[STATISTICS].shape != expected[STATISTICS].shape:
            state[STATISTICS] = state[STATISTICS].new_zeros(expected[STATISTICS].shape)
            state[STATISTICS_WEIGHT].zero_()

    def _by_name(self, saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return saved groups of the parameters that are in the present groups."""
        group_of = {name: group for group in saved for name in group["param_names"]}
        numbers = dict(zip(_items(saved, "param_names"), _items(saved), strict=True))
        require_same_parameters(_STATE_DICT, numbers, self._expected)
        return [
            {**group_of[group["param_names"][0]], "params": [numbers[name] for name in group["param_names"]]}
            for group in self._present
        ]

    def _to_load(self, present: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
        """Return the saved group, with what is the present one's."""
        stays = {*_STRUCTURE, *(self._defaults if self._keeps_options else ())}
        kept = {key: value for key, value in present.items() if key in stays}
        return {**present, **saved, **kept, **of_schedule(saved, self._defaults), "params": saved["params"]}


def take_options(
    saved: Mapping[str, Any] | None, present: SchattenOptions, matrices: Iterable[Matrix], managed: Container[str]
) -> None:
    """Make a loaded state one of the present options, and say what has changed.

    Args:
        saved: the options with which it was saved, None where they are not known.
        present: of this run.
        matrices: of the optimizer.
        managed: names of the matrices whose p a policy changes.
    """
    if saved:
        say_changed_options(saved, present)
    for matrix in matrices:
        if matrix.state and matrix.name not in managed:
            matrix.p.fill_(matrix.first_p)


def _items(groups: Iterable[Mapping[str, Any]], key: str = "params") -> Iterator[Any]:
    """Yield the parameters of groups, or what they have under another key, in order."""
    return (item for group in groups for item in group[key])
