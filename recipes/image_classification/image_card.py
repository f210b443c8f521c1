"""The recipe's Trainer and its model card, in the form of `model_cards/template.md`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import images
from image_arguments import DataTrainingArguments, ModelArguments
from recipe_parts.run_record import (
    RecipeTrainer,
    RunRecord,
    circumstances,
    command_line,
    description,
    examples_per_step,
    hub_name,
    quantity,
    results,
    source_name,
)
from transformers import PreTrainedModel

SCRIPT = "recipes/image_classification/image_classification.py"
TASK = "image-classification"
SIZES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "images": "image_size",
    "patches": "patch_size",
}

INTENDED_USE = (
    "Research on optimizers: the model shows what a run with this optimizer gives. It tells apart the classes that it "
    "was trained on, in images of the same kind, and names one of them whatever it is shown."
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

    quantities: ClassVar[Mapping[str, str]] = {"loss": "loss", "accuracy": "accuracy"}
    run: Run

    def card_metadata(self) -> dict[str, Any]:
        """Return task, and base model and data set where they have a name on the Hub."""
        dataset = hub_name(self.run.data_args.dataset_name)
        return {
            "tasks": TASK,
            "pipeline_tag": TASK,
            "finetuned_from": hub_name(self.run.model_args.model_name_or_path),
            "dataset": self.run.data_args.source,
            "dataset_tags": [] if dataset is None else [dataset],
        }

    def card_texts(self) -> dict[str, str]:
        """Return what the template names beyond a Trainer's record."""
        assert isinstance(self.model, PreTrainedModel)
        size, source = quantity(self.model.num_parameters()), source_name(self.run.data_args.source)
        pictures = examples_per_step(self)
        return {
            "title": f"A classifier of {size} parameters for {source}",
            "description": description(
                self,
                sizes=SIZES,
                base=self.run.model_args.model_name_or_path,
                batch=f"{pictures:,} images, {quantity(self.state.global_step * pictures)} in all",
                script=SCRIPT,
            ),
            "intended_use": INTENDED_USE,
            "data": _data(self.run),
            "results": results(self.run.metrics, self.quantities),
            "circumstances": circumstances(self, self.run.seconds),
            "command": command_line(SCRIPT, self.run.command),
        }


def _data(run: Run) -> str:
    counts = f"{run.pictures['train']:,} to train on, {run.pictures['validation']:,} to evaluate on"
    if run.data_args.source == images.DIGITS_NAME:
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
