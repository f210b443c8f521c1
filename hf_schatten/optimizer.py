"""SchattenP: the Schatten-p update for matrices and AdamW for everything else, as one ``torch.optim.Optimizer``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from .criterion import NODES
from .distributed import UnsupportedEngineError
from .linalg import spectral_power
from .linalg.coefficient_table import exponent_of
from .options import OPTIMIZER_NAME, ScaleRule, SchattenOptions
from .scaling import update_norm

if TYPE_CHECKING:
    from .adaptation import Adaptation

# State of a matrix, by name. Every key is a tensor that is created at the first step: sharded checkpoints drop
# what appears later.
STEP, MOMENTUM, P, STATISTICS = "step", "momentum", "p", "statistics"

# Temporaries of a matrix (m, n), m <= n, while its batch is updated: momentum, normalised momentum, iterate, product
# and weighted sum; Gram matrices and polynomials of them.
_WORKSPACE_RECTANGLES, _WORKSPACE_SQUARES = 5, 4


class SchattenP(Optimizer):
    r"""Schatten-p steepest descent for matrices, AdamW for the parameters of other groups.

    A matrix W of (out, in) = (m, n) with gradient G is updated as

    .. math::
        M \leftarrow \beta M + (1 - \beta) G, \quad
        W \leftarrow (1 - \eta \lambda) W - \eta \, c \, U \Sigma^{1/p} V^\top

    where U Σ Vᵀ is the singular value decomposition of the bias-corrected (Nesterov) momentum and c pins the
    Frobenius norm of the update (:mod:`hf_schatten.scaling`). p = 1 is normalised SGD with momentum, p = ∞ is
    Muon. Each matrix has a p of its own in ``state[parameter]["p"]``; :class:`hf_schatten.adaptation.Adaptation`
    re-estimates it during training, and without one it stays at the group's ``p``.

    Most users want :func:`hf_schatten.create_schatten_optimizer`, which makes the groups from a model.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of them. A group's ``spectral`` (default True)
            chooses the Schatten-p update, False chooses AdamW; ``transposed`` (default False) says that its
            matrices are stored (in, out).
        lr: learning rate of the AdamW groups; that of matrices is ``lr * lr_ratio``. Default 1e-3.
        p: p of a matrix at its first step: at least 1, ``inf``, or at most -4. Default ``inf``.
        momentum: decay β of the momentum, in [0, 1). Default 0.95.
        nesterov: look one step ahead. Default True.
        weight_decay: decoupled weight decay λ of every group. Default 0.1.
        scale: rule of the update's norm. Default ``match_rms_adamw``.
        lr_ratio: learning rate of the matrices divided by ``lr``. Default 1.
        betas: AdamW's decays. Default (0.9, 0.999).
        eps: AdamW's epsilon. Default 1e-8.
        ns_steps: Newton-Schulz steps of the spectral power, 3 to 8. Default 5.
        workspace_mib: memory, in MiB, that one batch of matrices may take for its temporaries; a matrix that needs
            more is a batch of its own. Default 512.

    Attributes:
        options: the options it was created with, None where it was made by hand.
        adaptation: what re-estimates p, None where p is fixed.

    Raises:
        ValueError: when a group marked ``spectral`` holds a parameter that is no matrix, or p is out of range.
    """

    options: SchattenOptions | None = None
    adaptation: Adaptation | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        p: float = math.inf,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        scale: ScaleRule = "match_rms_adamw",
        lr_ratio: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        ns_steps: int = 5,
        workspace_mib: int = 512,
    ) -> None:
        self.ns_steps = ns_steps
        self.workspace_mib = workspace_mib
        defaults = {
            "spectral": True,
            "transposed": False,
            "lr": lr,
            "p": p,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "scale": scale,
            "lr_ratio": lr_ratio,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as ``torch.optim.Optimizer`` does; a spectral group takes matrices only.

        Raises:
            ValueError: when a spectral group holds something else, or its p is out of range.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not group["spectral"]:
            return
        exponent_of(group["p"])
        for name, parameter in _named_parameters(group):
            if parameter.ndim != 2:
                self.param_groups.pop()
                raise ValueError(
                    f"Parameter {name!r} of shape {tuple(parameter.shape)} is no matrix. Put it into a group with "
                    "spectral=False, or let hf_schatten.create_schatten_optimizer(model) make the groups."
                )

    def direction(self, momenta: Tensor, p: Tensor) -> Tensor:
        """Return the update direction of a batch of matrices, of any scale: the method to override.

        Args:
            momenta: (B, m, n) bias-corrected momenta with m <= n: tall matrices come transposed.
            p: (B,) exponents.

        Returns:
            (B, m, n) U Σ^{1/p} Vᵀ of each momentum.
        """
        return spectral_power(momenta, p, steps=self.ns_steps)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: re-evaluates the model and returns the loss, as in ``torch.optim``.

        Returns:
            The closure's loss, or None.

        Raises:
            UnsupportedEngineError: when an engine has replaced the matrices by shards or flat pieces.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.create_matrix_state()
        if self.adaptation is not None:
            self.adaptation.estimate(self)
        matrices = []
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["spectral"]:
                matrices += [_Matrix(parameter, self.state[parameter], group) for parameter in parameters]
            elif parameters:
                self._adamw_step(group, parameters)
        for batch in _batches(matrices, self.workspace_mib):
            self._update_batch(batch)
        if self.adaptation is not None:
            self.adaptation.arm(self)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle keeps: everything but the adaptation, whose hooks belong to the model."""
        own = {"ns_steps": self.ns_steps, "workspace_mib": self.workspace_mib, "options": self.options}
        return super().__getstate__() | own

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, parameter) of every matrix of the spectral groups."""
        for group in self.param_groups:
            if group["spectral"]:
                yield from _named_parameters(group)

    def learned_p(self) -> dict[str, float]:
        """Return the present p of every matrix that has taken a step, by parameter name."""
        by_name = {name: state[P] for name, state in self._matrix_states()}
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
        return int(max((state[STEP].item() for _, state in self._matrix_states()), default=0))

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
        if self.adaptation is not None:
            self.adaptation.arm(self)

    def _matrix_states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, parameter in self.matrices():
            if parameter in self.state:  # indexing would create an entry
                yield name, self.state[parameter]

    def adapt(self, adaptation: Adaptation) -> None:
        """Let this object re-estimate p from now on."""
        self.adaptation = adaptation
        adaptation.arm(self)

    def stop_adapting(self) -> None:
        """Keep every p as it is from now on, and remove the hooks from the model."""
        if self.adaptation is not None:
            self.adaptation.remove()
            self.adaptation = None

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

    def _update_batch(self, batch: list[_Matrix]) -> None:
        """Update matrices of one shape or its transpose: one batched direction, each matrix with its own p."""
        average = batch[0].state[MOMENTUM]
        momenta = average.new_empty(len(batch), *batch[0].wide_shape)
        for matrix, slot in zip(batch, momenta, strict=True):
            matrix.advance_momentum(slot)
        p = torch.stack([matrix.state[P] for matrix in batch])  # (B,)
        directions = self.direction(momenta, p)  # (B, m, n)
        norms = torch.linalg.matrix_norm(directions)  # (B,)
        targets = torch.stack([matrix.update_norm() for matrix in batch])  # (B,)
        factors = torch.where(norms > 0, targets / norms, 0.0)
        for matrix, direction, factor in zip(batch, directions, factors, strict=True):
            matrix.apply(direction, factor)

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
class _Matrix:
    """One matrix at one step: what of the update concerns it alone."""

    parameter: Tensor  # (r, c), as stored
    state: dict[str, Tensor]
    group: dict[str, Any]

    @property
    def wide_shape(self) -> tuple[int, int]:
        """The shape with the shorter side first, in which equal matrices and their transposes share a batch."""
        rows, columns = self.parameter.shape
        return min(rows, columns), max(rows, columns)

    def advance_momentum(self, wide: Tensor) -> None:
        """Update the moving average in place and write the bias-corrected (look-ahead) momentum into ``wide``.

        The look-ahead is what the average would be if the gradient came once more, so that its bias is that of one
        step more.
        """
        beta, average = self.group["momentum"], self.state[MOMENTUM]
        gradient = self.parameter.grad.to(average.dtype)  # type: ignore[union-attr]
        step = self.state[STEP].add_(1).item()
        average.lerp_(gradient, 1 - beta)
        if self.group["nesterov"]:
            torch.lerp(average, gradient, 1 - beta, out=self._stored(wide)).div_(1 - beta ** (step + 1))
        else:
            torch.div(average, 1 - beta**step, out=self._stored(wide))

    def update_norm(self) -> Tensor:
        """Return the Frobenius norm that the update is scaled to, a scalar."""
        rows, columns = self.parameter.shape
        m, n = (columns, rows) if self.group["transposed"] else (rows, columns)
        s = self.state[P].reciprocal()
        return update_norm(self.group["scale"], m, n, s, beta1=self.group["betas"][0], lr_ratio=self.group["lr_ratio"])

    def apply(self, wide: Tensor, factor: Tensor) -> None:
        """Decay the weights and take the step ``factor * wide``."""
        lr = float(self.group["lr"]) * self.group["lr_ratio"]
        self.parameter.mul_(1 - lr * self.group["weight_decay"])
        self.parameter.addcmul_(self._stored(wide), factor, value=-lr)

    def _stored(self, wide: Tensor) -> Tensor:
        return wide if self.parameter.shape == wide.shape else wide.mT


def _batches(matrices: Iterable[_Matrix], workspace_mib: int) -> Iterator[list[_Matrix]]:
    """Yield batches of one shape (or its transpose), dtype and device that stay within the workspace."""
    alike: dict[Any, list[_Matrix]] = {}
    for matrix in matrices:
        momentum = matrix.state[MOMENTUM]
        alike.setdefault((matrix.wide_shape, momentum.dtype, momentum.device), []).append(matrix)
    for ((m, n), dtype, _), batch in alike.items():
        needed = (_WORKSPACE_RECTANGLES * m * n + _WORKSPACE_SQUARES * m * m) * dtype.itemsize
        size = max(1, (workspace_mib << 20) // needed)
        yield from (batch[start : start + size] for start in range(0, len(batch), size))


def _named_parameters(group: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, parameter) of a group; without names, the position stands in."""
    names = group.get("param_names") or [str(index) for index in range(len(group["params"]))]
    yield from zip(names, group["params"], strict=True)


def _state_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _new_state(parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    average = torch.zeros_like(parameter, dtype=_state_dtype(parameter))
    step = torch.tensor(0.0)  # on the host, as in torch.optim: reading it synchronises nothing
    if not group["spectral"]:
        return {STEP: step, "exp_avg": average, "exp_avg_sq": torch.zeros_like(average)}
    return {
        STEP: step,
        MOMENTUM: average,
        P: torch.tensor(group["p"], dtype=torch.float32, device=parameter.device),
        STATISTICS: torch.zeros(2, NODES, dtype=torch.float64, device=parameter.device),
    }


def _require_whole_matrix(parameter: Tensor) -> None:
    if isinstance(parameter, DTensor):
        raise UnsupportedEngineError(
            "schatten_p does not support sharded (DTensor) parameters of FSDP version 2 or tensor parallelism yet. "
            "Use DDP, or optim='adamw_torch' with this engine."
        )
    if parameter.ndim != 2:
        raise UnsupportedEngineError(
            f"A matrix has become a tensor of shape {tuple(parameter.shape)}: the training engine (DeepSpeed ZeRO or "
            "FSDP version 1) hands the optimizer flat pieces. Use DDP, or optim='adamw_torch' with this engine."
        )
