"""The stored tables are tame, and fits meet their targets."""

import itertools
import math

import numpy as np
import pytest
import torch

from hf_schatten.linalg.coefficient_table import Coefficients, interpolate, load_table
from hf_schatten.linalg.multiscale_fit import MultiscaleFit, least_squares
from hf_schatten.options import NS_STEPS

pytestmark = pytest.mark.filterwarnings("error")

X = np.geomspace(5e-4, 1, 400)


def multiscale(s: float, steps: int = 5) -> Coefficients:
    return Coefficients.from_row(interpolate(torch.tensor([s], dtype=torch.float64), steps)[0].tolist())


@pytest.mark.parametrize("steps", NS_STEPS)
def test_table_is_complete_and_tame(steps: int) -> None:
    columns = load_table(steps)["columns"]
    exponents = [column["s"] for column in columns]
    assert (exponents[0], exponents[-1]) == (-0.25, 1)
    assert {0, 0.25, 0.5} < set(exponents)
    assert all(0 < after - before <= 1 / 32 for before, after in itertools.pairwise(exponents))
    for column in columns:
        assert len(column["a"]) == len(column["b"]) == len(column["c"]) == len(column["w"]) - 1 == steps
        assert max(map(abs, column["w"])) < (1.5 if column["s"] >= 0 else 5), "cancelling weights ruin bfloat16"
    assert columns[-1]["w"] == [1.0] + [0.0] * steps


@pytest.mark.parametrize("steps", NS_STEPS)
def test_stored_errors_are_the_errors(steps: int) -> None:
    x = np.geomspace(5e-4, 1, 4000)
    for column in load_table(steps)["columns"][::8]:
        fitted = Coefficients(*(tuple(column[name]) for name in "abcw"))
        error = np.abs(fitted.transfer(x) - x ** column["s"]).max()
        assert error == pytest.approx(column["max_error"], rel=0.05, abs=1e-6)


@pytest.mark.parametrize("steps", NS_STEPS)
def test_errors_fall_as_s_grows(steps: int) -> None:
    # From six steps on, a composition for the polar factor itself is better than what there is for s > 0.
    lowest = 0 if steps <= 5 else 1 / 16
    errors = [column["relative_error"] for column in load_table(steps)["columns"] if column["s"] >= lowest]
    assert all(after < 1.15 * before for before, after in itertools.pairwise(errors))


def test_more_steps_fit_better() -> None:
    for s in (0.0, 0.25, 0.5):
        errors = [np.abs(multiscale(s, steps).transfer(X) - X**s).mean() for steps in NS_STEPS]
        assert errors[:5] == sorted(errors[:5], reverse=True)
        assert errors[5] < 1.5 * errors[4]


@pytest.mark.parametrize("steps", NS_STEPS)
def test_transfer_grows_with_p_and_keeps_its_sign(steps: int) -> None:
    exponents = np.linspace(0, 1, 161)
    values = np.array([multiscale(s, steps).transfer(X) for s in exponents])
    assert (values > 0).all()
    rises = np.maximum(np.diff(values, axis=0), 0)  # there are none in x^s
    assert rises.sum(0).max() < 0.08
    assert rises[:, X < 0.1].sum(0).max() < 1e-3


def test_below_the_domain_small_values_stay_small() -> None:
    x = np.geomspace(1e-8, 5e-4, 200)
    for s in (0.0, 0.25, 0.5, 0.9):
        values = multiscale(s).transfer(x)
        assert (np.diff(values) > 0).all()
        assert (values <= 1.2 * x**s).all()


def test_columns_are_interpolated_linearly_between_unequal_neighbours() -> None:
    columns = load_table(5)["columns"]
    nodes = torch.tensor([column["s"] for column in columns], dtype=torch.float64)
    rows = torch.tensor([[*c["a"], *c["b"], *c["c"], *c["w"]] for c in columns], dtype=torch.float64)
    torch.testing.assert_close(interpolate(nodes, 5), rows, rtol=1e-14, atol=1e-14)
    between = 0.75 * nodes[:-1] + 0.25 * nodes[1:]
    torch.testing.assert_close(interpolate(between, 5), 0.75 * rows[:-1] + 0.25 * rows[1:], rtol=1e-12, atol=1e-12)
    outside = torch.tensor([-1.0, 2.0, math.nan], dtype=torch.float64)
    torch.testing.assert_close(interpolate(outside, 5)[:2], rows[[0, -1]], rtol=1e-14, atol=1e-14)
    assert interpolate(outside, 5)[2].isnan().all()


@pytest.mark.parametrize("steps", NS_STEPS)
def test_iterates_that_rounding_makes_larger_do_not_explode(steps: int) -> None:
    for s in np.linspace(0, 1, 33):
        row = np.array(multiscale(s, steps).row)
        row[: 3 * steps] *= 1.02
        assert np.abs(Coefficients.from_row(row.tolist()).transfer(X)).max() < 5


def test_multiscale_interpolates_to_the_identity() -> None:
    np.testing.assert_allclose(multiscale(1.0).transfer(X), X, rtol=1e-12, atol=1e-12)


def test_gradient_of_the_fit() -> None:
    x, exponents = np.geomspace(5e-4, 1, 40), np.array([0.1, 0.15, 0.4])
    targets, importance = x ** exponents[:, None], np.array([1.0, 2.0, 1.0])
    fit = MultiscaleFit(3, x, targets, np.eye(3), np.full(3, 0.01), importance, roughness=0.1 * np.eye(3))
    start = np.array([0.7, 0.7, 0.7, 0.5, 0.5, 0.5])  # three stretches and three drops, the same in every column
    curves = start[:, None] + 0.1 * np.random.default_rng(0).standard_normal((6, 3))

    def objective(curves: np.ndarray) -> float:
        at = fit.linearize(curves)
        assert at is not None
        return fit._objective(at, curves)

    at = fit.linearize(curves)
    assert at is not None
    gradient, _ = fit._normal_equations(at, curves)
    steps = 1e-6 * np.eye(curves.size).reshape(-1, *curves.shape)
    expected = np.array([(objective(curves + step) - objective(curves - step)) / 2e-6 for step in steps])
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_least_squares_of_any_function() -> None:
    def target(x: np.ndarray) -> np.ndarray:
        return np.tanh(5 * x)

    x = np.geomspace(0.01, 1, 200)
    fitted = least_squares(target, 5, lowest=0.01)
    np.testing.assert_allclose(fitted.transfer(x), target(x), rtol=0.02, atol=0.01)
    with pytest.raises(ValueError, match="lowest must lie in"):
        least_squares(target, 5, lowest=0)
    with pytest.raises(ValueError, match="steps must be one of"):
        least_squares(target, 2, lowest=0.01)


def test_infinite_p_is_the_polar_factor() -> None:
    values = multiscale(1 / math.inf).transfer(np.geomspace(0.01, 1, 100))
    np.testing.assert_allclose(values, 1, rtol=0.15, atol=0.15)
