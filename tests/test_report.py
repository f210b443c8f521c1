"""Log entries, and the pictures drawn from them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from matplotlib.image import imread

from hf_schatten.adaptive.adaptation import Choice
from hf_schatten.report import figures, log_entry, plot_choices, plot_p_by_layer, plot_updates
from hf_schatten.report.__main__ import main
from hf_schatten.report.figures import plot_p_of_runs
from hf_schatten.report.log import LogError, history_entry, read_log_history

pytestmark = pytest.mark.pictures


def test_a_log_entry_has_summary_and_layers():
    entry = log_entry({"a.weight": 1.0, "b.weight": 4.0, "c": math.inf})
    assert entry == {
        "schatten_p_min": 1.0,
        "schatten_p_median": 4.0,
        "schatten_p_max": math.inf,
        "schatten_p/a": 1.0,
        "schatten_p/b": 4.0,
        "schatten_p/c": math.inf,
    }


def test_a_history_holds_what_json_has():
    entry = {"a": 2.0, "b": math.inf, "c": -math.inf, "d": math.nan}
    stored = history_entry(entry)
    assert stored == {"a": 2.0, "b": "inf", "c": "-inf", "d": "nan"}
    assert json.loads(json.dumps(stored, allow_nan=False)) == stored
    assert float(stored["b"]) == math.inf


def test_the_picture_shows_layers_by_estimates(tmp_path):
    history = [
        {"step": 10, **log_entry({"a.weight": 1.0, "b.weight": math.inf})},
        {"step": 11, "loss": 1.0},
        {"step": 20, **history_entry(log_entry({"a.weight": math.inf, "b.weight": -4.0}))},
    ]
    path = tmp_path / "figures" / "p.png"
    assert plot_p_by_layer(history, path)
    height, width, _ = imread(path).shape
    assert height > 100
    assert width > 500


@pytest.mark.parametrize(("last", "said"), [(-4.0, "all are -4"), (2.0, None)])
def test_layers_of_one_kind_lie_together_and_equal_p_is_said(last, said, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    names = ["0.query", "0.down", "1.query", "1.down"]
    p = {f"{name}.weight": -4.0 for name in names} | {"1.down.weight": last}
    assert plot_p_by_layer([{"step": 10, **log_entry(p)}], tmp_path / "p.png")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.query", "1.query", "0.down", "1.down"]
    assert axes.get_title().partition("\n")[2] == (said or "")


def test_runs_are_four_in_a_row(tmp_path):
    history = [{"step": 10, **log_entry({f"{layer}.weight": 2.0 for layer in range(20)})}]
    shapes = {}
    for count in (1, 4, 5):
        runs = {f"seed {seed}": history for seed in range(count)}
        assert plot_p_of_runs({**runs, "without estimates": []}, tmp_path / "p.png")
        shapes[count] = imread(tmp_path / "p.png").shape[:2]
    assert shapes[1][1] < shapes[4][1] == shapes[5][1]
    assert shapes[1][0] == shapes[4][0] < shapes[5][0]


def test_nothing_is_drawn_without_an_estimate(tmp_path):
    path = tmp_path / "figures" / "p.png"
    assert not plot_p_by_layer([{"step": 1, "loss": 2.0}], path)
    assert not path.parent.exists()


def test_the_entry_holds_the_updates_of_each_layer():
    entry = log_entry({"a.weight": 2.0}, {"a.weight": 7.0}, {"a.weight": 0.1})
    assert entry["schatten_stable_rank/a"] == 7.0
    assert entry["schatten_relative_size/a"] == 0.1


def test_the_updates_are_drawn_where_they_were_logged(tmp_path):
    p = {"a.weight": 1.0, "b.weight": 2.0}
    history = [{"step": step, **log_entry(p, p, {"a.weight": 0.01, "b.weight": 0.0})} for step in (10, 20)]
    assert plot_updates(history, tmp_path / "updates.png")
    assert imread(tmp_path / "updates.png").std() > 0.05
    assert not plot_updates([{"step": 1, **log_entry(p)}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_choice_is_drawn_with_its_spectra(tmp_path):
    exponents = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    objective = -((exponents - 0.3) ** 2)
    objective[-5:] = -torch.inf
    choice = Choice("a.weight", 10, torch.tensor([3.0, 1.0, 0.0]), torch.tensor([2.0, 1.0]), exponents, objective, 0.3)
    assert plot_choices([choice, choice], tmp_path / "spectra.png")
    height, width, _ = imread(tmp_path / "spectra.png").shape
    assert width > height > 600
    assert not plot_choices([], tmp_path / "none.png")


def test_updates_that_moved_nothing_are_drawn_as_nothing(tmp_path):
    """As on warm-up's first step, at a learning rate of zero, and where a weight is still zero."""
    for value in (0.0, "inf", "nan"):
        entry = {"step": 1, "schatten_stable_rank/a": 2.0, "schatten_relative_size/a": value}
        assert plot_updates([entry], tmp_path / f"{value}.png")


