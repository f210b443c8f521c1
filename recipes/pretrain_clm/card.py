"""The recipe's model card: what is known of a run, in the form of `model_cards/template.md`."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.pretrain_clm import data
from recipes.pretrain_clm.arguments import DataTrainingArguments, ModelArguments
from recipes.recipe_parts.language_model import LanguageModelTrainer
from recipes.recipe_parts.run_record import RunRecord, examples_per_step, quantity, source_name, whole_model


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

    script = "recipes/pretrain_clm/pretrain_clm.py"
    intended_use = (
        "Research on optimizers: the model shows what a run with this optimizer gives. It continues text of the kind "
        "that it was trained on. It was not tuned to follow instructions, and nothing was done against false, private "
        "or harmful output."
    )
    run: Run

    def title(self) -> str:
        """Name the size and the text."""
        size = quantity(whole_model(self).num_parameters())
        return f"A language model of {size} parameters on {source_name(self.run.data_args.source)}"

    def batch(self) -> str:
        """Count tokens."""
        tokens = examples_per_step(self) * self.run.data_args.block_size
        return f"{tokens:,} tokens, {quantity(self.state.global_step * tokens)} in all"

    def data(self) -> str:
        """Say which text there is, and how it is tokenized."""
        return _data(self.run)

    def card_metadata(self) -> dict[str, Any]:
        """Add the licence where the recipe alone has made the model."""
        own = self.run.data_args.source == data.STDLIB_NAME and self.run.model_args.model_name_or_path is None
        return super().card_metadata() | {"license": "apache-2.0" if own else None}


def _data(run: Run) -> str:
    counts = f"{run.documents['train']:,} documents to train on, {run.documents['validation']:,} held out"
    if run.data_args.source == data.STDLIB_NAME:
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
