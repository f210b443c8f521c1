"""The benchmark of a task's training on a tiny script: that both optimizers train its model, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import interleaved_timing
from benchmarks.comparison import scenario_overhead as script
from benchmarks.comparison.comparison import Candidate, ComparisonError, Task

TRAIN = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments

args = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()[0]
config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0)
rows = [{"input_ids": torch.arange(8) + i % 5, "labels": torch.arange(8) + i % 5} for i in range(16)]
Trainer(GPT2LMHeadModel(config), args, train_dataset=rows).train()
raise AssertionError("trained")
"""
YAML = """
script: train.py
arguments: [--use_cpu, --report_to, none, --per_device_train_batch_size, "4"]
metric: eval_loss
greater_is_better: false
seeds: [7]
learning_rates: [1.0e-3]
candidates:
  Muon: { optim: torch_muon }
  adaptive: { optim_args: "p=adaptive,p_interval=3,p_first_step=2" }
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "task.yaml").write_text(YAML)
    return tmp_path / "task.yaml"


def test_whole_run(task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(interleaved_timing, "_SHORTEST", 0.0)
    script.main([str(task), "--repeats", "2", "--output", str(tmp_path / "out")])
    (row,) = json.loads((tmp_path / "out" / "scenario_overhead.json").read_text("utf-8"))["rows"]
    assert (row["candidate"], row["steps"]) == ("adaptive", 3)
    assert row["run"]["median"] > 0
    assert "run over Muon's" in capsys.readouterr().out


def test_copies_are_trained_with_estimates_and_the_model_is_not(task: Path, tmp_path: Path, monkeypatch):
    model, batch = script.training_of(Task.load(task), tmp_path / "out")
    assert batch["input_ids"].shape == (4, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = []
    create = script.create_schatten_optimizer
    monkeypatch.setattr(
        script,
        "create_schatten_optimizer",
        lambda own, *args, **options: made.append((own, create(own, *args, **options))) or made[-1][1],
    )
    monkeypatch.setattr(interleaved_timing, "_SHORTEST", 0.0)
    _, steps = script.measure(
        model, batch, Candidate("k", "schatten_p", "p=adaptive,p_interval=3,p_first_step=2", ()), 1
    )
    ((own, optimizer),) = made
    assert steps == 3
    estimated = [state["statistics_weight"] for state in optimizer.state.values() if "statistics_weight" in state]
    assert len(estimated) == 4
    assert all((weights > 0).all() for weights in estimated)
    assert not torch.equal(own.state_dict()["transformer.wte.weight"], before["transformer.wte.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_measured_is_named(task: Path, tmp_path: Path):
    with pytest.raises(ComparisonError, match="trains with torch_muon"):
        script.main([str(task), "--candidate", "Muon"])
    (tmp_path / "train.py").write_text("")
    with pytest.raises(ComparisonError, match="no Trainer that trains"):
        script.main([str(task), "--output", str(tmp_path)])
