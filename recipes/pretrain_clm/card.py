"""The recipe's model card: what is known of a run, in the form of `model_cards/template.md`."""

import os
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import corpus
import torch
from arguments import DataTrainingArguments, ModelArguments
from corpus import InputError
from transformers import PreTrainedModel, Trainer
from transformers.training_args import OptimizerNames

from hf_schatten import SchattenTrainerMixin
from hf_schatten.report import card_from_template

REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATE = REPOSITORY / "model_cards" / "template.md"
SCRIPT = "recipes/pretrain_clm/pretrain_clm.py"
TASK = "text-generation"
SECRET_FLAGS = frozenset({"--hub_token", "--push_to_hub_token"})

INTENDED_USE = (
    "Research on optimizers: the model shows what a run with this optimizer gives. It continues text of the kind that "
    "it was trained on. It was not tuned to follow instructions, and nothing was done against false, private or "
    "harmful output."
)


@dataclass
class Run:
    """What a Trainer does not know of its run.

    Attributes:
        model_args: Which model.
        data_args: Which text.
        command: Arguments of the script.
        documents: Number of documents in each split.
        blocks: Number of blocks used of each split.
        vocabulary: Number of the tokenizer's tokens.
        metrics: Loss and perplexity by the prefix of their names: `eval_start`, before the training, and `eval`.
        seconds: How long the training took, or None.
    """

    model_args: ModelArguments
    data_args: DataTrainingArguments
    command: Sequence[str]
    documents: Mapping[str, int]
    blocks: Mapping[str, int]
    vocabulary: int
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float | None = None


class _TemplateTrainer(Trainer):
    """A Trainer whose card is the template, filled in, also when it pushes to the Hub."""

    def __init__(self, *args: Any, run: Run, **kwargs: Any) -> None:
        if not TEMPLATE.is_file():
            raise InputError(f"{TEMPLATE} is missing: run the recipe in a whole checkout of its repository.")
        super().__init__(*args, **kwargs)
        self.run = run

    def create_model_card(self, **metadata: Any) -> None:  # type: ignore[override] # takes keywords alone
        """Write the card; the arguments are those of `Trainer.create_model_card`, and win over the recipe's."""
        if not self.is_world_process_zero():
            return
        metadata = known_metadata(self.run) | metadata
        card = card_from_template(TEMPLATE, self, texts(self, self.run), **metadata)
        card.save(Path(self.args.output_dir or ".") / "README.md")


class PretrainingTrainer(SchattenTrainerMixin, _TemplateTrainer):
    """The recipe's Trainer: exact resume, and a card of the template with the optimizer's section."""


def known_metadata(run: Run) -> dict[str, Any]:
    """Return the card's metadata: task, base model and data set where they have a name on the Hub, and the licence."""
    base, dataset = run.model_args.model_name_or_path, run.data_args.dataset_name
    embedded = run.data_args.source == corpus.STDLIB_NAME and base is None
    return {
        "tasks": TASK,
        "pipeline_tag": TASK,
        "finetuned_from": None if base is None or Path(base).exists() else base,
        "dataset": run.data_args.source,
        "dataset_tags": [] if dataset is None or Path(dataset).exists() else [dataset],
        "license": "apache-2.0" if embedded else None,
    }


def texts(trainer: Trainer, run: Run) -> dict[str, str]:
    """Return what the template names beyond a Trainer's record."""
    assert isinstance(trainer.model, PreTrainedModel)
    args, steps, base = trainer.args, trainer.state.global_step, run.model_args.model_name_or_path
    size, source = _quantity(trainer.model.num_parameters()), _name(run.data_args.source)
    start = "Trained from scratch" if base is None else f"Trained further from `{Path(base).name}`"
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * run.data_args.block_size
    return {
        "title": f"A language model of {size} parameters on {source}",
        "description": (
            f"{_architecture(trainer.model)}. {start} for {steps:,} steps of {batch:,} tokens, "
            f"{_quantity(steps * batch)} in all, with `--optim {OptimizerNames(args.optim).value}`, by the recipe "
            f"`{Path(SCRIPT).parent}` of the `hf_schatten` repository."
        ),
        "intended_use": INTENDED_USE,
        "data": _data(run),
        "results": _results(run.metrics),
        "circumstances": _circumstances(trainer, run),
        "command": f"python {SCRIPT} {shlex.join(public(run.command))}".strip(),
    }


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


def _architecture(model: PreTrainedModel) -> str:
    """Say the model's class and those of its sizes that its configuration names."""
    sizes = {
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "context": "max_position_embeddings",
        "vocabulary": "vocab_size",
    }
    known = (f"{name} {getattr(model.config, key)}" for name, key in sizes.items() if hasattr(model.config, key))
    return f"A `{type(model).__name__}` ({', '.join(known)})"


def _data(run: Run) -> str:
    counts = f"{run.documents['train']:,} documents to train on, {run.documents['validation']:,} held out"
    if run.data_args.source == corpus.STDLIB_NAME:
        origin = (
            f"The `.py` files of the standard library of Python {platform.python_version()}, without tests, installed "
            f"packages and code tables: {counts}. Another version or distribution has other files, and gives other "
            "numbers."
        )
    else:
        origin = f"{_name(run.data_args.source)}: {counts}."
    tokenizer = run.model_args.tokenizer_name or run.model_args.model_name_or_path
    by = f"the tokenizer of `{Path(tokenizer).name}`" if tokenizer else "a byte-level BPE, trained on these documents,"
    blocks = f"{run.blocks['train']:,} to train on, {run.blocks['validation']:,} to evaluate on"
    return (
        f"{origin}\n\nTokenized by {by} with {run.vocabulary:,} tokens, and cut into blocks of "
        f"{run.data_args.block_size}: {blocks}."
    )


def _results(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Lay out loss and perplexity before and after the training, as far as they were measured."""
    columns = {title: prefix for prefix, title in (("eval_start", "start"), ("eval", "end")) if prefix in metrics}
    if not columns:
        return "Not evaluated."
    lines = [["validation", *columns], ["---", *["---:"] * len(columns)]]
    for quantity, title in (("loss", "loss"), ("perplexity", "perplexity per token")):
        values = (metrics[prefix][f"{prefix}_{quantity}"] for prefix in columns.values())
        lines.append([title, *(f"{value:.4g}" for value in values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _circumstances(trainer: Trainer, run: Run) -> str:
    precision = "bfloat16" if trainer.args.bf16 else "float16" if trainer.args.fp16 else "float32"
    took = f" The training took {run.seconds // 60:.0f} min {run.seconds % 60:.0f} s." if run.seconds else ""
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


def _name(source: str) -> str:
    """Name a text as a reader knows it: a file without the folders it lies in."""
    return f"`{Path(source).name}`" if Path(source).exists() else source


def _quantity(count: int) -> str:
    """Write a count as people say it, to three digits."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if count >= size / 2:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"
