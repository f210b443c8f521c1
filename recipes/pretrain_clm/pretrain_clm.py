"""Pretrain a causal language model from scratch with `--optim schatten_p`, or any other optimizer of Trainer.

Usage:
    python pretrain_clm.py gpt2_stdlib.yaml                       # the default job, on the embedded corpus
    python pretrain_clm.py gpt2_stdlib.yaml --learning_rate 1e-3  # a flag overrides the file
    python pretrain_clm.py --train_file my.txt --optim schatten_p --max_steps 500
    python pretrain_clm.py --help
"""

import logging
import sys
from collections.abc import Sequence

from datasets import Dataset, DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from recipes.pretrain_clm import data
from recipes.pretrain_clm.arguments import DataTrainingArguments, ModelArguments, parse_arguments
from recipes.pretrain_clm.card import PretrainingTrainer, Run
from recipes.recipe_parts import blocks
from recipes.recipe_parts.command_line import InputError, checkpoint_to_resume
from recipes.recipe_parts.documents import load_files, load_hub_dataset
from recipes.recipe_parts.language_model import require_context
from recipes.recipe_parts.run_record import run_recipe
from recipes.recipe_parts.splits import sample
from recipes.recipe_parts.terminal import prepare_terminal

logger = logging.getLogger("pretrain_clm")


def load_documents(args: DataTrainingArguments) -> DatasetDict:
    """Load the chosen text as the splits `train` and `validation`."""
    columns = {"text": args.text_column}
    if args.dataset_name:
        return load_hub_dataset(args.dataset_name, args.dataset_config_name, columns, args.validation_fraction)
    if args.train_file:
        return load_files(args.train_file, args.validation_file, columns, args.validation_fraction)
    return data.load_python(data.source_root(args.python_source), args.validation_fraction)


def load_tokenizer(args: ModelArguments, train_documents: Dataset) -> PreTrainedTokenizerBase:
    """Load the chosen tokenizer, or train one on the train split."""
    if name := args.tokenizer_name or args.model_name_or_path:
        return AutoTokenizer.from_pretrained(name)
    return blocks.train_tokenizer(train_documents, args.vocab_size)


def build_model(args: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int) -> PreTrainedModel:
    """Make a model with fresh weights, or load the one to continue from.

    Raises:
        InputError: The model cannot take blocks of this size, or its shape is impossible.
    """
    if args.model_name_or_path:
        if args.config_overrides:
            raise InputError("--config_overrides changes a new model; it cannot go with --model_name_or_path.")
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, tp_plan=args.tp_plan)
    else:
        if args.tp_plan:
            raise InputError("--tp_plan cuts weights that are loaded: it goes with --model_name_or_path.")
        config = new_config(args, tokenizer, block_size)
        model = AutoModelForCausalLM.from_config(config)
    require_context(model.config, block_size)
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer))
    return model


def new_config(args: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int) -> PretrainedConfig:
    """Describe the new model: a GPT-2 of the given size, or `--config_name`, for the tokenizer's tokens."""
    vocabulary = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if args.config_name:
        config = AutoConfig.from_pretrained(args.config_name, **vocabulary)
    else:
        if args.n_embd % args.n_head:
            raise InputError(f"--n_embd {args.n_embd} is not a multiple of --n_head {args.n_head}.")
        config = GPT2Config(
            n_layer=args.n_layer,
            n_embd=args.n_embd,
            n_head=args.n_head,
            n_positions=block_size,
            embd_pdrop=args.dropout,
            attn_pdrop=args.dropout,
            resid_pdrop=args.dropout,
            **vocabulary,
        )
    if args.config_overrides:
        config.update_from_string(args.config_overrides)
    return config


def main(argv: Sequence[str]) -> None:
    """Load, tokenize, evaluate, train, evaluate, save."""
    model_args, data_args, training_args = parse_arguments(argv)
    prepare_terminal(training_args)
    checkpoint = checkpoint_to_resume(training_args)
    set_seed(training_args.seed)

    with training_args.main_process_first(desc="text and tokenizer"):
        documents = load_documents(data_args)
        tokenizer = load_tokenizer(model_args, documents["train"])
        examples = blocks.make_blocks(
            documents,
            tokenizer,
            data_args.block_size,
            data_args.preprocessing_num_workers,
            data_args.overwrite_cache,
        )
    train_blocks = sample(examples["train"], data_args.max_train_samples)
    eval_blocks = sample(examples["validation"], data_args.max_eval_samples)
    model = build_model(model_args, tokenizer, data_args.block_size)
    logger.info(
        "%s: %s documents; blocks of %s tokens: %s to train on, %s to evaluate on",
        *(data_args.source, len(documents["train"]), data_args.block_size, len(train_blocks), len(eval_blocks)),
    )
    logger.info("%s parameters, vocabulary of %s tokens", f"{model.num_parameters():,}", len(tokenizer))

    trainer = PretrainingTrainer(
        run=Run(
            model_args=model_args,
            data_args=data_args,
            command=argv,
            documents={split: len(rows) for split, rows in documents.items()},
            blocks={"train": len(train_blocks), "validation": len(eval_blocks)},
            vocabulary=len(tokenizer),
        ),
        model=model,
        args=training_args,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        processing_class=tokenizer,
        data_collator=blocks.collate,
    )
    run_recipe(trainer, checkpoint)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"pretrain_clm.py: error: {error}")
