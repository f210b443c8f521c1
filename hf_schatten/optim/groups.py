"""The values of parameter groups, checked where they enter the optimizer and wherever they are edited afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import fields
from numbers import Real
from typing import Any

from torch import Tensor

from hf_schatten.matrices.engines import is_elsewhere
from hf_schatten.matrices.layout import LAYOUT, matrix_name
from hf_schatten.optim.matrix import Group, Matrix, initial_p, layout_of, named_parameters
from hf_schatten.option_names import OptionError
from hf_schatten.options import SchattenOptions

# What the parameters of a group are, and what their state holds.
_FIXED = "spectral", *LAYOUT, "precondition"
_FIRST_P = "p", "p_by_parameter"
_RULES = (
    *_FIXED,
    *_FIRST_P,
    "momentum",
    "nesterov",
    "step_rule",
    "scale",
    "lr_ratio",
    "lr_ratio_by_parameter",
    "maximize",
)

# Keys that would change the step of another optimizer, or of this one if they were not options of it as a whole.
_NOT_OF_GROUPS = frozenset(
    {"amsgrad", "adjust_lr_fn", "capturable", "dampening", "differentiable", "foreach", "fused", "ns_coefficients"}
    | {field.name for field in fields(SchattenOptions)}
)


class Groups:
    """The checks of an optimizer's groups, given its options."""

    def __init__(self, options: SchattenOptions) -> None:
        self._options = options
        self._allowed: dict[int, list[Any]] = {}  # values that passed, by the number of their group

    def check_edited(
        self,
        groups: Sequence[Group],
        states: Container[Tensor],
        matrices: Callable[[], Iterable[Matrix]],
        managed: Collection[str],
    ) -> None:
        """Check groups before a step, and give the matrices of a group that was given another first p this p.

        Args:
            groups: of the optimizer.
            states: parameters that have taken a step.
            matrices: yields its matrices.
            managed: names of the matrices whose p a policy changes.

        Raises:
            OptionError: as :meth:`check`.
        """
        for number, group in enumerate(groups):
            if self.check(number, group, states, managed):
                for matrix in matrices():
                    if matrix.group is group and matrix.state:
                        matrix.p.fill_(matrix.first_p)

    def check(self, number: int, group: Group, started: Container[Tensor] = (), managed: Collection[str] = ()) -> bool:
        """Return whether the first p of a group has been edited since the last check.

        Args:
            number: of the group in the optimizer.
            group: the group.
            started: parameters that have taken a step.
            managed: names of the matrices whose p a policy changes.

        Raises:
            OptionError: when a value is out of range, excludes another, or can no longer change.
            ValueError: when a spectral group holds a parameter that does not consist of real matrices, or several
                elements of a parameter share their memory.
        """
        _require_numbers(group)
        values, before = [*(group[rule] for rule in _RULES), *group], self._allowed.get(number)
        if values == before:
            return False
        for key in sorted(group.keys() & _NOT_OF_GROUPS - {*_RULES}):
            if group[key] not in (None, False):
                raise OptionError(
                    f"{key}={group[key]!r} of a group is not supported: leave it out. "
                    + ("It is an option of the whole optimizer." if hasattr(self._options, key) else "")
                )
        edited = {rule for rule, new, old in zip(_RULES, values, before or values, strict=False) if new != old}
        for rule in sorted(edited.intersection(_FIXED)):
            if any(parameter in started for parameter in group["params"]):
                raise OptionError(
                    f"{rule}={group[rule]!r} of a group is not allowed: it cannot change after a step, since the "
                    "state depends on it. Make a new optimizer."
                )
        for name, parameter in named_parameters(group):
            _require_updatable(name, parameter, group)
        other_p = not edited.isdisjoint(_FIRST_P)
        if group["spectral"]:
            self._require_one_oracle(group)
            for name, parameter in named_parameters(group):
                layout_of(group).check(name, parameter.shape)
                parts = layout_of(group).part_names(parameter.shape)
                for p in set(initial_p(group, name, len(parts))):
                    self.options_of(group, p)
                learned = [part for part in parts if other_p and matrix_name(name, part) in managed]
                if learned:
                    raise OptionError(
                        f"p={group['p']!r} of a group is not allowed: the p of {matrix_name(name, learned[0])!r} is "
                        f"not fixed, but p={self._options.p}. Use p_overrides, or call stop_following() first."
                    )
        self._allowed[number] = values
        return other_p

    def forget(self) -> None:
        """Take the values of all groups as new ones at the next check."""
        self._allowed.clear()

    def options_of(self, group: Group, p: float = math.inf) -> SchattenOptions:
        """Return the options of a group, which are checked as all options are."""
        own = {name: group[name] for name in ("momentum", "nesterov", "step_rule", "scale", "precondition")}
        shared = {name: getattr(self._options, name) for name in ("coupling_order", "coupling_weights", "target")}
        return SchattenOptions(p=p, schatten_lr_ratio=group["lr_ratio"], **own, **shared)

    def _require_one_oracle(self, group: Group) -> None:
        if self._options.coupling_order is not None and group["step_rule"] != self._options.step_rule:
            raise OptionError(
                f"step_rule={group['step_rule']!r} of a group is not allowed: coupled updates have one oracle, and "
                f"the optimizer's is {self._options.step_rule!r}. Give all groups the same."
            )


def _require_updatable(name: str, parameter: Tensor, group: Group) -> None:
    shared = any(size > 1 and stride == 0 for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    if shared and not is_elsewhere(parameter):
        raise ValueError(
            f"Several elements of {name!r} share one place in memory, as of an expanded tensor: make the parameter of "
            "tensor.clone()."
        )
    if group["spectral"] and parameter.is_complex():
        raise ValueError(
            f"{name!r} is complex, and SchattenP updates real matrices: put it into a group with spectral=False, or "
            "name it in the option exclude."
        )


def _require_numbers(group: Group) -> None:
    """Raise an OptionError unless the numbers of a group are in range; those of options are checked as options."""
    rate = group["lr"]
    if not isinstance(rate, Tensor):
        _require("lr", rate, _is_number(rate) and 0 <= rate < math.inf, "a finite number, 0 or more")
    elif rate.numel() != 1 or rate.is_complex():
        _require("lr", rate, False, "a tensor of one element")
    elif rate.device.type == "cpu":  # elsewhere, looking at it would wait for the device
        _require("lr", rate.item(), 0 <= rate.item() < math.inf, "a finite number, 0 or more")
    for name in ("weight_decay", "eps"):
        number = group[name]
        _require(name, number, _is_number(number) and 0 <= number < math.inf, "a finite number, 0 or more")
    betas = group["betas"]
    both = isinstance(betas, Sequence) and len(betas) == 2 and all(map(_is_number, betas))
    _require("betas", betas, both and all(0 <= beta < 1 for beta in betas), "two numbers, 0 or more and below 1")
    for name in ("momentum", "lr_ratio"):
        _require(name, group[name], _is_number(group[name]), "a number")
    for name, ratio in group["lr_ratio_by_parameter"].items():
        holds = _is_number(ratio) and 0 <= ratio < math.inf
        _require(f"lr_ratio_by_parameter: {name}", ratio, holds, "a finite number, 0 or more")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _require(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise OptionError(f"{name}={value!r} of a group is not allowed: {rule}.")
