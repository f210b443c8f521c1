"""The stored tables are what the fit makes of itself."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.spectral_power import fit_tables
from benchmarks.spectral_power.ordered_fit import OrderedFit
from hf_schatten.linalg.coefficient_table import Coefficients, load_table, table_filename

pytestmark = pytest.mark.filterwarnings("error")

X = np.geomspace(5e-4, 1, 400)


@pytest.mark.parametrize("steps", [3, 4])
def test_refitting_a_table_from_its_curves_returns_to_it(steps: int) -> None:
    table = load_table(steps)
    curves = np.array(table["curves"])
    refitted = fit_tables.tabulate(steps, curves, fit_tables.release_columns(steps, curves * (1 + 1e-6)))
    for stored, column in zip(table["columns"], refitted["columns"], strict=True):
        if stored["s"] >= 0:
            before, after = (Coefficients(*(tuple(c[name]) for name in "abcw")).transfer(X) for c in (stored, column))
            np.testing.assert_allclose(after, before, rtol=0.01, atol=0.01)
            assert column["relative_error"] == pytest.approx(stored["relative_error"], rel=0.02, abs=1e-5)


@pytest.mark.slow
def test_the_command_remakes_a_stored_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("OMP", "OPENBLAS", "MKL"):
        monkeypatch.setenv(f"{library}_NUM_THREADS", "1")  # the command sets them; they are undone here
    fit_tables.main(["--steps", "3", "--folder", str(tmp_path), "--processes", "1"])
    assert "3 steps" in capsys.readouterr().out
    remade = json.loads((tmp_path / table_filename(3)).read_text())
    for stored, column in zip(load_table(3)["columns"], remade["columns"], strict=True):
        assert column["relative_error"] == pytest.approx(stored["relative_error"], rel=0.05, abs=1e-5)


@pytest.mark.parametrize("order", [0.0, 1.0])
def test_gradient_of_the_ordered_fit(order: float) -> None:
    x, exponents = np.geomspace(5e-4, 1, 40), np.array([0.1, 0.15, 0.4])
    targets, importance = x ** exponents[:, None], np.array([1.0, 2.0, 1.0])
    fit = OrderedFit(
        3, x, targets, np.eye(3), np.full(3, 0.01), importance, roughness=0.1 * np.eye(3), order=np.full(2, order)
    )
    rng = np.random.default_rng(0)
    curves = fit_tables.random_start(3, 3, rng)
    curves += 0.1 * rng.standard_normal(curves.shape)

    def objective(curves: np.ndarray) -> float:
        at = fit.linearize(curves)
        assert at is not None
        assert fit._rises(at).any() == (order > 0)
        return fit._objective(at, curves)

    at = fit.linearize(curves)
    assert at is not None
    gradient, _ = fit._normal_equations(at, curves)
    steps = 1e-6 * np.eye(curves.size).reshape(-1, *curves.shape)
    expected = np.array([(objective(curves + step) - objective(curves - step)) / 2e-6 for step in steps])
    # Of the rises Kaufman's variant leaves out what the change of the weights adds where the fit is poor.
    tolerance = 0.2 * abs(expected).max() if order else 1e-5
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=tolerance)
