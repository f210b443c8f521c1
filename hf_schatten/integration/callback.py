"""What a Trainer shows of the optimizer: p in its logs and at its progress bar, and the pictures at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy

from hf_schatten.adaptive.adaptation import Adaptation
from hf_schatten.adaptive.schedule import ScheduledP
from hf_schatten.distributed.processes import process_count
from hf_schatten.integration.checkpoint import write_learned_p
from hf_schatten.optim.policy import Policy
from hf_schatten.optim.schatten_p import SchattenP
from hf_schatten.options import OPTIMIZER_NAME, SchattenOptions
from hf_schatten.report import log_entry, plot_choices, plot_p_by_layer, plot_updates
from hf_schatten.report.figures import P_BY_LAYER, SPECTRA, UPDATES
from hf_schatten.report.log import MEDIAN, SKIPPED_STEPS, SUMMARY_PREFIX, history_entry, summary, without_layers

_ILLUSTRATED = 3  # matrices whose spectra and criterion are drawn: the first, the middle and the last


class SchattenCallback(TrainerCallback):
    """Logs the learned p and draws it at the end of training; does nothing with other optimizers.

    ``import hf_schatten`` adds it to every Trainer. A step that re-estimates p is always logged, so that
    ``trainer_state.json`` and the loggers hold every estimate: the summary ``schatten_p_min``, ``schatten_p_median``
    and ``schatten_p_max``, and per layer ``schatten_p/<layer>`` and the update's ``schatten_stable_rank/<layer>`` and
    ``schatten_relative_size/<layer>``. Once a gradient was not finite, ``schatten_skipped_steps`` is the most steps
    that a matrix has skipped. An infinite p is the number for the loggers, and the string ``inf`` in
    ``trainer_state.json``. At every save and at the end, pictures of them, and of what p was chosen from, go into the
    folder ``figures`` of the output folder. The cadence of the estimates itself is the optimizer's
    (:class:`hf_schatten.adaptive.adaptation.Adaptation`), which works without a Trainer too.

    It stands before all loggers in the Trainer's list of callbacks, since it adds to what they get.
    """

    def __init__(self) -> None:
        self._logged_estimates = 0
        self._drawn_step: int | None = None

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
            RuntimeError: when the run continues at a later step and the optimizer starts at its first, or when several
                processes train each for itself.
        """
        schatten = unwrap_optimizer(optimizer)
        if schatten is None:
            return
        if process_count() > 1 and args.world_size == 1:
            raise RuntimeError(
                f"{process_count()} processes were started, but the Trainer trains in each of them as if it were "
                "alone: pass --use_cpu where there is no GPU."
            )
        self._logged_estimates = schatten.policy.estimates if schatten.policy else 0
        self._drawn_step = None
        if schatten.policy is not None:
            schatten.policy.after_update(schatten)
        if isinstance(schatten.policy, Adaptation) and state.is_world_process_zero:
            schatten.policy.illustrated = _ILLUSTRATED
        if isinstance(schatten.policy, ScheduledP) and schatten.policy.steps is None:
            schatten.policy.steps = state.max_steps
        if state.global_step > 0 and not schatten.state:
            raise RuntimeError(
                f"Training resumes at step {state.global_step}, but the checkpoint's optimizer state was not loaded: "
                "a plain Trainer reads optimizer.pt only, which is missing. Resume with hf_schatten.SchattenTrainer "
                "where there is an optimizer.safetensors, from another checkpoint, or start a new run from the "
                "model's weights."
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
        """Add p to the training logs of the step that has estimated it.

        Logs without a training loss are metrics that ``evaluate`` and ``train`` return, and stay as they are.
        """
        schatten = unwrap_optimizer(optimizer)
        policy = schatten.policy if schatten else None
        if logs is None or "loss" not in logs or schatten is None:
            return
        skipped = schatten.skipped_steps()
        if skipped:
            most = {SKIPPED_STEPS: float(max(skipped.values()))}
            logs.update(most)
            state.log_history[-1].update(most)
        if not (self._has_news(optimizer) or isinstance(policy, ScheduledP)):
            return
        assert policy is not None
        self._logged_estimates = policy.estimates
        entry = log_entry(schatten.learned_p(), *_updates(policy))
        logs.update(entry)
        state.log_history[-1].update(history_entry(entry))  # type: ignore[arg-type] # declared as floats alone

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Draw the pictures, warn of steps that were skipped since the last warning, and leave the model alone."""
        self._draw(args, state, optimizer)
        schatten = unwrap_optimizer(optimizer)
        if schatten is None:
            return
        schatten.report_skipped()
        if schatten.policy is not None:
            schatten.policy.pause()

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Draw the pictures of the run so far, and keep p where the checkpoint's own file cannot be read for it."""
        self._draw(args, state, optimizer)
        schatten = unwrap_optimizer(optimizer)
        if schatten is not None and state.is_world_process_zero and args.output_dir and not args.save_only_model:
            write_learned_p(schatten, Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def _draw(self, args: TrainingArguments, state: TrainerState, optimizer: Any) -> None:
        """Draw into the output folder what was logged and measured: p, its criterion, the updates."""
        schatten = unwrap_optimizer(optimizer)
        if schatten is None or not (state.is_world_process_zero and args.output_dir):
            return
        if self._drawn_step == state.global_step:  # the save of the last step has drawn the same
            return
        self._drawn_step = state.global_step
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
    """Transformers' progress bar with the median p, and without per-layer values, which would fill the terminal."""

    def __init__(self, max_str_len: int = 100) -> None:
        super().__init__(max_str_len)
        self._shown_estimates = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        self._shown_estimates = 0

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Advance the bar, and show the median p of every estimate, logged or not; after a resume, of the last one."""
        super().on_step_end(args, state, control, optimizer=optimizer, **kwargs)
        schatten = unwrap_optimizer(optimizer)
        if self.training_bar is None or schatten is None or not isinstance(schatten.policy, Adaptation):
            return
        if schatten.policy.estimates != self._shown_estimates:
            self._shown_estimates = schatten.policy.estimates
            self._show(summary(schatten.learned_p())[MEDIAN])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the logs above the bar, with the summary of p instead of every layer's; a schedule's p at the bar."""
        logs = logs or {}
        super().on_log(args, state, control, logs=without_layers(logs), **kwargs)
        median = logs.get(SUMMARY_PREFIX + MEDIAN)
        if self.training_bar is not None and median is not None:
            self._show(median)

    def _show(self, median: float) -> None:
        bar: Any = self.training_bar  # tqdm's, which transformers declares as None
        bar.set_postfix_str(f"median p {median:.3g}")


class SchattenPrinterCallback(PrinterCallback):
    """Transformers' printed logs, which a disabled progress bar leaves, without the per-layer values."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the logs with the summary of p instead of every layer's."""
        super().on_log(args, state, control, logs=without_layers(logs or {}), **kwargs)


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
