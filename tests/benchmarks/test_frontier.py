"""Who dominates whom, and the verdict for each p."""

import math

import pytest

from benchmarks.spectral_power.accuracy import frontier_by_p
from benchmarks.spectral_power.frontier import Point, dominating_peers, families_left, plot
from benchmarks.spectral_power.peers import EXPONENTS, OURS


def point(error: float, time: float, family: str = "peer", setting: str = "K = 5", p: float = 2.0) -> Point:
    return Point("Gaussian", p, family, setting, error, time)


@pytest.mark.parametrize(
    ("error", "time", "expected"),
    [
        (0.05, 1.0, True),  # more accurate
        (0.10, 0.9, True),  # faster
        (0.05, 1.2, False),
        (0.20, 0.5, False),
        (0.10, 1.0, False),  # the same
        (0.099, 0.99, False),  # within the margins
        (0.102, 0.5, True),  # its error is larger within the margin only
        (math.inf, 0.1, False),
    ],
)
def test_dominates(error, time, expected):
    assert point(error, time).dominates(point(0.10, 1.0)) is expected


def test_differences_of_rounding_do_not_count():
    assert not point(1e-8, 1.0).dominates(point(9e-7, 1.0))


def test_dominating_peers_names_the_most_accurate_peer():
    points = [
        point(0.10, 1.0, OURS, "K = 3"),
        point(0.01, 2.0, OURS, "K = 5"),
        point(0.09, 1.0, "good"),
        point(0.05, 0.9, "better"),
    ]
    assert dominating_peers(points) == {"K = 3": points[3]}
    assert families_left(points) == {OURS, "better"}


def test_verdicts():
    points = [point(0.1, 1.0, OURS, "K = 3", p) for p in EXPONENTS] + [point(0.2, 0.5, "fast", p=1.0)]
    points += [point(0.05, 1.0, "accurate", p=math.inf)]
    verdicts = {verdict["p"]: verdict for verdict in frontier_by_p(points)}
    assert verdicts["2"] == {"p": "2", "Gaussian": "all", "peers on it too": ""}
    assert verdicts["1"]["peers on it too"] == "fast"
    assert verdicts["∞"]["Gaussian"] == "none (others behind accurate)"


def test_record_fits_json():
    record = point(math.inf, 1.0, p=math.inf).record()
    assert record["error"] is None
    assert record["p"] == "∞"


def test_plot(tmp_path):
    points = [point(0.1 / k, k, OURS, f"K = {k}", p) for k in (3, 4) for p in (2.0, math.inf)]
    plot([*points, point(math.inf, 1.0, "diverging")], tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
