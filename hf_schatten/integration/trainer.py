"""SchattenTrainer, and its mixin for other Trainers: exact resume, safetensors state and an optimizer card."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import save_fsdp_model
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from hf_schatten.integration.active_adapters import keeping_adapters, save_adapters
from hf_schatten.integration.callback import unwrap_optimizer
from hf_schatten.integration.checkpoint import (
    STATE_FILE,
    CheckpointError,
    is_foreign,
    load_optimizer,
    mark_incomplete,
    naming_damaged_files,
    newest_complete_checkpoint,
    require_same_checkpoint,
    save_optimizer,
    write_refusal,
)
from hf_schatten.integration.converted_weights import load_converted_weights
from hf_schatten.optim.schatten_p import SchattenP
from hf_schatten.options import OPTIMIZER_NAME
from hf_schatten.private_api import SCHEDULER_FILE, require_trainer_methods
from hf_schatten.report import card_section, plot_p_by_layer, read_card_section, write_card_section
from hf_schatten.report.figures import P_BY_LAYER, has_p_by_layer

logger = logging.get_logger(__name__)

_CARD_TAGS = ("schatten-p",)

if TYPE_CHECKING:
    _Base = Trainer  # whose methods the mixin calls, wherever it is mixed in
else:
    _Base = object


class SchattenTrainerMixin(_Base):
    """What gives any Trainer checkpoints of the optimizer in safetensors, with the learned p, and its card a section.

    Name it before the Trainer: ``class MyTrainer(SchattenTrainerMixin, SFTTrainer): pass``; likewise with
    ``Seq2SeqTrainer``, ``DPOTrainer`` and others. Takes the arguments of that Trainer. With ``optim="schatten_p"`` (or
    a :class:`hf_schatten.SchattenP` in ``optimizers``), training that resumes from a checkpoint continues bitwise as
    if it had not stopped, and the model card, whoever writes it and how often, describes the optimizer. With any
    other optimizer it changes nothing, and says so.

    Raises:
        TypeError: when a class names it after a Trainer, whose methods would then hide the mixin's.
        PrivateApiError: when the installed transformers saves and loads by methods of other names.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[: cls.__mro__.index(SchattenTrainerMixin)]:
            if issubclass(base, Trainer) and not issubclass(base, SchattenTrainerMixin):
                raise TypeError(
                    f"{cls.__name__} names {base.__name__} before SchattenTrainerMixin, whose checkpoints and card it "
                    f"would not have: write class {cls.__name__}(SchattenTrainerMixin, {base.__name__})."
                )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        require_trainer_methods()
        super().__init__(*args, **kwargs)
        if unwrap_optimizer(self.optimizer) is None and self.args.optim != OPTIMIZER_NAME:
            name, other = type(self).__name__, OptimizerNames(self.args.optim).value
            logger.warning_once(
                f"{name} trains with optim={other!r}, as without SchattenTrainerMixin; set optim={OPTIMIZER_NAME!r} "
                "for the Schatten-p update."
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does.

        Args:
            resume_from_checkpoint: folder of a checkpoint, or True for the newest in the output folder that is
                complete. Default None: from the start.
            *args: as the Trainer takes them.
            **kwargs: likewise.

        Raises:
            CheckpointError: when processes resume different ones.
        """
        if resume_from_checkpoint is True:
            newest = newest_complete_checkpoint(self.args.output_dir or ".")
            resume_from_checkpoint = str(newest) if newest else True
        if resume_from_checkpoint:
            require_same_checkpoint(None if resume_from_checkpoint is True else Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Create the model card as the Trainer does, with a section on the optimizer.

        A Trainer that has not trained keeps the section that the card has: it describes the weights that were loaded.
        Where the Trainer writes no card, there is none.
        """
        card = Path(self.args.output_dir or ".") / "README.md"
        earlier = read_card_section(card) if self.is_world_process_zero() else None
        schatten = self._schatten_optimizer()
        model: Any = self.model
        if schatten is not None and hasattr(model, "add_model_tags"):
            model.add_model_tags(list(_CARD_TAGS))  # the only tags that PEFT's own update of the card keeps
        super().create_model_card(*args, **kwargs)
        if not (self.is_world_process_zero() and card.is_file()):
            return
        if schatten is not None:
            figure = self._figure_of_p(card.parent) if schatten.options.report == "full" else None
            section = card_section(schatten.options, _destinations(schatten), schatten.learned_p(), figure)
            write_card_section(card, section, _CARD_TAGS)
        elif self.optimizer is None and earlier:
            write_card_section(card, earlier, _CARD_TAGS)

    def _figure_of_p(self, folder: Path) -> Path | None:
        """Return the picture of p relative to the folder, None without an estimate.

        In training nothing is drawn: a card that a save writes names the picture that the end draws.
        """
        if not has_p_by_layer(self.state.log_history):
            return None
        if not (self.is_in_train or (folder / P_BY_LAYER).is_file()):
            plot_p_by_layer(self.state.log_history, folder / P_BY_LAYER)
        return P_BY_LAYER

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._schatten_optimizer() is not None and self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            mark_incomplete(os.path.join(self._get_output_dir(trial=trial), folder))
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._schatten_optimizer() is not None:
            self.accelerator.wait_for_everyone()  # what is written next says that the checkpoint is complete

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        schatten = self._schatten_optimizer()
        if schatten is None or self.is_deepspeed_enabled:  # whose own checkpoint has the state of each process
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.is_fsdp_enabled:  # what a resume loads the weights from; every process takes part
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_model(plugin, self.accelerator, self.model, output_dir, adapter_only=True)
        save_optimizer(schatten, output_dir, write=self.args.should_save)
        if self.args.should_save:
            assert self.lr_scheduler is not None  # made with the optimizer
            write_refusal(output_dir)
            save_adapters(self.model, output_dir)
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_FILE.resolve()))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        schatten = self._schatten_optimizer()
        if schatten is None and checkpoint is not None and os.path.exists(os.path.join(checkpoint, STATE_FILE)):
            raise CheckpointError(
                f"{checkpoint} holds the state of {OPTIMIZER_NAME} ({STATE_FILE}), and this run uses "
                f"optim={OptimizerNames(self.args.optim).value!r}: set optim={OPTIMIZER_NAME!r}, or start a new run "
                "from the model's weights."
            )
        if checkpoint is None or schatten is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if is_foreign(checkpoint):
            with naming_damaged_files(checkpoint):
                super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.lr_scheduler is not None  # made with the optimizer
        load_optimizer(schatten, checkpoint)
        path = os.path.join(checkpoint, SCHEDULER_FILE.resolve())
        try:
            self.lr_scheduler.load_state_dict(torch.load(path, weights_only=True))
        except Exception as error:  # whatever torch raises on a missing, truncated or foreign file
            message = f"{path} holds no learning-rate schedule ({error}): resume from an earlier checkpoint."
            raise CheckpointError(message) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with (
            naming_damaged_files(resume_from_checkpoint),
            keeping_adapters(model or self.model, resume_from_checkpoint),
        ):
            # Under FSDP, the weights are in a file of its own, by the model's names.
            if self.is_fsdp_enabled or not load_converted_weights(model or self.model, resume_from_checkpoint):
                own = () if model is None else (model,)  # which other trainers' loading does not take
                super()._load_from_checkpoint(resume_from_checkpoint, *own)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or not load_converted_weights(self.model, str(self.state.best_model_checkpoint)):
            super()._load_best_model()

    def _schatten_optimizer(self) -> SchattenP | None:
        return unwrap_optimizer(self.optimizer)


class SchattenTrainer(SchattenTrainerMixin, Trainer):
    """A ``Trainer`` with the checkpoints and the card of :class:`SchattenTrainerMixin`; takes Trainer's arguments."""


def _destinations(optimizer: SchattenP) -> dict[str, tuple[int, int]]:
    """Return how many tensors and parameters each update has: ``{"schatten_p": (tensors, parameters), …}``."""
    counts = {OPTIMIZER_NAME: (0, 0), "adamw": (0, 0)}
    for group in optimizer.held.groups:
        update = OPTIMIZER_NAME if group["spectral"] else "adamw"
        tensors, parameters = counts[update]
        size = sum(parameter.numel() for parameter in group["params"])
        counts[update] = tensors + len(group["params"]), parameters + size
    return counts
