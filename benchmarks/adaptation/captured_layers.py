"""Gradients and inputs of a GPT-2's layers, captured from a short training run on the standard library's source.

A capture is kept as one safetensors file a run, so that a benchmark repeats in seconds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from hf_schatten import create_schatten_optimizer
from recipes.pretrain_clm import data
from recipes.recipe_parts import blocks

_VALIDATION_FRACTION = 0.05  # the recipe's; its train split is the text here


@dataclass(frozen=True)
class TrainingRun:
    """A model, its text and the steps whose layers are captured.

    Attributes:
        name: For the tables and the cache's file.
        width: Model width; the layers' sides are this, three times and four times this.
        layers: Blocks of four layers.
        stages: Training steps whose gradients and inputs are captured, counted from 1.
        documents: Files of the standard library to train on, evenly spaced.
        vocabulary: Tokens of the tokenizer.
        block: Tokens in a sequence.
        batch: Sequences in a training step.
        captured_batch: Sequences in a step that is captured.
        learning_rate: Of matrices and of everything else; with a warm-up over the first 20 steps.
        p: Exponent of the update, fixed, so that what is measured does not choose what it is measured on.
    """

    name: str
    width: int
    layers: int
    stages: tuple[int, ...]
    documents: int = 160
    vocabulary: int = 4096
    block: int = 256
    batch: int = 4
    captured_batch: int = 16
    learning_rate: float = 2e-3
    p: float = 4.0


NARROW = TrainingRun("width 256", width=256, layers=3, stages=(10, 50, 150))
WIDE = TrainingRun("width 768", width=768, layers=2, stages=(10, 50, 150))
TINY = TrainingRun(
    "tiny", width=16, layers=1, stages=(2, 4), documents=8, vocabulary=300, block=16, batch=2, captured_batch=8
)


@dataclass(frozen=True)
class CapturedLayer:
    """One layer at one step.

    Attributes:
        run: Name of the run.
        step: Training step, counted from 1.
        name: Name of the layer in the model.
        gradient: As the parameter's: (in, out), since GPT-2's layers are ``Conv1D``.
        inputs: One row a token, (tokens, in).
    """

    run: str
    step: int
    name: str
    gradient: Tensor
    inputs: Tensor


def captured_layers(run: TrainingRun, cache: Path) -> Iterator[CapturedLayer]:
    """Yield every layer at every stage; trains and captures where the cache has no capture of this very run.

    Args:
        run: What to train.
        cache: Folder of the captures, made if there is none.
    """
    path = cache / f"{run.name.replace(' ', '_')}.safetensors"
    if not _holds(path, run):
        cache.mkdir(parents=True, exist_ok=True)
        save_file(dict(_capture(run)), path, metadata={"run": repr(run)})
    with safe_open(path, "pt") as file:
        keys = sorted(file.keys(), key=_stage_and_layer)
        for gradient, inputs in zip(keys[::2], keys[1::2], strict=True):
            step, layer, _ = gradient.split("/")
            yield CapturedLayer(run.name, int(step), layer, file.get_tensor(gradient), file.get_tensor(inputs))


def _holds(path: Path, run: TrainingRun) -> bool:
    if not path.is_file():
        return False
    with safe_open(path, "pt") as file:
        return bool((file.metadata() or {}).get("run") == repr(run))


def _stage_and_layer(key: str) -> tuple[int, str]:
    step, layer = key.split("/", 1)
    return int(step), layer


def _capture(run: TrainingRun) -> Iterator[tuple[str, Tensor]]:
    """Train, and yield gradients and inputs by ``step/layer/kind``."""
    torch.manual_seed(0)
    text = _text(run)
    tokenizer = blocks.train_tokenizer(text, run.vocabulary)
    batches = _batches(run, blocks.make_blocks(DatasetDict(train=text), tokenizer, run.block)["train"])
    model = _model(run, tokenizer)
    modules: Iterator[tuple[str, nn.Module]] = model.transformer.named_modules()
    layers = {name: module for name, module in modules if isinstance(module, Conv1D)}
    optimizer = create_schatten_optimizer(model, run.learning_rate, p=run.p, verbose=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    for step, batch in enumerate(batches, start=1):
        with _recorded_inputs(layers if step in run.stages else {}) as inputs:
            model(input_ids=batch, labels=batch).loss.backward()
        for name, rows in inputs.items():
            gradient = layers[name].weight.grad
            assert gradient is not None
            yield f"{step}/{name}/gradient", gradient.clone()
            yield f"{step}/{name}/inputs", rows
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _text(run: TrainingRun) -> Dataset:
    documents = data.load_python(data.source_root(data.STDLIB), _VALIDATION_FRACTION)["train"]
    total = len(documents)
    return documents.select([row * total // run.documents for row in range(run.documents)])


def _model(run: TrainingRun, tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    config = GPT2Config(
        n_layer=run.layers,
        n_embd=run.width,
        n_head=max(1, run.width // 64),
        n_positions=run.block,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )
    return GPT2LMHeadModel(config).train()


def _batches(run: TrainingRun, sequences: Dataset) -> Iterator[Tensor]:
    """Yield (batch, block) tokens for every step up to the last stage, from the shuffled sequences."""
    tokens = torch.tensor(sequences["input_ids"][:])  # (sequences, block)
    tokens = tokens[torch.randperm(len(tokens))]
    start = 0
    for step in range(1, max(run.stages) + 1):
        size = run.captured_batch if step in run.stages else run.batch
        yield tokens[torch.arange(start, start + size) % len(tokens)]
        start += size


@contextmanager
def _recorded_inputs(layers: dict[str, Conv1D]) -> Iterator[dict[str, Tensor]]:
    """Collect the rows that enter each layer while the context is open, (tokens, in) by name."""
    inputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[name] = arguments[0].detach().flatten(0, -2).clone()

        return record

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    yield inputs
    for handle in handles:
        handle.remove()
