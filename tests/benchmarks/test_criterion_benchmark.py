"""The benchmark of the estimators of p on a tiny capture: that it runs and what it leaves, never how fast it is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import datasets
import pytest
import torch

from benchmarks import interleaved_timing
from benchmarks.adaptation import captured_layers
from benchmarks.adaptation import criterion as script


@pytest.fixture(autouse=True)
def _private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setattr(interleaved_timing, "_SHORTEST", 0.0)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "captures"


def test_whole_run(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]):
    script.main(["--quick", "--repeats", "2", "--cache", str(cache), "--output", str(tmp_path / "new" / "folder")])
    results = json.loads((tmp_path / "new" / "folder" / "criterion.json").read_text("utf-8"))
    estimators = set(script.ESTIMATORS)
    assert set(results["error"]) == estimators - {"exact"}
    assert results["error"]["lanczos"]["p in [1, 100]"]["layers"][2] < 0.01
    assert all(set(row) == estimators for row in results["cost"].values())
    assert all(cost["ms"] > 0 and cost["peak"] > 0 for row in results["cost"].values() for cost in row.values())
    assert len(results["sampling"]) == 4
    table = (tmp_path / "new" / "folder" / "criterion.md").read_text("utf-8")
    assert "| iterates |" in table
    assert table in capsys.readouterr().out


def test_a_capture_is_read_again(cache: Path, monkeypatch: pytest.MonkeyPatch):
    captured = list(captured_layers.captured_layers(captured_layers.TINY, cache))
    assert [(layer.step, layer.name) for layer in captured[:2]] == [(2, "h.0.attn.c_attn"), (2, "h.0.attn.c_proj")]
    assert captured[0].gradient.shape == (16, 48)
    assert captured[0].inputs.shape == (128, 16)
    monkeypatch.setattr(captured_layers, "_capture", lambda run: pytest.fail("captured again"))
    again = list(captured_layers.captured_layers(captured_layers.TINY, cache))
    torch.testing.assert_close(again[3].gradient, captured[3].gradient, atol=0, rtol=0)
    other = dataclasses.replace(captured_layers.TINY, learning_rate=1.0)
    with pytest.raises(pytest.fail.Exception, match="captured again"):
        list(captured_layers.captured_layers(other, cache))


def test_peak_memory_counts_what_is_held_at_once():
    size = 4 * 1000 * 1000

    def call() -> None:
        first = torch.ones(1000, 1000)
        second = first + 1
        del first
        second + 1

    assert 2 * size <= script.peak_memory(call) < 2 * size + 10_000


def test_the_quantiles_of_errors():
    assert script._quantiles(torch.linspace(0, 1, 101)) == pytest.approx((0.5, 0.95, 1.0), abs=1e-6, rel=1e-6)
    assert script._quantiles(torch.empty(0)) == ()


def test_malformed_arguments(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        script.main(["--estimators", "nothing"])
    assert "lanczos" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["--repeats", "0"])
