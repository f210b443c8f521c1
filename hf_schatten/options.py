"""Every option of the optimizer in one dataclass: its values, its defaults and its rules, each checked here alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from hf_schatten.exponent import exceeds, exponent_of
from hf_schatten.option_names import (
    OPTION_VALUES,
    ComputeDtype,
    CouplingWeights,
    EstimatorName,
    OptionError,
    Precondition,
    ReportLevel,
    ScaleRule,
    StepRule,
    refuse_unknown,
    require_one_of,
)
from hf_schatten.option_text import (
    POWER,
    json_ready,
    parse_fused_parts,
    parse_lr_ratio,
    parse_override,
    parse_schedule,
    parse_target,
    parse_value,
    read_pairs,
)

OPTIMIZER_NAME = "schatten_p"  # what --optim takes

# The default p, and where its estimate ends unless told. The norms of the oracles exist for p of at least 1 only; 100
# is within a few percent of Muon, and its logs stay finite.
LARGEST_P, _LARGEST_P_OF_ORACLES = -4.0, 100.0

NS_STEPS = (3, 4, 5, 6, 7, 8)  # Newton-Schulz steps for which there is a table

# The options of an adaptive p.
_OF_ESTIMATES = (
    *("p_estimator", "p_min", "p_max", "p_init", "p_interval", "p_first_step", "p_ema_decay", "p_async"),
    "probe_rows",
)

WeightFunction = Callable[[str, tuple[int, int]], float]  # from a matrix's name and its (out, in)
TargetFunction = Callable[[Any], Any]  # of a NumPy array of singular values


@dataclass(frozen=True)
class SchattenOptions:
    """Options of the Schatten-p update and of the estimation of p.

    The learning rate, the weight decay and AdamW's betas and epsilon are not here: they are shared with AdamW and come
    from the caller (``TrainingArguments`` in a Trainer).

    Args:
        p: one number for all matrices: 1 is SGD-like, ``inf`` is Muon, and negative numbers up to -4, with spectral
            exponents 1/p in [-0.25, 0), lie beyond Muon; or ``"adaptive"`` (estimated per matrix from the spectra of
            gradient and input, see :mod:`hf_schatten.adaptive.criterion`), or ``"schedule"`` (as ``p_schedule`` says).
            Default -4, the best number for all matrices in all six kinds of training that were compared.
        p_overrides: ``pattern:p`` pairs for matrices that keep a p of their own, such as ``*.c_proj:inf``; several
            are joined by ``;``. The first that matches counts. Default none.
        p_schedule: ``START:END`` or ``START:END:STEPS`` of ``p=schedule``: 1/p goes linearly from the first p to the
            last in this number of steps, a Trainer's whole training where none is given. Default ``4:inf``.
        p_estimator: how the norms of gradient and input are computed for an estimate of p; see
            :data:`hf_schatten.linalg.spectrum.LOG_NORM_ESTIMATORS`. Default ``auto``: ``lanczos``, on an accelerator
            ``iterates`` for sides up to 2048.
        p_min: smallest p that the estimate may choose, at least 1. Default 1.
        p_max: largest p that the estimate may choose; ``inf`` is allowed, and so are -4 and below, beyond Muon.
            Default none: -4, or 100, almost Muon, with a ``step_rule`` that is not pinned.
        p_init: p of every layer until its first estimate, or the checkpoint of another run whose learned p the layers
            of the same names start from. Default ``p_max``.
        p_interval: steps between two estimates. Default 100.
        p_first_step: step of the first, early estimate (counted from 1). Default 10.
        p_ema_decay: decay of the moving average of the statistics per estimate, in [0, 1); 0 uses the
            newest sample alone. Default 0.8.
        p_async: estimate in a worker thread, off the training step; the new p arrives some steps later, so that
            training no longer repeats bitwise. Default False.
        probe_rows: most input rows (tokens) sampled per layer on a due step. Default 1024.
        momentum: decay of the momentum, in [0, 1). Default 0.95.
        nesterov: look one step ahead of the momentum. Default True.
        step_rule: how long an update is. ``pinned`` (default): as ``scale`` says. ``ball`` and ``regularized``:
            Schattor's oracles, whose update has the Schatten-(p + 1) norm ``lr``, or ``lr`` times the dual norm of the
            momentum; p is at least 1 then, and ``scale`` stays at its default. See
            :mod:`hf_schatten.optim.step_rules`.
        scale: how the length of a pinned update is measured: ``schatten`` (default), in the norm that p stands for,
            ``match_rms_adamw`` or ``muon``, in the Frobenius norm, ``interpolate``, or ``none``, which leaves the
            update its own norm; see :mod:`hf_schatten.optim.step_rules`.
        coupling_order: order, in [1, inf], of the vector norm that couples the updates of all matrices of ``ball`` or
            ``regularized``. Keeps one more copy of the matrices. Default none: every matrix for itself.
        coupling_weights: weight of a matrix in that norm: ``uniform`` (default), ``sqrt_m_over_n``, or
            ``sqrt_n_over_m``, which makes the spectral norm at p = inf the operator norm between root mean squares; in
            Python, also a function from a matrix's name and its (out, in) to a number above 0.
        precondition: divide by roots of Adam's second moment, on the way into the spectral power and on the way out:
            ``none`` (default), ``adam`` (p = 1 is Adam, p = inf is Muon) or ``muadam`` (p = 1 is Adam, p = inf is
            MuAdam); see :mod:`hf_schatten.optim.preconditioning`.
        schatten_lr_ratio: learning rate of the matrices divided by the learning rate of everything else;
            both follow the one schedule. Default 1.
        lr_ratios: ``pattern:factor`` pairs, joined by ``;``, that multiply the learning rates of parameters, whatever
            their update: ``*.layers.0.*:0.5``. The first that matches counts. Default none.
        ns_steps: Newton–Schulz steps of the spectral power, 3 to 8. Default 5, Muon's cost.
        compute_dtype: dtype of the matrix products of an update: ``float32``, ``bfloat16``, or ``auto`` (default):
            ``bfloat16`` on an accelerator, and for sides of 128 or more on a CPU with AVX-512 BF16; else ``float32``,
            or float64 for float64 parameters.
        target: what becomes of the singular values: ``power`` (default), σ^{1/p}; or, relative to the Schatten-8 norm
            of the matrix, ``soft_threshold:TAU``, ``soft_step:TAU``, or ``top_k:K``, 1 for the largest K and 0 for
            the rest; in Python, also a function of them, which is fitted when the optimizer is made; see
            :mod:`hf_schatten.linalg.targets`. With any but ``power``, p is a number, which then shapes
            ``precondition`` and ``scale=interpolate`` only, and ``step_rule`` is ``pinned``.
        share_work: of several processes, let one compute the update of each matrix and send it. Default True.
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

    p: float | Literal["adaptive", "schedule"] = LARGEST_P
    p_overrides: tuple[str, ...] = ()
    p_schedule: str = "4:inf"
    p_estimator: EstimatorName = "auto"
    p_min: float = 1.0
    p_max: float | None = None
    p_init: float | str | None = None
    p_interval: int = 100
    p_first_step: int = 10
    p_ema_decay: float = 0.8
    p_async: bool = False
    probe_rows: int = 1024
    momentum: float = 0.95
    nesterov: bool = True
    step_rule: StepRule = "pinned"
    scale: ScaleRule = "schatten"
    coupling_order: float | None = None
    coupling_weights: CouplingWeights | WeightFunction = "uniform"
    precondition: Precondition = "none"
    schatten_lr_ratio: float = 1.0
    lr_ratios: tuple[str, ...] = ()
    ns_steps: int = 5
    compute_dtype: ComputeDtype = "auto"
    target: str | TargetFunction = POWER
    share_work: bool = True
    fused_parts: tuple[str, ...] = ()
    split_heads: bool = False
    exclude: tuple[str, ...] = ()
    report: ReportLevel = "full"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = parse_value(field.name, getattr(self, field.name), str(field.type))
            object.__setattr__(self, field.name, value)  # of a frozen class
        for name, allowed in OPTION_VALUES.items():
            if not callable(getattr(self, name)):
                require_one_of(name, getattr(self, name), allowed)
        self._check_p()
        for name, rule, holds in (
            ("p_interval", "a number of steps, 1 or more", self.p_interval >= 1),
            ("p_first_step", "a step number, 1 or more", self.p_first_step >= 1),
            ("p_ema_decay", "0 <= p_ema_decay < 1", 0 <= self.p_ema_decay < 1),
            ("probe_rows", "a number of rows, 1 or more", self.probe_rows >= 1),
            ("momentum", "0 <= momentum < 1", 0 <= self.momentum < 1),
            ("schatten_lr_ratio", "a positive finite number", 0 < self.schatten_lr_ratio < float("inf")),
            ("ns_steps", f"one of {', '.join(map(str, NS_STEPS))}", self.ns_steps in NS_STEPS),
        ):
            self._require(holds, name, rule)
        for parse, entries in ((parse_fused_parts, self.fused_parts), (parse_lr_ratio, self.lr_ratios)):
            for entry in entries:
                parse(entry)
        self._check_step_rule()
        self._check_target()

    def _check_p(self) -> None:
        numbers = {"p_min": self.p_min, "p": self.p, "p_max": self.p_max, "p_init": self.p_init}
        given = {name: p for name, p in numbers.items() if isinstance(p, float | int)}
        given |= {f"p_overrides: {pattern}": p for pattern, p in self.overrides.items()}
        given |= dict(zip(("p_schedule: START", "p_schedule: END"), self.schedule[:2], strict=True))
        for name, p in given.items():
            try:
                exponent_of(p, name)
            except ValueError as error:
                raise OptionError(str(error)) from error
        self._require(self.p_min >= 1 and not exceeds(self.p_min, self.largest_p), "p_min", "1 <= p_min <= p_max")
        if isinstance(self.p_init, str):
            self._require(self.adaptive, "p_init", "a checkpoint is for p=adaptive to start from")
        elif self.p_init is not None:
            inside = not exceeds(self.p_init, self.largest_p) and not exceeds(self.p_min, self.p_init)
            self._require(inside, "p_init", "p_min <= p_init <= p_max")

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
                "step_rule=pinned fixes the norm of every update; set step_rule=ball or step_rule=regularized",
            )
            return
        self._require(
            self.scale == SchattenOptions.scale,
            "scale",
            f"step_rule={self.step_rule} sets the update's length; leave scale out, or set step_rule=pinned",
        )
        for name, p in self._reachable_p().items():
            if p < 1:
                raise OptionError(
                    f"{name}={p!r} is not allowed with step_rule={self.step_rule}: the order p + 1 of its norm is at "
                    "least 2. Use p of at least 1, p=adaptive, or step_rule=pinned."
                )

    def _check_target(self) -> None:
        """Refuse a target that does not exist, and options that it would ignore."""
        if self.target == POWER:
            return
        name = json_ready(self.target)
        if isinstance(self.target, str):
            parse_target(self.target)
        self._require(
            self.compute_dtype == "auto" or not name.startswith("top_k"),
            "compute_dtype",
            f"target={name} multiplies in the momentum's own dtype; leave compute_dtype out",
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
        """Return the extremes of p by the option that allows them."""
        overrides = {f"p_overrides: {pattern}": p for pattern, p in self.overrides.items()}
        if self.p == "adaptive":
            return {"p_max": self.largest_p} | overrides
        if self.p == "schedule":
            start, end, _ = self.schedule
            return {"p_schedule: START": start, "p_schedule: END": end} | overrides
        return {"p": float(self.p)} | overrides

    def _require(self, holds: bool, name: str, rule: str) -> None:
        if not holds:
            raise OptionError(f"{name}={json_ready(getattr(self, name))!r} is not allowed: {rule}.")

    @property
    def adaptive(self) -> bool:
        """Whether p is estimated during training."""
        return self.p == "adaptive"

    @property
    def initial_p(self) -> float:
        """The p that a matrix without override starts with."""
        if self.p == "schedule":
            return self.schedule[0]
        if self.p == "adaptive":
            return float(self.p_init) if isinstance(self.p_init, float | int) else self.largest_p
        return float(self.p)

    @property
    def largest_p(self) -> float:
        """The largest p that the estimate may choose."""
        if self.p_max is not None:
            return self.p_max
        return LARGEST_P if self.step_rule == "pinned" else _LARGEST_P_OF_ORACLES

    @property
    def overrides(self) -> dict[str, float]:
        """The p of ``p_overrides`` by pattern."""
        return dict(map(parse_override, self.p_overrides))

    @property
    def rate_factors(self) -> dict[str, float]:
        """The factors of ``lr_ratios`` by pattern."""
        return dict(map(parse_lr_ratio, self.lr_ratios))

    @property
    def schedule(self) -> tuple[float, float, int | None]:
        """First p, last p and number of steps of ``p_schedule``."""
        return parse_schedule(self.p_schedule)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SchattenOptions:
        """Build the options from ``values`` by name, such as ``{"p_interval": "50"}``, whose texts are parsed.

        Raises:
            OptionError: when a name is unknown, with where it belongs or the nearest valid one, or a value malformed.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                refuse_unknown(name, known)
        return cls(**values)

    @classmethod
    def from_optim_args(cls, text: str | Mapping[str, Any] | None) -> SchattenOptions:
        """Parse the ``text`` of ``--optim_args``, such as ``"p=adaptive,p_interval=100"``, or a mapping, or None.

        Raises:
            OptionError: when the text is malformed, a name occurs twice, or as :meth:`from_mapping` says.
        """
        return cls.from_mapping(read_pairs(text or "", [field.name for field in fields(cls)]))

    @classmethod
    def given(cls, options: SchattenOptions | None, values: Mapping[str, Any], **defaults: Any) -> SchattenOptions:
        """Return ``options`` that were given whole, or as single ``values``, of which some have other ``defaults``.

        Raises:
            OptionError: when both are given, or as :meth:`from_mapping` says.
        """
        if options is None:
            return cls.from_mapping(defaults | dict(values))
        if not isinstance(options, cls):
            raise OptionError(
                f"options={options!r} is not a SchattenOptions; is it the learning rate? Write lr={options!r}."
            )
        if values:
            raise OptionError(f"{', '.join(values)} and options are both given: put all of them into options.")
        return options

    def without_effect(self) -> list[str]:
        """Return what is set and would be for another ``p``, as ``name=value``."""
        idle = [*(() if self.adaptive else _OF_ESTIMATES), *(() if self.p == "schedule" else ("p_schedule",))]
        return [f"{name}={getattr(self, name)}" for name in idle if getattr(self, name) != getattr(type(self), name)]

    def as_json(self) -> dict[str, Any]:
        """Return all options as JSON holds them: infinities as text, functions by their names."""
        return {field.name: json_ready(getattr(self, field.name)) for field in fields(self)}
