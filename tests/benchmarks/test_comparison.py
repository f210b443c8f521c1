"""The comparison of optimizers: which runs it makes, what it concludes, and one real run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.comparison import compare_optimizers, torch_muon
from benchmarks.comparison.comparison import Candidate, ComparisonError, Outcome, Run, Standing, Task, next_runs
from benchmarks.comparison.comparison_numbers import load_outcomes
from benchmarks.comparison.comparison_report import one_rate_for_all, steps_to_reach, write_report
from benchmarks.comparison.comparison_stability import learned_exponents
from hf_schatten import route_parameters
from hf_schatten.report.log import LAYER_PREFIX

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
ADAM = Candidate("AdamW", "adamw_torch", "", RATES)
FIXED = Candidate("p = 4", "schatten_p", "p=4", RATES)
TASK = Task(Path("train.py"), ("--max_steps", "4"), "eval_loss", False, (7, 8, 9), (ADAM, FIXED))


def outcome(run, loss, steps=4, seconds=1.0):
    """Return an outcome whose metric falls in a straight line from 10 at step 0 to ``loss``."""
    evaluations = [{"eval_loss": 10 + (loss - 10) * step / steps, "step": step} for step in (steps // 2, steps)]
    times = [seconds * (step + 1) for step in range(steps)]
    return Outcome(
        candidate=run.candidate.name,
        learning_rate=run.learning_rate,
        seed=run.seed,
        arguments=TASK.arguments,
        logs=[{"loss": 1.0, "step": 1}, *evaluations],
        steps=list(range(1, steps + 1)),
        seconds=times,
        cpu_seconds=times,
        optimizer_seconds=[time / 4 for time in times],
        optimizer_cpu_seconds=[time / 4 for time in times],
    )


def standing_of(candidate, losses, **kwargs):
    runs = [Run(candidate, rate, 7) for rate in losses]
    return Standing(TASK, candidate, tuple(outcome(run, losses[run.learning_rate], **kwargs) for run in runs))


def complete(candidate, loss_of, seeds):
    """Run a candidate's whole comparison on a made-up loss; return its runs in order."""
    done, order = [], []
    while wanted := next_runs(TASK, candidate, done, seeds):
        order.extend((run.learning_rate, run.seed) for run in wanted)
        done.extend(outcome(run, loss_of(run.learning_rate)) for run in wanted)
    return order


def test_the_sweep_comes_first_then_the_seeds_at_its_best_rate():
    order = complete(ADAM, lambda rate: abs(math.log(rate / 2e-3)), seeds=3)
    assert order == [*((rate, 7) for rate in RATES), (2e-3, 8), (2e-3, 9)]
    assert complete(ADAM, lambda rate: abs(math.log(rate / 2e-3)), seeds=1) == [(rate, 7) for rate in RATES]


@pytest.mark.parametrize(("optimum", "beyond"), [(3e-4, [5e-4, 2.5e-4, 1.25e-4]), (2e-2, [1.6e-2, 3.2e-2])])
def test_a_best_rate_at_the_end_extends_the_sweep(optimum, beyond):
    order = complete(ADAM, lambda rate: abs(math.log(rate / optimum)), seeds=1)
    assert [rate for rate, _ in order[4:]] == pytest.approx(beyond)


def test_a_sweep_whose_ends_are_equally_good_goes_on_at_both():
    order = complete(ADAM, lambda rate: 0.0 if rate >= 1.6e-2 else 1.0, seeds=1)
    assert [rate for rate, _ in order[4:]] == pytest.approx([5e-4, 1.6e-2, 3.2e-2, 6.4e-2])


def test_a_sweep_ends_even_where_more_is_always_better():
    assert len(complete(ADAM, lambda rate: -rate, seeds=1)) == 8


def test_a_diverged_run_is_the_worst():
    losses = {1e-3: 3.0, 2e-3: math.nan}
    standing = standing_of(ADAM, losses)
    assert standing.losses() == {1e-3: 3.0, 2e-3: math.inf}
    assert standing.best_rate == 1e-3


