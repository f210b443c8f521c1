"""Rows of the table of support: loops in the shape of accelerate's own examples, on one process and on two."""

from __future__ import annotations

import gc

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, find_executable_batch_size
from accelerate_loops import (
    BATCH,
    EPOCHS,
    HELD_OUT,
    HOOKS,
    LABELS,
    OPTIONS,
    ROWS,
    all_of_them,
    by_tokens,
    classifier,
    classify_text,
    padded,
    recorded,
    sentences,
)
from processes import together
from support_runs import FIRST_P, check_close, check_equal, weights
from torch.utils.data import DataLoader
from transformers import ResNetConfig, ResNetForImageClassification

import hf_schatten

THEME = "Trainers"
STEPS = EPOCHS * ROWS // BATCH


@pytest.fixture(autouse=True)
def new_state():
    """Forget the precision of the accelerator before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return what each of two processes gets from each loop."""
    folder = tmp_path_factory.mktemp("accelerate")
    return together(all_of_them, 2, folder, str(folder))


def check_learning(found):
    losses = found["losses"]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert FIRST_P not in found["p"].values()


@pytest.mark.supports(
    THEME, "accelerate's `complete_nlp_example`", "bf16, `skip_first_batches`: a resume within an epoch is exact"
)
def test_complete_nlp_example(tmp_path):
    with recorded() as samples:
        straight = classify_text(tmp_path, save_at=14, mixed_precision="bf16", gradient_accumulation_steps=2)
    resumed = classify_text(tmp_path, resume_at=14, mixed_precision="bf16", gradient_accumulation_steps=2)
    check_learning(straight)
    assert straight["losses"][14:] == resumed["losses"]
    check_equal(straight["weights"], resumed["weights"])
    assert straight["p"] == resumed["p"]
    assert len(samples) == 1 + STEPS // 2 // 3
    for counts in samples:  # of sentences of three to eight words, and not of the evaluation before step 6
        assert 2 * BATCH * 3 < counts.popitem()[1] < 2 * BATCH * 8


