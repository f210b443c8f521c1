"""The recipe's model card: what is known of a run, in the form of `model_cards/template.md`."""

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import corpus
from arguments import DataTrainingArguments, ModelArguments
from recipe_parts.run_record import (
    RecipeTrainer,
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
TASK = "text-generation"
SIZES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "context": "max_position_embeddings",
    "vocabulary": "vocab_size",
}

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


class PretrainingTrainer(RecipeTrainer):
    """The recipe's Trainer: measures perplexity too, and writes the recipe's card."""

    quantities: ClassVar[Mapping[str, str]] = {"loss": "loss", "perplexity": "perplexity per token"}
    run: Run

    def derived(self, name: str, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the perplexity."""
        try:
            return {f"{name}_perplexity": math.exp(metrics[f"{name}_loss"])}
        except OverflowError:
            return {f"{name}_perplexity": math.inf}

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
