"""The whole benchmark on tiny matrices: that it runs and what it leaves, never how fast it is."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import interleaved_timing
from benchmarks.spectral_power import bench
from benchmarks.spectral_power import spectral_power as script
from benchmarks.spectral_power.peers import newton_schulz
from benchmarks.spectral_power.speed import count_flops

TINY = bench.Sizes(hidden=8, layers=1, rows=16, peak=16, steps=(3,))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "QUICK", TINY)
    monkeypatch.setattr(interleaved_timing, "_SHORTEST", 0.0)


@pytest.mark.usefixtures("tiny")
def test_whole_run(tmp_path: Path, capsys):
    script.main(["--quick", "--repeats", "2", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "spectral_power.json").read_text("utf-8"))
    assert [row["target"] for row in results["speed"]] == [None] * 3  # the targets are for matrices of full size
    assert results["optimizer"][0]["reference"] == "torch.optim.Muon.step, bfloat16"
    assert all(row["flops"] > 0 and row["of_matmul_peak"] > 0 for row in results["speed"] + results["optimizer"])
    assert len(results["peers"]["frontier"]) == 8
    assert {point["family"] for point in results["peers"]["points"]} >= {"ours", "exact SVD", "polar + Taylor"}
    assert (tmp_path / "spectral_power.png").stat().st_size > 10_000
    assert "time ratio" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_one_section_in_half_precision(tmp_path: Path, dtype):
    folder = tmp_path / "new" / "folder"
    script.main(["--quick", "--repeats", "1", "--sections", "speed", "--dtype", dtype, "--output", str(folder)])
    results = json.loads((folder / "spectral_power.json").read_text("utf-8"))
    assert list(results) == ["machine", "speed"]
    assert results["machine"]["dtype"] == dtype


def test_flops_of_five_steps():
    assert count_flops(lambda: newton_schulz(torch.ones(4, 10))) == 5 * (2 * 2 * 4 * 4 * 10 + 2 * 4**3)


@pytest.mark.parametrize("arguments", [["--repeats", "0"], ["--dtype", "int8"], ["--sections", "nothing"]])
def test_malformed_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_a_missing_gpu_is_said(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        script.main(["--device", "cuda"])
    assert "no GPU" in capsys.readouterr().err
