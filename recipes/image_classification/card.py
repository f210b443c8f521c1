"""The recipe's Trainer and its model card, in the form of `model_cards/template.md`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from recipes.image_classification import data
from recipes.image_classification.arguments import DataTrainingArguments, ModelArguments
from recipes.recipe_parts.run_record import (
    RecipeTrainer,
    RunRecord,
    examples_per_step,
    quantity,
    source_name,
    whole_model,
)


@dataclass(kw_only=True)
class Run(RunRecord):
    """What a Trainer does not know of its run.

    Attributes:
        model_args: Which model.
        data_args: Which images.
        pictures: Number of images used of each split.
        classes: Number of classes.
    """

    model_args: ModelArguments
    data_args: DataTrainingArguments
    pictures: Mapping[str, int]
    classes: int


class ImageClassificationTrainer(RecipeTrainer):
    """The recipe's Trainer: writes the recipe's card."""

    script = "recipes/image_classification/image_classification.py"
    task = "image-classification"
    sizes: ClassVar[Mapping[str, str]] = {
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "images": "image_size",
        "patches": "patch_size",
    }
    intended_use = (
        "Research on optimizers: the model shows what a run with this optimizer gives. It tells apart the classes "
        "that it was trained on, in images of the same kind, and names one of them whatever it is shown."
    )
    quantities: ClassVar[Mapping[str, str]] = {"loss": "loss", "accuracy": "accuracy"}
    run: Run

    def title(self) -> str:
        """Name the size and the images."""
        size = quantity(whole_model(self).num_parameters())
        return f"A classifier of {size} parameters for {source_name(self.run.data_args.source)}"

    def batch(self) -> str:
        """Count images."""
        pictures = examples_per_step(self)
        return f"{pictures:,} images, {quantity(self.state.global_step * pictures)} in all"

    def data(self) -> str:
        """Say which images there are, and how they are augmented."""
        return _data(self.run)


def _data(run: Run) -> str:
    counts = f"{run.pictures['train']:,} to train on, {run.pictures['validation']:,} to evaluate on"
    if run.data_args.source == data.DIGITS_NAME:
        origin = (
            f"The handwritten digits of scikit-learn, 8 by 8 pixels, grey: {counts}. The same share of every digit is "
            "held out, chosen by a hash of the images' numbers; writers are not kept apart."
        )
    else:
        origin = f"{source_name(run.data_args.source)}, {run.classes:,} classes: {counts}."
    return f"{origin}\n\n{_augmentation(run.data_args)}"


def _augmentation(args: DataTrainingArguments) -> str:
    parts = []
    if args.random_crop_area < 1:
        parts.append(f"random parts of at least {args.random_crop_area:.0%} of their area")
    if args.random_shift:
        parts.append(f"shifts by up to {args.random_shift} pixel{'s' if args.random_shift > 1 else ''}")
    if args.random_flip:
        parts.append("random flips from left to right")
    return f"Training images are augmented: {', '.join(parts)}." if parts else "Training images are not augmented."
