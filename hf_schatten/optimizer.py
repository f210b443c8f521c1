"""SchattenP: the Schatten-p update for matrices and AdamW for everything else, as one ``torch.optim.Optimizer``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from .coupling import (
    COUPLING_WEIGHTS,
    WeightFunction,
    dual_norms,
    lengths_alone,
    lengths_coupled,
    unit_factors,
)
from .criterion import CURVES, NODES
from .distributed import UnsupportedEngineError
from .layout import Layout, as_matrix, matrix_name
from .linalg.coefficient_table import exponent_of
from .linalg.targets import POWER, TargetFunction, target_of
from .options import (
    OPTIMIZER_NAME,
    OPTION_VALUES,
    CouplingWeights,
    Precondition,
    PreconditionExponent,
    ScaleRule,
    SchattenOptions,
    StepRule,
)
from .preconditioning import SECOND_MOMENTS, root_exponent
from .scaling import update_norm

if TYPE_CHECKING:
    from .policy import Policy

# State of a parameter of matrices, by name; p, statistics and their weight have one row for each of its matrices.
# Every key is a tensor that is created at the first step: sharded checkpoints drop what appears later.
STEP, MOMENTUM, P, STATISTICS, STATISTICS_WEIGHT = "step", "momentum", "p", "statistics", "statistics_weight"

# Temporaries of a matrix (m, n), m <= n, while its batch is updated: momentum, normalised momentum, iterate, product
# and weighted sum; Gram matrices and polynomials of them. A preconditioner is one rectangle more.
_WORKSPACE_RECTANGLES, _WORKSPACE_SQUARES = 5, 4

# What the matrices of one batch have in common, besides shape, dtype and device.
_COMMON_OPTIONS = "step_rule", "precondition", "precondition_exponent"


class SchattenP(Optimizer):
    r"""Schatten-p steepest descent for matrices, AdamW for the parameters of other groups.

    A matrix W of (out, in) = (m, n) with gradient G is updated as

    .. math::
        M \leftarrow \beta M + (1 - \beta) G, \quad
        W \leftarrow (1 - \eta \lambda) W - \eta \, c \, U \Sigma^{1/p} V^\top

    where U Σ Vᵀ is the singular value decomposition of the bias-corrected (Nesterov) momentum and c pins the
    Frobenius norm of the update (:mod:`hf_schatten.scaling`), or makes it the step of one of Schattor's oracles
    (:mod:`hf_schatten.coupling`). p = 1 is normalised SGD with momentum, p = ∞ is Muon; between preconditioners
    (:mod:`hf_schatten.preconditioning`) p = 1 is Adam. A parameter is one matrix or several
    (:class:`hf_schatten.layout.Layout`), and each matrix has a p of its own in ``state[parameter]["p"]``. A policy
    (:mod:`hf_schatten.policy`) changes it during training; without one it stays at the group's ``p``.

    Most users want :func:`hf_schatten.create_schatten_optimizer`, which makes the groups from a model.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of them. A group's ``spectral`` (default True)
            chooses the Schatten-p update, False chooses AdamW; ``transposed`` (default False) and ``sections``
            (default none) say how its parameters are read as matrices, see :class:`hf_schatten.layout.Layout`.
        lr: learning rate of the AdamW groups; that of matrices is ``lr * lr_ratio``. Default 1e-3.
        p: p of a matrix at its first step: at least 1, ``inf``, or at most -4; in a group, a sequence gives each
            matrix of the parameter its own. Default ``inf``.
        momentum: decay β of the momentum, in [0, 1). Default 0.95.
        nesterov: look one step ahead. Default True.
        weight_decay: decoupled weight decay λ of every group. Default 0.1.
        step_rule: ``pinned`` by ``scale`` (default), or Schattor's oracles: ``ball``, whose step has the
            Schatten-(p + 1) norm of the learning rate, or ``regularized``, with the learning rate as reciprocal
            penalty.
        scale: rule of a pinned update's norm. Default ``match_rms_adamw``.
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
        target: what replaces σ^{1/p} where the step is pinned: a name that
            :func:`hf_schatten.linalg.targets.parse_target` takes, or a function of a NumPy array of singular values in
            (0, 1], relative to the Schatten-8 norm. A function is fitted here, once. p then shapes the
            preconditioner and ``scale="interpolate"`` only. Default ``power``.
        workspace_mib: memory, in MiB, that one batch of matrices may take for its temporaries; a matrix that needs
            more is a batch of its own. Default 512.

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
        scale: ScaleRule = "match_rms_adamw",
        coupling_order: float | None = None,
        coupling_weights: CouplingWeights | WeightFunction = "uniform",
        precondition: Precondition = "none",
        precondition_exponent: PreconditionExponent = "scaled",
        lr_ratio: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        ns_steps: int = 5,
        target: str | TargetFunction = POWER,
        workspace_mib: int = 512,
    ) -> None:
        self.ns_steps = ns_steps
        self.target = target_of(target)
        self.target.accuracy(ns_steps)  # fits it now, where a bad function can still be refused
        self.workspace_mib = workspace_mib
        self.coupling_order = coupling_order
        self.coupling_weights = coupling_weights
        defaults = {
            "spectral": True,
            "transposed": False,
            "sections": (),
            "lr": lr,
            "p": p,
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
            for name, parameter in _named_parameters(group):
                _layout(group).check(name, parameter.shape)
                _initial_p(group, len(_layout(group).part_names(parameter.shape)))
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
        return self.target.direction(momenta, p, self.ns_steps)

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
        self.create_matrix_state()
        if self.policy is not None:
            self.policy.before_update(self)
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["spectral"]:
                self._advance_moments(group, parameters)
            elif parameters:
                self._adamw_step(group, parameters)
        self._update_matrices([matrix for matrix in self.matrices() if matrix.parameter.grad is not None])
        if self.policy is not None:
            self.policy.after_update(self)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle keeps: everything but the policy, whose hooks belong to the model."""
        own = ("ns_steps", "target", "workspace_mib", "coupling_order", "coupling_weights", "options")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def matrices(self) -> Iterator[Matrix]:
        """Yield every matrix of the spectral groups."""
        for group in self.param_groups:
            if group["spectral"]:
                for name, parameter in _named_parameters(group):
                    state = self.state.get(parameter, {})  # indexing would create an entry
                    for index, part in enumerate(_layout(group).part_names(parameter.shape)):
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
            for name, parameter in _named_parameters(group):
                with torch.device("meta"):
                    state = _new_state(parameter.to("meta"), group)
                shapes[name] = {key: value.shape for key, value in state.items()}
        return shapes

    def steps_taken(self) -> int:
        """Return how many steps the matrices have taken: the largest of their counters."""
        return int(max((matrix.state[STEP].item() for matrix in self.matrices() if matrix.state), default=0))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as ``torch.optim.Optimizer`` does, but keep the dtype in which each tensor was saved.

        Torch casts floating-point state to the parameter's dtype, which rounds the fp32 state of bf16
        parameters.
        """
        super().load_state_dict(state_dict)
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, parameter in zip(saved_ids, parameters, strict=True):
            for key, saved in state_dict["state"].get(saved_id, {}).items():
                loaded = self.state[parameter][key]
                if isinstance(saved, Tensor) and loaded.dtype != saved.dtype:
                    self.state[parameter][key] = saved.to(device=loaded.device, copy=True)
        if self.policy is not None:
            self.policy.after_load(self)

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

    def create_matrix_state(self) -> None:
        """Create the state of every matrix that has none, also of one without a gradient so far.

        Raises:
            UnsupportedEngineError: when an engine has replaced the matrices by shards or flat pieces.
        """
        for group in self.param_groups:
            if group["spectral"]:
                for parameter in group["params"]:
                    if parameter not in self.state:
                        _require_whole_matrix(parameter)
                        self.state[parameter] = _new_state(parameter, group)

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

    def _advance_moments(self, group: dict[str, Any], parameters: Iterable[Tensor]) -> None:
        second_moment = SECOND_MOMENTS.get(group["precondition"])
        for parameter in parameters:
            state = self.state[parameter]
            state[STEP].add_(1)
            gradient = parameter.grad.to(state[MOMENTUM].dtype)  # type: ignore[union-attr]
            state[MOMENTUM].lerp_(gradient, 1 - group["momentum"])
            if second_moment is not None:
                second_moment.advance(state, gradient, _layout(group), group["betas"][1])

    def _update_matrices(self, matrices: list[Matrix]) -> None:
        """Update matrices batch by batch; coupled ones when all directions are known."""
        batches = _batches(matrices, self.workspace_mib)
        if self.coupling_order is None:
            for batch in batches:
                self._update_alone(batch)
        elif matrices:
            updates = [self._update_of(batch) for batch in batches]
            for update, factors in zip(updates, self._factors_coupled(updates, self.coupling_order), strict=True):
                self._take(update, factors)

    def _update_alone(self, batch: list[Matrix]) -> None:
        update = self._update_of(batch)
        self._take(update, _factors_alone(update))

    def _take(self, update: _Update, factors: Tensor) -> None:
        if self.policy is not None:
            self.policy.observe(update.batch, update.directions, factors)
        update.apply(factors)

    def _update_of(self, batch: list[Matrix]) -> _Update:
        """Return the update of matrices of one shape or its transpose: one batched direction, each with its own p."""
        momenta = batch[0].momentum.new_empty(len(batch), *batch[0].wide_shape)
        for matrix, slot in zip(batch, momenta, strict=True):
            matrix.write_momentum(slot)
        p = torch.stack([matrix.p for matrix in batch])  # (B,)
        preconditioners = _preconditioners(batch, momenta, p)  # (B, m, n) or None
        if preconditioners is not None:
            momenta.mul_(preconditioners)
        directions = self.direction(momenta, p)  # (B, m, n)
        products = None
        if batch[0].group["step_rule"] != "pinned":
            products = torch.linalg.vecdot(momenta.flatten(1), directions.flatten(1))  # (B,)
        if preconditioners is not None:
            directions = preconditioners.mul_(directions)
        return _Update(batch, directions, p.reciprocal().to(momenta.dtype), products)

    def _factors_coupled(self, updates: Sequence[_Update], order: float) -> list[Tensor]:
        """Return what the directions of each batch are multiplied by: the oracle's step of all matrices together."""
        matrices = [matrix for update in updates for matrix in update.batch]
        duals = [update.dual_norms() for update in updates]
        together = torch.cat([dual.to(duals[0].device) for dual in duals])  # (matrices,)
        weights = torch.tensor(self._coupling_weights(matrices), dtype=together.dtype)
        weights = weights.to(together.device, non_blocking=True)
        lengths = lengths_coupled(matrices[0].group["step_rule"], together, order, weights)
        return [
            length.to(dual) * unit_factors(dual, update.exponents)
            for update, dual, length in zip(updates, duals, lengths.split([len(dual) for dual in duals]), strict=True)
        ]

    def _coupling_weights(self, matrices: Sequence[Matrix]) -> list[float]:
        chosen = self.coupling_weights
        weight_of = chosen if callable(chosen) else COUPLING_WEIGHTS[chosen]
        weights = [weight_of(matrix.name, matrix.shape) for matrix in matrices]
        for matrix, weight in zip(matrices, weights, strict=True):
            if not 0 < weight < math.inf:
                raise ValueError(
                    f"coupling_weights gives {matrix.name!r} the weight {weight!r}: return a number above 0."
                )
        return weights

    def _adamw_step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if parameter not in self.state:
                self.state[parameter] = _new_state(parameter, group)
        states = [self.state[parameter] for parameter in parameters]
        # Half-precision parameters are updated through an fp32 copy, since their state is fp32.
        masters = [parameter.to(_state_dtype(parameter)) for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            masters,
            [parameter.grad.to(_state_dtype(parameter)) for parameter in parameters],  # type: ignore[union-attr]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state[STEP] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for parameter, master in zip(parameters, masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)


@dataclass(frozen=True)
class Matrix:
    """One matrix of a spectral group: its parameter, and where in it the matrix lies.

    Attributes:
        name: the parameter's, followed by the part's where the parameter consists of several matrices.
        parameter_name: the name of the parameter.
        parameter: the parameter that the matrix is a part of.
        index: its number among the parameter's matrices.
        group: the parameter's group.
        state: the parameter's state, empty before the first step.
    """

    name: str
    parameter_name: str
    parameter: Tensor
    index: int
    group: dict[str, Any]
    state: dict[str, Tensor]

    @property
    def input_name(self) -> str:
        """The name of its inputs, which the parts of a fused projection share."""
        return matrix_name(self.parameter_name, _layout(self.group).expert(self.parameter.shape, self.index))

    @property
    def momentum(self) -> Tensor:
        """The moving average of the gradient, (r, c) as stored."""
        return as_matrix(self._part(self.state[MOMENTUM]))

    @property
    def gradient(self) -> Tensor | None:
        """The gradient, (r, c) as stored, or None."""
        return None if self.parameter.grad is None else as_matrix(self._part(self.parameter.grad))

    @property
    def p(self) -> Tensor:
        """The exponent of this matrix, a scalar that may be written to."""
        return self.state[P][self.index]

    @property
    def first_p(self) -> float:
        """The exponent that it starts with."""
        return _initial_p(self.group, len(_layout(self.group).part_names(self.parameter.shape)))[self.index]

    @property
    def statistics(self) -> Tensor:
        """The moving average of the criterion's statistics, (CURVES, NODES); may be written to."""
        return self.state[STATISTICS][self.index]

    @property
    def statistics_weight(self) -> Tensor:
        """The sum of the weights in that moving average, a scalar; may be written to."""
        return self.state[STATISTICS_WEIGHT][self.index]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = as_matrix(self._part(self.parameter)).shape
        return (columns, rows) if self.group["transposed"] else (rows, columns)

    @property
    def wide_shape(self) -> tuple[int, int]:
        """The shape with the shorter side first, in which equal matrices and their transposes share a batch."""
        m, n = self.shape
        return min(m, n), max(m, n)

    @property
    def learning_rate(self) -> float:
        """The present learning rate of the matrix."""
        return float(self.group["lr"]) * self.group["lr_ratio"]

    def weight_norm(self) -> Tensor:
        """Return the Frobenius norm of the weights, a scalar."""
        return torch.linalg.vector_norm(self._part(self.parameter), dtype=self.momentum.dtype)

    def look_ahead(self, out: Tensor | None = None) -> Tensor:
        """Return what the moving average would be if the gradient came once more, (r, c) as stored."""
        gradient = self.gradient.to(self.momentum.dtype)  # type: ignore[union-attr]
        return torch.lerp(self.momentum, gradient, 1 - self.group["momentum"], out=out)

    def write_momentum(self, wide: Tensor) -> None:
        """Write the bias-corrected (look-ahead) momentum into ``wide``; the bias is that of one step more."""
        beta, step = self.group["momentum"], self.state[STEP].item()
        if self.group["nesterov"]:
            self.look_ahead(out=self._stored(wide)).div_(1 - beta ** (step + 1))
        else:
            torch.div(self.momentum, 1 - beta**step, out=self._stored(wide))

    def write_root_of_second_moment(self, wide: Tensor) -> None:
        """Write ``√V + ε`` with the bias-corrected second moment V into ``wide``."""
        group, step, root = self.group, self.state[STEP].item(), self._stored(wide)
        second_moment = SECOND_MOMENTS[group["precondition"]]
        second_moment.write(self.state, _layout(group), self.parameter.shape, self.index, out=root)
        root.div_(1 - group["betas"][1] ** step).sqrt_().add_(group["eps"])

    def update_norm(self, own: Tensor) -> Tensor:
        """Return the Frobenius norm that the update is scaled to, a scalar, from its own."""
        s, beta1, lr_ratio = self.p.reciprocal().to(own.dtype), self.group["betas"][0], self.group["lr_ratio"]
        return update_norm(self.group["scale"], *self.shape, s, own, beta1=beta1, lr_ratio=lr_ratio)

    def apply(self, wide: Tensor, factor: Tensor) -> None:
        """Decay the weights and take the step ``factor * wide``."""
        weights = self._part(self.parameter)
        weights.mul_(1 - self.learning_rate * self.group["weight_decay"])
        weights.addcmul_(self._stored(wide).reshape(weights.shape), factor, value=-self.learning_rate)

    def _part(self, tensor: Tensor) -> Tensor:
        return _layout(self.group).part(tensor, self.index)

    def _stored(self, wide: Tensor) -> Tensor:
        rows, columns = as_matrix(self._part(self.parameter)).shape
        return wide if rows <= columns else wide.mT


class _Update(NamedTuple):
    """The update of one batch before its length is known.

    Attributes:
        batch: matrices of one shape or its transpose, B of them.
        directions: (B, m, n), of any length.
        exponents: spectral exponents s, (B,).
        products: ``⟨M, O⟩`` (B,) of momenta and directions where the step is an oracle's, else None.
    """

    batch: list[Matrix]
    directions: Tensor
    exponents: Tensor
    products: Tensor | None

    def dual_norms(self) -> Tensor:
        """Return the dual norms of the momenta, (B,)."""
        return dual_norms(self.products, self.exponents)  # type: ignore[arg-type]

    def apply(self, factors: Tensor) -> None:
        """Decay the weights and step by the directions times ``factors`` (B,)."""
        for matrix, direction, factor in zip(self.batch, self.directions, factors, strict=True):
            matrix.apply(direction, factor)


def _factors_alone(update: _Update) -> Tensor:
    """Return what the directions are multiplied by, (B,), where every matrix is for itself."""
    if update.products is not None:
        dual = update.dual_norms()
        return lengths_alone(update.batch[0].group["step_rule"], dual) * unit_factors(dual, update.exponents)
    norms = torch.linalg.matrix_norm(update.directions)  # (B,)
    targets = torch.stack([matrix.update_norm(own) for matrix, own in zip(update.batch, norms, strict=True)])
    return torch.where(norms > 0, targets / norms, 0.0)


def _preconditioners(batch: list[Matrix], like: Tensor, p: Tensor) -> Tensor | None:
    """Return the preconditioners (B, m, n) of a batch, None where it has none."""
    if batch[0].group["precondition"] == "none":
        return None
    preconditioners = torch.empty_like(like)
    for matrix, slot in zip(batch, preconditioners, strict=True):
        matrix.write_root_of_second_moment(slot)
    exponents = root_exponent(batch[0].group["precondition_exponent"], p.reciprocal().to(like.dtype))  # (B,)
    return preconditioners.pow_(exponents[:, None, None])


def _batches(matrices: Iterable[Matrix], workspace_mib: int) -> Iterator[list[Matrix]]:
    """Yield batches of one shape (or its transpose), dtype, device and kind that stay within the workspace."""
    alike: dict[Any, list[Matrix]] = {}
    for matrix in matrices:
        momentum = matrix.momentum
        kind = tuple(matrix.group[option] for option in _COMMON_OPTIONS)
        alike.setdefault((matrix.wide_shape, momentum.dtype, momentum.device, kind), []).append(matrix)
    for ((m, n), dtype, *_), batch in alike.items():
        rectangles = _WORKSPACE_RECTANGLES + (batch[0].group["precondition"] != "none")
        needed = (rectangles * m * n + _WORKSPACE_SQUARES * m * m) * dtype.itemsize
        size = max(1, (workspace_mib << 20) // needed)
        yield from (batch[start : start + size] for start in range(0, len(batch), size))


def _named_parameters(group: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, parameter) of a group; without names, the position stands in."""
    names = group.get("param_names") or [str(index) for index in range(len(group["params"]))]
    yield from zip(names, group["params"], strict=True)


def _layout(group: dict[str, Any]) -> Layout:
    return Layout(group["transposed"], group["sections"])


def _check_names(group: dict[str, Any]) -> None:
    """Raise unless a group's options have values that exist.

    Raises:
        ValueError: with the option, its value and the allowed ones.
    """
    for option in ("scale", *_COMMON_OPTIONS):
        if group[option] not in OPTION_VALUES[option]:
            raise ValueError(f"{option}={group[option]!r} is not allowed: one of {', '.join(OPTION_VALUES[option])}.")


def _initial_p(group: dict[str, Any], count: int) -> list[float]:
    """Return the p that each of a parameter's matrices starts with.

    Raises:
        ValueError: when one is out of range, or belongs to no norm where the step is an oracle's, or their number is
            not that of the matrices.
    """
    values = list(group["p"]) if isinstance(group["p"], Sequence) else [group["p"]] * count
    for p in values:
        if exponent_of(p) < 0 and group["step_rule"] != "pinned":
            raise ValueError(
                f"p={p!r} is not allowed with step_rule={group['step_rule']!r}: the order p + 1 of its norm is at "
                "least 2. Use p of at least 1, or step_rule='pinned'."
            )
    if len(values) != count:
        raise ValueError(f"p={values!r} has {len(values)} values for a parameter of {count} matrices.")
    return values


def _state_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _new_state(parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    average = torch.zeros_like(parameter, dtype=_state_dtype(parameter))
    step = torch.tensor(0.0)  # on the host, as in torch.optim: reading it synchronises nothing
    if not group["spectral"]:
        return {STEP: step, "exp_avg": average, "exp_avg_sq": torch.zeros_like(average)}
    layout = _layout(group)
    count = len(layout.part_names(parameter.shape))
    second_moment = SECOND_MOMENTS.get(group["precondition"])
    return {
        STEP: step,
        MOMENTUM: average,
        **(second_moment.new_state(average, layout) if second_moment else {}),
        P: torch.tensor(_initial_p(group, count), dtype=torch.float32, device=parameter.device),
        STATISTICS: torch.zeros(count, CURVES, NODES, dtype=torch.float64, device=parameter.device),
        STATISTICS_WEIGHT: torch.zeros(count, dtype=torch.float64, device=parameter.device),
    }


def _require_whole_matrix(parameter: Tensor) -> None:
    if isinstance(parameter, DTensor):
        raise UnsupportedEngineError(
            "schatten_p does not support sharded (DTensor) parameters of FSDP version 2 or tensor parallelism yet. "
            "Use DDP, or optim='adamw_torch' with this engine."
        )
    if parameter.ndim < 2:
        raise UnsupportedEngineError(
            f"A matrix has become a tensor of shape {tuple(parameter.shape)}: the training engine (DeepSpeed ZeRO or "
            "FSDP version 1) hands the optimizer flat pieces. Use DDP, or optim='adamw_torch' with this engine."
        )
