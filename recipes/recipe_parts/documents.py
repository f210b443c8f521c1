"""Text of any source as a `datasets.DatasetDict`: the files of a library, local files, or a data set of the Hub.

Every source ends as the splits `train` and `validation` with string columns, a row a document.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Value, load_dataset

from recipes.recipe_parts.command_line import InputError
from recipes.recipe_parts.splits import is_held_out
from recipes.recipe_parts.terminal import bars_of_datasets

# `load_dataset` builders by file suffix. A plain text file holds documents separated by empty lines.
BUILDERS: dict[str, tuple[str, dict[str, str]]] = {
    ".txt": ("text", {"sample_by": "paragraph"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".parquet": ("parquet", {}),
}


def ordered_files(root: Path, pattern: str, is_wanted: Callable[[Path], bool]) -> list[Path]:
    """List files below `root` in an order that no file system can change.

    Args:
        root: The folder.
        pattern: Of their names, such as `*.py`.
        is_wanted: Says of a path relative to `root` whether it belongs to the list.
    """
    paths = (path.relative_to(root) for path in root.rglob(pattern))
    return [root / path for path in sorted(filter(is_wanted, paths), key=lambda path: path.as_posix())]


def load_library(files: Sequence[Path], root: Path, fraction: float, read: Callable[[str], str]) -> DatasetDict:
    """Load the files of a library, one document a file in the column `text`, split by file.

    Args:
        files: Of one kind, below `root`.
        root: Folder of the library.
        fraction: Expected share of files in the validation split.
        read: Returns the text of the file at a path.

    Raises:
        InputError: A split would be empty.
    """
    splits: dict[str, list[Path]] = {"train": [], "validation": []}
    for path in files:
        held_out = is_held_out(path.relative_to(root).as_posix(), fraction)
        splits["validation" if held_out else "train"].append(path)
    for split, paths in splits.items():
        if not paths:
            raise InputError(
                f"none of the {len(files)} files to read below {root} falls into the {split} split with "
                f"--validation_fraction {fraction}. Change the fraction, or give your own text with --train_file."
            )
    return DatasetDict({split: _read_documents(paths, read) for split, paths in splits.items()})


def load_files(
    train_file: str, validation_file: str | None, columns: Mapping[str, str], fraction: float
) -> DatasetDict:
    """Load the user's own files (see `BUILDERS`); without a validation file, hold out the last documents.

    Args:
        train_file: Path of a .txt, .json, .jsonl, .csv or .parquet file.
        validation_file: Path of a file of the same kind, or None.
        columns: The file's column by the name it gets, as in `{"text": "body"}`; a .txt file always has `text`.
        fraction: Share of documents to hold out if `validation_file` is None.

    Raises:
        InputError: A file is missing, empty or of an unknown kind, or has no such column.
    """
    files = {"train": ("--train_file", train_file)}
    if validation_file is not None:
        files["validation"] = ("--validation_file", validation_file)
    documents = {
        split: _columns_only(_load_file(flag, path), {"text": "text"} if _is_plain(path, columns) else columns, path)
        for split, (flag, path) in files.items()
    }
    return _with_validation(DatasetDict(documents), fraction, train_file)


def load_hub_dataset(
    name: str,
    config_name: str | None,
    columns: Mapping[str, str],
    fraction: float,
    validation_splits: Sequence[str] = ("validation",),
) -> DatasetDict:
    """Load a data set of the Hub; without a split to validate with, hold out the last documents of `train`.

    Args:
        name: Name on the Hub, or path of a local data set folder.
        config_name: Configuration of that data set, if it has several.
        columns: The data set's column by the name it gets, as in `{"text": "body"}`.
        fraction: Share of documents to hold out if there is no split to validate with.
        validation_splits: Splits to validate with; the first that exists becomes `validation`.

    Raises:
        InputError: There is no `train` split or no such column.
    """
    loaded = load_dataset(name, config_name)
    if "train" not in loaded:
        raise InputError(f"--dataset_name {name} has no split 'train'; it has: {', '.join(loaded)}.")
    found = next((split for split in validation_splits if split in loaded), None)
    wanted = {"train": loaded["train"]} | ({"validation": loaded[found]} if found else {})
    documents = {split: _columns_only(rows, columns, name) for split, rows in wanted.items()}
    return _with_validation(DatasetDict(documents), fraction, name)


def _read_documents(paths: list[Path], read: Callable[[str], str]) -> Dataset:
    """Read files into a data set, cached under a digest of their bytes (the library may be updated)."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    with bars_of_datasets(len(paths)):
        return Dataset.from_generator(
            _generate_documents,
            features=Features({"text": Value("string")}),
            gen_kwargs={"paths": [str(path) for path in paths], "read": read},
            fingerprint=digest.hexdigest()[:16],
        )


def _generate_documents(paths: Iterable[str], read: Callable[[str], str]) -> Iterator[dict[str, str]]:
    """Yield one row a file."""
    for path in paths:
        yield {"text": read(path)}


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


def _is_plain(path: str, columns: Mapping[str, str]) -> bool:
    return path.endswith(".txt") and set(columns) == {"text"}


def _columns_only(dataset: Dataset, columns: Mapping[str, str], source: str) -> Dataset:
    """Keep the columns that `columns` has as values, under the names that it has as keys."""
    for name, column in columns.items():
        if column not in dataset.column_names:
            raise InputError(
                f"--{name}_column {column} is not a column of {source}, which has: "
                f"{', '.join(dataset.column_names)}. Pass one of these."
            )
    dataset = dataset.select_columns(list(columns.values()))
    return dataset.rename_columns({column: name for name, column in columns.items() if column != name})


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
