"""Train an image classifier with `--optim schatten_p`, or any other optimizer of Trainer.

Usage:
    python image_classification.py vit_digits.yaml                       # a small ViT on scikit-learn's digits
    python image_classification.py resmlp_digits.yaml                    # a small ResMLP
    python image_classification.py vit_digits.yaml --learning_rate 1e-3  # a flag overrides the file
    python image_classification.py --dataset_name uoft-cs/cifar10 --image_column img --image_size 32 --num_channels 3
    python image_classification.py --help
"""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from datasets import DatasetDict
from transformers import (
    AutoModelForImageClassification,
    EvalPrediction,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
    set_seed,
)

from recipes.image_classification import data
from recipes.image_classification.arguments import DataTrainingArguments, ModelArguments, parse_arguments
from recipes.image_classification.card import ImageClassificationTrainer, Run
from recipes.image_classification.resmlp import ResMLPConfig
from recipes.recipe_parts.command_line import InputError, checkpoint_to_resume
from recipes.recipe_parts.metrics import load_metric
from recipes.recipe_parts.run_record import run_recipe
from recipes.recipe_parts.splits import sample
from recipes.recipe_parts.terminal import prepare_terminal

logger = logging.getLogger("image_classification")


def load_images(args: DataTrainingArguments) -> DatasetDict:
    """Load the chosen images as the splits `train` and `validation`."""
    if args.dataset_name:
        return data.load_hub_images(
            args.dataset_name,
            args.dataset_config_name,
            args.image_column,
            args.label_column,
            args.validation_fraction,
        )
    return data.load_sklearn_digits(args.validation_fraction)


def build_model(args: ModelArguments, classes: Sequence[str]) -> PreTrainedModel:
    """Make a model with fresh weights, or load the one to continue from, with a head for these classes.

    Raises:
        InputError: The model to continue from takes no images.
    """
    labels = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    if args.model_name_or_path:
        model = AutoModelForImageClassification.from_pretrained(
            args.model_name_or_path, **labels, ignore_mismatched_sizes=True
        )
        if not isinstance(getattr(model.config, "image_size", None), int):
            raise InputError(
                f"--model_name_or_path {args.model_name_or_path}: its configuration has no image_size, which the "
                "recipe needs to scale the images."
            )
        return model
    config = new_config(args)
    config.update(labels)
    if args.config_overrides:
        config.update_from_string(args.config_overrides)
    return AutoModelForImageClassification.from_config(config)


def new_config(args: ModelArguments) -> PretrainedConfig:
    """Describe the new model, of the given kind and size."""
    sizes: dict[str, Any] = {
        "image_size": args.image_size,
        "patch_size": args.patch_size,
        "num_channels": args.num_channels,
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_hidden_layers,
    }
    if args.model_type == "resmlp":
        return ResMLPConfig(**sizes, mlp_ratio=args.mlp_ratio)
    return ViTConfig(
        **sizes, num_attention_heads=args.num_attention_heads, intermediate_size=args.mlp_ratio * args.hidden_size
    )


def accuracy_of() -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the function that Trainer calls after an evaluation, of the `evaluate` module beside the recipes."""
    accuracy = load_metric("accuracy")

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        found = accuracy.compute(predictions=logits.argmax(axis=-1), references=prediction.label_ids)
        return {"accuracy": found["accuracy"]}

    return compute


def main(argv: Sequence[str]) -> None:
    """Load, evaluate, train, evaluate, save."""
    model_args, data_args, training_args = parse_arguments(argv)
    prepare_terminal(training_args)
    checkpoint = checkpoint_to_resume(training_args)
    set_seed(training_args.seed)

    with training_args.main_process_first(desc="images and metric"):
        splits = load_images(data_args)
        compute_metrics = accuracy_of()
    classes = splits["train"].features["label"].names
    train_images = sample(splits["train"], data_args.max_train_samples)
    eval_images = sample(splits["validation"], data_args.max_eval_samples)
    model = build_model(model_args, classes)
    size, channels = model.config.image_size, getattr(model.config, "num_channels", 3)
    augmentation = data.Pixels(
        size,
        channels,
        seed=training_args.seed,
        augmented=True,
        least_area=data_args.random_crop_area,
        shift=data_args.random_shift,
        flip=data_args.random_flip,
    )
    train_images.set_transform(augmentation)
    eval_images.set_transform(data.Pixels(size, channels, central_share=data_args.eval_crop))
    logger.info(
        "%s: %s classes; %s images to train on, %s to evaluate on, of %s by %s pixels",
        *(data_args.source, len(classes), len(train_images), len(eval_images), size, size),
    )
    logger.info("%s parameters", f"{model.num_parameters():,}")

    trainer = ImageClassificationTrainer(
        run=Run(
            command=argv,
            model_args=model_args,
            data_args=data_args,
            pictures={"train": len(train_images), "validation": len(eval_images)},
            classes=len(classes),
        ),
        model=model,
        args=training_args,
        train_dataset=train_images,
        eval_dataset=eval_images,
        data_collator=data.collate,
        compute_metrics=compute_metrics,
        callbacks=[data.EpochOfPixels(augmentation)],
    )
    run_recipe(trainer, checkpoint)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"image_classification.py: error: {error}")
