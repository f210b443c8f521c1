"""A recipe's command line: flags, a YAML or JSON file, or a file and flags that override it."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

import hf_schatten  # noqa: F401  the parser lists the optimizers known when it is built: this adds schatten_p
from hf_schatten.integration.checkpoint import newest_complete_checkpoint

CONFIG_SUFFIXES = {".yaml", ".yml", ".json"}


class InputError(ValueError):
    """What the user gave cannot be used. The message names the value and says what to do."""


def parse(argv: Sequence[str], kinds: Sequence[type], defaults: Mapping[str, Any]) -> tuple[Any, ...]:
    """Read flags, or a .yaml/.json file given first and flags that override it.

    Values of a file become defaults of the parser, as text, so that they pass through the same type checks
    as flags do. (In YAML, `2e-3` alone would be a string, and Trainer would fail much later.)

    Args:
        argv: The script's arguments.
        kinds: Dataclasses whose fields are the options.
        defaults: Of options whose dataclass has others.

    Returns:
        An instance of each of `kinds`.

    Raises:
        InputError: A key or flag is unknown, or the file is not a mapping.
    """
    parser = HfArgumentParser(list(kinds))  # type: ignore[arg-type]
    parser.set_defaults(**defaults)
    known = {action.dest for action in parser._actions}
    if argv and not argv[0].startswith("-") and Path(argv[0]).suffix in CONFIG_SUFFIXES:
        settings = read_config(Path(argv[0]))
        reject_unknown(settings, known, where=argv[0])
        parser.set_defaults(
            **{key: str(value) if isinstance(value, int | float) else value for key, value in settings.items()}
        )
        argv = argv[1:]
    *parsed, unknown = parser.parse_args_into_dataclasses(
        args=list(argv), return_remaining_strings=True, look_for_args_file=False
    )
    reject_unknown([word.partition("=")[0].lstrip("-") for word in unknown], known, where="the command line")
    return tuple(parsed)


def read_config(path: Path) -> dict[str, object]:
    """Read a YAML or JSON file of options."""
    if not path.is_file():
        raise InputError(f"config file {path}: there is no such file (looked in {Path.cwd()}).")
    text = path.read_text(encoding="utf-8")
    try:
        settings = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise InputError(f"config file {path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"config file {path} must hold lines like 'max_steps: 300'; it holds {settings!r}.")
    return settings


def reject_unknown(names: Iterable[str], known: set[str], where: str) -> None:
    """Raise an InputError for the first name that is not an option, with the nearest one that is."""
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean '{nearest[0]}'?" if nearest else " See --help for all options."
            raise InputError(f"unknown option '{name}' in {where}.{hint}")


def require_at_least(options: object, least: Mapping[str, int]) -> None:
    """Raise an InputError for the first option that is below its least value; None is no value.

    Args:
        options: A dataclass of options.
        least: Least values by option.
    """
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise InputError(f"--{name} {value} is too small: give at least {smallest}.")


def require_one_text(dataset_name: str | None, train_file: str | None, validation_file: str | None) -> None:
    """Raise an InputError unless the data come from one place: a data set, or files with one to train on."""
    if dataset_name and train_file:
        raise InputError(f"--dataset_name {dataset_name} and --train_file {train_file} exclude each other.")
    if validation_file and not train_file:
        raise InputError(f"--validation_file {validation_file} needs a --train_file.")


def require_fraction(validation_fraction: float) -> None:
    """Raise an InputError unless some of the data are held out, and some are not."""
    if not 0 < validation_fraction < 1:
        raise InputError(f"--validation_fraction {validation_fraction} is not between 0 and 1.")


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """Find the folder that `--resume_from_checkpoint` means: a path, or `last` (or `true`) for the newest.

    Raises:
        InputError: There is no such checkpoint.
    """
    wanted = args.resume_from_checkpoint
    if not wanted or str(wanted).lower() in {"false", "none"}:
        return None
    if str(wanted).lower() in {"last", "true"}:
        output_dir = Path(args.output_dir or "")
        newest = newest_complete_checkpoint(output_dir)
        if newest is None:
            raise InputError(f"--resume_from_checkpoint {wanted}: no complete checkpoint-* folder in {output_dir}.")
        return str(newest)
    if not Path(wanted).is_dir():
        raise InputError(f"--resume_from_checkpoint {wanted}: there is no such folder.")
    return str(wanted)
