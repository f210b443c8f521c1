"""Classifies pairs of sentences from JSON files, as a stranger would with transformers: knows no other package."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class ModelArguments:
    config_name: str = field(metadata={"help": "Folder with the model's configuration and its tokenizer."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where prepared data is kept."})


@dataclass
class DataTrainingArguments:
    train_file: str = field(metadata={"help": "JSON lines with sentence1, sentence2 and label."})
    validation_file: str = field(metadata={"help": "The same, to evaluate on."})
    max_seq_length: int = field(default=32, metadata={"help": "Tokens that a pair is cut to."})


def accuracy(prediction):
    return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    pairs = load_dataset(
        "json",
        data_files={"train": data_args.train_file, "validation": data_args.validation_file},
        cache_dir=model_args.cache_dir,
    )
    labels = sorted(pairs["train"].unique("label"))
    config = AutoConfig.from_pretrained(model_args.config_name, num_labels=len(labels))
    tokenizer = AutoTokenizer.from_pretrained(model_args.config_name)
    model = AutoModelForSequenceClassification.from_config(config)
    model.config.label2id = {label: i for i, label in enumerate(labels)}
    model.config.id2label = dict(enumerate(labels))

    def preprocess(examples):
        result = tokenizer(
            examples["sentence1"], examples["sentence2"], max_length=data_args.max_seq_length, truncation=True
        )
        result["label"] = [model.config.label2id[label] for label in examples["label"]]
        return result

    with training_args.main_process_first(desc="tokens"):
        pairs = pairs.map(preprocess, batched=True)

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=pairs["train"],
        eval_dataset=pairs["validation"],
        compute_metrics=accuracy,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate(eval_dataset=pairs["validation"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.create_model_card(tasks="text-classification")


if __name__ == "__main__":
    main()
