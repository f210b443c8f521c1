"""A script with a Trainer in a comparison: its arguments, and a real run of each kind of optimizer."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.comparison import compare_optimizers
from benchmarks.comparison.outcomes import NAME, Run
from benchmarks.comparison.regimes import find
from benchmarks.comparison.scripts import Script

SCRIPT = """
import sys
import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments

parser = HfArgumentParser(TrainingArguments)
args = parser.parse_json_file(sys.argv[1])[0] if len(sys.argv) == 2 else parser.parse_args_into_dataclasses()[0]
config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0)
torch.manual_seed(args.seed)
rows = [{"input_ids": torch.arange(8) + i % 5, "labels": torch.arange(8) + i % 5} for i in range(16)]
trainer = Trainer(GPT2LMHeadModel(config), args, train_dataset=rows, eval_dataset=rows)
trainer.train()
trainer.evaluate()
"""
YAML = """
script: train.py
arguments: [--max_steps, "4", --report_to, none, --save_strategy, "no", --eval_strategy, steps, --eval_steps, "2"]
learning_rates: [1.0e-3]
adamw_learning_rates: [2.0e-3]
p_interval: 2
"""
CPU = torch.device("cpu")


@pytest.fixture
def task(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "task.yaml").write_text(YAML)
    return tmp_path / "task.yaml"


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        ("adamw", "--optim adamw_torch --adam_beta1 0.9 --adam_beta2 0.95"),
        ("adamw:0.999", "--optim adamw_torch --adam_beta1 0.9 --adam_beta2 0.999"),
        ("muon", "--optim muon"),
        ("torch.optim.NAdam", "--optim torch.optim.NAdam"),
        ("p=-5,eps=1e-6", "--optim schatten_p --optim_args p=-5,eps=1e-6"),
        ("p=adaptive", "--optim schatten_p --optim_args p=adaptive,p_interval=2"),
    ],
)
def test_the_arguments_of_a_candidate(candidate, expected, task):
    script = Script.load(task)
    assert script.can(candidate)
    flags = script.flags(Run(str(task), candidate, 1e-3, 2))
    assert " ".join(flags) == f"{expected} --learning_rate 0.001 --seed 44"


@pytest.mark.parametrize("candidate", ["random", "shuffled:p=adaptive", "p=-4@query=inf"])
def test_controls_inside_the_optimizer_are_not_of_scripts(candidate, task):
    script = Script.load(task)
    assert compare_optimizers.wanted([str(task)], [candidate], [], 1) == []
    with pytest.raises(ValueError, match=f"A script cannot have '{candidate}'"):
        script.flags(Run(str(task), candidate, 1e-3, 0))


@pytest.mark.parametrize(
    "candidate",
    ["muon", *(pytest.param(each, marks=pytest.mark.slow) for each in ("adamw", "torch.optim.NAdam", "p=adaptive"))],
)
def test_a_real_run(candidate, task):
    run = Run(str(task), candidate, 1e-3, 0)
    outcome = find(run.regime).train(run, CPU)
    assert [step for step, _, _ in outcome.curve] == [2, 4]
    assert math.isfinite(outcome.training_loss)
    assert outcome.loss == outcome.curve[-1][2] < outcome.curve[0][2]
    assert 0 < outcome.curve[0][1] < outcome.seconds
    assert outcome.state > 0
    assert list(outcome.exponents) == (["2", "4"] if candidate == "p=adaptive" else [])


def test_runs_of_a_script_are_kept_beside_its_file(task, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(
        compare_optimizers, "run_all", lambda path, wanted, **settings: shown.append((path, wanted([]))) or []
    )
    compare_optimizers.main([str(task), "--only", "Muon"])
    assert shown == [(task.parent / "results" / NAME, [Run(str(task), "muon", 1e-3, 0)])]
    with pytest.raises(SystemExit):
        compare_optimizers.main(["text", str(task)])
    assert "have results in different folders" in capsys.readouterr().err


def test_a_failing_script_is_told_with_its_output(task):
    (task.parent / "train.py").write_text("raise SystemExit('no data')")
    with pytest.raises(RuntimeError, match=r"(?s)train\.py failed with exit code 1:\n.*no data"):
        Script.load(task).train(Run(str(task), "p=-4", 1e-3, 0), CPU)


def test_malformed_files(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.yaml describes no training"):
        find(str(tmp_path / "nothing.yaml"))
    (tmp_path / "task.yaml").write_text("script: train.py")
    with pytest.raises(ValueError, match=r"task\.yaml describes no training: KeyError\('arguments'\)"):
        find(str(tmp_path / "task.yaml"))
    (tmp_path / "task.yaml").write_text(YAML + "metric: eval_loss")
    with pytest.raises(ValueError, match=r"task\.yaml describes no training: TypeError.*'metric'"):
        find(str(tmp_path / "task.yaml"))