# The command that draws a run's log


def write_state(folder, history):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder / "trainer_state.json"


def estimate(step, p=2.0):
    values = {"a.weight": p, "b.weight": math.inf}
    return {"step": step, **history_entry(log_entry(values, values, {"a.weight": 0.1, "b.weight": 0.2}))}


def test_the_log_of_a_run_is_its_own_or_its_newest_checkpoints(tmp_path):
    for step in (5, 20, 100):
        write_state(tmp_path / f"checkpoint-{step}", [{"step": step}])
    write_state(tmp_path / "checkpoint-best", [{"step": 1000}])
    damaged = tmp_path / "checkpoint-200"
    damaged.mkdir()
    (damaged / "trainer_state.json").write_text('{"log_history": [')
    assert read_log_history(tmp_path) == (tmp_path / "checkpoint-100" / "trainer_state.json", [{"step": 100}])
    assert read_log_history(tmp_path / "checkpoint-20")[1] == [{"step": 20}]
    write_state(tmp_path, [{"step": 7}])
    assert read_log_history(tmp_path) == (tmp_path / "trainer_state.json", [{"step": 7}])
    with pytest.raises(LogError, match=r"has no log: neither it nor a checkpoint in it holds a readable trainer_stat"):
        read_log_history(damaged)


def test_the_command_draws_what_the_log_holds_and_says_what_it_does_not(tmp_path, capsys):
    source = write_state(tmp_path / "checkpoint-20", [estimate(10), {"step": 15, "loss": 1.0}, estimate(20)])
    main(["figures", str(tmp_path)])
    figures = tmp_path / "figures"
    assert {path.name for path in figures.iterdir()} == {"p_by_layer.png", "updates.png"}
    assert capsys.readouterr().out == (
        f"{figures / 'p_by_layer.png'} and {figures / 'updates.png'} are drawn from {source}.\n"
        "Not spectra.png: the log holds no spectra; a training draws it at its end.\n"
    )
    write_state(tmp_path / "schedule", [{"step": 1, **log_entry({"a.weight": 3.0})}])
    main(["figures", str(tmp_path / "schedule")])
    shown = capsys.readouterr().out
    assert "p_by_layer.png is drawn from" in shown
    assert "Not updates.png: the log holds no sizes of updates" in shown


@pytest.mark.parametrize("history", [None, [], [{"step": 1, "loss": 2.0, "schatten_p_median": 2.0}]])
def test_a_run_without_p_by_layer_is_explained(tmp_path, history):
    if history is not None:
        write_state(tmp_path, history)
    expected = (
        "has no log" if history is None else "has no p by layer: .* no estimate yet, or the option report=summary"
    )
    with pytest.raises(SystemExit, match=expected):
        main(["figures", str(tmp_path)])
    assert not (tmp_path / "figures").exists()
