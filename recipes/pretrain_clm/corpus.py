"""The default text: the Python standard library's own source, which each machine that runs the recipe has."""

import sysconfig
import tokenize
from pathlib import Path

from datasets import DatasetDict
from recipe_parts.documents import load_library, ordered_files

STDLIB_NAME = "Python standard library source"

# Not library code: installed packages, test suites, and files that are tables rather than text.
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}
)
EXCLUDED_PREFIX = "_sysconfigdata"  # generated when Python is built: differs from machine to machine


def stdlib_files(root: Path) -> list[Path]:
    """List the library's source files below `root`."""
    return ordered_files(root, "*.py", _is_library_code)


def load_stdlib(validation_fraction: float, root: Path | None = None) -> DatasetDict:
    """Load the standard library's source, one document a file, split by file.

    Args:
        validation_fraction: Expected share of files in the validation split.
        root: Folder of the library; that of the running Python if not given.

    Raises:
        InputError: A split would be empty.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    return load_library(stdlib_files(root), root, validation_fraction, _read)


def _is_library_code(path: Path) -> bool:
    return EXCLUDED_FOLDERS.isdisjoint(path.parts) and not path.name.startswith(EXCLUDED_PREFIX)


def _read(path: str) -> str:
    """Read a file as its coding line says (PEP 263)."""
    with tokenize.open(path) as file:
        return file.read()
