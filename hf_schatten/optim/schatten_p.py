"""SchattenP: the Schatten-p update for matrices, AdamW for all other parameters, in one ``torch.optim.Optimizer``."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_schatten.distributed.agreement import Agreement
from hf_schatten.distributed.owners import Computed, Write
from hf_schatten.distributed.processes import process_count
from hf_schatten.linalg.compute_dtype import chosen_compute_dtype
from hf_schatten.linalg.many_matrices import inner_products
from hf_schatten.linalg.targets import target_of
from hf_schatten.matrices.layout import Layout, matrix_name
from hf_schatten.optim.adamw import adamw_step
from hf_schatten.optim.apply import apply_updates
from hf_schatten.optim.coupling import ScaledUpdates, coupling_of
from hf_schatten.optim.finite_gradients import FiniteGradients, warn_of_skipped
from hf_schatten.optim.groups import Groups
from hf_schatten.optim.held import Parameters, held_by
from hf_schatten.optim.matrix import MOMENTUM, SKIPPED, STEP, Matrix, layout_of, named_parameters
from hf_schatten.optim.momentum import Momenta
from hf_schatten.optim.plan import Planner
from hf_schatten.optim.policy import Policy, warn_of_missing
from hf_schatten.optim.saved_state import OPTIONS, Loading, take_options
from hf_schatten.optim.stack import Stack
from hf_schatten.options import SchattenOptions

logger = logging.getLogger(__name__)

_REPORT_INTERVAL = 100  # steps between two looks, which wait for the device, at how many were skipped


class SchattenP(Optimizer):
    r"""Schatten-p steepest descent for matrices, AdamW for the parameters of other groups.

    A matrix W of (out, in) = (m, n) with gradient G is updated as

    .. math::
        M \leftarrow \beta M + (1 - \beta) G, \quad
        W \leftarrow (1 - \eta \lambda) W - \eta \, c \, U \Sigma^{1/p} V^\top

    where U Σ Vᵀ is the singular value decomposition of the bias-corrected (Nesterov) momentum and c is the length that
    the step rule gives the update (:mod:`hf_schatten.optim.step_rules`). A parameter is one matrix or several. Each
    has a p of its own in ``state[parameter]["p"]``, which a policy may change (:mod:`hf_schatten.optim.policy`).

    Most users want :func:`hf_schatten.create_schatten_optimizer`, which makes the groups from a model.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of them. A group's ``spectral`` (default True)
            chooses the Schatten-p update, False chooses AdamW; ``transposed``, ``parts``, ``blocks``,
            ``cuts_inputs`` and ``filters`` say how they are read (:class:`hf_schatten.matrices.layout.Layout`);
            ``p_by_parameter`` (none) has the p of single parameters by name, ``lr_ratio_by_parameter`` (none) what
            multiplies their learning rates, those of AdamW's too. ``p`` (a sequence gives each matrix of a
            parameter its own), ``momentum``, ``nesterov``, ``step_rule``, ``scale``, ``precondition`` and ``lr_ratio``
            may differ from the options'.
        options: of the update. Default None: made of the other arguments.
        lr: learning rate of AdamW; that of matrices is ``lr`` times the option ``schatten_lr_ratio``. Default 1e-3.
        weight_decay: decoupled weight decay λ of every group. Default 0.1.
        betas: AdamW's decays, the second of them the preconditioner's too. Default (0.9, 0.999).
        eps: AdamW's epsilon, and the preconditioner's. Default 1e-8.
        maximize: go uphill. Default False.
        **fields: of :class:`hf_schatten.SchattenOptions`, in place of ``options``; p is ``inf`` unless given.

    Attributes:
        options: of the update.
        target: the :class:`hf_schatten.linalg.targets.Target` of its directions.
        policy: what changes p, None where it is fixed.
        parameter_of: finds a parameter of the model by its name, None where the model is not known.

    Raises:
        OptionError: when an option is out of range, or options exclude each other.
        ValueError: when a group marked ``spectral`` holds a parameter that is not a matrix, or a function given as
            target cannot be fitted.
    """

    policy: Policy | None = None
    parameter_of: Callable[[str], Any] | None = None
    _known: Parameters | None = None
    _calls = _reported_skips = 0

    def __init__(
        self,
        params: Iterable[Any],
        options: SchattenOptions | None = None,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        **fields: Any,
    ) -> None:
        self.options = SchattenOptions.given(options, fields, p=math.inf)
        self._keeps_options = options is not None  # when a state is loaded
        self.target = target_of(self.options.target)
        self.target.accuracy(self.options.ns_steps)  # fits it now, where a bad function can still be refused
        self._begin()
        defaults = {
            "spectral": True,
            **vars(Layout()),
            "lr": lr,
            "maximize": maximize,
            "p": self.options.initial_p,
            "p_by_parameter": {},
            "momentum": self.options.momentum,
            "nesterov": self.options.nesterov,
            "weight_decay": weight_decay,
            "step_rule": self.options.step_rule,
            "scale": self.options.scale,
            "precondition": self.options.precondition,
            "lr_ratio": self.options.schatten_lr_ratio,
            "lr_ratio_by_parameter": {},
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, defaults)
        self._known = Parameters(self, self._new_planner)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as ``torch.optim.Optimizer`` does; a spectral group takes matrices only.

        Raises:
            ValueError: when a spectral group holds something else, or its options are out of range, exclude each other
                or do not go with those of the optimizer.
        """
        super().add_param_group(param_group)
        try:
            self._groups.check(len(self.param_groups) - 1, self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def direction(self, momenta: Tensor, p: Tensor) -> Tensor:
        """Return the update direction of a stack of matrices, of any length: the method to override.

        Args:
            momenta: (B, m, n) bias-corrected momenta with m <= n: tall matrices come transposed. In float32 at least;
                this method itself, without a preconditioner, also takes bfloat16, where products are in it.
            p: (B,) exponents.

        Returns:
            (B, m, n) U Σ^{1/p} Vᵀ of each momentum, or what another target makes of Σ.
        """
        return self._direction_of_target(momenta, p)[0]

    def _direction_of_target(self, momenta: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        dtype = chosen_compute_dtype(self.options.compute_dtype, momenta)
        return self.target.direction(momenta, p, self.options.ns_steps, dtype)

    @property
    def _directs_otherwise(self) -> bool:
        """Whether another function stands in the place of :meth:`direction`."""
        return getattr(self.direction, "__func__", None) is not SchattenP.direction

    def _measured_direction(self, momenta: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Return the direction O and the inner products ``⟨M, O⟩`` and ``⟨O, O⟩``, (2, B)."""
        if not self._directs_otherwise:
            return self._direction_of_target(momenta, p)
        return (found := self.direction(momenta, p)), inner_products(momenta, found)

    def _momenta_dtype(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """Return the dtype of stacked momenta of a shape, given that of the averages."""
        half = self.target.takes_half_precision and not self._directs_otherwise
        products = chosen_compute_dtype(self.options.compute_dtype, torch.empty(0, *shape, dtype=dtype, device=device))
        return products if half and products == torch.bfloat16 else dtype

    @torch.compiler.disable  # in a training step that is compiled, it runs as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; a closure re-evaluates the model and returns the loss, as in ``torch.optim``.

        Raises:
            UnsupportedEngineError: when an engine has replaced the matrices by shards or flat pieces.
            RuntimeError: when other processes, with which this one steps together, do not come.
            ValueError: when a function of coupling weights returns one that is not above 0.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        groups = (held := self.held).begin()
        self._groups.check_edited(held.groups, held.states, self.matrices, self._managed)
        held.create_state(groups, self.options.coupling_order)
        momenta = Momenta(gradients := FiniteGradients(groups))
        if self.options.share_work or self.policy is not None:  # else, nothing is exchanged
            self._agreement.renew(groups, self.options)
        if self.policy is not None:
            held.before_update(self.policy, self)
        elif not self._calls:
            warn_of_missing(self.options)
        momenta.count([group for group in groups if group["spectral"]], held.states)
        for group in groups:
            if not group["spectral"]:
                adamw_step(group, gradients.of(group["params"]), held.states, gradients)
        for delivery in held.planner.deliveries(groups, held.states, self.matrices, gradients, self.alone):
            momenta.advance(delivery.elsewhere)
            compute = partial(
                self._compute, self._coupling.start(delivery, momenta, self._measured_direction), gradients
            )
            for delivered in delivery.deliver(compute, momenta):
                apply_updates(delivered, gradients)
        held.end(self.policy, self)
        self._calls += 1
        if self._calls % _REPORT_INTERVAL == 0:
            self.report_skipped()
        return loss

    @property
    def _managed(self) -> Collection[str]:
        """The names of the matrices whose p a policy changes."""
        return self.policy.matrices if self.policy else ()

    @property
    def alone(self) -> bool:
        """Whether this process trains for itself: it is the only one, or others have other gradients."""
        return process_count() == 1 or not self._agreement.together

    def _compute(
        self, scaled: ScaledUpdates, gradients: FiniteGradients, work: Sequence[Stack], write: Write
    ) -> Iterator[Computed]:
        """Yield the updates of some stacks, zero where a gradient is not finite; the policy sees them first."""
        for update, factors in scaled(work, write):
            if self.policy is not None:
                self.policy.observe(update.matrices, update.directions, factors)
            keep = gradients.keeps([matrix.parameter for matrix in update.matrices])
            yield Computed(update.matrices, update.directions, factors * keep)

    def matrices(self) -> Iterator[Matrix]:
        """Yield every matrix of the spectral groups."""
        states = self.held.states
        for group in self.held.groups:
            if group["spectral"]:
                for name, parameter in named_parameters(group):
                    state = states.get(parameter, {})  # indexing would create an entry
                    for index, part in enumerate(layout_of(group).part_names(parameter.shape)):
                        yield Matrix(matrix_name(name, part), name, parameter, index, group, state)

    def learned_p(self) -> dict[str, float]:
        """Return the present p of every matrix that has taken a step, by its name: the parameter's, and the part's."""
        by_name = {matrix.name: matrix.p for matrix in self.matrices() if matrix.state}
        values = torch.stack(list(by_name.values())).tolist() if by_name else []  # one wait for the device
        return dict(zip(by_name, values, strict=True))

    def steps_taken(self) -> int:
        """Return how many steps the matrices have taken: the largest of their counters."""
        return int(max((state[STEP].item() for state in self.held.states.values() if MOMENTUM in state), default=0))

    def skipped_steps(self) -> dict[str, int]:
        """Return how many steps each matrix parameter has skipped because its gradient was not finite, where any."""
        states = {matrix.parameter_name: matrix.state[SKIPPED] for matrix in self.matrices() if matrix.state}
        counts = torch.stack(list(states.values())).tolist() if states else []  # one wait for the device
        return {name: int(count) for name, count in zip(states, counts, strict=True) if count}

    def report_skipped(self) -> None:
        """Warn of skipped steps, where there are more than at the last warning. Waits for the device."""
        skipped = self.skipped_steps()
        if sum(skipped.values()) > self._reported_skips:
            self._reported_skips = sum(skipped.values())
            warn_of_skipped(skipped)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as ``torch.optim.Optimizer`` does, and the options, which a resume compares."""
        own = {OPTIONS: self.options.as_json()} if self._keeps_options else {}
        with self.register_state_dict_post_hook(lambda _, state_dict: state_dict | own, prepend=True):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as ``torch.optim.Optimizer`` does, but in the dtypes in which state is kept.

        Torch casts state to the parameter's dtype, which rounds the fp32 state of bf16 parameters. How parameters are
        read as matrices is the present model's. An optimizer that was made with ``options`` keeps them, but for what a
        learning-rate schedule changes, and warns of those that differ from the saved ones.

        Raises:
            CheckpointError: when the state is of another model, or of other updates of its parameters.
            ValueError: when the state is another optimizer's, or is in another file.
        """
        loading = self.held.loading(self.param_groups, self.defaults, self._keeps_options)
        finish = partial(SchattenP._finish_loading, loading=loading)
        with (  # inside of the caller's own hooks
            self.register_load_state_dict_pre_hook(loading.prepare),
            self.register_load_state_dict_post_hook(finish, prepend=True),
        ):
            super().load_state_dict(state_dict)

    def _finish_loading(self, loading: Loading) -> None:
        loading.restore(self.state)
        self._groups.forget()
        if self._keeps_options:
            take_options(loading.options, self.options, self.matrices(), self._managed)
        if self.policy is not None:
            self.policy.after_load(self)

    def follow(self, policy: Policy) -> None:
        """Let ``policy`` change p from now on."""
        self.stop_following()
        self.policy = policy
        policy.after_update(self)

    def stop_following(self) -> None:
        """Keep every p as it is from now on, and remove the policy's hooks from the model."""
        if self.policy is not None:
            self.policy.remove()
            self.policy = None

    def create_state(self) -> None:
        """Create missing state, into which sharded checkpoints load; UnsupportedEngineError of an unknown engine."""
        self.held.create_state(self.held.groups, self.options.coupling_order)

    @property
    def held(self) -> Parameters:
        """What the groups hold: parameters, or what an engine has made of them."""
        self._known = held_by(self, self._new_planner, self.parameter_of, self._known)
        return self._known

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle keeps: all but the plan. The policy brings the model along, which it samples."""
        own = ("options", "target", "policy", "_keeps_options")
        return super().__getstate__() | {name: value for name, value in vars(self).items() if name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what :meth:`__getstate__` keeps; a copy plans for itself, since its parameters are others."""
        super().__setstate__(state)
        if "_agreement" not in self.__dict__:
            self._begin()

    def _begin(self) -> None:
        """Make what is not kept in a copy or a pickle."""
        self._groups = Groups(self.options)
        self._agreement = Agreement()
        self._coupling = coupling_of(self.options)
        self._new_planner = partial(Planner, self.options.share_work, self._groups.options_of, self._momenta_dtype)
        self._known = None
