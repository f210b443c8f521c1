"""The recipe's options: flags, a YAML or JSON file, or a file and flags that override it."""

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import corpus
import yaml
from corpus import InputError
from transformers import HfArgumentParser, TrainingArguments

import hf_schatten  # noqa: F401  the parser lists the optimizers known when it is built: this adds schatten_p

CONFIG_SUFFIXES = {".yaml", ".yml", ".json"}
SCRIPT_DEFAULTS = {"output_dir": "outputs/pretrain_clm", "do_train": True, "do_eval": True}


@dataclass
class ModelArguments:
    """Which model: by default a new GPT-2 of the given size."""

    n_layer: int = field(default=4, metadata={"help": "Layers of the new GPT-2."})
    n_embd: int = field(default=256, metadata={"help": "Width of the new GPT-2."})
    n_head: int = field(default=4, metadata={"help": "Attention heads of the new GPT-2; divides n_embd."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the new GPT-2, at all its three places."})
    config_name: str | None = field(
        default=None,
        metadata={"help": "Configuration (Hub name or folder) of another architecture, trained from scratch."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to the configuration, e.g. 'activation_function=relu,scale_attn_weights=false'."},
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Weights (Hub name or folder) to continue from, instead of from scratch."},
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer (Hub name or folder). Default: that of --model_name_or_path, else one "
            "trained on the train split."
        },
    )
    vocab_size: int = field(default=4096, metadata={"help": "Largest vocabulary of a tokenizer trained here."})


@dataclass
class DataTrainingArguments:
    """Which text: by default the Python standard library's own source."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub, or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})
    train_file: str | None = field(
        default=None, metadata={"help": f"Your own text: a file ending in {', '.join(corpus.BUILDERS)}."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Text for evaluation, likewise."})
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of documents to hold out where there is no validation split."}
    )
    block_size: int = field(default=256, metadata={"help": "Tokens in a training example."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only so many training blocks, evenly spaced."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only so many evaluation blocks, likewise."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes for tokenizing."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize anew, whatever is cached."})

    def __post_init__(self) -> None:
        if self.dataset_name and self.train_file:
            raise InputError(
                f"--dataset_name {self.dataset_name} and --train_file {self.train_file} exclude each other."
            )
        if self.validation_file and not self.train_file:
            raise InputError(f"--validation_file {self.validation_file} needs a --train_file.")
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"--validation_fraction {self.validation_fraction} is not between 0 and 1.")
        # A block of one token predicts nothing.
        for name, least in (("block_size", 2), ("max_train_samples", 1), ("max_eval_samples", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name} {value} is too small: give at least {least}.")

    @property
    def source(self) -> str:
        """Name of the text, for logs and the model card."""
        return self.dataset_name or self.train_file or corpus.STDLIB_NAME


def parse_arguments(argv: Sequence[str]) -> tuple[ModelArguments, DataTrainingArguments, TrainingArguments]:
    """Read flags, or a .yaml/.json file given first and flags that override it.

    Values of a file become defaults of the parser, as text, so that they pass through the same type checks
    as flags do. (In YAML, `2e-3` alone would be a string, and Trainer would fail much later.)

    Raises:
        InputError: A key or flag is unknown, or the file is no mapping.
    """
    parser = HfArgumentParser([ModelArguments, DataTrainingArguments, TrainingArguments])  # type: ignore[list-item]
    parser.set_defaults(**SCRIPT_DEFAULTS)
    known = {action.dest for action in parser._actions}
    if argv and not argv[0].startswith("-") and Path(argv[0]).suffix in CONFIG_SUFFIXES:
        settings = read_config(Path(argv[0]))
        reject_unknown(settings, known, where=argv[0])
        parser.set_defaults(
            **{key: str(value) if isinstance(value, int | float) else value for key, value in settings.items()}
        )
        argv = argv[1:]
    *arguments, unknown = parser.parse_args_into_dataclasses(
        args=list(argv), return_remaining_strings=True, look_for_args_file=False
    )
    reject_unknown([word.partition("=")[0].lstrip("-") for word in unknown], known, where="the command line")
    model_args, data_args, training_args = arguments
    return model_args, data_args, training_args


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
    """Raise an InputError for the first name that is no option, with the nearest one that is."""
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean '{nearest[0]}'?" if nearest else " See --help for all options."
            raise InputError(f"unknown option '{name}' in {where}.{hint}")
