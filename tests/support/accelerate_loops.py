"""Training loops in the shape of accelerate's own examples, with small models and data of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from accelerate.utils import (
    DataLoaderConfiguration,
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    set_seed,
)
from support_runs import FIRST_P, record_samples, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    get_linear_schedule_with_warmup,
)

import hf_schatten

WORDS, LABELS, LENGTH = 20, 3, 8
ROWS, BATCH, EPOCHS = 40, 4, 2  # of training, of a process' batch
HELD_OUT = 18  # which two processes pad to whole batches
OPTIONS = {"p_init": FIRST_P, "p_first_step": 2, "p_interval": 3, "p": "adaptive", "p_max": 1000.0}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
HOOKS = {"fp16": {}, "power_sgd": {"start_powerSGD_iter": 2, "matrix_approximation_rank": 2}}  # that gloo has too
Found = dict[str, Any]


def sentences(count: int) -> list[dict[str, Any]]:
    """Return sentences of three to eight words, and whether a word is the same as the last, the next or the second."""
    return [
        {"words": [1 + (7 * i + i % LABELS * j) % (WORDS - 1) for j in range(3 + i % 6)], "labels": i % LABELS}
        for i in range(count)
    ]


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return a batch whose sentences are as long as the longest of them."""
    lengths = torch.tensor([len(row["words"]) for row in rows])
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row["words"]) for row in rows], batch_first=True)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}


def model_of(kind: type[nn.Module]) -> nn.Module:
    """Return a small model without dropout, with the same weights at each call.

    An iterator of torch's that goes on within an epoch draws a random number more, so that dropout would draw others.
    """
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": WORDS, "n_positions": LENGTH}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    return kind(GPT2Config(**sizes, **tokens, **NO_DROPOUT, num_labels=LABELS))


def classifier() -> nn.Module:
    return model_of(GPT2ForSequenceClassification)


def classify_text(folder: Path, *, save_at: int = 0, resume_at: int = 0, **options: Any) -> Found:
    """Train, evaluate after each epoch, and save or resume in the middle of one, as ``complete_nlp_example`` does.

    Args:
        folder: of the checkpoint.
        save_at: batch of the run after which the checkpoint is written, 0 for none.
        resume_at: batch from which the checkpoint goes on, 0 to begin anew.
        options: of ``Accelerator``.
    """
    loading = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, dataloader_config=loading, **options)
    set_seed(1)
    model = classifier().to(accelerator.device)
    optimizer = hf_schatten.create_schatten_optimizer(model, 1e-2, verbose=False, **OPTIONS)
    loader = DataLoader(sentences(ROWS), shuffle=True, collate_fn=padded, batch_size=BATCH)
    held_out = DataLoader(sentences(HELD_OUT), collate_fn=padded, batch_size=BATCH)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, len(loader) * EPOCHS)
    model, optimizer, loader, held_out, schedule = accelerator.prepare(model, optimizer, loader, held_out, schedule)
    seen, losses, hits, judged = resume_at, [], [], []
    if resume_at:
        accelerator.load_state(str(folder))
    for epoch in range(resume_at // len(loader), EPOCHS):
        model.train()
        loader.set_epoch(epoch)
        done = seen - epoch * len(loader)
        for batch in accelerator.skip_first_batches(loader, done) if done else loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
            seen += 1
            if seen == save_at:
                accelerator.save_state(str(folder))
        model.eval()
        right = 0
        for batch in held_out:
            with torch.no_grad():
                predictions = model(**batch).logits.argmax(dim=-1)
            predictions, labels = accelerator.gather_for_metrics((predictions, batch["labels"]))
            judged += labels.tolist()
            right += int((predictions == labels).sum())
        hits.append(right)
    end = weights(accelerator.unwrap_model(model))
    accelerator.free_memory()
    return {"losses": losses, "hits": hits, "judged": judged, "weights": end, "p": optimizer.learned_p()}


@contextlib.contextmanager
def recorded() -> Iterator[list[dict[str, int]]]:
    """Record how many rows each estimate is made of."""
    with pytest.MonkeyPatch.context() as patch:
        yield record_samples(patch)


def compressed(hook: str) -> Found:
    """Train with gradients that DDP compresses before it averages them, as ``ddp_comm_hook`` does."""
    kwargs = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType(hook), comm_state_option=HOOKS[hook])
    return classify_text(Path(), kwargs_handlers=[kwargs])


def stopped_early() -> Found:
    """Train until any process wants to stop, as ``early_stopping`` does."""
    accelerator = Accelerator(cpu=True)
    model = classifier()
    optimizer = hf_schatten.create_schatten_optimizer(model, 1e-2, verbose=False, **OPTIONS)
    loader = DataLoader(sentences(ROWS), collate_fn=padded, batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for step, batch in enumerate(loader, start=1):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        if step == 3 and accelerator.process_index == 1:
            accelerator.set_trigger()
        if accelerator.check_trigger():
            break
    steps = optimizer.optimizer.steps_taken()
    return {"steps": steps, "weights": weights(accelerator.unwrap_model(model)), "p": optimizer.learned_p()}


def by_tokens(micro: int) -> Found:
    """Train on losses of all tokens of a step, as ``gradient_accumulation_for_autoregressive_models`` does.

    Args:
        micro: micro-batches of a step and process.
    """
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro)
    model = model_of(GPT2LMHeadModel)
    optimizer = hf_schatten.create_schatten_optimizer(model, 1e-2, verbose=False, p=4)
    size = 8 // micro // accelerator.num_processes
    loader = DataLoader(sentences(32), collate_fn=padded, batch_size=size)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    batches = iter(loader)
    for _ in range(32 // 8):
        several = [next(batches) for _ in range(micro)]
        labels = [batch["input_ids"].where(batch["attention_mask"] > 0, -100) for batch in several]
        targets = torch.stack([each[:, 1:].ne(-100).sum() for each in labels]).sum()
        total = int(accelerator.gather(targets).sum())
        for number, (batch, own) in enumerate(zip(several, labels, strict=True), start=1):
            last = number == micro or accelerator.num_processes == 1
            with contextlib.nullcontext() if last else model.no_sync():
                inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
                loss = model(**inputs, labels=own, use_cache=False, num_items_in_batch=total).loss
                accelerator.backward(loss * micro * accelerator.num_processes)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": weights(accelerator.unwrap_model(model))}


def averaged_now_and_then() -> Found:
    """Train copies whose weights are averaged after every fourth step, as ``local_sgd`` does."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = classifier()
    optimizer = hf_schatten.create_schatten_optimizer(model, 1e-2, verbose=False, **OPTIONS)
    loader = DataLoader(sentences(2 * ROWS), collate_fn=padded, batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=4, enabled=True) as averaging:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                averaging.step()
            losses.append(float(loss.detach()))
    return {"losses": losses, "weights": weights(accelerator.unwrap_model(model)), "p": optimizer.learned_p()}


def all_of_them(folder: str) -> dict[str, Found]:
    """Run every loop of several processes in one of them."""
    with recorded() as samples:
        found = {"straight": classify_text(Path(folder) / "state", save_at=7)}
        found["straight"]["samples"] = list(samples)
    found["resumed"] = classify_text(Path(folder) / "state", resume_at=7)
    found |= {hook: compressed(hook) for hook in HOOKS}
    return found | {
        "stopped": stopped_early(),
        "by tokens": by_tokens(2),
        "averaged": averaged_now_and_then(),
    }
