"""Fine-tune a causal language model with LoRA and `--optim schatten_p`, or any other optimizer of Trainer.

Usage:
    python lora_sft.py gpt2_headers.yaml                       # the model of pretrain_clm, on torch's C++ headers
    python lora_sft.py gpt2_headers.yaml --learning_rate 1e-3  # a flag overrides the file
    python lora_sft.py llama3_gsm8k.yaml                       # Llama 3 8B on GSM8K, on a GPU
    python lora_sft.py --train_file my.jsonl --prompt_column question --completion_column answer --optim schatten_p
    python lora_sft.py --help
"""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import DatasetDict
from transformers import AutoTokenizer, EvalPrediction, PreTrainedTokenizerBase, set_seed

from recipes.lora_sft import data, prompts
from recipes.lora_sft.adapters import add_adapters, load_base, require_base
from recipes.lora_sft.answers import AnswerCheck
from recipes.lora_sft.arguments import DataTrainingArguments, parse_arguments
from recipes.lora_sft.card import AdapterTrainer, AnsweringTrainer, Run, next_token_ids
from recipes.recipe_parts import blocks
from recipes.recipe_parts.command_line import InputError, checkpoint_to_resume
from recipes.recipe_parts.documents import load_files, load_hub_dataset
from recipes.recipe_parts.language_model import require_context
from recipes.recipe_parts.metrics import load_metric
from recipes.recipe_parts.run_record import run_recipe
from recipes.recipe_parts.splits import sample
from recipes.recipe_parts.terminal import prepare_terminal

VALIDATION_SPLITS = ("validation", "test")

logger = logging.getLogger("lora_sft")


def load_rows(args: DataTrainingArguments) -> DatasetDict:
    """Load the chosen text, or prompts with completions, as the splits `train` and `validation`."""
    if args.dataset_name:
        return load_hub_dataset(
            args.dataset_name, args.dataset_config_name, args.columns, args.validation_fraction, VALIDATION_SPLITS
        )
    if args.train_file:
        return load_files(args.train_file, args.validation_file, args.columns, args.validation_fraction)
    return data.load_headers(args.validation_fraction)


def make_examples(rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, args: DataTrainingArguments) -> DatasetDict:
    """Cut text into blocks, or put completions behind their prompts."""
    how: Any = {"num_workers": args.preprocessing_num_workers, "overwrite_cache": args.overwrite_cache}
    if args.prompt_column is None:
        return blocks.make_blocks(rows, tokenizer, args.block_size, **how)
    return prompts.make_examples(rows, tokenizer, args.prompt_template, args.block_size, **how)


def token_accuracy() -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the function that Trainer calls after an evaluation, of the `evaluate` module beside the recipes."""
    accuracy = load_metric("accuracy")

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        predictions, label_ids = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        predicted, labels = predictions[:, :-1], label_ids[:, 1:]  # of the token before
        counted = labels != prompts.IGNORED
        found = accuracy.compute(predictions=predicted[counted], references=labels[counted])
        return {"accuracy": found["accuracy"]}

    return compute


def main(argv: Sequence[str]) -> None:
    """Load, evaluate the base model, train adapters, evaluate, save."""
    model_args, data_args, training_args = parse_arguments(argv)
    prepare_terminal(training_args)
    require_base(model_args.model_name_or_path)
    checkpoint = checkpoint_to_resume(training_args)
    set_seed(training_args.seed)

    with training_args.main_process_first(desc="data, tokenizer and metrics"):
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
        rows = load_rows(data_args)
        examples = make_examples(rows, tokenizer, data_args)
        compute_metrics = token_accuracy()
        answering = {}
        if data_args.max_new_tokens is not None:
            answering["check"] = AnswerCheck(tokenizer, data_args.answer_pattern, data_args.max_new_tokens)
    train_examples = sample(examples["train"], data_args.max_train_samples)
    eval_examples = sample(examples["validation"], data_args.max_eval_samples)
    for check in answering.values():
        check.require_answers(eval_examples)
    base = load_base(model_args, training_args)
    require_context(base.config, data_args.block_size)
    model = add_adapters(base, model_args, training_args)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info(
        "%s: %s examples to train on, %s to evaluate on, of %s tokens at most",
        *(data_args.source, len(train_examples), len(eval_examples), data_args.block_size),
    )
    logger.info("%s of %s parameters are trained", f"{trained:,}", f"{base.num_parameters():,}")

    trainer = (AnsweringTrainer if answering else AdapterTrainer)(
        **answering,
        run=Run(
            command=argv,
            model_args=model_args,
            data_args=data_args,
            rows={split: len(split_rows) for split, split_rows in rows.items()},
            examples={"train": len(train_examples), "validation": len(eval_examples)},
            trained=trained,
        ),
        model=model,
        args=training_args,
        train_dataset=train_examples,
        eval_dataset=eval_examples,
        processing_class=tokenizer,
        data_collator=blocks.collate if data_args.prompt_column is None else prompts.Padding(tokenizer.eos_token_id),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=next_token_ids,
    )
    run_recipe(trainer, checkpoint)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"lora_sft.py: error: {error}")
