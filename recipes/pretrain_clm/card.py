"""The recipe's model card: what is known of a run, in the form of `model_cards/template.md`."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus
from arguments import DataTrainingArguments, ModelArguments
from recipe_parts.language_model import SIZES, TASK, LanguageModelTrainer
from recipe_parts.run_record import (
    RunRecord,
    circumstances,
    command_line,
    description,
    examples_per_step,
    hub_name,
    quantity,
    results,
    source_name,
)
from transformers import PreTrainedModel

SCRIPT = "recipes/pretrain_clm/pretrain_clm.py"

INTENDED_USE = (
    "Research on optimizers: the model shows what a run with this optimizer gives. It continues text of the kind that "
    "it was trained on. It was not tuned to follow instructions, and nothing was done against false, private or "
    "harmful output."
)


@dataclass(kw_only=True)
class Run(RunRecord):
    """What a Trainer does not know of its run.

    Attributes:
        model_args: Which model.
        data_args: Which text.
        documents: Number of documents in each split.
        blocks: Number of blocks used of each split.
        vocabulary: Number of the tokenizer's tokens.
    """

    model_args: ModelArguments
    data_args: DataTrainingArguments
    documents: Mapping[str, int]
    blocks: Mapping[str, int]
    vocabulary: int


class PretrainingTrainer(LanguageModelTrainer):
    """The recipe's Trainer: writes the recipe's card."""

    run: Run

    def card_metadata(self) -> dict[str, Any]:
        """Return task, base model and data set where they have a name on the Hub, and the licence."""
        base, dataset = self.run.model_args.model_name_or_path, hub_name(self.run.data_args.dataset_name)
        embedded = self.run.data_args.source == corpus.STDLIB_NAME and base is None
        return {
            "tasks": TASK,
            "pipeline_tag": TASK,
            "finetuned_from": hub_name(base),
            "dataset": self.run.data_args.source,
            "dataset_tags": [] if dataset is None else [dataset],
            "license": "apache-2.0" if embedded else None,
        }

    def card_texts(self) -> dict[str, str]:
        """Return what the template names beyond a Trainer's record."""
        assert isinstance(self.model, PreTrainedModel)
        size, source = quantity(self.model.num_parameters()), source_name(self.run.data_args.source)
        tokens = examples_per_step(self) * self.run.data_args.block_size
        return {
            "title": f"A language model of {size} parameters on {source}",
            "description": description(
                self,
                sizes=SIZES,
                base=self.run.model_args.model_name_or_path,
                batch=f"{tokens:,} tokens, {quantity(self.state.global_step * tokens)} in all",
                script=SCRIPT,
            ),
            "intended_use": INTENDED_USE,
            "data": _data(self.run),
            "results": results(self.run.metrics, self.quantities),
            "circumstances": circumstances(self, self.run.seconds),
            "command": command_line(SCRIPT, self.run.command),
        }


def _data(run: Run) -> str:
    counts = f"{run.documents['train']:,} documents to train on, {run.documents['validation']:,} held out"
    if run.data_args.source == corpus.STDLIB_NAME:
        origin = (
            f"The `.py` files of the standard library of Python {platform.python_version()}, without tests, installed "
            f"packages and code tables: {counts}. Another version or distribution has other files, and gives other "
            "numbers."
        )
    else:
        origin = f"{source_name(run.data_args.source)}: {counts}."
    tokenizer = run.model_args.tokenizer_name or run.model_args.model_name_or_path
    by = f"the tokenizer of `{Path(tokenizer).name}`" if tokenizer else "a byte-level BPE, trained on these documents,"
    blocks = f"{run.blocks['train']:,} to train on, {run.blocks['validation']:,} to evaluate on"
    return (
        f"{origin}\n\nTokenized by {by} with {run.vocabulary:,} tokens, and cut into blocks of "
        f"{run.data_args.block_size}: {blocks}."
    )
