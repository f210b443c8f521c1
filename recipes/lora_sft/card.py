"""The recipe's Trainers and their model card, in the form of `model_cards/template.md`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from recipes.lora_sft import data
from recipes.lora_sft.answers import AnswerCheck
from recipes.lora_sft.arguments import ALL_LINEAR, DataTrainingArguments, ModelArguments
from recipes.recipe_parts.command_line import InputError
from recipes.recipe_parts.language_model import LanguageModelTrainer
from recipes.recipe_parts.run_record import RunRecord, examples_per_step, quantity, source_name


@dataclass(kw_only=True)
class Run(RunRecord):
    """What a Trainer does not know of its run.

    Attributes:
        model_args: Which model and adapters.
        data_args: Which data.
        rows: Documents, or prompts with their completions, in each split.
        examples: Number of examples used of each split.
        trained: Number of parameters that are trained.
    """

    model_args: ModelArguments
    data_args: DataTrainingArguments
    rows: Mapping[str, int]
    examples: Mapping[str, int]
    trained: int


class AdapterTrainer(LanguageModelTrainer):
    """The recipe's Trainer: writes the recipe's card."""

    script = "recipes/lora_sft/lora_sft.py"
    intended_use = (
        "For research on optimizers. The adapters are the result of one run with this optimizer. They make the base "
        "model write more like the data below, and need that model; its own limits on use hold for both."
    )
    quantities: ClassVar[Mapping[str, str]] = {
        **LanguageModelTrainer.quantities,
        "accuracy": "share of tokens predicted",
    }
    run: Run

    def title(self) -> str:
        """Name the number of trained parameters and the data."""
        return f"Adapters of {quantity(self.run.trained)} parameters for {source_name(self.run.data_args.source)}"

    def batch(self) -> str:
        """Count tokens, or completions."""
        data_args, examples = self.run.data_args, examples_per_step(self)
        if data_args.prompt_column is not None:
            return f"{examples:,} completions, {quantity(self.state.global_step * examples)} in all"
        tokens = examples * data_args.block_size
        return f"{tokens:,} tokens, {quantity(self.state.global_step * tokens)} in all"

    def data(self) -> str:
        """Say which data there are, and how they are tokenized."""
        return _data(self.run)

    def adapters(self) -> str:
        """Say which adapters there are."""
        args = self.run.model_args
        where = "all linear layers" if args.lora_target_modules == ALL_LINEAR else f"`{args.lora_target_modules}`"
        bits = ", the weights beside them in 4 bits" if args.load_in_4bit else ""
        return (
            f" with LoRA of rank {args.lora_r} (alpha {args.lora_alpha:g}, dropout {args.lora_dropout:g}) in {where}, "
            f"{quantity(self.run.trained)} parameters{bits},"
        )

    def card_metadata(self) -> dict[str, Any]:
        """Add the library."""
        return super().card_metadata() | {"library_name": "peft", "tags": ["lora", "generated_from_trainer"]}


class AnsweringTrainer(AdapterTrainer):
    """The Trainer where the model answers prompts: counts right answers too, before and after the training.

    Raises:
        InputError: The model is sharded, so that no process can generate for itself.
    """

    quantities: ClassVar[Mapping[str, str]] = {**AdapterTrainer.quantities, "answer_match": "right answers"}

    def __init__(self, *args: Any, check: AnswerCheck, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            raise InputError("--max_new_tokens is not supported with FSDP: leave it out, or use DDP.")
        self.check = check

    def derived(self, name: str, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the perplexity and the share of right answers."""
        share = self.check.share_right(self, self.eval_dataset)
        return super().derived(name, metrics) | {f"{name}_answer_match": share}


def next_token_ids(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Return the tokens predicted, (B, length): a Trainer keeps them in place of the logits, which need more room."""
    scores = logits[0] if isinstance(logits, tuple) else logits
    return scores.argmax(dim=-1)


def _data(run: Run) -> str:
    args = run.data_args
    kind = "documents" if args.prompt_column is None else "prompts with completions"
    counts = f"{run.rows['train']:,} {kind} to train on, {run.rows['validation']:,} held out"
    if args.source == data.HEADERS_NAME:
        origin = (
            f"The C++ headers of torch {torch.__version__} in {_listed(data.FOLDERS)}, without generated ones: "
            f"{counts}. Another version or build has other files, and gives other numbers."
        )
    else:
        origin = f"{source_name(args.source)}: {counts}."
    return f"{origin}\n\n{_tokens(run)}"


def _tokens(run: Run) -> str:
    args = run.data_args
    used = f"{run.examples['train']:,} to train on, {run.examples['validation']:,} to evaluate on"
    by = f"the tokenizer of `{Path(run.model_args.model_name_or_path).name}`"
    if args.prompt_column is None:
        return f"Tokenized by {by}, and cut into blocks of {args.block_size}: {used}."
    return (
        f"Tokenized by {by}; what has at most {args.block_size} tokens is used: {used}. The loss is that of the "
        f"completions. A prompt is read as `{args.prompt_template!r}`."
    )


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(f'`{name}`' for name in names[:-1])} and `{names[-1]}`"
