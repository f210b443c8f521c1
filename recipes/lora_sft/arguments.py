"""The recipe's options: flags, a YAML or JSON file, or a file and flags that override it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import TrainingArguments

from recipes.lora_sft import data
from recipes.recipe_parts.command_line import InputError, parse, require_at_least, require_fraction, require_one_text
from recipes.recipe_parts.documents import BUILDERS

DEFAULT_BASE = "outputs/pretrain_clm"  # where the recipe pretrain_clm saves its model
ALL_LINEAR = "all-linear"  # peft's name for every linear layer but the output's
DTYPES = ("float32", "bfloat16", "float16", "auto")
SCRIPT_DEFAULTS = {"output_dir": "outputs/lora_sft", "do_train": True, "do_eval": True}


@dataclass
class ModelArguments:
    """Which model, and which adapters: by default the one that `make train` trains, and all its linear layers."""

    model_name_or_path: str = field(
        default=DEFAULT_BASE, metadata={"help": "The model to fine-tune (Hub name or folder), with its tokenizer."}
    )
    dtype: str = field(
        default="float32", metadata={"help": f"Type of its frozen weights: {', '.join(DTYPES)} (as they are stored)."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Keep its weights in 4 bits (QLoRA). Needs bitsandbytes and a GPU."}
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapters."})
    lora_alpha: float = field(default=16, metadata={"help": "Factor of the adapters' output, times the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapters' input."})
    lora_target_modules: str = field(
        default=ALL_LINEAR,
        metadata={
            "help": f"Layers that get adapters, by the ends of their names: 'q_proj,v_proj', or {ALL_LINEAR} "
            "for all but the output."
        },
    )

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"--dtype {self.dtype} is not known: give {', '.join(DTYPES)}.")
        require_at_least(self, {"lora_r": 1})
        if self.lora_alpha <= 0:
            raise InputError(f"--lora_alpha {self.lora_alpha} is not above 0.")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"--lora_dropout {self.lora_dropout} is not at least 0 and below 1.")


@dataclass
class DataTrainingArguments:
    """Which text, or which prompts and completions: by default the C++ headers of torch."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub, or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(
        default=None, metadata={"help": f"Your own data: a file ending in {', '.join(BUILDERS)}."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Data for evaluation, likewise."})
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})
    prompt_column: str | None = field(
        default=None,
        metadata={"help": "The column that holds prompts: the model then learns their completions, not text."},
    )
    completion_column: str = field(default="completion", metadata={"help": "The column that holds completions."})
    prompt_template: str = field(
        default="{prompt}\n", metadata={"help": "What the model reads before it completes; contains '{prompt}'."}
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the data to hold out where there is no split to validate with."}
    )
    block_size: int = field(
        default=256,
        metadata={
            "help": "Tokens in a training example: a block of text has so many, a prompt with its completion at most."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only so many training examples, evenly spaced."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only so many evaluation examples, likewise."}
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Let the model answer the prompts of the evaluation before and after training, with at most so "
            "many tokens, and count the right answers. Default: it answers none."
        },
    )
    answer_pattern: str = field(
        default=r"#### *(-?[0-9.,]+)",
        metadata={"help": "Regular expression of the final answer that is compared; GSM8K's by default."},
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes for tokenizing."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again, whatever is cached."})

    def __post_init__(self) -> None:
        require_one_text(self.dataset_name, self.train_file, self.validation_file)
        require_fraction(self.validation_fraction)
        # A block of one token predicts nothing.
        least = {"block_size": 2, "max_train_samples": 1, "max_eval_samples": 1, "max_new_tokens": 1}
        require_at_least(self, least)
        self._check_prompts()

    def _check_prompts(self) -> None:
        if self.prompt_column is None:
            for name in ("completion_column", "prompt_template", "max_new_tokens"):
                if getattr(self, name) != self.__dataclass_fields__[name].default:
                    raise InputError(f"--{name} {getattr(self, name)} needs prompts: give --prompt_column.")
            return
        if not (self.dataset_name or self.train_file):
            raise InputError(f"--prompt_column {self.prompt_column} needs a --dataset_name or a --train_file.")
        if self.prompt_column == self.completion_column:
            raise InputError(f"--prompt_column and --completion_column are both {self.prompt_column}.")
        if "{prompt}" not in self.prompt_template:
            raise InputError(f"--prompt_template {self.prompt_template!r} does not contain '{{prompt}}'.")

    @property
    def columns(self) -> dict[str, str]:
        """The columns of the data that are used, by what they are called here."""
        if self.prompt_column is None:
            return {"text": self.text_column}
        return {"prompt": self.prompt_column, "completion": self.completion_column}

    @property
    def source(self) -> str:
        """Name of the data, for logs and the model card."""
        return self.dataset_name or self.train_file or data.HEADERS_NAME


def parse_arguments(argv: Sequence[str]) -> tuple[ModelArguments, DataTrainingArguments, TrainingArguments]:
    """Read flags, or a .yaml/.json file given first and flags that override it.

    Raises:
        InputError: A key or flag is unknown, or the file is not a mapping.
    """
    model_args, data_args, training_args = parse(
        argv, [ModelArguments, DataTrainingArguments, TrainingArguments], SCRIPT_DEFAULTS
    )
    return model_args, data_args, training_args
