"""What a Trainer shows of the optimizer: p in its logs, a quiet progress bar, and the picture at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import (
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy

from .adaptation import Adaptation
from .optimizer import SchattenP
from .options import OPTIMIZER_NAME, SchattenOptions
from .policy import Policy, ScheduledP
from .report import log_entry, plot_choices, plot_p_by_layer, plot_updates
from .report.figures import P_BY_LAYER, SPECTRA, UPDATES
from .report.log import LAYER_PREFIXES

_ILLUSTRATED = 3  # matrices whose spectra and criterion are drawn: the first, the middle and the last


class SchattenCallback(TrainerCallback):
    """Logs the learned p and draws it at the end of training; does nothing with other optimizers.

    ``import hf_schatten`` adds it to every Trainer. A step that re-estimates p is always logged, so that
    ``trainer_state.json`` and the loggers hold every estimate: the summary ``schatten_p_min``, ``schatten_p_median``
    and ``schatten_p_max``, and per layer ``schatten_p/<layer>`` and the update's ``schatten_stable_rank/<layer>`` and
    ``schatten_relative_size/<layer>``. At every save and at the end, pictures of them, and of what p was chosen from,
    go into the folder ``figures`` of the output folder. The cadence of the estimates itself is the optimizer's
    (:class:`hf_schatten.adaptation.Adaptation`), which works without a Trainer too.
    """

    def __init__(self) -> None:
        self._logged_estimates = 0

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report malformed options when the Trainer is made, not when training starts."""
        if args.optim == OPTIMIZER_NAME:
            SchattenOptions.from_optim_args(args.optim_args)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Prepare the first step, and stop a resumed run that has lost its optimizer state.

        Raises:
            RuntimeError: when the run continues at a later step and the optimizer starts at its first.
        """
        schatten = unwrap_optimizer(optimizer)
        if schatten is None:
            return
        self._logged_estimates = schatten.policy.estimates if schatten.policy else 0
        if schatten.policy is not None:
            schatten.policy.after_update(schatten)
        if isinstance(schatten.policy, Adaptation) and state.is_world_process_zero:
            schatten.policy.illustrated = _ILLUSTRATED
        if isinstance(schatten.policy, ScheduledP) and schatten.policy.steps is None:
            schatten.policy.steps = state.max_steps
        if state.global_step > 0 and not schatten.state:
            raise RuntimeError(
                f"Training resumes at step {state.global_step}, but the checkpoint's optimizer state was not loaded: "
                "a plain Trainer reads optimizer.pt only. Resume with hf_schatten.SchattenTrainer, which wrote the "
                "checkpoint, or start a new run from the model's weights."
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Ask for a log when the step has re-estimated p."""
        if self._has_news(optimizer) and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add p to the logs of the step that has estimated it."""
        schatten = unwrap_optimizer(optimizer)
        policy = schatten.policy if schatten else None
        if logs is None or not (self._has_news(optimizer) or isinstance(policy, ScheduledP)):
            return
        assert schatten is not None
        assert policy is not None
        self._logged_estimates = policy.estimates
        entry = log_entry(schatten.learned_p(), *_updates(policy))
        logs.update(entry)
        state.log_history[-1].update(entry)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Draw the pictures, and leave the model alone."""
        self._draw(args, state, optimizer)
        schatten = unwrap_optimizer(optimizer)
        if schatten is not None and schatten.policy is not None:
            schatten.policy.pause()

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Draw the pictures of the run so far."""
        self._draw(args, state, optimizer)

    def _draw(self, args: TrainingArguments, state: TrainerState, optimizer: Any) -> None:
        """Draw into the output folder what was logged and measured: p, its criterion, the updates."""
        schatten = unwrap_optimizer(optimizer)
        if schatten is None or not (state.is_world_process_zero and args.output_dir):
            return
        folder = Path(args.output_dir)
        plot_p_by_layer(state.log_history, folder / P_BY_LAYER)
        plot_updates(state.log_history, folder / UPDATES)
        if isinstance(schatten.policy, Adaptation):
            plot_choices(schatten.policy.choices, folder / SPECTRA)

    def _has_news(self, optimizer: Any) -> bool:
        schatten = unwrap_optimizer(optimizer)
        policy = schatten.policy if schatten else None
        return policy is not None and policy.estimates > self._logged_estimates


class SchattenProgressCallback(ProgressCallback):
    """Transformers' progress bar without the per-layer values, which would fill the terminal."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the logs above the bar, with the summary of p instead of every layer's."""
        shown = {name: value for name, value in (logs or {}).items() if not name.startswith(LAYER_PREFIXES)}
        super().on_log(args, state, control, logs=shown, **kwargs)


def _updates(policy: Policy) -> tuple[dict[str, float], dict[str, float]]:
    """Return stable rank and relative size of the last due step's updates, by matrix name."""
    updates = policy.updates if isinstance(policy, Adaptation) else {}
    if not updates:
        return {}, {}
    values = torch.stack([torch.stack(pair) for pair in updates.values()]).tolist()  # one wait for the device
    stable_ranks, relative_sizes = zip(*values, strict=True)
    return dict(zip(updates, stable_ranks, strict=True)), dict(zip(updates, relative_sizes, strict=True))


def unwrap_optimizer(optimizer: Optimizer | None) -> SchattenP | None:
    """Return the SchattenP inside accelerate's wrapper, or None when it is another optimizer."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, SchattenP) else None