def test_standard_error_and_mean_are_over_the_seeds():
    runs = [Run(ADAM, 2e-3, seed) for seed in TASK.seeds]
    standing = Standing(TASK, ADAM, tuple(outcome(run, loss) for run, loss in zip(runs, (1.0, 2.0, 6.0), strict=True)))
    assert standing.mean() == pytest.approx(3.0)
    assert standing.standard_error() == pytest.approx(math.sqrt(7.0 / 3))
    assert math.isnan(standing_of(ADAM, {1e-3: 1.0}).standard_error())


@pytest.mark.parametrize(
    ("curve", "target", "greater", "expected"),
    [
        (([10, 20, 30], [3.0, 2.0, 1.0]), 1.5, False, 25.0),
        (([10, 20, 30], [3.0, 2.0, 1.0]), 3.5, False, 10.0),
        (([10, 20, 30], [3.0, 2.0, 1.0]), 0.5, False, None),
        (([10, 20], [math.nan, 1.0]), 2.0, False, 20.0),
        (([10, 20], [0.5, 0.9]), 0.8, True, 17.5),
    ],
)
def test_steps_to_reach(curve, target, greater, expected):
    assert steps_to_reach(curve, target, greater) == (None if expected is None else pytest.approx(expected))


def test_the_mean_curve_is_that_of_the_seeds_at_the_best_rate():
    best, worse, other = Run(ADAM, 1e-3, 7), Run(ADAM, 2e-3, 7), Run(ADAM, 1e-3, 8)
    standing = Standing(TASK, ADAM, (outcome(best, 2.0), outcome(worse, 5.0), outcome(other, 4.0)))
    assert standing.mean_curve() == ([2, 4], [6.5, 3.0])  # of [6, 2] and [7, 4]


def test_one_rate_for_all_is_the_one_with_the_smallest_worst_excess():
    other = Candidate("p = inf", "schatten_p", "p=inf", RATES)
    sentence = one_rate_for_all(
        [
            standing_of(FIXED, {1e-3: 2.0, 2e-3: 2.02}),
            standing_of(other, {1e-3: 3.3, 2e-3: 3.0}),
            standing_of(ADAM, {}),
        ]
    )
    assert "0.002 is within 5% of" in sentence
    assert "p = 4: 1.00 %, p = inf: 0.00 % above" in sentence
    apart = one_rate_for_all([standing_of(FIXED, {1e-3: 2.0, 2e-3: 4.0}), standing_of(other, {1e-3: 4.0, 2e-3: 2.0})])
    assert "is not within 5%" in apart


def test_the_page_has_times_relative_to_muon(tmp_path):
    muon = Candidate("Muon", "torch_muon", "", RATES)
    page = write_report(
        [standing_of(muon, {1e-3: 2.0}, seconds=2.0), standing_of(FIXED, {1e-3: 1.0}, seconds=3.0)], tmp_path, "toy"
    )
    row = next(line for line in page.read_text("utf-8").splitlines() if line.startswith("| p = 4"))
    # It falls by 9 in 4 steps and so reaches 2, a fall of 8, after 8/9 of them.
    assert row == "| p = 4 | `p=4` | 0.001 | 1.0000 | 1 | 0.89 | 1.50 | 1.50 |"
    assert "| Muon |  | 0.001 | 2.0000 | 1 | 1.00 | 1.00 | 1.00 |" in page.read_text("utf-8")
    numbers = json.loads((tmp_path / "comparison.json").read_text("utf-8"))
    assert numbers[1]["step_seconds"] == 3.0
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


