"""A checkpoint in other hands: it resumes exactly or it is refused, and never without its optimizer's state."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_schatten import CheckpointError, SchattenTrainer, load_learned_p

# Resumes each checkpoint with each optimizer where the package cannot be imported, and prints what came of it.
STRANGER = """
import json, sys
sys.modules["hf_schatten"] = None
import torch
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

rows = [torch.arange(start, start + 16) % 64 for start in range(64)]
for case in sys.argv[1:]:
    checkpoint, optim = case.split(",")
    model = GPT2LMHeadModel.from_pretrained(checkpoint)
    arguments = TrainingArguments(
        "unused", optim=optim, max_steps=6, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, learning_rate=1e-3,
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        print("OUTCOME", json.dumps([case, "continued", trainer.lr_scheduler.get_last_lr()[0]]))
    except Exception as error:
        print("OUTCOME", json.dumps([case, type(error).__name__, str(error)]))
"""


def run(trainer_class, output, checkpoint=None, **arguments):
    """Train a small model to step six, saving at step three, and return the trainer."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0)
    defaults = {
        "optim": "schatten_p",
        "optim_args": "p=adaptive,p_interval=50,p_first_step=50",  # no estimate and no pictures: most of the time
        "max_steps": 6,
        "save_steps": 3,
        "logging_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    rows = [torch.arange(start, start + 16) % 64 for start in range(64)]
    trainer = trainer_class(
        GPT2LMHeadModel(config),
        TrainingArguments(str(output), **defaults | arguments),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


@pytest.fixture(scope="module")
def schatten(tmp_path_factory):
    """Return the checkpoint of a SchattenTrainer after three of six steps."""
    output = tmp_path_factory.mktemp("schatten")
    run(SchattenTrainer, output)
    return output / "checkpoint-3"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return the checkpoint of a plain Trainer after three of six steps."""
    output = tmp_path_factory.mktemp("plain")
    run(Trainer, output)
    return output / "checkpoint-3"


def without(checkpoint, name, folder):
    """Return a copy of a checkpoint that lacks a file."""
    copy = shutil.copytree(checkpoint, folder / checkpoint.name)
    (copy / name).unlink()
    return copy


def test_without_the_package_no_optimizer_resumes_without_its_state(plain, schatten, tmp_path):
    bare = without(schatten, "optimizer.pt", tmp_path)
    optimizers = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd")
    cases = [f"{checkpoint},{optim}" for checkpoint in (plain, schatten) for optim in optimizers]
    command = [sys.executable, "-c", STRANGER, *cases, f"{bare},adamw_torch"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    lines = [line.removeprefix("OUTCOME ") for line in result.stdout.splitlines() if line.startswith("OUTCOME ")]
    outcomes = {case: (kind, detail) for case, kind, detail in map(json.loads, lines)}
    assert len(outcomes) == len(cases) + 1, result.stderr
    for case in cases:
        assert outcomes[case] == ("ValueError", "loaded state dict has a different number of parameter groups"), case
    # What the file prevents: a new schedule, which is half way when training ends.
    kind, learning_rate = outcomes[f"{bare},adamw_torch"]
    assert kind == "continued"
    assert learning_rate == pytest.approx(1e-3 / 2, rel=1e-6, abs=0)


def test_a_plain_trainer_refuses_a_schatten_trainers_checkpoint_and_says_who_reads_it(schatten, tmp_path):
    assert (schatten / "optimizer.pt").stat().st_size < 4096
    with pytest.raises(ValueError, match=r"state into optimizer\.safetensors .* Resume with hf_schatten\.SchattenTr"):
        run(Trainer, tmp_path, schatten)
    with pytest.raises(RuntimeError, match="resumes at step 3, but the checkpoint's optimizer state was not loaded"):
        run(Trainer, tmp_path, without(schatten, "optimizer.pt", tmp_path))


@pytest.mark.parametrize("kind", ["plain", "schatten"])
def test_a_schatten_trainer_resumes_both(kind, request, tmp_path):
    checkpoint = request.getfixturevalue(kind)
    run(SchattenTrainer, tmp_path, checkpoint)
    last, expected = tmp_path / "checkpoint-6", checkpoint.with_name("checkpoint-6")
    assert load_learned_p(last) == load_learned_p(expected)
    assert len(load_learned_p(checkpoint)) == 6
    weights = load_file(expected / "model.safetensors")
    for name, value in load_file(last / "model.safetensors").items():
        assert torch.equal(value, weights[name]), name


def test_a_schatten_trainer_with_another_optimizer_refuses_the_state(schatten, tmp_path):
    with pytest.raises(CheckpointError, match=r"state of schatten_p .*this run uses optim='adamw_torch': set optim="):
        run(SchattenTrainer, tmp_path, schatten, optim="adamw_torch", optim_args=None)


def test_a_lost_state_file_is_named(schatten, tmp_path):
    lost = without(schatten, "optimizer.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is missing"):
        run(SchattenTrainer, tmp_path, lost)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors has it, and is missing"):
        load_learned_p(lost)


@pytest.mark.parametrize("trainer_class", [Trainer, SchattenTrainer])
def test_the_state_of_another_optimizer_is_refused_by_name(trainer_class, tmp_path):
    run(Trainer, tmp_path, optim="adamw_torch", optim_args=None)
    with pytest.raises(ValueError, match="not SchattenP's but another optimizer's: resume with the optimizer that wr"):
        run(trainer_class, tmp_path, tmp_path / "checkpoint-3")


class Biased(nn.Module):
    """Has as many groups for Schatten-p as for the optimizers of Trainer, of the same sizes: torch checks no more."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, inputs, labels):
        return {"loss": self.second(self.first(inputs).tanh()).square().mean()}


@pytest.mark.parametrize("pair", ["schatten_p adamw_torch", "schatten_p sgd", "adamw_torch schatten_p"])
def test_groups_of_equal_size_do_not_let_a_foreign_state_through(pair, training_arguments):
    written, resumed = pair.split()
    rows = [{"inputs": torch.ones(8), "labels": 0}] * 32

    def make(optim, checkpoint=None):
        arguments = training_arguments(optim=optim, max_steps=4, save_strategy="steps", save_steps=2)
        trainer = Trainer(Biased(), arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=checkpoint)
        return f"{arguments.output_dir}/checkpoint-2"

    checkpoint = make(written)
    groups = torch.load(f"{checkpoint}/optimizer.pt", weights_only=True)["param_groups"]
    assert [len(group["params"]) for group in groups] == [2, 2]
    with pytest.raises((KeyError, ValueError), match=r"exp_avg|dampening|not SchattenP's but another optimizer's"):
        make(resumed, checkpoint)


def vit(seed):
    torch.manual_seed(seed)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **size))


class Weights(TrainerCallback):
    """Keeps the weights that training starts from."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.first = {name: value.clone() for name, value in model.state_dict().items()}


def test_weights_that_are_stored_under_other_names_resume(training_arguments):
    generator = torch.Generator().manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": i % 2} for i in range(32)]
    arguments = training_arguments(
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_step",
        greater_is_better=False,  # the earlier is the better
    )
    last = {}

    def train(seed, checkpoint=None):
        start = Weights()
        step = iter((2.0, 4.0) if checkpoint is None else (4.0,))
        trainer = SchattenTrainer(
            vit(seed),
            arguments,
            train_dataset=rows,
            eval_dataset=rows[:4],
            compute_metrics=lambda _: {"step": next(step)},
            callbacks=[start],
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        last[seed] = load_file(f"{arguments.output_dir}/checkpoint-4/model.safetensors")
        return start.first, dict(trainer.model.state_dict())

    middle = f"{arguments.output_dir}/checkpoint-2"
    _, best = train(seed=0)
    stored = load_file(f"{middle}/model.safetensors")
    assert "vit.layers.0.attention.q_proj.weight" not in stored  # else the test shows nothing
    renamed = "vit.encoder.layer.0.attention.attention.query.weight"
    assert torch.equal(best["vit.layers.0.attention.q_proj.weight"], stored[renamed])
    assert not torch.equal(stored[renamed], last[0][renamed])

    started, best_of_resumed = train(seed=1, checkpoint=middle)
    for name in best:
        assert torch.equal(started[name], best[name]), name
        assert torch.equal(best_of_resumed[name], best[name]), name
    for name in last[0]:
        assert torch.equal(last[0][name], last[1][name]), name


@pytest.mark.parametrize(
    ("kind", "name"), [("plain", "optimizer.pt"), ("plain", "model.safetensors"), ("schatten", "model.safetensors")]
)
def test_a_truncated_file_names_the_checkpoint(kind, name, request, tmp_path):
    checkpoint = shutil.copytree(request.getfixturevalue(kind), tmp_path / "checkpoint-3")
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"A file of .*checkpoint-3 is truncated.*from an earlier checkpoint"):
        run(SchattenTrainer, tmp_path, checkpoint)
