"""A recipe's run and its model card: what is known of the run, in the form of `model_cards/template.md`."""

import logging
import os
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, Trainer
from transformers.training_args import OptimizerNames

from hf_schatten import SchattenTrainerMixin
from recipes.recipe_parts.card_template import card_from_template
from recipes.recipe_parts.command_line import InputError

logger = logging.getLogger("recipes")

REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATE = REPOSITORY / "model_cards" / "template.md"
SECRET_FLAGS = frozenset({"--hub_token", "--push_to_hub_token"})


@dataclass(kw_only=True)
class RunRecord:
    """What a Trainer does not know of its run, whatever the recipe.

    Attributes:
        model_args: The recipe's options of the model, with `model_name_or_path`.
        data_args: Its options of the data, with `dataset_name` and `source`.
        command: Arguments of the script.
        metrics: By the prefix of their names: `eval_start`, before the training, and `eval`.
        seconds: How long the training took, or None.
    """

    model_args: Any
    data_args: Any
    command: Sequence[str]
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float | None = None


class _TemplateTrainer(Trainer):
    """A Trainer whose card is the template, filled in, also when it pushes to the Hub.

    Attributes:
        script: The recipe's, from the repository's root.
        task: The Hub's name of what the model does.
        sizes: What the card names of the model's configuration: the key by what the card calls it.
        intended_use: A paragraph of the card.
        quantities: What an evaluation measures, by the key in its metrics, as the tables call it.
    """

    script: ClassVar[str]
    task: ClassVar[str]
    sizes: ClassVar[Mapping[str, str]]
    intended_use: ClassVar[str]
    quantities: ClassVar[Mapping[str, str]] = {"loss": "loss"}

    def __init__(self, *args: Any, run: Any, **kwargs: Any) -> None:
        if not TEMPLATE.is_file():
            raise InputError(f"{TEMPLATE} is missing: run the recipe in a whole checkout of its repository.")
        super().__init__(*args, **kwargs)
        self.run = run

    def title(self) -> str:
        """Return the card's title."""
        raise NotImplementedError

    def batch(self) -> str:
        """Say what one step sees, and all steps: "1,024 images, 10,240 in all"."""
        raise NotImplementedError

    def data(self) -> str:
        """Say where the data come from, how they are split and what is made of them."""
        raise NotImplementedError

    def adapters(self) -> str:
        """Say what is trained in place of the base's weights: " with …"; "" where the weights are."""
        return ""

    def card_metadata(self) -> dict[str, Any]:
        """Return the arguments of `Trainer.create_model_card` that the recipe knows; names, where the Hub has them."""
        dataset = hub_name(self.run.data_args.dataset_name)
        return {
            "tasks": self.task,
            "pipeline_tag": self.task,
            "finetuned_from": hub_name(self.run.model_args.model_name_or_path),
            "dataset": self.run.data_args.source,
            "dataset_tags": [] if dataset is None else [dataset],
        }

    def card_texts(self) -> dict[str, str]:
        """Return what the template names beyond a Trainer's record."""
        return {
            "title": self.title(),
            "description": _description(self),
            "intended_use": self.intended_use,
            "data": self.data(),
            "results": results(self.run.metrics, self.quantities),
            "circumstances": circumstances(self, self.run.seconds),
            "command": command_line(self.script, self.run.command),
        }

    def derived(self, name: str, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return what an evaluation gives besides its metrics, whose names begin with `name`."""
        return {}

    def create_model_card(self, **metadata: Any) -> None:  # type: ignore[override] # takes keywords alone
        """Write the card; the arguments are those of `Trainer.create_model_card`, and win over the recipe's."""
        if not self.is_world_process_zero():
            return
        card = card_from_template(TEMPLATE, self, self.card_texts(), **self.card_metadata() | metadata)
        card.save(Path(self.args.output_dir or ".") / "README.md")

    def measure(self, name: str) -> None:
        """Evaluate the model as it is, and store what is measured in `{name}_results.json`."""
        metrics = self.evaluate(metric_key_prefix=name)
        vars(self).pop("model_preparation_time", None)  # which Trainer would add to every log from here on
        metrics |= self.derived(name, metrics)
        self.save_metrics(name, metrics)
        self.run.metrics[name] = metrics


class RecipeTrainer(SchattenTrainerMixin, _TemplateTrainer):
    """A recipe's Trainer: exact resume, and a card of the template with the optimizer's section."""


def run_recipe(trainer: Any, checkpoint: str | None) -> None:
    """Evaluate, train, evaluate, save, and write the card, as far as the arguments of the training ask for it.

    Args:
        trainer: A `RecipeTrainer`.
        checkpoint: Folder of the checkpoint to resume, or None.
    """
    args = trainer.args
    if args.do_eval:
        # A resumed run, too, evaluates the weights of step 0 here; `train` then loads the checkpoint's.
        trainer.measure("eval_start")
    if args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.run.seconds = result.metrics["train_runtime"]
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if args.do_eval and args.do_train:
        trainer.measure("eval")
        if trainer.is_world_process_zero():
            print(side_by_side(trainer.run.metrics, trainer.quantities), flush=True)
    if args.push_to_hub:
        trainer.push_to_hub()  # writes the card
    else:
        trainer.create_model_card()
    logger.info("%s has the model and its card, README.md", args.output_dir)
    trainer.accelerator.end_training()  # left to the end of Python, gloo may abort a process that has trained


def side_by_side(metrics: Mapping[str, Mapping[str, float]], quantities: Mapping[str, str]) -> str:
    """Lay out what the validation split gives before and after training, for a terminal."""
    lines = [f"{'validation':<12}{'start':>12}{'end':>12}"]
    for quantity in quantities:
        values = metrics["eval_start"][f"eval_start_{quantity}"], metrics["eval"][f"eval_{quantity}"]
        lines.append(f"{quantity:<12}" + "".join(f"{value:>12.4g}" for value in values))
    return "\n".join(lines)


def results(metrics: Mapping[str, Mapping[str, float]], quantities: Mapping[str, str]) -> str:
    """Lay out what was measured before and after the training, as far as it was, as a table in Markdown."""
    columns = {title: prefix for prefix, title in (("eval_start", "start"), ("eval", "end")) if prefix in metrics}
    if not columns:
        return "Not evaluated."
    lines = [["validation", *columns], ["---", *["---:"] * len(columns)]]
    for quantity, title in quantities.items():
        values = (metrics[prefix][f"{prefix}_{quantity}"] for prefix in columns.values())
        lines.append([title, *(f"{value:.4g}" for value in values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def whole_model(trainer: Trainer) -> PreTrainedModel:
    """Return the model that is trained, or that whose adapters are."""
    model: Any = trainer.model
    found = model.get_base_model() if hasattr(model, "get_base_model") else model
    assert isinstance(found, PreTrainedModel)
    return found


def _description(trainer: _TemplateTrainer) -> str:
    """Say which model was trained, from what, for how long and by which recipe."""
    architecture, base = _architecture(whole_model(trainer), trainer.sizes), trainer.run.model_args.model_name_or_path
    start = "Trained from scratch" if base is None else f"Trained further from `{Path(base).name}`{trainer.adapters()}"
    return (
        f"{architecture}. {start} for {trainer.state.global_step:,} steps of {trainer.batch()}, with "
        f"`--optim {OptimizerNames(trainer.args.optim).value}`, by the recipe `{Path(trainer.script).parent}` of the "
        "`hf_schatten` repository."
    )


def _architecture(model: PreTrainedModel, sizes: Mapping[str, str]) -> str:
    known = (f"{name} {getattr(model.config, key)}" for name, key in sizes.items() if hasattr(model.config, key))
    return f"A `{type(model).__name__}` ({', '.join(known)})"


def examples_per_step(trainer: Trainer) -> int:
    """Return how many examples a step of the optimizer sees, over all processes."""
    return trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size


def circumstances(trainer: Trainer, seconds: float | None) -> str:
    """Say seed, precision, machine, Python, date and how long the training took, where that is known."""
    precision = "bfloat16" if trainer.args.bf16 else "float16" if trainer.args.fp16 else "float32"
    took = f" The training took {seconds // 60:.0f} min {seconds % 60:.0f} s." if seconds else ""
    return (
        f"Seed {trainer.args.seed}, {precision}, {_machine(trainer)}, Python {platform.python_version()}, "
        f"{datetime.now(UTC).date()}.{took}"
    )


def _machine(trainer: Trainer) -> str:
    processes = f"{trainer.args.world_size} processes, each on " if trainer.args.world_size > 1 else ""
    if trainer.args.device.type == "cuda":
        return f"{processes}one {torch.cuda.get_device_name(trainer.args.device)}"
    return f"{processes}{os.cpu_count()} CPU cores ({_processor()})"


def _processor() -> str:
    """Name the processor: Linux knows, other systems answer Python."""
    information = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.M) if information.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def command_line(script: str, command: Sequence[str]) -> str:
    """Return the run's command, without what is secret or of this machine alone."""
    return f"python {script} {shlex.join(public(command))}".strip()


def public(command: Sequence[str]) -> list[str]:
    """Return the arguments without access tokens, and without the folders that only this machine has.

    Both `--flag value` and `--flag=value` are understood. An absolute path becomes one from the repository, or a name.
    """
    kept: list[str] = []
    skip = False
    for word in command:
        flag, separator, value = word.rpartition("=")
        name = (flag or word).partition("=")[0]
        secret = name in SECRET_FLAGS
        if not (secret or skip):
            kept.append(f"{flag}{separator}{_without_folders(value)}")
        skip = secret and not separator
    return kept


def _without_folders(text: str) -> str:
    path = Path(text)
    if not path.is_absolute():
        return text
    return path.relative_to(REPOSITORY).as_posix() if path.is_relative_to(REPOSITORY) else path.name


def hub_name(name: str | None) -> str | None:
    """Return a name of the Hub, None for a local folder: the card's metadata link to names."""
    return None if name is None or Path(name).exists() else name


def source_name(source: str) -> str:
    """Name a data set as a reader knows it: a file without the folders it lies in."""
    return f"`{Path(source).name}`" if Path(source).exists() else source


def quantity(count: int) -> str:
    """Write a count as people say it, to three digits."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if count >= size / 2:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"
