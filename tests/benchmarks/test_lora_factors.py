"""The comparison of what to route of LoRA's factors: that it runs, and what differs between the ways."""

from __future__ import annotations

import json

import torch

from benchmarks.comparison import lora_factors as script
from hf_schatten import SchattenP


def test_whole_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "read_text", lambda path: "def one(): return two\n" * 200)
    monkeypatch.setattr(script, "headers", lambda: "inline int one() { return two; }\n" * 200)
    made = []

    def noted(model, optimizer, data, steps):
        groups = optimizer.param_groups if isinstance(optimizer, SchattenP) else []
        made.append({name for group in groups if group["spectral"] for name in group["param_names"]})
        train(model, optimizer, data, steps)

    train = script.train
    monkeypatch.setattr(script, "train", noted)
    script.main(["--quick", "--output", str(tmp_path)])
    written = json.loads((tmp_path / "lora_factors.json").read_text("utf-8"))
    runs = len(script.QUICK.rates) * len(script.QUICK.seeds)
    assert len(written["outcomes"]) == len(script.WAYS) * runs
    assert all(0 < outcome["loss"] < written["before"] + 1 for outcome in written["outcomes"])
    sides = [{side for name in routed for side in "AB" if f"lora_{side}" in name} for routed in made[1::runs]]
    assert sides == [{"A", "B"}, {"B"}, {"A"}, set()]
    assert capsys.readouterr().out.count("| A and B ") == 1


def test_the_table_has_the_best_rate_and_its_spread():
    losses = {(1e-3, 0): 3.0, (1e-3, 1): 3.2, (1e-2, 0): 2.0, (1e-2, 1): 2.2}
    outcomes = [script.Outcome(way, rate, seed, loss) for way in script.WAYS for (rate, seed), loss in losses.items()]
    rows = script.rows_of(outcomes)
    assert rows[0] == ("A and B", "0.01", "2.1000 ± 0.1414", "3.1000", "2.1000")
    assert len(rows) == len(script.WAYS)


def test_batches_are_those_of_the_seed():
    blocks = torch.arange(20)[:, None]
    first, again, other = (next(script.batches(blocks, script.QUICK, seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