def test_a_report_is_written_again_from_its_numbers(tmp_path):
    learned = {LAYER_PREFIX + "a.weight": -5.0, LAYER_PREFIX + "b.weight": math.inf, "step": 2}
    runs = [Run(FIXED, rate, seed) for rate, seed in ((1e-3, 7), (1e-3, 8), (2e-3, 7))]
    outcomes = [outcome(run, loss, seconds=3.0) for run, loss in zip(runs, (1.25, 1.75, math.nan), strict=True)]
    for each in outcomes:
        each.logs.append(learned)
    muon = Candidate("Muon", "torch_muon", "", RATES)
    first = write_report(
        [standing_of(muon, {1e-3: 2.0}), Standing(TASK, FIXED, tuple(outcomes))], tmp_path / "1", "toy"
    )
    read = load_outcomes(tmp_path / "1" / "comparison.json", "eval_loss")
    assert [learned_exponents(each) for each in read[1:]] == [{2: {"a.weight": -0.2, "b.weight": 0.0}}] * 2 + [{}]
    second = write_report(
        [Standing(TASK, muon, tuple(read[:1])), Standing(TASK, FIXED, tuple(read[1:]))], tmp_path / "2", "toy"
    )
    assert second.read_text("utf-8") == first.read_text("utf-8")
    numbers = [(tmp_path / folder / "comparison.json").read_text("utf-8") for folder in ("1", "2")]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("content", ["[{}]", "{", '{"a": 1}'])
def test_a_file_that_is_no_reports_is_not_kept(tmp_path, content):
    assert load_outcomes(tmp_path / "comparison.json", "eval_loss") == []
    (tmp_path / "comparison.json").write_text(content)
    with pytest.raises(
        ComparisonError, match=r"comparison\.json has no outcomes of a comparison by eval_loss: .* --keep"
    ):
        load_outcomes(tmp_path / "comparison.json", "eval_loss")


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
arguments: [--max_steps, "4", --use_cpu, --report_to, none, --save_strategy, "no", --logging_steps, "1"]
metric: eval_loss
greater_is_better: false
seeds: [7, 8]
learning_rates: [1.0e-3]
candidates:
  Muon: { optim: torch_muon }
  AdamW: { optim: adamw_torch }
