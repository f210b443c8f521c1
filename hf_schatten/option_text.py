"""How options are written: ``--optim_args``, values as text, and the small languages of four of them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from numbers import Integral, Real
from os import PathLike
from typing import Any, NamedTuple

from hf_schatten.option_names import OptionError

# Targets that stand beside the power: form, rule, and whether a number is allowed.
_TARGETS: Mapping[str, tuple[str, str, Callable[[float], bool]]] = {
    "top_k": ("top_k:K", "K a whole number from 1, such as top_k:8", lambda k: k >= 1 and k.is_integer()),
    "soft_threshold": (
        "soft_threshold:TAU",
        "TAU between 0 and 1, such as soft_threshold:0.1",
        lambda tau: 0 < tau < 1,
    ),
    "soft_step": ("soft_step:TAU", "TAU between 0 and 1, such as soft_step:0.2", lambda tau: 0 < tau < 1),
}
POWER = "power"  # the target that is the update of this package
FUNCTION_PREFIX = "function:"  # of the name that stands for a Python function

_GIVEN_PART = re.compile(r"(?P<name>[A-Za-z_]\w*)(?:\*(?P<weight>[1-9]\d*))?")


def read_pairs(text: str | Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return the names and values of ``name=value,name=value``, what ``--optim_args`` takes; blanks are ignored.

    A mapping from names to values, as a YAML file may have it, is taken as it is.

    Raises:
        OptionError: when a pair has no ``=``, options are not separated by commas, or a name occurs twice.
    """
    if isinstance(text, Mapping):
        return dict(text)
    if not isinstance(text, str):
        raise OptionError(
            f"optim_args={text!r} is not allowed: write a text such as 'p=adaptive,p_interval=100', or a mapping."
        )
    values: dict[str, str] = {}
    for given in text.split(","):
        pair = given.replace(" ", "")
        if not pair:
            continue
        _require_one_option(given, known)
        name, separator, value = pair.partition("=")
        if not (name and separator and value):
            raise OptionError(
                f"optim_args has {pair!r}, which is not a name=value pair; write for example "
                "optim_args='p=adaptive,p_interval=100', and join several patterns by ';'."
            )
        if name in values:
            raise OptionError(f"optim_args names {name!r} twice; keep one of them.")
        values[name] = value
    return values


def write_pairs(values: Mapping[str, Any]) -> str:
    """Return options as a text that transformers reads too, which splits it at every comma and ``=``.

    Raises:
        OptionError: when such a text cannot hold a value.
    """
    texts = {name: _as_text(value) for name, value in values.items()}
    for name, text in texts.items():
        if callable(values[name]) or "," in text or "=" in text:
            raise OptionError(
                f"optim_args cannot hold {name}={text!r}: ',' and '=' separate options in a Trainer's text, which has "
                "no functions. Join patterns by ';', give a folder another name, or pass the Trainer "
                f"optimizers=(create_schatten_optimizer(model, {name}=…), None)."
            )
    return ",".join(f"{name}={text}" for name, text in texts.items())


def _as_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ";".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _require_one_option(pair: str, known: Collection[str]) -> None:
    """Raise where a second option follows after a semicolon or a blank."""
    for second in re.finditer(r"[;\s]\s*(\w+)\s*=", pair.partition("=")[2]):
        if second[1] in known:
            raise OptionError(
                f"optim_args has {pair.strip()!r}: separate options by commas, as before {second[1]!r}; semicolons "
                "join the patterns of one option."
            )


