"""From prompts and completions to training examples: the loss is that of the completion's tokens."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import DatasetDict, Features, List, Value
from transformers import PreTrainedTokenizerBase

from recipes.recipe_parts.command_line import InputError

logger = logging.getLogger(__name__)

IGNORED = -100  # a label that has no part in the loss, as all models of transformers have it

EXAMPLE_FEATURES = Features(
    {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "completion": Value("string")}
)


def make_examples(
    rows: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    block_size: int,
    *,
    num_workers: int | None = None,
    overwrite_cache: bool = False,
) -> DatasetDict:
    """Tokenize prompts and completions, each for itself, so that a prompt has the same tokens when it is answered.

    What exceeds `block_size` is left out, and counted in the log: cut off, it would teach to stop before the answer.

    Args:
        rows: Splits with the columns `prompt` and `completion`.
        tokenizer: Must have an `eos_token`, which closes a completion.
        template: What the model reads of a prompt; contains `{prompt}`.
        block_size: Most tokens of an example.
        num_workers: Processes to use; None for this one only.
        overwrite_cache: Compute again even where `datasets` has a cached result.

    Returns:
        The same splits with the columns `input_ids`, `labels`, which are `IGNORED` over the prompt, and `completion`.

    Raises:
        InputError: No example of a split is short enough, or the tokenizer has no `eos_token`.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer {tokenizer.name_or_path} has no eos_token to close a completion.")
    tokens = rows.map(
        tokenize,
        batched=True,
        remove_columns=["prompt"],
        features=EXAMPLE_FEATURES,
        fn_kwargs={"tokenizer": tokenizer, "template": template},
        num_proc=num_workers,
        load_from_cache_file=not overwrite_cache,
        desc="Tokenizing",
    )
    examples = tokens.filter(
        _fits,
        input_columns=["input_ids"],
        fn_kwargs={"block_size": block_size},
        num_proc=num_workers,
        load_from_cache_file=not overwrite_cache,
        desc=f"Keeping what has {block_size} tokens or fewer",
    )
    for split, kept in examples.items():
        if not len(kept):
            shortest = min(map(len, tokens[split]["input_ids"]))
            raise InputError(
                f"every example of the {split} split exceeds --block_size {block_size}; the shortest has {shortest} "
                "tokens. Give a larger one."
            )
        if len(kept) < len(tokens[split]):
            logger.warning(
                "%s of the %s examples of the %s split exceed --block_size %s and are left out",
                *(len(tokens[split]) - len(kept), len(tokens[split]), split, block_size),
            )
    return examples


def tokenize(
    batch: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerBase, template: str
) -> dict[str, list[list[int]]]:
    """Turn prompts and completions into ids and labels; the prompt begins as the tokenizer's model expects it."""
    # replace, not format: other braces of the template are text
    prompts = tokenizer([template.replace("{prompt}", prompt) for prompt in batch["prompt"]], verbose=False)
    completions = tokenizer(batch["completion"], add_special_tokens=False, verbose=False)
    ids, labels = [], []
    for prompt, completion in zip(prompts["input_ids"], completions["input_ids"], strict=True):
        closed = [*completion, tokenizer.eos_token_id]
        ids.append([*prompt, *closed])
        labels.append([IGNORED] * len(prompt) + closed)
    return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class Padding:
    """Makes a batch of examples, each as long as the longest.

    Attributes:
        token: Any token; it is neither attended to nor learned.
    """

    token: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, all (B, length)."""
        lengths = [len(row["input_ids"]) for row in rows]
        return {
            "input_ids": self._stacked([row["input_ids"] for row in rows], self.token),
            "attention_mask": self._stacked([[1] * length for length in lengths], 0),
            "labels": self._stacked([row["labels"] for row in rows], IGNORED),
        }

    @staticmethod
    def _stacked(rows: list[list[int]], filler: int) -> torch.Tensor:
        longest = max(map(len, rows))
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def prompt_of(example: Mapping[str, Any]) -> list[int]:
    """Return the tokens of an example that come before its completion."""
    return [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label == IGNORED]


def _fits(ids: list[int], block_size: int) -> bool:
    return len(ids) <= block_size
