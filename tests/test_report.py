"""Log entries, and the pictures drawn from them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from matplotlib.image import imread

from hf_schatten.adaptive.adaptation import Choice
from hf_schatten.report import log_entry, plot_choices, plot_p_by_layer, plot_updates
from hf_schatten.report.figures import plot_p_of_runs
from hf_schatten.report.log import history_entry

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
