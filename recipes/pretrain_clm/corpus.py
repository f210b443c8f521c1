"""The text to train on: the Python standard library's own source, local files, or a data set of the Hub.

Every source ends as a `datasets.DatasetDict` with the splits `train` and `validation` and one string column,
`text`, a row a document. The standard library needs no download: each machine that runs the recipe has it.
"""

import hashlib
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Value, load_dataset
from recipe_parts.command_line import InputError

STDLIB_NAME = "Python standard library source"

# Not library code: installed packages, test suites, and files that are tables rather than text.
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}
)
EXCLUDED_PREFIX = "_sysconfigdata"  # generated when Python is built: differs from machine to machine

# `load_dataset` builders by file suffix. A plain text file holds documents separated by empty lines.
BUILDERS: dict[str, tuple[str, dict[str, str]]] = {
    ".txt": ("text", {"sample_by": "paragraph"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".parquet": ("parquet", {}),
}


def stdlib_files(root: Path) -> list[Path]:
    """List the library's source files below `root`, in an order that no file system can change."""
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (
        path for path in paths if EXCLUDED_FOLDERS.isdisjoint(path.parts) and not path.name.startswith(EXCLUDED_PREFIX)
    )
    return [root / path for path in sorted(kept, key=lambda path: path.as_posix())]


def is_held_out(name: str, fraction: float) -> bool:
    """Say whether the document called `name` belongs to the validation split.

    The choice hangs on the name alone, so that a file added or removed never moves another one across.

    Args:
        name: Path of the document relative to its corpus, with forward slashes.
        fraction: Expected share of documents that are held out, in [0, 1].
    """
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def load_stdlib(validation_fraction: float, root: Path | None = None) -> DatasetDict:
    """Load the standard library's source, one document a file, split by file.

    Args:
        validation_fraction: Expected share of files in the validation split.
        root: Folder of the library; that of the running Python if not given.

    Raises:
        InputError: A split would be empty.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    splits: dict[str, list[Path]] = {"train": [], "validation": []}
    for path in stdlib_files(root):
        held_out = is_held_out(path.relative_to(root).as_posix(), validation_fraction)
        splits["validation" if held_out else "train"].append(path)
    for split, paths in splits.items():
        if not paths:
            raise InputError(
                f"no .py file below {root} falls into the {split} split with --validation_fraction "
                f"{validation_fraction}. Change the fraction, or give your own text with --train_file."
            )
    return DatasetDict({split: _read_documents(paths) for split, paths in splits.items()})


def load_files(train_file: str, validation_file: str | None, column: str, fraction: float) -> DatasetDict:
    """Load the user's own files (see `BUILDERS`); without a validation file, hold out the last documents.

    Args:
        train_file: Path of a .txt, .json, .jsonl, .csv or .parquet file.
        validation_file: Path of a file of the same kind, or None.
        column: Name of the column that holds the text; a .txt file always has `text`.
        fraction: Share of documents to hold out if `validation_file` is None.

    Raises:
        InputError: A file is missing, empty or of an unknown kind, or has no such column.
    """
    files = {"train": ("--train_file", train_file)}
    if validation_file is not None:
        files["validation"] = ("--validation_file", validation_file)
    documents = {
        split: _text_only(_load_file(flag, path), "text" if path.endswith(".txt") else column, path)
        for split, (flag, path) in files.items()
    }
    return _with_validation(DatasetDict(documents), fraction, train_file)


def load_hub_dataset(name: str, config_name: str | None, column: str, fraction: float) -> DatasetDict:
    """Load a data set of the Hub; without a `validation` split, hold out the last documents of `train`.

    Args:
        name: Name on the Hub, or path of a local data set folder.
        config_name: Configuration of that data set, if it has several.
        column: Name of the column that holds the text.
        fraction: Share of documents to hold out if there is no validation split.

    Raises:
        InputError: There is no `train` split or no such column.
    """
    loaded = load_dataset(name, config_name)
    if "train" not in loaded:
        raise InputError(f"--dataset_name {name} has no split 'train'; it has: {', '.join(loaded)}.")
    wanted = [split for split in ("train", "validation") if split in loaded]
    documents = {split: _text_only(loaded[split], column, name) for split in wanted}
    return _with_validation(DatasetDict(documents), fraction, name)


def _read_documents(paths: list[Path]) -> Dataset:
    """Read Python files into a data set, cached under a digest of their bytes (Python may be updated)."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return Dataset.from_generator(
        _generate_documents,
        features=Features({"text": Value("string")}),
        gen_kwargs={"paths": [str(path) for path in paths]},
        fingerprint=digest.hexdigest()[:16],
    )


def _generate_documents(paths: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yield one row a file, decoded as its coding line says (PEP 263)."""
    for path in paths:
        with tokenize.open(path) as file:
            yield {"text": file.read()}


def _load_file(flag: str, path: str) -> Dataset:
    """Load one local file by its suffix; `flag` is the option to name in an error."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{flag} {path}: there is no such file (looked in {Path.cwd()}).")
    if file.suffix not in BUILDERS:
        raise InputError(f"{flag} {path}: unknown kind of file; use one of {', '.join(BUILDERS)}.")
    if file.stat().st_size == 0:
        raise InputError(f"{flag} {path} is empty (0 bytes). Give a file with text.")
    builder, options = BUILDERS[file.suffix]
    return load_dataset(builder, data_files=str(file), split="train", **options)


def _text_only(dataset: Dataset, column: str, source: str) -> Dataset:
    """Keep the text column alone and call it `text`."""
    if column not in dataset.column_names:
        raise InputError(
            f"--text_column {column} is not a column of {source}, which has: "
            f"{', '.join(dataset.column_names)}. Pass one of these."
        )
    dataset = dataset.select_columns([column])
    return dataset if column == "text" else dataset.rename_column(column, "text")


def _with_validation(documents: DatasetDict, fraction: float, source: str) -> DatasetDict:
    """Hold out the last documents of `train` unless there is a validation split already."""
    if "validation" in documents:
        return documents
    total = len(documents["train"])
    held_out = max(1, round(fraction * total))
    if held_out >= total:
        raise InputError(
            f"{source} has {total} document(s), too few to hold out {held_out} for validation. Give a "
            "--validation_file, or more documents (in a .txt file, an empty line ends a document)."
        )
    train = documents["train"].select(range(total - held_out))
    validation = documents["train"].select(range(total - held_out, total))
    return DatasetDict({"train": train, "validation": validation})
