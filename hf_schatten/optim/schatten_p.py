"""SchattenP: the Schatten-p update for matrices and AdamW for everything else, as one ``torch.optim.Optimizer``."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from hf_schatten.distributed.processes import ALONE, Peers, UnsupportedEngineError
from hf_schatten.distributed.replicated import assign, exchange, rounds_of, sharing_peers, update_cost
from hf_schatten.distributed.sharded import is_sharded, local, shards_of, update_sharded
from hf_schatten.linalg.compute_dtype import fast_compute_dtype
from hf_schatten.linalg.targets import POWER, TargetFunction, target_of
from hf_schatten.matrices.layout import matrix_name
from hf_schatten.optim.adamw import adamw_step, new_adamw_state
from hf_schatten.optim.coupling import COUPLING_WEIGHTS, WeightFunction
from hf_schatten.optim.finite_gradients import Usable, count_unusable, usable_gradients
from hf_schatten.optim.matrix import (
    MOMENTUM,
    SKIPPED,
    STEP,
    Group,
    Matrix,
    State,
    if_usable,
    initial_p,
    layout_of,
    named_parameters,
    new_matrix_state,
)
from hf_schatten.optim.preconditioning import SECOND_MOMENTS
from hf_schatten.optim.saved_state import groups_to_load, say_changed_options
from hf_schatten.optim.stack import COMMON_OPTIONS, Update, batches, factors_alone, lengths_together
from hf_schatten.options import (
    OPTIMIZER_NAME,
    OPTION_VALUES,
    CouplingWeights,
    Precondition,
    PreconditionExponent,
    ScaleRule,
    SchattenOptions,
    StepRule,
    json_ready,
)

if TYPE_CHECKING:
    from hf_schatten.optim.policy import Policy

# Marks a state_dict without state, and says which file has it.
STATE_ELSEWHERE = "schatten_p_state_file"
OPTIONS = "schatten_p_options"  # where a state_dict has the options of the run

logger = logging.getLogger(__name__)

_REPORT_INTERVAL = 100  # steps between two looks, which wait for the device, at how many were skipped


class SchattenP(Optimizer):
    r"""Schatten-p steepest descent for matrices, AdamW for the parameters of other groups.

    A matrix W of (out, in) = (m, n) with gradient G is updated as

    .. math::
        M \leftarrow \beta M + (1 - \beta) G, \quad
        W \leftarrow (1 - \eta \lambda) W - \eta \, c \, U \Sigma^{1/p} V^\top

    where U Σ Vᵀ is the singular value decomposition of the bias-corrected (Nesterov) momentum and c pins the
    Frobenius norm of the update (:mod:`hf_schatten.optim.scaling`), or makes it the step of one of Schattor's oracles
    (:mod:`hf_schatten.optim.coupling`). p = 1 is normalised SGD with momentum, p = ∞ is Muon; between preconditioners
    (:mod:`hf_schatten.optim.preconditioning`) p = 1 is Adam. A parameter is one matrix or several
    (:class:`hf_schatten.matrices.layout.Layout`), and each matrix has a p of its own in ``state[parameter]["p"]``. A policy
    (:mod:`hf_schatten.optim.policy`) changes it during training; without one it stays at the group's ``p``.

    Most users want :func:`hf_schatten.create_schatten_optimizer`, which makes the groups from a model.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of them. A group's ``spectral`` (default True)
            chooses the Schatten-p update, False chooses AdamW; ``transposed`` (default False), ``sections`` (default
            none) and ``blocks`` (default 1) say how its parameters are read as matrices, see
            :class:`hf_schatten.matrices.layout.Layout`; ``p_by_parameter`` (default none) has, by name, the p of parameters
            with another than the group's.
        lr: learning rate of the AdamW groups; that of matrices is ``lr * lr_ratio``. Default 1e-3.
        p: p of a matrix at its first step: at least 1, ``inf``, or at most -4; in a group, a sequence gives each
            matrix of the parameter its own. Default ``inf``.
        momentum: decay β of the momentum, in [0, 1). Default 0.95.
        nesterov: look one step ahead. Default True.
        weight_decay: decoupled weight decay λ of every group. Default 0.1.
        step_rule: ``pinned`` by ``scale`` (default), or Schattor's oracles: ``ball``, whose step has the
            Schatten-(p + 1) norm of the learning rate, or ``regularized``, with the learning rate as reciprocal
            penalty.
        scale: rule of a pinned update's norm. Default ``schatten``.
        coupling_order: order, in [1, inf], of the norm that couples the oracle's steps of all matrices that have a
            gradient. Their directions, one copy of the matrices, are kept until all are known; nothing waits for
            the device. Default None: every matrix for itself.
        coupling_weights: weight of a matrix in that norm, above 0: a name, or a function of the matrix' name and its
            (out, in). Default ``uniform``, 1 for all.
        precondition: second moment that is divided by: ``none`` (default), ``adam`` (state of 4 bytes a parameter)
            or ``adafactor`` (4 bytes for each row and column of a matrix). Decays by the second of ``betas``.
        precondition_exponent: ``scaled`` with p (default) or ``fixed``.
        lr_ratio: learning rate of the matrices divided by ``lr``. Default 1.
        betas: AdamW's decays. Default (0.9, 0.999).
        eps: AdamW's epsilon, and the preconditioner's. Default 1e-8.
        ns_steps: Newton-Schulz steps of the spectral power, 3 to 8. Default 5.
        compute_dtype: dtype of the matrix products. Default None: float64 for float64 momenta; bfloat16 on an
            accelerator, and for matrices of 128 rows and columns or more on a CPU with instructions for it (AVX-512
            BF16); else float32.
        target: what replaces σ^{1/p} where the step is pinned: a name that
            :func:`hf_schatten.linalg.targets.parse_target` takes, or a function of a NumPy array of singular values in
            (0, 1], relative to the Schatten-8 norm. A function is fitted here, once. p then shapes the
            preconditioner and ``scale="interpolate"`` only. Default ``power``.
        workspace_mib: memory, in MiB, that one batch of matrices may take for its temporaries; a matrix that needs
            more is a batch of its own. Default 512.
        share_work: where several processes train together, compute each matrix' update on one of them and exchange
            the updates (:mod:`hf_schatten.distributed.replicated`), which takes the parameters' bytes once a step. All
            processes must have the same gradients, as under DDP. Default True.
        share_processes: most processes that share with each other, neighbours by their number: in as few groups as
            possible, of nearly one size; fewer where there are few matrices. Default 16.
        buffer_mib: memory, in MiB, of a buffer that receives the updates of other processes, more where one matrix
            needs more; there are two at most. Default 256.

    Attributes:
        options: the options it was created with, None where it was made by hand.
        target: the :class:`hf_schatten.linalg.targets.Target` of its directions.
        policy: what changes p, None where it is fixed.

    Raises:
        ValueError: when a group marked ``spectral`` holds a parameter that is no matrix, p is out of range, its
            options exclude each other, or the target is unknown or cannot be fitted.
    """

    options: SchattenOptions | None = None
    policy: Policy | None = None
    _calls = _reported_skips = 0
    _sharing: Peers | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        p: float = math.inf,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        step_rule: StepRule = "pinned",
        scale: ScaleRule = "schatten",
        coupling_order: float | None = None,
        coupling_weights: CouplingWeights | WeightFunction = "uniform",
        precondition: Precondition = "none",
        precondition_exponent: PreconditionExponent = "scaled",
        lr_ratio: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        ns_steps: int = 5,
        compute_dtype: torch.dtype | None = None,
        target: str | TargetFunction = POWER,
        workspace_mib: int = 512,
        share_work: bool = True,
        share_processes: int = 16,
        buffer_mib: int = 256,
    ) -> None:
        self.ns_steps = ns_steps
        self.compute_dtype = compute_dtype
        self.target = target_of(target)
        self.target.accuracy(ns_steps)  # fits it now, where a bad function can still be refused
        self.workspace_mib = workspace_mib
        self.share_work = share_work
        self.share_processes = share_processes
        self.buffer_mib = buffer_mib
        self.coupling_order = coupling_order
        self.coupling_weights = coupling_weights
        defaults = {
            "spectral": True,
            "transposed": False,
            "sections": (),
            "blocks": 1,
            "lr": lr,
            "p": p,
            "p_by_parameter": {},
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "step_rule": step_rule,
            "scale": scale,
            "precondition": precondition,
            "precondition_exponent": precondition_exponent,
            "lr_ratio": lr_ratio,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as ``torch.optim.Optimizer`` does; a spectral group takes matrices only.

        Raises:
            ValueError: when a spectral group holds something else, its p is out of range, or its step rule does not
                go with its p or with the coupling.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not group["spectral"]:
            return
        try:
            _check_names(group)
            self._check_coupling()
            self._check_target(group)
            for name, parameter in named_parameters(group):
                layout_of(group).check(name, parameter.shape)
                initial_p(group, name, len(layout_of(group).part_names(parameter.shape)))
        except ValueError:
            self.param_groups.pop()
            raise

    def direction(self, momenta: Tensor, p: Tensor) -> Tensor:
        """Return the update direction of a batch of matrices, of any scale: the method to override.

        Args:
            momenta: (B, m, n) bias-corrected momenta with m <= n: tall matrices come transposed.
            p: (B,) exponents.

        Returns:
            (B, m, n) U Σ^{1/p} Vᵀ of each momentum, or what another target makes of Σ.
        """
        return self.target.direction(momenta, p, self.ns_steps, self.compute_dtype or fast_compute_dtype(momenta))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: re-evaluates the model and returns the loss, as in ``torch.optim``.

        Returns:
            The closure's loss, or None.

        Raises:
            UnsupportedEngineError: when an engine has replaced the matrices by shards or flat pieces.
            ValueError: when a function of coupling weights returns one that is not above 0.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.create_state()
        if self.policy is not None:
            self.policy.before_update(self)
        usable = usable_gradients(self.param_groups)
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter in usable]
            if group["spectral"]:
                self._advance_moments(group, parameters, usable)
            elif parameters:
                adamw_step(group, parameters, self.state, usable)
        with_gradient = [
            replace(matrix, usable=usable[matrix.parameter])
            for matrix in self.matrices()
            if matrix.parameter in usable
        ]
        self._update_matrices([matrix for matrix in with_gradient if not is_sharded(matrix.parameter)])
        sharded = [matrix for matrix in with_gradient if is_sharded(matrix.parameter)]
        update_sharded(sharded, lambda owned: self._steps(owned, owned), self.buffer_mib)
        if self.policy is not None:
            self.policy.after_update(self)
        self._calls += 1
        if self._calls % _REPORT_INTERVAL == 0:
            self.report_skipped()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle keeps: everything but the policy, whose hooks belong to the model."""
        own = ("ns_steps", "compute_dtype", "target", "coupling_order", "coupling_weights", "options")
        work = ("workspace_mib", "share_work", "share_processes", "buffer_mib")
        return super().__getstate__() | {name: getattr(self, name) for name in (*own, *work)}

    def matrices(self) -> Iterator[Matrix]:
        """Yield every matrix of the spectral groups."""
        for group in self.param_groups:
            if group["spectral"]:
                for name, parameter in named_parameters(group):
                    state = self.state.get(parameter, {})  # indexing would create an entry
                    for index, part in enumerate(layout_of(group).part_names(parameter.shape)):
                        yield Matrix(matrix_name(name, part), name, parameter, index, group, state)

    def learned_p(self) -> dict[str, float]:
        """Return the present p of every matrix that has taken a step, by its name.

        The name is the parameter's; where the parameter consists of several matrices, that of the part follows.
        """
        by_name = {matrix.name: matrix.p for matrix in self.matrices() if matrix.state}
        values = torch.stack(list(by_name.values())).tolist() if by_name else []  # one wait for the device
        return dict(zip(by_name, values, strict=True))

    def destinations(self) -> dict[str, tuple[int, int]]:
        """Return how many tensors and parameters each update has: ``{"schatten_p": (tensors, parameters), …}``."""
        counts = {OPTIMIZER_NAME: (0, 0), "adamw": (0, 0)}
        for group in self.param_groups:
            update = OPTIMIZER_NAME if group["spectral"] else "adamw"
            tensors, parameters = counts[update]
            counts[update] = (
                tensors + len(group["params"]),
                parameters + sum(parameter.numel() for parameter in group["params"]),
            )
        return counts

    def expected_state(self) -> dict[str, dict[str, torch.Size]]:
        """Return the shape of every state tensor that each named parameter has or will have."""
        shapes = {}
        for group in self.param_groups:
            for name, parameter in named_parameters(group):
                state = _new_state(name, torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), group)
                shapes[name] = {key: value.shape for key, value in state.items()}
        return shapes

    def steps_taken(self) -> int:
        """Return how many steps the matrices have taken: the largest of their counters."""
        return int(max((matrix.state[STEP].item() for matrix in self.matrices() if matrix.state), default=0))

    def skipped_steps(self) -> dict[str, int]:
        """Return how many steps each matrix parameter has skipped because its gradient was not finite, where any."""
        states = {
            name: self.state[parameter][SKIPPED]
            for group in self.param_groups
            if group["spectral"]
            for name, parameter in named_parameters(group)
            if parameter in self.state
        }
        counts = torch.stack(list(states.values())).tolist() if states else []  # one wait for the device
        return {name: int(count) for name, count in zip(states, counts, strict=True) if count}

    def report_skipped(self) -> None:
        """Warn of the steps that matrices have skipped, where there are more than at the last warning.

        :meth:`step` calls it every 100 steps, and a Trainer at the end of training. Waits for the device.
        """
        skipped = self.skipped_steps()
        if sum(skipped.values()) <= self._reported_skips:
            return
        self._reported_skips = sum(skipped.values())
        most = max(skipped.values())
        with_most = [name for name, count in skipped.items() if count == most]
        if len(with_most) == 1:
            logger.warning(
                "The gradients of %d of the matrices were not finite (NaN or infinite) on some steps, which were "
                "skipped: of %s, %d steps in all. Lower the learning rate, or look for the layer that overflows.",
                *(len(skipped), with_most[0], most),
            )
        else:
            logger.warning(
                "The gradients of %d of the matrices were not finite (NaN or infinite) on some steps, which were "
                "skipped: %d of them skipped %d steps. A Trainer, and any clipping by the norm of all gradients, "
                "makes all of them NaN where one is, so that this names no layer. Lower the learning rate, or find "
                "the layer with --debug underflow_overflow.",
                *(len(skipped), len(with_most), most),
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as ``torch.optim.Optimizer`` does, and the options, which a resume compares."""
        own = {OPTIONS: json_ready(asdict(self.options))} if self.options else {}
        return super().state_dict() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as ``torch.optim.Optimizer`` does, but keep the dtype in which each tensor was saved.

        Torch casts floating-point state to the parameter's dtype, which rounds the fp32 state of bf16
        parameters. How parameters are read as matrices is the present model's: torch's distributed checkpoints lose
        nested options of a group. An optimizer with options keeps them, but for the learning rates, which belong to
        the schedule; options that differ from the saved ones are logged as a warning.

        Raises:
            CheckpointError: when the state is of another model, or of other updates of its parameters.
            ValueError: when the state is another optimizer's, or is in another file.
        """
        _require_own_state(state_dict)
        own = self.defaults if self.options else ()
        groups = groups_to_load(state_dict, self.param_groups, self.expected_state(), own)
        super().load_state_dict(state_dict | {"param_groups": groups})
        saved_ids = chain.from_iterable(group["params"] for group in groups)
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, parameter in zip(saved_ids, parameters, strict=True):
            for key, saved in state_dict["state"].get(saved_id, {}).items():
                loaded = self.state[parameter][key]
                if isinstance(saved, Tensor) and loaded.dtype != saved.dtype:
                    self.state[parameter][key] = saved.to(device=loaded.device, copy=True)
        if self.options:
            self._honour(self.options, state_dict.get(OPTIONS))
        if self.policy is not None:
            self.policy.after_load(self)

    def _honour(self, options: SchattenOptions, saved_options: Mapping[str, Any] | None) -> None:
        """Make a loaded state one of the present options."""
        changed = say_changed_options(saved_options, options) if saved_options else frozenset()
        managed = self.policy.matrices if self.policy else ()
        for matrix in self.matrices():
            if matrix.state and matrix.name not in managed:
                matrix.p.fill_(matrix.first_p)
            if matrix.state and "criterion" in changed:  # whose statistics are of another kind
                matrix.statistics.zero_()
                matrix.statistics_weight.zero_()

    def follow(self, policy: Policy) -> None:
        """Let this policy change p from now on."""
        self.stop_following()
        self.policy = policy
        policy.after_update(self)

    def stop_following(self) -> None:
        """Keep every p as it is from now on, and remove the policy's hooks from the model."""
        if self.policy is not None:
            self.policy.remove()
            self.policy = None

    def create_state(self) -> None:
        """Create the state of every parameter that has none, also of one without a gradient so far.

        A checkpoint that lacks a parameter's state is of another model, and sharded ones are loaded into what exists.

        Raises:
            UnsupportedEngineError: when an engine has replaced the matrices by shards or flat pieces.
        """
        for group in self.param_groups:
            for name, parameter in named_parameters(group):
                if parameter not in self.state:
                    if group["spectral"]:
                        self._require_matrix(name, parameter, group)
                    self.state[parameter] = _new_state(name, parameter, group)

    def _require_matrix(self, name: str, parameter: Tensor, group: Group) -> None:
        if is_sharded(parameter):
            shards_of(name, parameter)
            for option, value in (("precondition", group["precondition"]), ("coupling_order", self.coupling_order)):
                if value not in ("none", None):
                    raise UnsupportedEngineError(
                        f"{option}={value!r} is not supported where FSDP shards the parameters: leave it out, or "
                        "use DDP."
                    )
        if parameter.ndim < 2:
            raise UnsupportedEngineError(
                f"A matrix has become a tensor of shape {tuple(parameter.shape)}: the training engine (DeepSpeed ZeRO "
                "or FSDP version 1) hands the optimizer flat pieces. Use DDP or FSDP version 2, or "
                "optim='adamw_torch' with this engine."
            )

    def _check_coupling(self) -> None:
        weights, names = self.coupling_weights, OPTION_VALUES["coupling_weights"]
        if not callable(weights) and weights not in names:
            raise ValueError(f"coupling_weights={weights!r} is not allowed: one of {', '.join(names)}, or a function.")
        if self.coupling_order is None:
            if weights != "uniform":
                raise ValueError(
                    f"coupling_weights={weights!r} is for coupled matrices: set coupling_order to 2, say."
                )
            return
        if not self.coupling_order >= 1:
            raise ValueError(f"coupling_order={self.coupling_order!r} is not allowed: it is 1 or more, or None.")
        rules = {other["step_rule"] for other in self.param_groups if other["spectral"]}
        if rules not in ({"ball"}, {"regularized"}):
            raise ValueError(
                f"coupling_order={self.coupling_order!r} couples the steps of one oracle, and the step_rule of the "
                f"groups is {', '.join(sorted(rules))}: set step_rule to 'ball' or to 'regularized' for all."
            )

    def _check_target(self, group: dict[str, Any]) -> None:
        if self.target.name != POWER and group["step_rule"] != "pinned":
            raise ValueError(
                f"target={self.target.name!r} is not allowed with step_rule={group['step_rule']!r}, whose norm is "
                "that of the spectral power. Use step_rule='pinned'."
            )

    def _advance_moments(self, group: dict[str, Any], parameters: Sequence[Tensor], usable: Usable) -> None:
        second_moment = SECOND_MOMENTS.get(group["precondition"])
        count_unusable([usable[parameter] for parameter in parameters], [self.state[p][SKIPPED] for p in parameters])
        for parameter in parameters:
            state, momentum = self.state[parameter], local(self.state[parameter][MOMENTUM])
            state[STEP].add_(1)
            gradient = local(parameter.grad).to(momentum.dtype)  # type: ignore[arg-type]
            momentum.lerp_(if_usable(usable[parameter], gradient, momentum), 1 - group["momentum"])
            if second_moment is not None:
                layout, beta2 = layout_of(group), group["betas"][1]
                second_moment.advance(state, gradient, layout, beta2, usable[parameter])

    def _update_matrices(self, matrices: list[Matrix]) -> None:
        """Update matrices, each of them on one process where several share the work."""
        peers = self._peers()
        if peers.size == 1:
            for update, factors in self._updates(matrices, matrices):
                if self.policy is not None:
                    self.policy.observe(update.batch, update.directions, factors)
                update.apply(factors)
            return
        owners = assign([update_cost(matrix) for matrix in matrices], peers.size)
        owned = [matrix for matrix, owner in zip(matrices, owners, strict=True) if owner == peers.rank]
        # Coupled steps are known together; others are computed as they travel.
        known = None if self.coupling_order is None else self._steps(owned, matrices)
        rounds = rounds_of(matrices, owners, peers.size, self.buffer_mib)

        def steps_of(sent: list[Matrix]) -> dict[int, Tensor]:
            return self._steps(sent, matrices) if known is None else known

        for matrix, step in exchange(rounds, peers, steps_of, self.buffer_mib):
            whole = torch.ones((), dtype=matrix.momentum.dtype, device=step.device)
            if self.policy is not None:
                self.policy.observe([matrix], step[None].to(whole.dtype), whole[None])
            assert matrix.usable is not None
            keep = matrix.usable.to(whole.dtype)
            matrix.apply(step, keep, keep)

    def _peers(self) -> Peers:
        """Return the processes with which this one shares the updates; all call it together for the first time."""
        if not self.share_work:
            return ALONE
        if self._sharing is None:
            whole = [matrix for matrix in self.matrices() if not is_sharded(matrix.parameter)]
            self._sharing = sharing_peers(whole, self.share_processes)
        return self._sharing

    def _steps(self, owned: list[Matrix], matrices: list[Matrix]) -> dict[int, Tensor]:
        """Return the step (m, n) of each owned matrix by its identity."""
        return {
            id(matrix): direction.mul_(factor)
            for update, factors in self._updates(owned, matrices)
            for matrix, direction, factor in zip(update.batch, update.directions, factors, strict=True)
        }

    def _updates(self, owned: list[Matrix], matrices: list[Matrix]) -> Iterator[tuple[Update, Tensor]]:
        """Yield updates of the owned matrices, batch by batch, and what their directions are multiplied by.

        Args:
            owned: those that this process computes.
            matrices: all of them; coupled ones meet here, on every process.
        """
        in_batches = batches(owned, self.workspace_mib)
        if self.coupling_order is None:
            for batch in in_batches:
                update = Update.of(batch, self.direction, powers=self.target.name == POWER)
                yield update, factors_alone(update)
        elif matrices:
            updates = [Update.of(batch, self.direction) for batch in in_batches]
            for update, lengths in zip(updates, self._coupled_lengths(updates, matrices), strict=True):
                yield update, update.factors(lengths)

    def _coupled_lengths(self, updates: list[Update], matrices: list[Matrix]) -> Sequence[Tensor]:
        position = {id(matrix): index for index, matrix in enumerate(matrices)}
        index = torch.tensor([position[id(matrix)] for update in updates for matrix in update.batch], dtype=torch.long)
        index = index.to(matrices[0].momentum.device, non_blocking=True)
        duals = matrices[0].momentum.new_zeros(len(matrices))
        if updates:
            duals[index] = torch.cat([update.dual_norms().to(duals) for update in updates])
        peers = self._peers()
        if peers.size > 1:
            dist.all_reduce(duals, group=peers.group)
        chosen = self.coupling_weights
        weight_of = chosen if callable(chosen) else COUPLING_WEIGHTS[chosen]
        lengths = lengths_together(matrices, duals, float(self.coupling_order or 0), weight_of)
        return lengths[index].split([len(update.batch) for update in updates])


def _new_state(name: str, parameter: Tensor, group: Group) -> State:
    return new_matrix_state(name, parameter, group) if group["spectral"] else new_adamw_state(parameter)


def _check_names(group: dict[str, Any]) -> None:
    """Raise unless a group's options have values that exist.

    Raises:
        ValueError: with the option, its value and the allowed ones.
    """
    for option in COMMON_OPTIONS:
        if group[option] not in OPTION_VALUES[option]:
            raise ValueError(f"{option}={group[option]!r} is not allowed: one of {', '.join(OPTION_VALUES[option])}.")


def _require_own_state(state_dict: dict[str, Any]) -> None:
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
