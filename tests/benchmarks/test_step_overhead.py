"""The benchmark of whole steps on a tiny model: that it runs, and counts what it says."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import interleaved_timing
from benchmarks.comparison import step_overhead as script


def test_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(interleaved_timing, "_SHORTEST", 0.0)
    sizes = "--widths 16 32 --layers 1 --sequences 2 --length 8 --vocabulary 40 --repeats 2"
    script.main([*sizes.split(), "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "step_overhead_auto.json").read_text("utf-8"))["rows"]
    assert [row["setting"]["width"] for row in rows] == [16, 32]
    for row in rows:
        assert row["step"]["median"] > 0
        assert row["products"] > 0
        assert row["muon_products"] > 0
    assert "step over Muon's" in capsys.readouterr().out


def test_products_are_those_of_the_matrices():
    A, B = torch.randn(3, 4), torch.randn(4, 5)
    assert script.products_of(lambda: A @ B) == 2 * 3 * 4 * 5


@pytest.mark.parametrize("arguments", [["--widths", "0"], ["--repeats", "0"]])
def test_bad_sizes_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert "must be at least 1" in capsys.readouterr().err
