"""The default text: the C++ headers that every installation of torch has, which the base model has not seen."""

from pathlib import Path

import torch
from datasets import DatasetDict

from recipes.recipe_parts.documents import load_library, ordered_files

HEADERS_NAME = "C++ headers of torch"

# Written by people and in every build: other folders are generated, of other projects, or of one kind of machine.
FOLDERS = ("c10/core", "c10/util", "torch/csrc")
EXCLUDED_FOLDERS = frozenset({"generated"})


def header_files(root: Path) -> list[Path]:
    """List the headers below `root`, torch's folder `include`."""
    return ordered_files(root, "*.h", _is_written)


def load_headers(validation_fraction: float, root: Path | None = None) -> DatasetDict:
    """Load the headers, one document a file, split by file.

    Args:
        validation_fraction: Expected share of files in the validation split.
        root: Folder of the headers; that of the running torch if not given.

    Raises:
        InputError: A split would be empty.
    """
    root = root or Path(torch.__file__).parent / "include"
    return load_library(header_files(root), root, validation_fraction, _read)


def _is_written(path: Path) -> bool:
    return path.as_posix().startswith(FOLDERS) and EXCLUDED_FOLDERS.isdisjoint(path.parts)


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")
