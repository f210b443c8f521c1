"""Classifies a folder of images, as a stranger would with transformers: knows no other package."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class DataTrainingArguments:
    train_dir: str = field(metadata={"help": "Folder with one folder of images per class."})
    train_val_split: float = field(default=0.25, metadata={"help": "Share of the images to evaluate on."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where prepared data is kept."})


@dataclass
class ModelArguments:
    config_name: str = field(metadata={"help": "Folder with the model's configuration."})


def to_pixels(examples):
    """Turn the images of a batch into tensors (channels, height, width) in [-1, 1]."""
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 127.5 - 1 for image in examples["image"]]
    examples["pixel_values"] = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    return examples


def collate_fn(examples):
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["label"] for example in examples]),
    }


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    images = load_dataset("imagefolder", data_dir=data_args.train_dir, cache_dir=data_args.cache_dir)
    images = images["train"].train_test_split(data_args.train_val_split, seed=training_args.seed)
    names = images["train"].features["label"].names
    config = AutoConfig.from_pretrained(
        model_args.config_name,
        num_labels=len(names),
        label2id={name: i for i, name in enumerate(names)},
        id2label=dict(enumerate(names)),
    )
    model = AutoModelForImageClassification.from_config(config)
    images["train"].set_transform(to_pixels)
    images["test"].set_transform(to_pixels)

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=images["train"],
        eval_dataset=images["test"],
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(axis=1) == p.label_ids).mean())},
        data_collator=collate_fn,
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.create_model_card(tasks="image-classification")


if __name__ == "__main__":
    main()
