"""Every option of the optimizer in one dataclass, and the parser of ``--optim_args`` strings."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from .linalg.coefficient_table import STEPS, exponent_of

OPTIMIZER_NAME = "schatten_p"  # what --optim takes

ScaleRule = Literal["match_rms_adamw", "muon", "interpolate"]


class OptionError(ValueError):
    """An option is unknown, malformed or out of range; the message names the value and the fix."""


@dataclass(frozen=True)
class SchattenOptions:
    """Options of the Schatten-p update and of the estimation of p.

    The learning rate, the weight decay and AdamW's betas and epsilon are not here: they are shared with
    AdamW and come from the caller (``TrainingArguments`` in a Trainer).

    Args:
        p: ``"adaptive"`` (estimated per layer from the spectra of gradient and input), or one number for all
            matrices: 1 is SGD-like, ``inf`` is Muon. Negative numbers up to -4 are spectral exponents
            1/p in [-0.25, 0), "beyond Muon". Default ``"adaptive"``.
        p_min: smallest p that the estimate may choose, at least 1. Default 1.
        p_max: largest p that the estimate may choose, ``inf`` allowed. Default 100, whose update is within
            a few percent of Muon's and whose logs stay finite.
        p_init: p of every layer until its first estimate. Default ``p_max``.
        p_interval: steps between two estimates. Default 100.
        p_first_step: step of the first, early estimate (counted from 1). Default 10.
        p_ema_decay: decay of the moving average of the statistics per estimate, in [0, 1); 0 uses the
            newest sample alone. Default 0.8.
        probe_rows: most input rows (tokens) sampled per layer on a due step. Default 1024.
        momentum: decay of the momentum, in [0, 1). Default 0.95.
        nesterov: look one step ahead of the momentum. Default True.
        scale: how ||O||_F is pinned: ``match_rms_adamw`` (default), ``muon`` or ``interpolate``;
            see :mod:`hf_schatten.scaling`.
        schatten_lr_ratio: learning rate of the matrices divided by the learning rate of everything else;
            both follow the one schedule. Default 1.
        ns_steps: Newton-Schulz steps of the spectral power, 3 to 8. Default 5, Muon's cost.
        workspace_mib: memory, in MiB, that a batch of equally shaped matrices may take for temporaries. Default 512.
        exclude: parameter name patterns (``fnmatch``; several joined by ``;`` in ``--optim_args``) that go to
            AdamW although they are matrices. A pattern without a match is an error. Default none.

    Raises:
        OptionError: when a value is out of range.
    """

    p: float | Literal["adaptive"] = "adaptive"
    p_min: float = 1.0
    p_max: float = 100.0
    p_init: float | None = None
    p_interval: int = 100
    p_first_step: int = 10
    p_ema_decay: float = 0.8
    probe_rows: int = 1024
    momentum: float = 0.95
    nesterov: bool = True
    scale: ScaleRule = "match_rms_adamw"
    schatten_lr_ratio: float = 1.0
    ns_steps: int = 5
    workspace_mib: int = 512
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.p != "adaptive":
            try:
                exponent_of(self.p)
            except ValueError as error:
                raise OptionError(str(error)) from error
        self._require(1 <= self.p_min <= self.p_max, "p_min", "1 <= p_min <= p_max")
        self._require(
            self.p_init is None or self.p_min <= self.p_init <= self.p_max,
            "p_init",
            "p_min <= p_init <= p_max",
        )
        self._require(self.p_interval >= 1, "p_interval", "a number of steps, 1 or more")
        self._require(self.p_first_step >= 1, "p_first_step", "a step number, 1 or more")
        self._require(0 <= self.p_ema_decay < 1, "p_ema_decay", "0 <= p_ema_decay < 1")
        self._require(self.probe_rows >= 1, "probe_rows", "a number of rows, 1 or more")
        self._require(0 <= self.momentum < 1, "momentum", "0 <= momentum < 1")
        self._require(self.scale in get_args(ScaleRule), "scale", f"one of {', '.join(get_args(ScaleRule))}")
        self._require(0 < self.schatten_lr_ratio < math.inf, "schatten_lr_ratio", "a positive finite number")
        self._require(self.ns_steps in STEPS, "ns_steps", f"one of {', '.join(map(str, STEPS))}")
        self._require(self.workspace_mib >= 1, "workspace_mib", "a number of MiB, 1 or more")

    def _require(self, holds: bool, name: str, rule: str) -> None:
        if not holds:
            raise OptionError(f"{name}={getattr(self, name)!r} is not allowed: {rule}.")

    @property
    def adaptive(self) -> bool:
        """Whether p is estimated during training."""
        return self.p == "adaptive"

    @property
    def initial_p(self) -> float:
        """The p that every matrix starts with."""
        if self.p != "adaptive":
            return float(self.p)
        return self.p_max if self.p_init is None else self.p_init

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SchattenOptions:
        """Build the options from names and values; string values are parsed to each option's type.

        Args:
            values: option name to value, for example ``{"p": "adaptive", "p_interval": "50"}``.

        Raises:
            OptionError: on an unknown name (with the nearest valid name and the list) or a malformed value.
        """
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
                raise OptionError(f"Unknown option {name!r}.{hint} The options are: {', '.join(sorted(known))}.")
        return cls(**{name: _parse(name, value) for name, value in values.items()})

    @classmethod
    def from_optim_args(cls, text: str | None) -> SchattenOptions:
        """Parse the string that ``--optim_args`` takes, such as ``"p=adaptive,p_interval=100"``.

        Args:
            text: comma-separated ``name=value`` pairs; blanks are ignored; None or "" gives the defaults.

        Raises:
            OptionError: when a pair has no ``=``, a name occurs twice, or as :meth:`from_mapping` says.
        """
        values: dict[str, str] = {}
        for pair in filter(None, (text or "").replace(" ", "").split(",")):
            name, separator, value = pair.partition("=")
            if not (name and separator and value):
                raise OptionError(
                    f"optim_args has {pair!r}, which is no name=value pair; write for example "
                    "optim_args='p=adaptive,p_interval=100'."
                )
            if name in values:
                raise OptionError(f"optim_args names {name!r} twice; keep one of them.")
            values[name] = value
        return cls.from_mapping(values)


def _truth_value(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


_PARSERS: dict[str, tuple[Any, str]] = {
    "float": (float, "a number"),
    "int": (int, "a whole number"),
    "bool": (_truth_value, "true or false"),
    "float | Literal['adaptive']": (
        lambda text: text if text == "adaptive" else float(text),
        "'adaptive', a number or inf",
    ),
    "float | None": (lambda text: None if text.lower() == "none" else float(text), "a number or none"),
    "ScaleRule": (str, ""),
    "tuple[str, ...]": (lambda text: tuple(filter(None, text.split(";"))), "patterns joined by ';'"),
}


def _parse(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    kind = next(str(field.type) for field in fields(SchattenOptions) if field.name == name).replace('"', "'")
    parser, expected = _PARSERS[kind]
    try:
        return parser(value)
    except (ValueError, KeyError) as error:
        raise OptionError(f"{name}={value!r} is not allowed: it takes {expected}.") from error
