"""The overhead benchmark on a tiny model: that it runs, what it leaves, and how it scales."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import interleaved_timing
from benchmarks.adaptation import adaptation_overhead as script
from hf_schatten import SchattenOptions


def test_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(interleaved_timing, "_SHORTEST", 0.0)
    sizes = "--layers 1 --width 16 --sequences 2 --length 8 --vocabulary 40 --micro-batches 2"
    counts = "--run-steps 2 --repeats 2"
    script.main([*sizes.split(), *counts.split(), "--output", str(tmp_path)])
    (row,) = json.loads((tmp_path / "adaptation_overhead.json").read_text("utf-8"))["rows"]
    assert row["estimator"] == SchattenOptions.p_estimator
    assert math.isfinite(row["due_step_seconds"])  # a difference of times, of any sign beside other processes
    assert row["peak_bytes"] > 3 * 4 * row["parameters"]  # weights, momentum and gradients
    assert row["adaptive_peak_bytes"] >= row["peak_bytes"]
    assert "1 due step in 100" in capsys.readouterr().out


def test_the_share_is_that_of_one_due_step_in_the_interval():
    setting = script.Runs("cpu", 1, 16, 2, 8, 40, 1, run_steps=5)
    assert script.overhead(1.2, setting, interval=100) == pytest.approx(0.01, rel=1e-9)