def _truth_value(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


def _number_or_path(text: str) -> float | str | None:
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        return text


class _Kind(NamedTuple):
    """What an option takes."""

    parse: Callable[[str], Any]
    takes: Callable[[Any], bool]  # what is no text
    expected: str


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_number_or_none(value: Any) -> bool:
    return value is None or _is_number(value)


def _is_nothing(value: Any) -> bool:
    return False


# By the annotation of the field; the others take the names that they list.
_KINDS: dict[str, _Kind] = {
    "float": _Kind(float, _is_number, "a number"),
    "int": _Kind(int, lambda value: _is_number(value) and isinstance(value, Integral), "a whole number"),
    "bool": _Kind(_truth_value, lambda value: isinstance(value, bool), "true or false"),
    "float | Literal['adaptive', 'schedule']": _Kind(
        lambda text: text if text in ("adaptive", "schedule") else float(text),
        _is_number,
        "'adaptive', 'schedule', a number or inf",
    ),
    "float | str | None": _Kind(_number_or_path, _is_number_or_none, "a number, none, or the folder of a checkpoint"),
    "float | None": _Kind(
        lambda text: None if text.lower() == "none" else float(text), _is_number_or_none, "a number or none"
    ),
    "tuple[str, ...]": _Kind(
        lambda text: tuple(filter(None, re.split("[;,]", text))),
        lambda value: isinstance(value, tuple) and all(isinstance(entry, str) for entry in value),
        "patterns joined by ';', or a list of patterns",
    ),
    "str": _Kind(str, _is_nothing, "a text"),
    "CouplingWeights | WeightFunction": _Kind(str, callable, "a name or a function"),
    "str | TargetFunction": _Kind(str, callable, "a name or a function"),
}
_NAME = _Kind(str, _is_nothing, "a name")


def parse_value(name: str, value: Any, kind: str) -> Any:
    """Return the value of an option, given as such or as text, by the option's annotation.

    Scalars of NumPy and torch are numbers, paths texts, and lists tuples.

    Raises:
        OptionError: when it is no value of that kind.
    """
    given, known = value, _KINDS.get(kind.replace('"', "'"), _NAME)
    value = _scalar(value)
    value = str(value) if isinstance(value, PathLike) else value
    value = tuple(value) if isinstance(value, list) else value
    if isinstance(value, str):
        with suppress(ValueError, KeyError):
            return known.parse(value)
    elif known.takes(value):
        return value
    raise OptionError(f"{name}={given!r} is not allowed: it takes {known.expected}.")


def _scalar(value: Any) -> Any:
    """Return the number that a scalar of NumPy or torch is; anything else stays."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def json_ready(value: Any) -> Any:
    """Return the value as JSON holds it.

    Infinities are the strings they are parsed from, functions their names, and scalars of torch and NumPy numbers.
    """
    if isinstance(value, Mapping):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if callable(value):
        return FUNCTION_PREFIX + function_name(value)
    value = _scalar(value)
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def function_name(f: Callable[..., Any]) -> str:
    """Return the name of a function, or the type of another callable."""
    return getattr(f, "__qualname__", type(f).__name__)


def parse_override(entry: str) -> tuple[str, float]:
    """Return pattern and p of an entry ``pattern:p`` of ``p_overrides``.

    Raises:
        OptionError: when it is no such text.
    """
    return _parse_pattern_and_number("p_overrides", entry, "p", "*.c_proj:inf")


def parse_lr_ratio(entry: str) -> tuple[str, float]:
    """Return pattern and factor of an entry ``pattern:factor`` of ``lr_ratios``.

    Raises:
        OptionError: when it is no such text, or the factor is not a positive finite number.
    """
    pattern, factor = _parse_pattern_and_number("lr_ratios", entry, "factor", "model.layers.0.*:0.5")
    if not 0 < factor < math.inf:
        raise OptionError(f"lr_ratios has {entry!r}, whose factor is not a positive finite number.")
    return pattern, factor


def _parse_pattern_and_number(option: str, entry: str, number: str, example: str) -> tuple[str, float]:
    pattern, separator, value = entry.rpartition(":")
    if not (pattern and separator):
        raise OptionError(f"{option} has {entry!r}, which is not pattern:{number}; write for example {example}.")
    return pattern, parse_value(option, value, "float")


def parse_schedule(text: str) -> tuple[float, float, int | None]:
    """Return first p, last p and number of steps of ``START:END`` or ``START:END:STEPS``; no steps are None.

    Raises:
        OptionError: when it is no such text, or the steps are below 1.
    """
    start, separator, rest = text.partition(":")
    end, _, steps = rest.partition(":")
    try:
        schedule = float(start), float(end), int(steps) if steps else None
    except ValueError:
        separator = ""
    if not separator or (schedule[2] is not None and schedule[2] < 1):
        raise OptionError(
            f"p_schedule={text!r} is not allowed: write START:END, or START:END:STEPS with 1 step or more, such as "
            "4:inf:1000."
        )
    return schedule


def parse_fused_parts(entry: str) -> tuple[str, list[tuple[str, int]], int]:
    """Return the layer pattern, the parts with their weights, and the number of blocks of an entry of ``fused_parts``.

    It is ``pattern:part/part*weight@blocks``; without parts, the layer stays whole.

    Raises:
        OptionError: when it is no such text.
    """
    pattern, separator, rest = entry.rpartition(":")
    cut, _, blocks = rest.partition("@")
    parts = [_GIVEN_PART.fullmatch(part) for part in cut.split("/")] if cut else []
    if not (pattern and separator) or not all(parts) or (blocks and not (blocks.isdecimal() and int(blocks))):
        raise OptionError(
            f"fused_parts has {entry!r} says no parts; write for example *.Wqkv:q*4/k/v for queries four times as "
            "large as keys and values, *.query_key_value:q/k/v@32 for 32 blocks that each hold the three, or "
            "*.c_attn: for one matrix."
        )
    return pattern, [(part["name"], int(part["weight"] or 1)) for part in parts if part], int(blocks or 1)


def parse_target(text: str) -> tuple[str, float]:
    """Return name and number of ``top_k:K``, ``soft_threshold:TAU`` or ``soft_step:TAU``; of ``power``, 0.

    Raises:
        OptionError: when it is none of these; the message names the text and the fix.
    """
    if text == POWER:
        return POWER, 0.0
    name, _, argument = text.partition(":")
    if text.startswith(FUNCTION_PREFIX):
        raise OptionError(
            f"target={text!r} is not allowed: it names a Python function, which a text cannot hold. Pass the function "
            "itself, as create_schatten_optimizer(model, target=function)."
        )
    if name not in _TARGETS and name != POWER:
        nearest = difflib.get_close_matches(name, (POWER, *_TARGETS), n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        forms = ", ".join((POWER, *(form for form, _, _ in _TARGETS.values())))
        raise OptionError(f"target={text!r} is not allowed: one of {forms}.{hint}")
    form, rule, allows = _TARGETS.get(name, (POWER, "whose exponent is 1/p", lambda number: False))
    try:
        number = float(argument)
    except ValueError:
        number = math.nan
    if not allows(number):
        raise OptionError(f"target={text!r} is not allowed: write {form}, {rule}.")
    return name, number
