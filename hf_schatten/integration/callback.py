"""What a Trainer keeps of the optimizer: p in its logs, and the pictures at the end."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy

from hf_schatten.adaptive.adaptation import Adaptation
from hf_schatten.adaptive.schedule import ScheduledP
from hf_schatten.distributed.processes import process_count
from hf_schatten.integration.checkpoint import write_learned_p
from hf_schatten.integration.engine_arguments import refuse_unsupported_arguments
from hf_schatten.optim.policy import Policy
from hf_schatten.optim.schatten_p import SchattenP
from hf_schatten.option_text import read_pairs, write_pairs
from hf_schatten.options import OPTIMIZER_NAME, SchattenOptions
from hf_schatten.report import draw_log, log_entry, plot_choices, summary_entry
from hf_schatten.report.figures import SPECTRA
from hf_schatten.report.log import SKIPPED_STEPS, history_entry

logger = logging.getLogger(__name__)

_ILLUSTRATED = 3  # matrices whose spectra and criterion are drawn: the first, the middle and the last


_models: dict[int, weakref.ref[nn.Module]] = {}  # of Trainers, by the identity of their arguments


class SchattenCallback(TrainerCallback):
    """A callback that logs the learned p and draws it at the end of training; idle with other optimizers.

    ``import hf_schatten`` adds it to every Trainer, before all loggers, since it adds to what they get. A step that
    re-estimates p is always logged: the summary ``schatten_p_min``, ``schatten_p_median`` and ``schatten_p_max``, and
    per layer ``schatten_p/<layer>`` and the update's ``schatten_stable_rank/<layer>`` and
    ``schatten_relative_size/<layer>``. Once a gradient was not finite, ``schatten_skipped_steps`` is the most steps
    that a matrix has skipped. An infinite p is the string ``inf`` in ``trainer_state.json``. At the end of training,
    pictures of them, and of what p was chosen from, go into the output folder's ``figures``. The option ``report``
    leaves out the layers and the pictures (``summary``), or everything (``none``).
    """

    _logged_estimates = 0
    _in_training = False

    def on_init_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report malformed options, and engines that are not supported, when the Trainer is made.

        Options that were given as a mapping, or end with a comma, are written as Trainer itself reads them.
        """
        if args.optim != OPTIMIZER_NAME:
            return
        refuse_unsupported_arguments(args)  # DeepSpeed's own optimizer would be made in place of this one
        SchattenOptions.from_optim_args(args.optim_args)
        if args.optim_args:
            args.optim_args = write_pairs(read_pairs(args.optim_args, ()))
        if isinstance(model := kwargs.get("model"), nn.Module):
            _models[id(args)] = weakref.ref(model)
            weakref.finalize(args, _models.pop, id(args), None)

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Prepare the first step, and stop a resumed run that has lost its optimizer state.

        Raises:
            RuntimeError: when the run continues at a later step and the optimizer starts at its first, or when several
                processes train each for itself.
        """
        again, self._in_training = self._in_training, True  # the attempt before this one was aborted
        schatten = unwrap_optimizer(kwargs.get("optimizer"))
        if schatten is None:
            if clause := ignored(args, kwargs.get("optimizer")):
                logger.warning("%s.", clause)
            return
        if process_count() > 1 and args.world_size == 1:
            raise RuntimeError(
                f"{process_count()} processes were started, but the Trainer trains in each of them as if it were "
                "alone: pass --use_cpu where there is no GPU."
            )
        if again and args.auto_find_batch_size and state.global_step == 0:
            _start_over(schatten)
        policy = schatten.policy
        self._logged_estimates = policy.estimates if policy else 0
        if policy is not None:
            policy.after_update(schatten)
        if isinstance(policy, Adaptation) and state.is_world_process_zero and schatten.options.report == "full":
            policy.illustrated = _ILLUSTRATED
        if isinstance(policy, ScheduledP) and policy.steps is None:
            policy.steps = state.max_steps
        if state.global_step > 0 and not schatten.state:
            raise RuntimeError(
                f"Training resumes at step {state.global_step}, but the checkpoint's optimizer state was not loaded: "
                "a plain Trainer reads optimizer.pt only, which is missing. Resume with hf_schatten.SchattenTrainer "
                "where there is an optimizer.safetensors, from another checkpoint, or start a new run from the "
                "model's weights."
            )

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a log when the step has re-estimated p."""
        schatten = unwrap_optimizer(kwargs.get("optimizer"))
        if schatten is not None and self._has_news(schatten) and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True

    def on_log(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add p to the training logs of the step that has estimated it.

        Logs without a training loss are metrics that ``evaluate`` and ``train`` return, and stay as they are.
        """
        schatten, logs = unwrap_optimizer(kwargs.get("optimizer")), kwargs.get("logs") or {}
        if schatten is None or not logs.keys() & {"loss", "learning_rate"}:  # SetFit calls the loss otherwise
            return
        entry: dict[str, float] = {}
        skipped = schatten.skipped_steps()
        if skipped:
            entry[SKIPPED_STEPS] = float(max(skipped.values()))
        policy, report = schatten.policy, schatten.options.report
        if policy is not None and (self._has_news(schatten) or (isinstance(policy, ScheduledP) and report != "none")):
            self._logged_estimates = policy.estimates
            learned_p = schatten.learned_p()
            entry |= log_entry(learned_p, *_updates(policy)) if report == "full" else summary_entry(learned_p)
        if entry:
            logs.update(entry)
            state.log_history[-1].update(history_entry(entry))  # type: ignore[arg-type] # declared as floats alone

    def on_train_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw the pictures, warn of steps that were skipped since the last warning, and leave the model alone."""
        self._in_training = False
        schatten = unwrap_optimizer(kwargs.get("optimizer"))
        if schatten is None:
            return
        if schatten.options.report == "full" and state.is_world_process_zero and args.output_dir:
            self._draw(schatten, state, Path(args.output_dir))
        schatten.report_skipped()
        if schatten.policy is not None:
            schatten.policy.pause()

    def on_save(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep p where the checkpoint's own file cannot be read for it."""
        schatten = unwrap_optimizer(kwargs.get("optimizer"))
        if schatten is not None and state.is_world_process_zero and args.output_dir and not args.save_only_model:
            write_learned_p(schatten, Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def _draw(self, schatten: SchattenP, state: TrainerState, folder: Path) -> None:
        """Draw into the output folder what was logged and measured: p, its criterion, the updates."""
        draw_log(state.log_history, folder)
        if isinstance(schatten.policy, Adaptation):
            plot_choices(schatten.policy.choices, folder / SPECTRA)

    def _has_news(self, schatten: SchattenP) -> bool:
        estimates = schatten.policy.estimates if schatten.policy else 0
        return schatten.options.report != "none" and estimates > self._logged_estimates


def model_trained_with(args: Arguments) -> nn.Module | None:
    """Return the model of the Trainer that was made last with these arguments, None where there is none."""
    model = _models.get(id(args))
    return None if model is None else model()


def ignored(args: Arguments, optimizer: Optimizer | None) -> str | None:
    """Return a clause that says so where another optimizer trains in the place of ``optim``, else None."""
    if args.optim != OPTIMIZER_NAME or unwrap_optimizer(optimizer) is not None:
        return None
    other = type(getattr(optimizer, "optimizer", optimizer)).__name__
    return f"optim={OPTIMIZER_NAME!r} has no effect: the Trainer was given an optimizer of its own, {other}"


def _start_over(schatten: SchattenP) -> None:
    """Forget the steps of an attempt at training that has run out of memory; a Trainer keeps its optimizer."""
    schatten.state.clear()
    if schatten.policy is not None:
        schatten.policy.estimates = 0
        schatten.policy.after_load(schatten)


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
    inner: Any = optimizer
    while inner is not None and not isinstance(inner, SchattenP):  # DeepSpeed's optimizer is inside of accelerate's
        inner = getattr(inner, "optimizer", None)
    return inner
