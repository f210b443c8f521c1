"""The recipe's options: flags, a YAML or JSON file, or a file and flags that override it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import TrainingArguments

from recipes.image_classification import data
from recipes.recipe_parts.command_line import InputError, parse, require_at_least, require_fraction

MODEL_TYPES = ("vit", "resmlp")
SCRIPT_DEFAULTS = {
    "output_dir": "outputs/image_classification",
    "do_train": True,
    "do_eval": True,
    "remove_unused_columns": False,  # pixels are made of columns that no model knows
}


@dataclass
class ModelArguments:
    """Which model: by default a new ViT for pictures of 8 by 8 pixels."""

    model_type: str = field(default="vit", metadata={"help": f"Kind of the new model: {' or '.join(MODEL_TYPES)}."})
    image_size: int = field(default=8, metadata={"help": "Height and width of its images, in pixels."})
    patch_size: int = field(default=2, metadata={"help": "Height and width of its patches; divides image_size."})
    num_channels: int = field(default=1, metadata={"help": "1 for grey images, 3 for colour."})
    hidden_size: int = field(default=64, metadata={"help": "Its width."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Its layers."})
    num_attention_heads: int = field(
        default=4, metadata={"help": "Attention heads of a ViT; divides hidden_size. A ResMLP has none."}
    )
    mlp_ratio: int = field(default=4, metadata={"help": "Width of the MLPs' hidden layer over hidden_size."})
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to the configuration, e.g. 'hidden_dropout_prob=0.1,qkv_bias=false'."},
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Weights (Hub name or folder) to continue from, instead of from scratch."},
    )

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise InputError(f"--model_type {self.model_type} is not known: give {' or '.join(MODEL_TYPES)}.")
        if self.num_channels not in (1, 3):
            raise InputError(f"--num_channels {self.num_channels}: give 1 (grey) or 3 (colour).")
        sizes = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        require_at_least(self, dict.fromkeys(sizes, 1))
        if self.image_size % self.patch_size:
            raise InputError(f"--image_size {self.image_size} is not a multiple of --patch_size {self.patch_size}.")
        if self.model_type == "vit" and self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"--hidden_size {self.hidden_size} is not a multiple of --num_attention_heads "
                f"{self.num_attention_heads}."
            )
        if self.model_name_or_path and self.config_overrides:
            raise InputError("--config_overrides changes a new model; it cannot go with --model_name_or_path.")


@dataclass
class DataTrainingArguments:
    """Which images: by default scikit-learn's handwritten digits."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub, or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    image_column: str = field(default="image", metadata={"help": "The column that holds the images."})
    label_column: str = field(default="label", metadata={"help": "The column that holds the classes."})
    validation_fraction: float = field(
        default=0.2,
        metadata={"help": "Share of each class to hold out where there is no split 'validation' or 'test'."},
    )
    random_shift: int = field(
        default=0, metadata={"help": "Augmentation: move training images by up to so many pixels."}
    )
    random_flip: bool = field(default=False, metadata={"help": "Augmentation: mirror every other training image."})
    random_crop_area: float = field(
        default=1.0,
        metadata={"help": "Augmentation: smallest share of a training image's area that is used; 1 for no crops."},
    )
    eval_crop: float = field(
        default=1.0, metadata={"help": "Side of the middle square that is evaluated over the image's shorter side."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only so many training images, evenly spaced."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only so many evaluation images, likewise."}
    )

    def __post_init__(self) -> None:
        require_fraction(self.validation_fraction)
        for name in ("random_crop_area", "eval_crop"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"--{name} {getattr(self, name)} is not above 0 and at most 1.")
        require_at_least(self, {"random_shift": 0, "max_train_samples": 1, "max_eval_samples": 1})

    @property
    def source(self) -> str:
        """Name of the images, for logs and the model card."""
        return self.dataset_name or data.DIGITS_NAME


def parse_arguments(argv: Sequence[str]) -> tuple[ModelArguments, DataTrainingArguments, TrainingArguments]:
    """Read flags, or a .yaml/.json file given first and flags that override it.

    Raises:
        InputError: A key or flag is unknown, or the file is not a mapping.
    """
    model_args, data_args, training_args = parse(
        argv, [ModelArguments, DataTrainingArguments, TrainingArguments], SCRIPT_DEFAULTS
    )
    return model_args, data_args, training_args
