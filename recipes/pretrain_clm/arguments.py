"""The recipe's options: flags, a YAML or JSON file, or a file and flags that override it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import TrainingArguments

from recipes.pretrain_clm import data
from recipes.recipe_parts.command_line import parse, require_at_least, require_fraction, require_one_text
from recipes.recipe_parts.documents import BUILDERS

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
    tp_plan: str | None = field(
        default=None,
        metadata={"help": "Cut these weights over all processes as they are loaded: 'auto', by the model's own plan."},
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

    python_source: str = field(
        default=data.STDLIB,
        metadata={
            "help": f"Python files to train on: {data.STDLIB}, {data.PACKAGES} (all that are installed beside the "
            "Python that runs this), or a folder. Other text goes before."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub, or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})
    train_file: str | None = field(
        default=None, metadata={"help": f"Your own text: a file ending in {', '.join(BUILDERS)}."}
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
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again, whatever is cached."})

    def __post_init__(self) -> None:
        require_one_text(self.dataset_name, self.train_file, self.validation_file)
        require_fraction(self.validation_fraction)
        # A block of one token predicts nothing.
        require_at_least(self, {"block_size": 2, "max_train_samples": 1, "max_eval_samples": 1})

    @property
    def source(self) -> str:
        """Name of the text, for logs and the model card."""
        return self.dataset_name or self.train_file or data.source_name(self.python_source)


def parse_arguments(argv: Sequence[str]) -> tuple[ModelArguments, DataTrainingArguments, TrainingArguments]:
    """Read flags, or a .yaml/.json file given first and flags that override it.

    Raises:
        InputError: A key or flag is unknown, or the file is not a mapping.
    """
    model_args, data_args, training_args = parse(
        argv, [ModelArguments, DataTrainingArguments, TrainingArguments], SCRIPT_DEFAULTS
    )
    return model_args, data_args, training_args
