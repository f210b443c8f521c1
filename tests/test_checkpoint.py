"""The optimizer's files: what they hold, what comes back, and what is refused before any training step."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import hf_schatten
from hf_schatten import CheckpointError, SchattenP, load_learned_p
from hf_schatten.integration.checkpoint import (
    CONFIG_FILE,
    FORMAT_VERSION,
    STATE_FILE,
    load_optimizer,
    newest_complete_checkpoint,
    save_optimizer,
)


def make(steps=3, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    optimizer = hf_schatten.create_schatten_optimizer(
        model, lr=0.01, verbose=False, **{"p": "adaptive", "p_interval": 2, "p_first_step": 1} | options
    )
    for _ in range(steps):
        model(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.fixture
def saved(tmp_path):
    optimizer = make()
    save_optimizer(optimizer, tmp_path)
    return optimizer, tmp_path


def states(optimizer):
    return {
        f"{name}/{key}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        for key, value in optimizer.state[parameter].items()
    }


def test_p_is_read_by_matrix_where_a_parameter_has_several(gpt2, tmp_path):
    optimizer = hf_schatten.create_schatten_optimizer(
        gpt2, verbose=False, p=3, p_overrides="*.c_attn.q:2;*.1.attn.c_attn.*:inf"
    )
    gpt2(input_ids=torch.zeros(1, 2, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    save_optimizer(optimizer, tmp_path)
    torch.save(optimizer.state_dict(), (tmp_path / "torch").mkdir() or tmp_path / "torch" / "optimizer.pt")
    learned = load_learned_p(tmp_path)
    assert learned == optimizer.learned_p() == load_learned_p(tmp_path / "torch")
    assert [learned[f"transformer.h.0.attn.c_attn.weight.{part}"] for part in "qkv"] == [2.0, 3.0, 3.0]
    assert [learned[f"transformer.h.1.attn.c_attn.weight.{part}"] for part in "qkv"] == [2.0, math.inf, math.inf]


def test_statistics_of_an_earlier_criterion_begin_again_and_p_stays(saved):
    optimizer, folder = saved
    state = load_file(folder / STATE_FILE)
    with safe_open(folder / STATE_FILE, framework="pt") as file:
        metadata = file.metadata()
    for key in ("0.weight/statistics", "1.weight/statistics"):  # of three curves, as earlier versions had
        state[key] = torch.cat([state[key], torch.ones_like(state[key][:, :1])], dim=1)
    save_file(state, folder / STATE_FILE, metadata)
    again = make(steps=0)
    load_optimizer(again, folder)
    assert again.learned_p() == optimizer.learned_p()
    for matrix, before in zip(again.matrices(), optimizer.matrices(), strict=True):
        assert matrix.statistics.shape == before.statistics.shape
        assert not matrix.statistics.any()
        assert matrix.statistics_weight == 0
        assert before.statistics_weight > 0
        assert torch.equal(matrix.state["momentum"], before.state["momentum"])
    same = make(steps=0)
    save_optimizer(optimizer, folder)
    load_optimizer(same, folder)
    for matrix, before in zip(same.matrices(), optimizer.matrices(), strict=True):
        assert torch.equal(matrix.statistics, before.statistics)
        assert torch.equal(matrix.statistics_weight, before.statistics_weight)


def test_the_files_are_safetensors_by_name_and_strict_json(saved):
    optimizer, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == [STATE_FILE, CONFIG_FILE]
    with safe_open(folder / STATE_FILE, framework="pt") as file:
        keys = set(file.keys())
    assert keys == set(states(optimizer))
    assert {"0.weight/momentum", "0.weight/p", "1.bias/exp_avg_sq"} <= keys
    config = json.loads((folder / CONFIG_FILE).read_text(), parse_constant=pytest.fail)
    assert config["format_version"] == FORMAT_VERSION
    assert config["options"]["p_interval"] == 2
    assert config["groups"][0]["param_names"] == ["0.weight", "1.weight"]


def test_infinite_options_are_written_as_words(tmp_path):
    save_optimizer(make(p=math.inf), tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text(), parse_constant=pytest.fail)
    assert config["options"]["p"] == "inf"
    assert load_learned_p(tmp_path) == {"0.weight": math.inf, "1.weight": math.inf}


def test_the_state_comes_back_exactly(saved):
    optimizer, folder = saved
    again = make(steps=0)
    again.param_groups[0]["lr"] = 123.0
    load_optimizer(again, folder)
    assert states(again).keys() == states(optimizer).keys()
    for key, value in states(optimizer).items():
        loaded = states(again)[key]
        assert loaded.dtype == value.dtype
        assert torch.equal(loaded, value)
    assert again.param_groups[0]["lr"] == 0.01


def test_what_never_had_a_gradient_is_saved_too(tmp_path):
    def unused():
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
        model.unused = nn.Linear(4, 3)
        return model, hf_schatten.create_schatten_optimizer(model, verbose=False, p=4)

    model, optimizer = unused()
    model[1](model[0](torch.ones(5, 6))).sum().backward()
    optimizer.step()
    save_optimizer(optimizer, tmp_path)
    again = unused()[1]
    load_optimizer(again, tmp_path)
    assert {"unused.weight/momentum", "unused.bias/exp_avg"} <= states(again).keys()
    assert again.state[again.param_groups[0]["params"][-1]]["step"] == 0


def test_learned_p_is_read_without_a_model(saved):
    optimizer, folder = saved
    assert load_learned_p(folder) == optimizer.learned_p()
    assert load_learned_p(str(folder)) == optimizer.learned_p()


def test_learned_p_is_read_from_a_plain_trainers_file(tmp_path):
    optimizer = make()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    assert load_learned_p(tmp_path) == optimizer.learned_p()


def test_changed_options_are_said_and_honoured(saved, caplog):
    _, folder = saved
    again = make(steps=0, p=4.0, p_interval=7, momentum=0.8)
    load_optimizer(again, folder)
    assert set(again.learned_p().values()) == {4.0}
    assert again.param_groups[0]["momentum"] == 0.8
    assert "p 'adaptive' -> 4.0" in caplog.text
    assert "p_interval 2 -> 7" in caplog.text
    assert "p_max" not in caplog.text


@pytest.mark.parametrize("name", [STATE_FILE, CONFIG_FILE])
@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "empty"])
def test_a_damaged_file_is_named_and_the_optimizer_untouched(saved, name, damage):
    _, folder = saved
    path = folder / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[: len(content) // 2], "foreign": b"[1, 2]", "empty": b""}[damage])
    again = make(steps=0)
    with pytest.raises(CheckpointError, match=name):
        load_optimizer(again, folder)
    assert not again.state


def test_another_format_version_is_refused(saved):
    _, folder = saved
    path = folder / CONFIG_FILE
    path.write_text(path.read_text().replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 99'))
    with pytest.raises(
        CheckpointError, match=f"format_version 99, and this version .* reads 3 and {FORMAT_VERSION}: resume"
    ):
        load_optimizer(make(steps=0), folder)


def as_format_3(group):
    """Return a parameter group as the first format had it."""
    group = dict(group)
    group["sections"] = group.pop("parts")
    muadam = group["precondition"] == "muadam"
    return group | {
        "precondition": "adam" if muadam else group["precondition"],
        "precondition_exponent": "fixed" if muadam else "scaled",
    }


def old_options(**changed):
    """Return options as the first format had them, of a run with an adaptive p."""
    options = {"p": "adaptive", "p_interval": 2, "p_first_step": 1, "split_fused": True, "workspace_mib": 512}
    options |= {"sync": "statistics", "p_groups": [], "p_start": 4.0, "p_end": "inf", "p_steps": None}
    return options | {"precondition": "none", "precondition_exponent": "scaled"} | changed


def make_format_3(folder, **changed):
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text())
    config |= {"format_version": 3, "options": old_options(**changed)}
    config["groups"] = [as_format_3(group) for group in config["groups"]]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("precondition", ["none", "adam", "muadam"])
def test_the_format_before_is_read(tmp_path, caplog, precondition):
    optimizer = make(precondition=precondition)
    save_optimizer(optimizer, tmp_path)
    kind = {"precondition": "adam", "precondition_exponent": "fixed"} if precondition == "muadam" else {}
    make_format_3(tmp_path, **({"precondition": precondition} | kind))
    assert load_learned_p(tmp_path) == optimizer.learned_p()
    again = make(steps=0, precondition=precondition)
    load_optimizer(again, tmp_path)
    for key, value in states(optimizer).items():
        assert torch.equal(states(again)[key], value)
    assert "Options changed" not in caplog.text


@pytest.mark.parametrize(("steps", "text"), [(None, "2:-5"), (300, "2:-5:300"), (1_234_567, "2:-5:1234567")])
def test_a_schedule_of_the_format_before_is_the_same_option(tmp_path, caplog, steps, text):
    save_optimizer(make(p="schedule", p_schedule="2:-5:9"), tmp_path)
    make_format_3(tmp_path, p="schedule", p_start=2.0, p_end=-5.0, p_steps=steps)
    load_optimizer(make(steps=0, p="schedule", p_schedule=text), tmp_path)
    assert "Options changed" not in caplog.text
    load_optimizer(make(steps=0, p="schedule", p_schedule="2:-5:9"), tmp_path)
    assert f"p_schedule '{text}' -> '2:-5:9'" in caplog.text


def test_parts_are_read_from_the_format_before(gpt2, tmp_path):
    optimizer = hf_schatten.create_schatten_optimizer(gpt2, verbose=False, p=3)
    gpt2(input_ids=torch.zeros(1, 2, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    save_optimizer(optimizer, tmp_path)
    make_format_3(tmp_path, p=3.0)
    state_dict = optimizer.state_dict()
    state_dict["param_groups"] = [as_format_3(group) for group in state_dict["param_groups"]]
    (tmp_path / "torch").mkdir()
    torch.save(state_dict, tmp_path / "torch" / "optimizer.pt")
    assert load_learned_p(tmp_path) == load_learned_p(tmp_path / "torch") == optimizer.learned_p()
    again = hf_schatten.create_schatten_optimizer(gpt2, verbose=False, p=3)
    again.load_state_dict(torch.load(tmp_path / "torch" / "optimizer.pt", weights_only=True))
    assert again.learned_p() == optimizer.learned_p()
    assert not any("sections" in group or "precondition_exponent" in group for group in again.param_groups)


def test_adafactors_second_moment_is_refused(saved):
    _, folder = saved
    make_format_3(folder, precondition="adafactor")
    edit(folder, lambda t: t.update({"0.weight/second_moment_rows": torch.ones(8)}))
    with pytest.raises(CheckpointError, match=r"second_moment_rows.*its second moment is kept otherwise"):
        load_optimizer(make(steps=0, precondition="adam"), folder)


def edit(folder, change):
    tensors = load_file(folder / STATE_FILE)
    change(tensors)
    save_file(tensors, folder / STATE_FILE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [t.pop(key) for key in list(t) if key.startswith("1.weight/")], "are missing from it.*'1.weight'"),
        (lambda t: t.update({"2.weight/p": torch.tensor(1.0)}), "are only in it.*'2.weight'"),
        (lambda t: t.update({"0.weight/momentum": torch.ones(3, 3)}), r"0.weight/momentum of shape \(3, 3\)"),
        (lambda t: t.pop("0.weight/statistics"), "the parameter was routed elsewhere"),
    ],
    ids=["missing layer", "extra layer", "other shape", "other routing"],
)
def test_a_checkpoint_of_another_model_is_refused(saved, change, message):
    _, folder = saved
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_optimizer(make(steps=0), folder)


def test_a_parameter_that_moved_to_adamw_is_refused(saved):
    _, folder = saved
    with pytest.raises(CheckpointError, match=r"'1\.weight', but its update now needs.*exclude"):
        load_optimizer(make(steps=0, exclude=("1.*",)), folder)


def test_a_folder_without_state_points_to_the_newest_checkpoint(tmp_path):
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_optimizer(make(), folder)
    with pytest.raises(CheckpointError, match=r"has no optimizer\.safetensors\. Did you mean .*checkpoint-10\?"):
        load_learned_p(tmp_path)


def test_parameters_without_names_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="have no names, by which a checkpoint is keyed"):
        save_optimizer(SchattenP([nn.Parameter(torch.ones(2, 2))]), tmp_path)


def test_a_folder_without_any_state_was_saved_without(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no optimizer state \(was it saved with save_only_model\?\)"):
        load_optimizer(make(steps=0), tmp_path)


def test_the_newest_complete_checkpoint_is_found(tmp_path, caplog):
    assert newest_complete_checkpoint(tmp_path) is None
    for step in (5, 10, 20, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text('{"log_history": [')  # killed while it wrote
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert "the writing of checkpoint-100, checkpoint-20 was not finished" in caplog.text
