"""The names of options and of their values: those that exist, those that are gone, and what to say of others."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any, Literal, NoReturn, get_args

EstimatorName = Literal["auto", "exact", "lanczos", "iterates"]
StepRule = Literal["pinned", "ball", "regularized"]
ScaleRule = Literal["schatten", "match_rms_adamw", "muon", "interpolate", "none"]
CouplingWeights = Literal["uniform", "sqrt_m_over_n", "sqrt_n_over_m"]
Precondition = Literal["none", "adam", "muadam"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
ReportLevel = Literal["full", "summary", "none"]

# The options that take one of several names.
OPTION_VALUES: dict[str, tuple[str, ...]] = {
    "p_estimator": get_args(EstimatorName),
    "step_rule": get_args(StepRule),
    "scale": get_args(ScaleRule),
    "coupling_weights": get_args(CouplingWeights),
    "precondition": get_args(Precondition),
    "compute_dtype": get_args(ComputeDtype),
    "report": get_args(ReportLevel),
}

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
    "criterion": "is gone: p=adaptive has one criterion, which was holder; leave it out",
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
    ("p_estimator", "submatrix"): "it is gone; use lanczos, which is as fast and more accurate",
    ("p_estimator", "lowrank"): "it is gone; use lanczos, which is as fast and more accurate",
    ("p_estimator", "exact32"): "it is gone; use exact",
}


class OptionError(ValueError):
    """An option that is unknown, malformed or out of range; the message names the value and the fix."""


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
