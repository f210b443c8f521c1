"""The base model, frozen, in full or 4-bit precision, and LoRA's matrices beside its own."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TrainingArguments
from transformers.pytorch_utils import Conv1D

from recipes.lora_sft.arguments import ALL_LINEAR, DEFAULT_BASE, ModelArguments
from recipes.recipe_parts.command_line import InputError


def require_base(name: str) -> None:
    """Check that the default base model has been trained, before anything else takes time.

    Raises:
        InputError: It has not.
    """
    folder = Path(name)
    complete = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    if name == DEFAULT_BASE and not complete:
        raise InputError(
            f"there is no base model in {DEFAULT_BASE} (looked in {Path.cwd()}): run `make train` in the repository's "
            "root, which trains it in minutes, or give --model_name_or_path."
        )


def load_base(args: ModelArguments, training_args: TrainingArguments) -> PreTrainedModel:
    """Load the model that is fine-tuned.

    Raises:
        InputError: 4-bit weights are wanted where they cannot be had.
    """
    options: dict[str, Any] = {"dtype": args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)}
    if args.load_in_4bit:
        options |= _four_bit(training_args)
    return AutoModelForCausalLM.from_pretrained(args.model_name_or_path, **options)


def add_adapters(base: PreTrainedModel, args: ModelArguments, training_args: TrainingArguments) -> PeftModel:
    """Freeze a model, and give each of its chosen layers a pair of matrices that are trained.

    Raises:
        InputError: No layer of the model has the names asked for.
    """
    if args.load_in_4bit:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=training_args.gradient_checkpointing)
    elif training_args.gradient_checkpointing:
        base.enable_input_require_grads()  # else nothing below the first checkpoint has a gradient
    names = args.lora_target_modules
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,  # type: ignore[arg-type] # a factor, which may be any number
        lora_dropout=args.lora_dropout,
        target_modules=names if names == ALL_LINEAR else re.split(r"\s*,\s*", names.strip()),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise InputError(f"--lora_target_modules {names}: {error}") from error
    assert isinstance(model, PeftModel)
    return model


def _four_bit(training_args: TrainingArguments) -> dict[str, Any]:
    """Return what `from_pretrained` needs for weights of 4 bits (QLoRA's NF4)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("--load_in_4bit needs the package bitsandbytes: pip install bitsandbytes, or leave it out.")
    if training_args.device.type == "cpu":
        raise InputError("--load_in_4bit needs a GPU, and this run is on a CPU: leave it out.")
    compute = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        ),
        "device_map": {"": training_args.device},
    }
