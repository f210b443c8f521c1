"""How options are written: ``--optim_args``, values as text, and the small languages of four of them.

Knows no option but those that no longer exist, about which it says what to write instead.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

# What the caller sets for AdamW and the matrices alike: names under which it may be given as an option, the argument
# of create_schatten_optimizer, and the flags of TrainingArguments.
_OF_THE_CALLER = (
    (("lr", "learning_rate"), "lr", "--learning_rate"),
    (("weight_decay", "wd"), "weight_decay", "--weight_decay"),
    (("betas", "beta1", "beta2", "adam_beta1", "adam_beta2"), "betas", "--adam_beta1 and --adam_beta2"),
    (("eps", "epsilon", "adam_epsilon"), "eps", "--adam_epsilon"),
)

_CONSTANT = "is a constant now; leave it out"
_ONE_SCHEDULE = "is part of p_schedule; write p_schedule=START:END or START:END:STEPS, such as p_schedule=4:inf:1000"
_REMOVED = {
    "sync": "is gone: processes average their statistics; for a p closer to the whole batch's raise probe_rows",
    "split_fused": "is gone; write fused_parts=*: to leave every fused projection whole",
    "workspace_mib": _CONSTANT,
    "buffer_mib": _CONSTANT,
    "share_processes": _CONSTANT,
    "p_interval_growth": "is gone; raise p_interval",
    "p_groups": "is gone: each matrix has a p of its own; give several the same with p_overrides=PATTERN:P",
    "p_start": _ONE_SCHEDULE,
    "p_end": _ONE_SCHEDULE,
    "p_steps": _ONE_SCHEDULE,
    "precondition_exponent": "is gone; write precondition=adam (scaled) or precondition=muadam (-1/4)",
}
_REMOVED_VALUES = {
    ("precondition", "adafactor"): "it is gone; use adam, which keeps 4 bytes for each parameter",
    ("p_estimator", "lowrank"): "it is gone; use lanczos, which is as fast and more accurate",
    ("p_estimator", "exact32"): "it is gone; use exact",
}

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


class OptionError(ValueError):
    """An option is unknown, malformed or out of range; the message names the value and the fix."""


def refuse_unknown(name: str, known: Collection[str]) -> NoReturn:
    """Raise for a name that is not an option, saying where it belongs, what has replaced it, or what it resembles.

    Raises:
        OptionError: always.
    """
    for names, argument, flags in _OF_THE_CALLER:
        if name in names:
            raise OptionError(
                f"{name!r} is not an option of schatten_p: set {flags} of TrainingArguments, or the argument "
                f"{argument} of create_schatten_optimizer."
            )
    if name in _REMOVED:
        raise OptionError(f"The option {name!r} {_REMOVED[name]}.")
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise OptionError(f"Unknown option {name!r}.{hint} The options are: {', '.join(sorted(known))}.")


def require_one_of(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raise unless a value is one of an option's names.

    Raises:
        OptionError: with the allowed names, or what has replaced one that no longer exists.
    """
    if value in allowed:
        return
    rule = _REMOVED_VALUES.get((name, value), f"one of {', '.join(allowed)}")
    raise OptionError(f"{name}={value!r} is not allowed: {rule}.")


def read_pairs(text: str, known: Collection[str]) -> dict[str, str]:
    """Return the names and values of ``name=value,name=value``, what ``--optim_args`` takes; blanks are ignored.

    Raises:
        OptionError: when a pair has no ``=``, options are not separated by commas, or a name occurs twice.
    """
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


# By the annotation of the field.
_PARSERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "float": (float, "a number"),
    "int": (int, "a whole number"),
    "bool": (_truth_value, "true or false"),
    "float | Literal['adaptive', 'schedule']": (
        lambda text: text if text in ("adaptive", "schedule") else float(text),
        "'adaptive', 'schedule', a number or inf",
    ),
    "float | str | None": (_number_or_path, "a number, none, or the folder of a checkpoint"),
    "float | None": (lambda text: None if text.lower() == "none" else float(text), "a number or none"),
    "tuple[str, ...]": (lambda text: tuple(filter(None, re.split("[;,]", text))), "patterns joined by ';'"),
}


def parse_value(name: str, value: Any, kind: str) -> Any:
    """Return the value that a text stands for, by the option's annotation; what is no text stays, a list is a tuple.

    Raises:
        OptionError: when the text is no value of that kind.
    """
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    parser, expected = _PARSERS.get(kind.replace('"', "'"), (str, "a name"))
    try:
        return parser(value)
    except (ValueError, KeyError) as error:
        raise OptionError(f"{name}={value!r} is not allowed: it takes {expected}.") from error


def json_ready(value: Any) -> Any:
    """Return the value as JSON holds it: infinities as the strings they are parsed from, functions as their names."""
    if isinstance(value, Mapping):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if callable(value):
        return FUNCTION_PREFIX + function_name(value)
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
