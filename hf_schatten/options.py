"""Every option of the optimizer in one dataclass, and the parser of ``--optim_args`` strings."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NoReturn, get_args

from hf_schatten.linalg.coefficient_table import STEPS, exponent_of
from hf_schatten.linalg.spectrum import LogNormEstimatorName
from hf_schatten.linalg.targets import FUNCTION_PREFIX, POWER, parse_target
from hf_schatten.matrices.fused_projections import parse_fused_parts

OPTIMIZER_NAME = "schatten_p"  # what --optim takes

# Where the estimate of p ends unless told. The norms of the oracles exist for p of at least 1 only; 100 is within a
# few percent of Muon, and its logs stay finite.
LARGEST_P, _LARGEST_P_OF_ORACLES = -5.0, 100.0

ScaleRule = Literal["schatten", "match_rms_adamw", "muon", "interpolate", "none"]
StepRule = Literal["pinned", "ball", "regularized"]
CouplingWeights = Literal["uniform", "sqrt_m_over_n", "sqrt_n_over_m"]
Precondition = Literal["none", "adam", "adafactor"]
PreconditionExponent = Literal["scaled", "fixed"]
CriterionName = Literal["kronecker", "holder", "alignment", "decrease"]
Sync = Literal["statistics", "gram"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
Report = Literal["full", "summary", "none"]

# The options that take one of several names.
OPTION_VALUES: dict[str, tuple[str, ...]] = {
    "criterion": get_args(CriterionName),
    "p_estimator": get_args(LogNormEstimatorName),
    "sync": get_args(Sync),
    "step_rule": get_args(StepRule),
    "scale": get_args(ScaleRule),
    "coupling_weights": get_args(CouplingWeights),
    "precondition": get_args(Precondition),
    "precondition_exponent": get_args(PreconditionExponent),
    "compute_dtype": get_args(ComputeDtype),
    "report": get_args(Report),
}

# What the caller sets for AdamW and the matrices alike: names under which it may be given as an option, the argument
# of create_schatten_optimizer, and the flags of TrainingArguments.
_OF_THE_CALLER = (
    (("lr", "learning_rate"), "lr", "--learning_rate"),
    (("weight_decay", "wd"), "weight_decay", "--weight_decay"),
    (("betas", "beta1", "beta2", "adam_beta1", "adam_beta2"), "betas", "--adam_beta1 and --adam_beta2"),
    (("eps", "epsilon", "adam_epsilon"), "eps", "--adam_epsilon"),
)


class OptionError(ValueError):
    """An option is unknown, malformed or out of range; the message names the value and the fix."""


@dataclass(frozen=True)
class SchattenOptions:
    """Options of the Schatten-p update and of the estimation of p.

    The learning rate, the weight decay and AdamW's betas and epsilon are not here: they are shared with
    AdamW and come from the caller (``TrainingArguments`` in a Trainer).

    Args:
        p: ``"adaptive"`` (estimated per matrix from the spectra of gradient and input), ``"schedule"`` (1/p linear
            in the step), or one number for all matrices: 1 is SGD-like, ``inf`` is Muon. Negative numbers up to -4
            are spectral exponents 1/p in [-0.25, 0), "beyond Muon". Default ``"adaptive"``.
        p_overrides: ``pattern:p`` pairs for matrices that keep a p of their own, such as ``*.c_proj:inf``; several
            are joined by ``;``. The first that matches counts. Default none.
        criterion: what the estimate maximises: ``kronecker`` (default), ``holder``, ``alignment`` or ``decrease``;
            see :mod:`hf_schatten.adaptive.criterion`.
        p_estimator: how norms are computed for it; see :data:`hf_schatten.linalg.spectrum.LOG_NORM_ESTIMATORS`.
            Default ``lanczos``.
        p_groups: patterns, joined by ``;``: all matrices that match one share a p. Default none.
        p_min: smallest p that the estimate may choose, at least 1. Default 1.
        p_max: largest p that the estimate may choose; ``inf`` is allowed, and so are -4 and below, which extend the
            range of 1/p below zero. Default none: -5, or 100, almost Muon, with a ``step_rule`` that is not pinned.
        p_init: p of every layer until its first estimate, or the checkpoint of another run whose learned p the layers
            of the same names start from. Default ``p_max``.
        p_interval: steps between two estimates. Default 100.
        p_interval_growth: factor by which the interval grows after each estimate, at least 1. Default 1.
        p_first_step: step of the first, early estimate (counted from 1). Default 10.
        p_ema_decay: decay of the moving average of the statistics per estimate, in [0, 1); 0 uses the
            newest sample alone. Default 0.8.
        p_async: estimate in a worker thread, off the training step; the new p arrives some steps later, so that
            training no longer repeats bitwise. Default False.
        probe_rows: most input rows (tokens) sampled per layer on a due step. Default 1024.
        sync: what processes exchange on a due step: ``statistics`` (default), the mean of their curves, about 1 KiB a
            matrix, which is an approximation where inputs differ; or ``gram``, the Gram matrices of all input rows
            (none left out, on one process too), with which p is that of the global batch: 8 n² bytes for a layer of n
            inputs, and with the criterion ``kronecker`` 8 m² for a matrix of m outputs.
        p_start: first p of ``p="schedule"``. Default 4.
        p_end: last p of ``p="schedule"``. Default ``inf``.
        p_steps: steps of ``p="schedule"``; a Trainer's whole training where it is none. Default none.
        momentum: decay of the momentum, in [0, 1). Default 0.95.
        nesterov: look one step ahead of the momentum. Default True.
        step_rule: how long a step is. ``pinned`` (default): as ``scale`` says. ``ball`` and ``regularized``:
            Schattor's oracles, whose step has the Schatten-(p + 1) norm ``lr``, or ``lr`` times the dual norm of the
            momentum; p is at least 1 then, and ``scale`` stays at its default. See :mod:`hf_schatten.optim.coupling`.
        scale: how the size of O is pinned: ``schatten`` (default), in the norm that p stands for, ``match_rms_adamw``
            or ``muon``, in the Frobenius norm, ``interpolate``, or ``none``, which leaves the update its own norm; see
            :mod:`hf_schatten.optim.scaling`.
        coupling_order: order of the vector norm, in [1, inf], in which the steps of all matrices are coupled; for
            ``step_rule`` ``ball`` and ``regularized``. Keeps one more copy of the matrices. Default none: every
            matrix for itself.
        coupling_weights: weight of a matrix in that norm: ``uniform`` (default), ``sqrt_m_over_n``, or
            ``sqrt_n_over_m``, which makes the spectral norm at p = inf the operator norm between root mean squares.
        precondition: divide by roots of the second moment, on the way into the spectral power and on the way out:
            ``none`` (default), ``adam`` (p = 1 is Adam) or ``adafactor``, whose second moment has rank one; see
            :mod:`hf_schatten.optim.preconditioning`.
        precondition_exponent: exponent of the second moment on either way: ``scaled`` (default), -1/(2(p + 1)), with
            which p = inf is Muon, or ``fixed``, -1/4, with which it is MuAdam.
        schatten_lr_ratio: learning rate of the matrices divided by the learning rate of everything else;
            both follow the one schedule. Default 1.
        ns_steps: Newton-Schulz steps of the spectral power, 3 to 8. Default 5, Muon's cost.
        compute_dtype: dtype of the matrix products of an update: ``float32``, ``bfloat16``, or ``auto`` (default):
            ``bfloat16`` on an accelerator, and for matrices of 128 rows and columns or more on a CPU with instructions
            for it (AVX-512 BF16); else ``float32``, or float64 for float64 parameters.
        target: what becomes of the singular values: ``power`` (default), σ^{1/p}; or, relative to the Schatten-8 norm
            of the matrix, ``soft_threshold:TAU``, ``soft_step:TAU``, or ``top_k:K``, 1 for the largest K and 0 for
            the rest; see :mod:`hf_schatten.linalg.targets`. With any but ``power``, p is a number, which then shapes
            ``precondition`` and ``scale=interpolate`` only, and ``step_rule`` is ``pinned``.
        workspace_mib: memory, in MiB, that a batch of equally shaped matrices may take for temporaries. Default 512.
        share_work: on several processes, compute each matrix' update on one of them and exchange the updates.
            Default True.
        share_processes: most processes that do so together, neighbours by their number; on a slow network, those of
            a machine. Default 16.
        buffer_mib: memory, in MiB, of a buffer that receives the updates of other processes. Default 256.
        split_fused: update the parts of fused projections (``c_attn``, ``qkv_proj``, ``query_key_value``,
            ``gate_up_proj``, …) as matrices of their own. Default True.
        fused_parts: entries ``pattern:part/part``, joined by ``;``, of projections that the package does not know, or
            should not split: ``*.Wqkv:q*4/k/v`` has queries four times as large as keys and values,
            ``*.qkv:q/k/v@32`` repeats the three in 32 blocks, ``*.c_attn:`` stays whole. Default none.
        split_heads: update queries, keys and values as a matrix for each head of attention. Default False.
        exclude: parameter name patterns, joined by ``;``, that go to AdamW although they are matrices. Default none.
        report: what a run shows of the optimizer: ``full`` (default): the routing table, p of all layers in the logs,
            and figures at the end of training; ``summary``: the table, and minimum, median and maximum of p in the
            logs; or ``none`` of these.

    Patterns are those of ``fnmatch``, on names with or without "weight": ``*.mlp.*``. One without a match is an error.

    Raises:
        OptionError: when a value is out of range.
    """

    p: float | Literal["adaptive", "schedule"] = "adaptive"
    p_overrides: tuple[str, ...] = ()
    criterion: CriterionName = "kronecker"
    p_estimator: LogNormEstimatorName = "lanczos"
    p_groups: tuple[str, ...] = ()
    p_min: float = 1.0
    p_max: float | None = None
    p_init: float | str | None = None
    p_interval: int = 100
    p_interval_growth: float = 1.0
    p_first_step: int = 10
    p_ema_decay: float = 0.8
    p_async: bool = False
    probe_rows: int = 1024
    sync: Sync = "statistics"
    p_start: float = 4.0
    p_end: float = math.inf
    p_steps: int | None = None
    momentum: float = 0.95
    nesterov: bool = True
    step_rule: StepRule = "pinned"
    scale: ScaleRule = "schatten"
    coupling_order: float | None = None
    coupling_weights: CouplingWeights = "uniform"
    precondition: Precondition = "none"
    precondition_exponent: PreconditionExponent = "scaled"
    schatten_lr_ratio: float = 1.0
    ns_steps: int = 5
    compute_dtype: ComputeDtype = "auto"
    target: str = POWER
    workspace_mib: int = 512
    share_work: bool = True
    share_processes: int = 16
    buffer_mib: int = 256
    split_fused: bool = True
    fused_parts: tuple[str, ...] = ()
    split_heads: bool = False
    exclude: tuple[str, ...] = ()
    report: Report = "full"

    def __post_init__(self) -> None:
        if not isinstance(self.p, str):
            _require_exponent("p", self.p)
        for name in ("p_min", "p_start", "p_end"):
            _require_exponent(name, getattr(self, name))
        if self.p_max is not None:
            _require_exponent("p_max", self.p_max)
        for p in self.overrides.values():
            _require_exponent("p_overrides", p)
        for name, allowed in OPTION_VALUES.items():
            self._require(getattr(self, name) in allowed, name, f"one of {', '.join(allowed)}")
        # In the order of 1/p, in which -4 lies beyond inf.
        self._require(self.p_min >= 1 and 1 / self.largest_p <= 1 / self.p_min, "p_min", "1 <= p_min <= p_max")
        self._require(
            not isinstance(self.p_init, float | int) or 1 / self.largest_p <= 1 / self.p_init <= 1 / self.p_min,
            "p_init",
            "p_min <= p_init <= p_max",
        )
        self._require(
            not isinstance(self.p_init, str) or self.adaptive, "p_init", "a checkpoint is for p=adaptive to start from"
        )
        self._require(self.p_interval >= 1, "p_interval", "a number of steps, 1 or more")
        self._require(1 <= self.p_interval_growth < math.inf, "p_interval_growth", "a finite number, 1 or more")
        self._require(self.p_steps is None or self.p_steps >= 1, "p_steps", "a number of steps, 1 or more")
        self._require(self.share_processes >= 1, "share_processes", "a number of processes, 1 or more")
        self._require(self.p_first_step >= 1, "p_first_step", "a step number, 1 or more")
        self._require(0 <= self.p_ema_decay < 1, "p_ema_decay", "0 <= p_ema_decay < 1")
        self._require(self.probe_rows >= 1, "probe_rows", "a number of rows, 1 or more")
        self._require(0 <= self.momentum < 1, "momentum", "0 <= momentum < 1")
        self._require(0 < self.schatten_lr_ratio < math.inf, "schatten_lr_ratio", "a positive finite number")
        self._require(self.ns_steps in STEPS, "ns_steps", f"one of {', '.join(map(str, STEPS))}")
        for option in ("workspace_mib", "buffer_mib"):
            self._require(getattr(self, option) >= 1, option, "a number of MiB, 1 or more")
        self._require(
            self.precondition != "none" or self.precondition_exponent == "scaled",
            "precondition_exponent",
            "it is for precondition=adam or adafactor",
        )
        for option in ("fused_parts", "split_heads"):
            self._require(self.split_fused or not getattr(self, option), option, "split_fused=false leaves all whole")
        for entry in self.fused_parts:
            try:
                parse_fused_parts(entry)
            except ValueError as error:
                raise OptionError(f"fused_parts has {error}") from error
        self._check_step_rule()
        self._check_target()

    def _check_step_rule(self) -> None:
        """Refuse combinations in which an option would be ignored, or a norm would be none."""
        self._require(self.coupling_order is None or self.coupling_order >= 1, "coupling_order", "1 or more, or none")
        self._require(
            self.coupling_weights == "uniform" or self.coupling_order is not None,
            "coupling_weights",
            "it is for coupled matrices; set coupling_order, for example to 2",
        )
        if self.step_rule == "pinned":
            self._require(
                self.coupling_order is None,
                "coupling_order",
                "step_rule=pinned fixes the norm of every step; set step_rule=ball or step_rule=regularized",
            )
            return
        self._require(
            self.scale == SchattenOptions.scale,
            "scale",
            f"step_rule={self.step_rule} sets the step's length; leave scale out, or set step_rule=pinned",
        )
        for name, p in self._reachable_p().items():
            if p < 1:
                raise OptionError(
                    f"{name}={p!r} is not allowed with step_rule={self.step_rule}: the order p + 1 of its norm is at "
                    "least 2. Use p of at least 1, or step_rule=pinned."
                )

    def _check_target(self) -> None:
        """Refuse a target that does not exist, and options that it would ignore."""
        if not self.target.startswith(FUNCTION_PREFIX):
            try:
                parse_target(self.target)
            except ValueError as error:
                raise OptionError(str(error)) from error
        if self.target == POWER:
            return
        self._require(
            self.compute_dtype == "auto" or not self.target.startswith("top_k"),
            "compute_dtype",
            f"target={self.target} multiplies in the momentum's own dtype; leave compute_dtype out",
        )
        self._require(
            not isinstance(self.p, str) and not self.p_overrides,
            "target",
            f"its directions do not depend on p, and p={self.p} or p_overrides would be ignored; set p to a number, "
            "such as p=inf, and leave p_overrides out",
        )
        self._require(
            self.step_rule == "pinned",
            "target",
            f"the norm of step_rule={self.step_rule} is that of the spectral power; set step_rule=pinned",
        )

    def _reachable_p(self) -> dict[str, float]:
        """The extremes of p by the option that allows them."""
        overrides = {f"p_overrides: {pattern}": p for pattern, p in self.overrides.items()}
        if self.p == "adaptive":
            return {"p_max": self.largest_p} | overrides
        if self.p == "schedule":
            return {"p_start": self.p_start, "p_end": self.p_end} | overrides
        return {"p": float(self.p)} | overrides

    def _require(self, holds: bool, name: str, rule: str) -> None:
        if not holds:
            raise OptionError(f"{name}={getattr(self, name)!r} is not allowed: {rule}.")

    @property
    def adaptive(self) -> bool:
        """Whether p is estimated during training."""
        return self.p == "adaptive"

    @property
    def initial_p(self) -> float:
        """The p that a matrix without override starts with."""
        if self.p == "schedule":
            return self.p_start
        if self.p == "adaptive":
            return float(self.p_init) if isinstance(self.p_init, float | int) else self.largest_p
        return float(self.p)

    @property
    def largest_p(self) -> float:
        """The largest p, in the order of 1/p, that the estimate may choose."""
        if self.p_max is not None:
            return self.p_max
        return LARGEST_P if self.step_rule == "pinned" else _LARGEST_P_OF_ORACLES

    @property
    def overrides(self) -> dict[str, float]:
        """The p of ``p_overrides`` by pattern.

        Raises:
            OptionError: when an entry is no ``pattern:p``.
        """
        overrides = {}
        for entry in self.p_overrides:
            pattern, separator, p = entry.rpartition(":")
            if not (pattern and separator):
                raise OptionError(f"p_overrides has {entry!r}, which is no pattern:p; write for example *.c_proj:inf.")
            overrides[pattern] = _parse("p_overrides", p, "float")
        return overrides

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SchattenOptions:
        """Build the options from names and values; string values are parsed to each option's type.

        Args:
            values: option name to value, for example ``{"p": "adaptive", "p_interval": "50"}``.

        Raises:
            OptionError: on an unknown name (with where it belongs, or the nearest valid name and the list) or a
                malformed value.
        """
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                _refuse_unknown(name, known)
        return cls(**{name: _parse(name, value) for name, value in values.items()})

    @classmethod
    def from_optim_args(cls, text: str | None) -> SchattenOptions:
        """Parse the string that ``--optim_args`` takes, such as ``"p=adaptive,p_interval=100"``.

        Args:
            text: comma-separated ``name=value`` pairs; blanks are ignored; None or "" gives the defaults.

        Raises:
            OptionError: when a pair has no ``=``, options are not separated by commas, a name occurs twice, or as
                :meth:`from_mapping` says.
        """
        values: dict[str, str] = {}
        for given in (text or "").split(","):
            pair = given.replace(" ", "")
            if not pair:
                continue
            _require_one_option(given)
            name, separator, value = pair.partition("=")
            if not (name and separator and value):
                raise OptionError(
                    f"optim_args has {pair!r}, which is no name=value pair; write for example "
                    "optim_args='p=adaptive,p_interval=100', and join several patterns by ';'."
                )
            if name in values:
                raise OptionError(f"optim_args names {name!r} twice; keep one of them.")
            values[name] = value
        return cls.from_mapping(values)


def json_ready(value: Any) -> Any:
    """Return the value with infinities as the strings that options are parsed from: JSON has none."""
    if isinstance(value, Mapping):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _refuse_unknown(name: str, known: set[str]) -> NoReturn:
    for names, argument, flags in _OF_THE_CALLER:
        if name in names:
            raise OptionError(
                f"{name!r} is no option of schatten_p: set {flags} of TrainingArguments, or the argument {argument} "
                "of create_schatten_optimizer."
            )
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise OptionError(f"Unknown option {name!r}.{hint} The options are: {', '.join(sorted(known))}.")


def _require_one_option(pair: str) -> None:
    """Raise where a second option follows after a semicolon or a blank."""
    known = {field.name for field in fields(SchattenOptions)}
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


_PARSERS: dict[str, tuple[Any, str]] = {
    "float": (float, "a number"),
    "int": (int, "a whole number"),
    "bool": (_truth_value, "true or false"),
    "float | Literal['adaptive', 'schedule']": (
        lambda text: text if text in ("adaptive", "schedule") else float(text),
        "'adaptive', 'schedule', a number or inf",
    ),
    "float | str | None": (_number_or_path, "a number, none, or the folder of a checkpoint"),
    "float | None": (lambda text: None if text.lower() == "none" else float(text), "a number or none"),
    "int | None": (lambda text: None if text.lower() == "none" else int(text), "a whole number or none"),
    "tuple[str, ...]": (lambda text: tuple(filter(None, re.split("[;,]", text))), "patterns joined by ';'"),
}


def _require_exponent(name: str, p: float) -> None:
    try:
        exponent_of(p)
    except ValueError as error:
        raise OptionError(f"{name}: {error}") from error


def _parse(name: str, value: Any, kind: str | None = None) -> Any:
    """Return the value that a text stands for, of the option's type or the given one."""
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    kind = kind or next(str(field.type) for field in fields(SchattenOptions) if field.name == name).replace('"', "'")
    parser, expected = _PARSERS.get(kind, (str, "a name"))
    try:
        return parser(value)
    except (ValueError, KeyError) as error:
        raise OptionError(f"{name}={value!r} is not allowed: it takes {expected}.") from error
