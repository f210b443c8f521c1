"""Text to compute gradients on: a file, or by default the Python standard library's own source."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

STDLIB_NAME = "the Python standard library's source"

_CHARACTERS_PER_TOKEN = 16  # of a window that is to hold a block; tokens are shorter on average


class GeometryError(ValueError):
    """The page cannot be written; the message names what is missing and the fix."""


def read_text(path: Path | None) -> str:
    """Return the text of a file, or of the standard library's top-level modules.

    Args:
        path: a UTF-8 file, or None for the standard library of the running Python.

    Raises:
        GeometryError: when there is no such file, or it is no text.
    """
    if path is None:
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        return "\n".join(module.read_text("utf-8", errors="replace") for module in modules)
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GeometryError(f"{path} cannot be read as UTF-8 text ({error}): give a text file with --data.") from error


def token_blocks(text: str, tokenizer: PreTrainedTokenizerBase, blocks: int, length: int) -> Tensor:
    """Return blocks of tokens from windows that are evenly spaced in the text.

    Args:
        text: of any length; windows of a short one overlap.
        tokenizer: the model's.
        blocks: most blocks wanted.
        length: tokens of a block.

    Returns:
        Token ids (blocks, length); fewer blocks where windows hold less than one.

    Raises:
        GeometryError: when no window holds a block.
    """
    width = length * _CHARACTERS_PER_TOKEN
    starts = [max(0, len(text) - width) * block // max(1, blocks - 1) for block in range(blocks)]
    windows = [text[start : start + width] for start in dict.fromkeys(starts)]
    tokenized: Sequence[list[int]] = tokenizer(windows, truncation=True, max_length=length)["input_ids"]
    whole = [ids for ids in tokenized if len(ids) == length]
    if not whole:
        raise GeometryError(
            f"the text of {len(text)} characters holds no block of {length} tokens: give more with --data."
        )
    return torch.tensor(whole)


def byte_blocks(text: str, length: int) -> Tensor:
    """Return all blocks of the text's UTF-8 bytes, (blocks, length) int64; the last, incomplete one is left out.

    Raises:
        GeometryError: when the text is shorter than a block.
    """
    data = torch.tensor(list(text.encode()), dtype=torch.long)
    if len(data) < length:
        raise GeometryError(f"the text of {len(data)} bytes holds no block of {length}: give more with --data.")
    return data[: len(data) // length * length].view(-1, length)
