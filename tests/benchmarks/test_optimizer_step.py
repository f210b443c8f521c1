"""The benchmark of the optimizer's step: that it runs, that it counts rightly, and the promise that it holds us to."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import optimizer_step as script

MOST_OPERATIONS = 250
MOST_PASSES = 1.5


def text_of(counter):
    """Return a table of operations, for messages of failed tests."""
    return "\n".join("  ".join(row) for row in [("operation", "times", "bytes over the least"), *counter.table()])


# The promise


@pytest.mark.parametrize(("model", "dtype"), script.COUNTED)
def test_a_step_is_few_operations(model, dtype):
    counter = script.count_step(script.model_of(script.MODELS[model](), "meta", dtype))
    assert counter.names.total() <= MOST_OPERATIONS, text_of(counter)


@pytest.mark.parametrize("model", [model for model, dtype in script.COUNTED if dtype == "float32"])
def test_a_step_moves_few_bytes_outside_the_iteration(model):
    counter = script.count_step(script.model_of(script.MODELS[model](), "meta"))
    assert counter.numbers()["passes"] <= MOST_PASSES, text_of(counter)


def test_twice_as_many_layers_are_as_many_operations():
    """Of the matrices: no other parameter, be it embedding, bias or norm, has a gradient."""
    few, many = (
        script.count_step(script.model_of(script.gpt2(layers, 768), "meta"), matrices_alone=True).names
        for layers in (12, 24)
    )
    assert many == few, {name: (few[name], many[name]) for name in few | many if few[name] != many[name]}


# The count


def test_bytes_and_operations_of_a_tiny_model():
    counter = script.count_step(script.model_of(script.gpt2(2, 16, 40), "meta"))
    matrices = 2 * 12 * 16**2
    others = counter.parameters - matrices
    assert counter.least == (4 + 2 * 8) * matrices + (4 + 2 * 12) * others
    # Momenta are in half precision where products are.
    assert counter.passes["hf_schatten::advance_averages"] == (4 + 2 * 4 + 2) * matrices
    assert counter.passes["hf_schatten::add_updates"] == (2 * 4 + 2) * matrices
    assert counter.passes["aten::_foreach_norm"] == pytest.approx(4 * (matrices + others), rel=0.01)
    assert counter.passes["aten::_fused_adamw_"] == pytest.approx((4 + 2 * 12) * others, rel=0.02)
    assert counter.names["hf_schatten::spectral_iteration"] == 2  # stacks
    assert not counter.names.keys() & {"aten::bmm", "aten::baddbmm"}
    assert counter.kernels > counter.on_device
    assert counter.iterates > 2 * (2 + 2) * matrices  # at least what it takes and gives


def test_views_and_allocations_are_no_work_and_products_move_nothing():
    A = torch.empty(3, 4, device="meta")
    with script.StepCounter(A.numel()) as counter:
        _ = A.T, torch.empty_like(A), A @ A.T
        A.add_(A[:1])
    names = dict(counter.names)
    assert names.pop("aten::add_") == names.pop("aten::mm") == 1
    assert {name.partition("::")[2] for name in names} <= {"t", "transpose", "permute", "empty_like", "slice"}
    assert counter.on_device == counter.kernels == 2
    assert counter.passes.total() == 4 * (12 + 12 + 4)


def test_the_llama_has_the_size_that_it_is_named_after():
    model = script.model_of(script.MODELS["llama-554m"](), "meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(554e6, rel=1e-3)


# The script


@pytest.mark.parametrize("options", [["--tokens", "24"], ["--count"]])
def test_quick_run(options, tmp_path: Path, capsys):
    script.main(["--quick", "--repeats", "2", *options, "--output", str(tmp_path / "new")])
    written = json.loads((tmp_path / "new" / "optimizer_step.json").read_text("utf-8"))
    page = (tmp_path / "new" / "optimizer_step.md").read_text("utf-8")
    assert torch.__version__ in written["machine"]
    assert written["machine"] in page
    assert page in capsys.readouterr().out
    assert [(row["model"], row["optimizer"]) for row in written["counts"]] == [
        ("tiny-gpt2, float32", script.OURS),
        ("tiny-gpt2, float32", script.MUON),
        ("tiny-llama, bfloat16", script.OURS),
    ]
    for row in written["counts"]:
        assert row["operations"] == sum(row["names"].values()) >= row["on_device"] > 0
    timed = "--count" not in options
    assert ("## Timed" in page) == timed
    assert list(written["timings"]) == (["tiny-gpt2", "tiny-llama"] if timed else [])
    for rows in written["timings"].values():
        assert rows.keys() >= {script.MUON, script.OURS, script.ADAMW}
        assert rows[script.OURS]["ours over it"] == rows[script.OURS]["ours over it there"] == 1
        assert all(number > 0 for row in rows.values() for number in row.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "must be at least 1"),
        pytest.param(
            ["--device", "cuda"],
            "sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--models", "llama-8b"], "invalid choice"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert message in capsys.readouterr().err
