"""Text that each machine has: Python source, by default that of the standard library."""

import logging
import sysconfig
import tokenize
from pathlib import Path

from datasets import DatasetDict

from recipes.recipe_parts.command_line import InputError
from recipes.recipe_parts.documents import load_library, ordered_files

logger = logging.getLogger(__name__)

# What `--python_source` knows besides folders: its name for logs and cards, and sysconfig's name of its folder.
STDLIB = "stdlib"
PACKAGES = "packages"
_LIBRARIES = {
    STDLIB: ("Python standard library source", "stdlib"),
    PACKAGES: ("source of the installed Python packages", "purelib"),
}
STDLIB_NAME = _LIBRARIES[STDLIB][0]

# Not library code: installed packages, test suites, and files that are tables rather than text.
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}
)
EXCLUDED_PREFIX = "_sysconfigdata"  # generated when Python is built: differs from machine to machine


def python_files(root: Path) -> list[Path]:
    """List the library's source files below `root`."""
    return ordered_files(root, "*.py", _is_library_code)


def source_root(source: str) -> Path:
    """Return the folder that `--python_source` means.

    Raises:
        InputError: It is none.
    """
    if source in _LIBRARIES:
        return Path(sysconfig.get_path(_LIBRARIES[source][1]))
    if not Path(source).is_dir():
        raise InputError(f"--python_source {source}: no such folder. Give one, or {' or '.join(_LIBRARIES)}.")
    return Path(source)


def source_name(source: str) -> str:
    """Name the text of `--python_source` for logs and cards."""
    return _LIBRARIES[source][0] if source in _LIBRARIES else f"Python source in {Path(source).resolve().name}"


def load_python(root: Path, validation_fraction: float) -> DatasetDict:
    """Load Python source, one document a file, split by file.

    Args:
        root: Folder whose files are read, and those of its folders that hold library code.
        validation_fraction: Expected share of files in the validation split.

    Raises:
        InputError: A split would be empty.
    """
    return load_library(python_files(root), root, validation_fraction, _read)


def _is_library_code(path: Path) -> bool:
    return EXCLUDED_FOLDERS.isdisjoint(path.parts) and not path.name.startswith(EXCLUDED_PREFIX)


def _read(path: str) -> str:
    """Read a file as its coding line says (PEP 263); a file that Python could not read either is an empty document."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError) as error:
        logger.warning("%s is left out: %s", path, error)
        return ""
