"""SchattenTrainer: transformers' Trainer with exact resume, safetensors optimizer state and an optimizer card."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from .callback import unwrap_optimizer
from .checkpoint import STATE_FILE, CheckpointError, load_optimizer, save_optimizer
from .optimizer import SchattenP
from .options import OPTIMIZER_NAME
from .report import card_section, write_card_section
from .report.figures import P_BY_LAYER

logger = logging.get_logger(__name__)

_CARD_TAGS = ("schatten-p",)


class SchattenTrainer(Trainer):
    """A ``Trainer`` whose checkpoints hold the optimizer state and the learned p in safetensors.

    Takes the arguments of ``Trainer``. With ``optim="schatten_p"`` (or a :class:`hf_schatten.SchattenP` in
    ``optimizers``), training that resumes from a checkpoint continues bitwise as if it had not stopped, and the
    model card describes the optimizer. With any other optimizer it is a plain ``Trainer``, and says so.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if unwrap_optimizer(self.optimizer) is None and self.args.optim != OPTIMIZER_NAME:
            other = OptimizerNames(self.args.optim).value
            logger.warning_once(
                f"SchattenTrainer trains with optim={other!r}, as a plain Trainer; set optim={OPTIMIZER_NAME!r} for "
                "the Schatten-p update."
            )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Create the model card as ``Trainer`` does, with a section on the optimizer."""
        super().create_model_card(*args, **kwargs)
        schatten = self._schatten_optimizer()
        if schatten is None or not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir or ".")
        section = card_section(
            asdict(schatten.options) if schatten.options else {},
            schatten.destinations(),
            schatten.learned_p(),
            P_BY_LAYER if (folder / P_BY_LAYER).is_file() else None,
        )
        write_card_section(folder / "README.md", section, _CARD_TAGS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        schatten = self._schatten_optimizer()
        if schatten is None:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            assert self.lr_scheduler is not None  # made with the optimizer
            save_optimizer(schatten, output_dir)
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        schatten = self._schatten_optimizer()
        if checkpoint is None or schatten is None or _is_plain_trainer_checkpoint(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.lr_scheduler is not None  # made with the optimizer
        load_optimizer(schatten, checkpoint)
        path = os.path.join(checkpoint, SCHEDULER_NAME)
        try:
            self.lr_scheduler.load_state_dict(torch.load(path, weights_only=True))
        except Exception as error:  # whatever torch raises on a missing, truncated or foreign file
            raise CheckpointError(
                f"{path} holds no learning-rate schedule ({error}): resume from an earlier checkpoint."
            ) from error

    def _schatten_optimizer(self) -> SchattenP | None:
        return unwrap_optimizer(self.optimizer)


def _is_plain_trainer_checkpoint(checkpoint: str) -> bool:
    folder = Path(checkpoint)
    return not (folder / STATE_FILE).exists() and (folder / "optimizer.pt").exists()
