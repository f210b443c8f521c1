"""Scripts that know nothing of this package, run by its runner: p is adaptive and logged, and resume is exact."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from scripts import materials

from hf_schatten import load_learned_p, run

LAYERS = {
    "language_modeling": [
        f"transformer.h.{block}.{layer}"
        for block in range(2)
        for layer in (*(f"attn.c_attn.{part}" for part in "qkv"), "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ],
    "text_classification": [
        *(f"bert.encoder.layer.0.attention.self.{part}" for part in ("query", "key", "value")),
        *(f"bert.encoder.layer.0.{part}.dense" for part in ("attention.output", "intermediate", "output")),
        "bert.pooler.dense",
    ],
    "image_classification": [
        *(f"vit.layers.0.attention.{part}_proj" for part in "qkvo"),
        *(f"vit.layers.0.mlp.fc{number}" for number in (1, 2)),
    ],
}


@pytest.fixture
def run_script(monkeypatch):
    """Return what runs a script as the runner does, in this process, which is put back afterwards."""

    def call(name, *options):
        with monkeypatch.context() as patch:
            materials.restore_after_runner(patch)
            script = str(materials.SCRIPTS / f"{name}.py")
            patch.setattr(sys, "argv", ["run.py", script, *materials.flags(*options)])
            run.main()

    return call


def history(checkpoint):
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


def logged_p(entry):
    prefix = "schatten_p/"
    return {name.removeprefix(prefix): value for name, value in entry.items() if name.startswith(prefix)}


def assert_equal(found, expected, where=""):
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_equal(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_equal(found[index], value, f"{where}/{index}")
    else:
        assert found == expected, where


@pytest.mark.pictures
@pytest.mark.parametrize("name", LAYERS)
def test_a_script_trains_with_adaptive_p_and_resumes_exactly(name, run_script, tmp_path, capfd):
    assert "hf_schatten" not in (materials.SCRIPTS / f"{name}.py").read_text()
    data = getattr(materials, name)(tmp_path)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    options = materials.TRAINING | materials.SCHATTEN | data
    run_script(name, options, {"--output_dir": straight})
    middle, end = (f"checkpoint-{step}" for step in (materials.MIDDLE, materials.STEPS))
    run_script(name, options, {"--output_dir": resumed, "--resume_from_checkpoint": straight / middle})

    log = history(straight / end)
    estimates = [entry for entry in log if "schatten_p_median" in entry]
    assert [entry["step"] for entry in estimates] == materials.DUE
    for entry in estimates:
        assert sorted(logged_p(entry)) == sorted(LAYERS[name])
        assert len(set(logged_p(entry).values())) > len(LAYERS[name]) // 2
        assert all(-0.25 - 1e-6 <= 1 / p <= 1 for p in logged_p(entry).values())
    assert sum(logged_p(estimates[0])[layer] != logged_p(estimates[-1])[layer] for layer in LAYERS[name]) > 2
    learned = {layer.replace(".weight", ""): p for layer, p in load_learned_p(straight / end).items()}
    assert learned == logged_p(estimates[-1])

    assert_equal(history(resumed / end), log)
    assert {"loss", "grad_norm", "learning_rate"} <= log[-1].keys()
    assert_equal(load_file(resumed / end / "model.safetensors"), load_file(straight / end / "model.safetensors"))
    for file in ("optimizer.pt", "scheduler.pt"):
        states = [torch.load(run / end / file, weights_only=True) for run in (resumed, straight)]
        assert_equal(*states, where=file)
    assert not (resumed / middle).exists()  # it did not start again

    for output in (straight, resumed):
        assert (output / "README.md").is_file()
        assert "eval_loss" in json.loads((output / "eval_results.json").read_text())
        assert (output / "figures" / "p_by_layer.png").is_file()
    assert "hf_schatten.run: warning" not in capfd.readouterr().err
