"""From documents to training examples: a byte-level BPE tokenizer, and blocks of a fixed number of tokens."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recipes.recipe_parts.command_line import InputError
from recipes.recipe_parts.terminal import bars_of_datasets

END_OF_TEXT = "<|endoftext|>"  # GPT-2's name for the token between two documents

# The merges of a vocabulary of this kind settle after a few hundred megabytes of text.
MAX_TOKENIZER_DOCUMENTS = 100_000

BLOCK_FEATURES = Features({"input_ids": List(Value("int32"))})


def train_tokenizer(documents: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (GPT-2's kind): no unknown token, decoding gives the text back.

    Args:
        documents: Data set with a column `text`.
        vocab_size: Upper limit on the number of tokens, the 256 bytes and `END_OF_TEXT` among them.

    Raises:
        InputError: `vocab_size` has no room for the bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise InputError(
            f"--vocab_size {vocab_size} has no room for the {len(alphabet)} bytes and {END_OF_TEXT}. "
            f"Give at least {len(alphabet) + 1}; 4096 suits a small model."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    limit = min(len(documents), MAX_TOKENIZER_DOCUMENTS)
    tokenizer.train_from_iterator(_batches_of_text(documents.select(range(limit))), trainer, length=limit)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,  # it would change the spaces around punctuation
    )


def make_blocks(
    documents: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    num_workers: int | None = None,
    overwrite_cache: bool = False,
) -> DatasetDict:
    """Tokenize the documents, join them with an end-of-text token between, and cut the stream into blocks.

    Args:
        documents: Splits with a column `text`.
        tokenizer: Must have an `eos_token`.
        block_size: Tokens in a block.
        num_workers: Processes to use; None for this one only.
        overwrite_cache: Compute again even where `datasets` has a cached result.

    Returns:
        The same splits with one column, `input_ids`, of shape (blocks, block_size).

    Raises:
        InputError: A split is too short for one block, or the tokenizer has no `eos_token`.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer {tokenizer.name_or_path} has no eos_token to put between documents.")
    with bars_of_datasets(sum(map(len, documents.values()))):
        tokens = documents.map(
            tokenize,
            batched=True,
            remove_columns=["text"],
            features=BLOCK_FEATURES,
            fn_kwargs={"tokenizer": tokenizer},
            num_proc=num_workers,
            load_from_cache_file=not overwrite_cache,
            desc="Tokenizing",
        )
        blocks = tokens.map(
            cut_into_blocks,
            batched=True,
            features=BLOCK_FEATURES,
            fn_kwargs={"block_size": block_size},
            num_proc=num_workers,
            load_from_cache_file=not overwrite_cache,
            desc=f"Cutting into blocks of {block_size} tokens",
        )
    for split in blocks:
        if len(blocks[split]) == 0:
            total = sum(len(row) for row in tokens[split]["input_ids"])
            raise InputError(
                f"the {split} split has {total} tokens, too few for one block of --block_size {block_size}. "
                "Give more text or a smaller block size."
            )
    return blocks


def tokenize(batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    """Turn texts into token ids, each closed by an end-of-text token; empty documents are left out."""
    texts = [text for text in batch["text"] if text]
    # verbose=False: that a document exceeds the model's context is no problem here, it will be cut.
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in encoded]}


def cut_into_blocks(batch: dict[str, list[list[int]]], block_size: int) -> dict[str, list[list[int]]]:
    """Join the rows of a batch and cut them into blocks; the tail, less than one block, is dropped.

    `datasets` hands over 1000 documents at a time: that is one tail per thousand documents.
    """
    stream = list(chain.from_iterable(batch["input_ids"]))
    whole = len(stream) - len(stream) % block_size
    return {"input_ids": [stream[start : start + block_size] for start in range(0, whole, block_size)]}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack blocks to `input_ids` of shape (B, block_size); the model itself shifts `labels` by one token."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def _batches_of_text(documents: Dataset) -> Iterator[Iterable[str]]:
    """Yield the texts a hundred documents at a time: memory stays small whatever the corpus."""
    for batch in documents.iter(batch_size=100):
        yield batch["text"]