@pytest.mark.supports(
    THEME, "accelerate's `complete_cv_example`", "a ResNet with `OneCycleLR`, a checkpoint after each epoch"
)
def test_complete_cv_example(tmp_path):
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(LABELS, 3, 8, 8, generator=generator)
    images = [
        {"pixel_values": prototypes[i % LABELS] + torch.randn(3, 8, 8, generator=generator), "labels": i % LABELS}
        for i in range(ROWS)
    ]

    def train(start=0):
        checkpoints = ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True, total_limit=1)
        accelerator = Accelerator(cpu=True, project_config=checkpoints if not start else None)
        torch.manual_seed(0)
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        model = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=LABELS)).to(accelerator.device)
        optimizer = hf_schatten.create_schatten_optimizer(model, 1e-2 / 25, verbose=False, **OPTIONS)
        loader = DataLoader(images, batch_size=BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=1e-2, epochs=EPOCHS, steps_per_epoch=len(loader)
        )
        model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
        if start:
            accelerator.load_state(str(tmp_path / "checkpoints" / "checkpoint_0"))
        losses, momenta = [], []
        for epoch in range(start, EPOCHS):
            model.train()
            for batch in loader:
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                momenta.append(optimizer.param_groups[0]["momentum"])
            if epoch == 0:
                accelerator.save_state()
        return {"losses": losses, "p": optimizer.learned_p(), "weights": weights(model), "momenta": momenta}

    straight, resumed = train(), train(start=1)
    check_learning(straight)
    assert straight["losses"][ROWS // BATCH :] == resumed["losses"]
    check_equal(straight["weights"], resumed["weights"])
    assert straight["momenta"][ROWS // BATCH :] == resumed["momenta"]
    assert min(straight["momenta"]) < 0.86  # it is cycled, between 0.85 and 0.95
    assert max(straight["momenta"]) > 0.94


@pytest.mark.supports(
    THEME,
    "`find_executable_batch_size` of accelerate",
    "the try that did not fit leaves no hooks; accumulation makes up for the batch",
)
@pytest.mark.parametrize("model_is_kept", [False, True])
def test_find_executable_batch_size(model_is_kept, caplog):
    kept = classifier() if model_is_kept else None
    before, tried = weights(classifier()), []

    def train(starting_batch_size):
        @find_executable_batch_size(starting_batch_size=starting_batch_size)
        def loop(batch_size):
            tried.append(batch_size)
            accumulated = 16 // batch_size
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
            accelerator.free_memory()
            model = kept or classifier()
            model.load_state_dict(before)
            model.train()
            optimizer = hf_schatten.create_schatten_optimizer(model, 1e-2, verbose=False, **OPTIONS)
            loader = DataLoader(3 * sentences(ROWS - ROWS % 16), collate_fn=padded, batch_size=batch_size)
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            for number, batch in enumerate(loader, start=1):
                with accelerator.accumulate(model):
                    loss = model(**batch).loss
                    if batch_size > 4 and number > accumulated:  # at the second step, whose forwards are sampled
                        raise RuntimeError("CUDA out of memory.")
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
            return weights(model), optimizer.learned_p(), sum(len(each._forward_hooks) for each in model.modules())

        return loop()

    weights_, p, hooks = train(5)
    assert tried == [5, 4]
    assert FIRST_P not in p.values()
    gc.collect()  # the optimizer of the loop above, with its hooks
    plain, plain_p, plain_hooks = train(4)
    check_equal(weights_, plain)
    assert (p, hooks) == (plain_p, plain_hooks)
    assert "Two optimizers" not in caplog.text


def check_same_on_both(pair, name):
    first, second = (found[name] for found in pair)
    check_equal(first["weights"], second["weights"])
    assert first["p"] == second["p"]
    assert FIRST_P not in first["p"].values()
    return first, second


@pytest.mark.supports(
    THEME,
    "accelerate's `multi_process_metrics`, `checkpointing`",
    "two processes: `gather_for_metrics` counts each row once, evaluation is not sampled, a resume is exact",
)
def test_metrics_and_checkpoints_of_two_processes(pair):
    straight = check_same_on_both(pair, "straight")
    resumed = check_same_on_both(pair, "resumed")
    for whole, rest in zip(straight, resumed, strict=True):
        check_learning(whole)
        assert whole["losses"][7:] == rest["losses"]
        check_equal(whole["weights"], rest["weights"])
        assert whole["judged"] == EPOCHS * [i % LABELS for i in range(HELD_OUT)]
        assert len(whole["samples"]) == 1 + STEPS // 2 // 3
        for counts in whole["samples"]:
            assert BATCH * 3 < counts.popitem()[1] < BATCH * 8
    assert straight[0]["losses"] != straight[1]["losses"]


@pytest.mark.supports(
    THEME,
    "accelerate's `ddp_comm_hook`",
    "fp16 and PowerSGD; p is that of the compressed gradients, and the same on both processes",
)
def test_ddp_communication_hooks(pair):
    plain = pair[0]["straight"]
    for hook in HOOKS:
        for found in check_same_on_both(pair, hook):
            check_learning(found)
    compressed = pair[0]["fp16"]
    check_close(plain["weights"], compressed["weights"], atol=1e-3, rtol=1e-2)
    assert compressed["losses"] != plain["losses"]
    assert pair[0]["power_sgd"]["p"] != plain["p"]


@pytest.mark.supports(
    THEME, "accelerate's `early_stopping`", "`set_trigger` on one process stops both at the same step"
)
def test_early_stopping(pair):
    for found in check_same_on_both(pair, "stopped"):
        assert found["steps"] == 3


@pytest.mark.supports(
    THEME,
    "accelerate's `gradient_accumulation_for_autoregressive_models`",
    "two processes with `no_sync` train as one with the whole batch",
)
def test_losses_of_all_tokens_of_a_step(pair):
    alone = by_tokens(1)["weights"]
    for found in (alone, *(found["by tokens"]["weights"] for found in pair)):
        del found["transformer.h.0.attn.c_attn.bias"]  # the keys' has no gradient, and AdamW follows its rounding
        check_close(alone, found, atol=3e-5, rtol=1e-3)


@pytest.mark.supports(
    THEME,
    "accelerate's `local_sgd`",
    "each process has a p of its own, and the weights are averaged",
)
def test_local_sgd(pair):
    first, second = (found["averaged"] for found in pair)
    for found in (first, second):
        check_learning(found)
    check_equal(first["weights"], second["weights"])
    assert first["p"] != second["p"]
