"""Pretrains a causal language model on text files, as a stranger would with transformers: knows no other package."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass, field
from itertools import chain

from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


@dataclass
class ModelArguments:
    config_name: str = field(metadata={"help": "Folder with the model's configuration and its tokenizer."})


@dataclass
class DataArguments:
    train_file: str = field(metadata={"help": "Text to train on, one document per line."})
    validation_file: str | None = field(default=None, metadata={"help": "Text to evaluate on."})
    block_size: int = field(default=16, metadata={"help": "Tokens per sequence."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where prepared data is kept."})


def group_texts(examples, block_size):
    """Join the documents and cut them into blocks; what remains is dropped."""
    joined = {name: list(chain(*documents)) for name, documents in examples.items()}
    length = len(joined["input_ids"]) // block_size * block_size
    blocks = {
        name: [tokens[start : start + block_size] for start in range(0, length, block_size)]
        for name, tokens in joined.items()
    }
    blocks["labels"] = [list(block) for block in blocks["input_ids"]]
    return blocks


def main():
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    print(f"process {training_args.process_index} of {training_args.world_size}", flush=True)
    set_seed(training_args.seed)

    files = {"train": data_args.train_file}
    if data_args.validation_file is not None:
        files["validation"] = data_args.validation_file
    config = AutoConfig.from_pretrained(model_args.config_name)
    tokenizer = AutoTokenizer.from_pretrained(model_args.config_name)
    model = AutoModelForCausalLM.from_config(config)
    with training_args.main_process_first(desc="tokens"):
        texts = load_dataset("text", data_files=files, cache_dir=data_args.cache_dir)
        tokens = texts.map(lambda examples: tokenizer(examples["text"]), batched=True, remove_columns=["text"])
        blocks = tokens.map(group_texts, batched=True, fn_kwargs={"block_size": data_args.block_size})

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=blocks["train"] if training_args.do_train else None,
        eval_dataset=blocks["validation"] if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    if training_args.do_train:
        checkpoint = training_args.resume_from_checkpoint
        if checkpoint is None and os.path.isdir(training_args.output_dir):
            checkpoint = get_last_checkpoint(training_args.output_dir)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        metrics = result.metrics | {"train_samples": len(blocks["train"])}
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.create_model_card(tasks="text-generation", dataset=os.path.basename(data_args.train_file))


if __name__ == "__main__":
    main()