"""


def test_a_real_run_is_stored_and_not_run_again(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "task.yaml").write_text(YAML)
    arguments = [str(tmp_path / "task.yaml"), "--only", "Muon", "--seeds", "1", "--runs", str(tmp_path / "runs")]
    compare_optimizers.main([*arguments, "--threads", "1"])
    stored = Outcome.load(tmp_path / "runs" / "Muon_lr0.001_seed7.json")
    assert stored.steps == [1, 2, 3, 4]
    assert 0 < stored.optimizer_seconds[-1] < stored.seconds[-1]
    assert [entry["step"] for entry in stored.logs if "loss" in entry] == [1, 2, 3, 4]
    assert math.isfinite(stored.final("eval_loss"))
    assert "| Muon |" in capsys.readouterr().out
    assert (tmp_path / "results_task" / "comparison.md").is_file()
    monkeypatch.setattr(compare_optimizers.Store, "execute", lambda *args: pytest.fail("ran again"))
    compare_optimizers.main(arguments)
    (tmp_path / "comparison.yaml").write_text(YAML)
    compare_optimizers.main([str(tmp_path / "comparison.yaml"), *arguments[1:], "--report"])
    assert (tmp_path / "results" / "comparison.md").is_file()
    monkeypatch.undo()
    elsewhere = ["--runs", str(tmp_path / "elsewhere"), "--threads", "1"]
    compare_optimizers.main([arguments[0], "--keep", "--only", "AdamW", "--seeds", "1", *elsewhere])
    assert [path.name for path in (tmp_path / "elsewhere").glob("*.json")] == ["AdamW_lr0.001_seed7.json"]
    page = (tmp_path / "results_task" / "comparison.md").read_text("utf-8")
    assert "\n| Muon |" in page
    assert "\n| AdamW |" in page
    monkeypatch.setattr(compare_optimizers.Store, "execute", lambda *args: pytest.fail("ran again"))
    compare_optimizers.main([*arguments[:5], "--keep", "--runs", str(tmp_path / "nowhere")])
    task = Task.load(tmp_path / "task.yaml")
    (tmp_path / "task.yaml").write_text(YAML.replace('"4"', '"3"'))
    changed = Task.load(tmp_path / "task.yaml")
    kept = load_outcomes(tmp_path / "results_task" / "comparison.json", "eval_loss")
    assert compare_optimizers.Store(task, tmp_path / "nowhere", kept).not_kept() == []
    assert compare_optimizers.Store(changed, tmp_path / "nowhere", kept).not_kept() == ["Muon", "AdamW"]
    capsys.readouterr()
    compare_optimizers.main([arguments[0], "--keep", "--report"])
    assert "Outcomes of other arguments leave the report: Muon, AdamW." in capsys.readouterr().err
    assert compare_optimizers.Store(task, tmp_path / "runs").outcomes(task.candidates[0])
    assert not compare_optimizers.Store(changed, tmp_path / "runs").outcomes(changed.candidates[0])


def test_a_failing_script_is_named_with_its_output(tmp_path):
    (tmp_path / "train.py").write_text("raise SystemExit('no data')")
    task = Task(tmp_path / "train.py", (), "eval_loss", False, (7,), (ADAM,))
    with pytest.raises(ComparisonError, match=r"failed with exit code 1; its output is in .*output\.log"):
        compare_optimizers.Store(task, tmp_path / "runs").execute(Run(ADAM, 1e-3, 7), threads=1)
    assert "no data" in next((tmp_path / "runs").glob("*/output.log")).read_text("utf-8")
    assert not list((tmp_path / "runs").glob("*.json"))


def test_malformed_tasks_and_names(tmp_path):
    with pytest.raises(ComparisonError, match="describes no comparison"):
        Task.load(tmp_path / "nothing.yaml")
    (tmp_path / "task.yaml").write_text("script: train.py")
    with pytest.raises(ComparisonError, match=r"task\.yaml describes no comparison: KeyError\('learning_rates'\)"):
        Task.load(tmp_path / "task.yaml")
    with pytest.raises(ComparisonError, match="no candidate 'Lion'; there are: AdamW, p = 4"):
        TASK.only(["Lion"])
    with pytest.raises(ComparisonError, match="have no 'eval_accuracy'"):
        outcome(Run(ADAM, 1e-3, 7), 1.0).final("eval_accuracy")


def test_the_baseline_is_torch_muon_on_the_routed_matrices_and_adamw_on_the_rest(gpt2):
    torch.manual_seed(0)
    reference = type(gpt2)(gpt2.config)
    reference.load_state_dict(gpt2.state_dict())
    options = {"betas": (0.9, 0.999), "eps": 1e-8}
    optimizer = torch_muon.MuonAndAdamW(gpt2, lr=1e-2, weight_decay=0.1, **options)
    routed = {route.name for route in route_parameters(reference).to("schatten_p")}
    decayed = {route.name: route.decay for route in route_parameters(reference).routes}
    named = dict(reference.named_parameters())
    muon = torch.optim.Muon([named[name] for name in routed], 1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    others = [
        {
            "params": [W for name, W in named.items() if name not in routed and decayed[name] is decay],
            "weight_decay": x,
        }
        for decay, x in ((True, 0.1), (False, 0.0))
    ]
    adamw = torch.optim.AdamW(others, 1e-2, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for step in range(3):
        for name, W in gpt2.named_parameters():
            W.grad = torch.randn_like(W)
            named[name].grad = W.grad.clone()
        optimizer.step()
        scheduler.step()
        for other in (muon, adamw):
            for group in other.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            other.step()
    for name, W in gpt2.named_parameters():
        torch.testing.assert_close(W, named[name], atol=0, rtol=0)


def test_the_baseline_leaves_what_muon_does_not_take_to_adamw():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(4, 4))
    optimizer = torch_muon.MuonAndAdamW(model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)
    assert [[W.ndim for W in group["params"]] for group in optimizer.param_groups] == [[2], [4], [1, 1]]
