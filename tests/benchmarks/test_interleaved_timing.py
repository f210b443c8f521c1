"""Ratios of alternating calls, on a clock that only the calls advance."""

import pytest
import torch

from benchmarks import interleaved_timing
from benchmarks.interleaved_timing import best_seconds, time_ratio

CPU = torch.device("cpu")


class Clock:
    """Stands in for the time: each call takes as many seconds as it says, and leaves its name."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def call(self, name: str, *seconds: float):
        durations = iter(seconds)

        def run() -> None:
            self.log.append(name)
            self.now += next(durations)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(interleaved_timing.time, "perf_counter", lambda: clock.now)
    return clock


def test_reference_and_candidate_alternate_after_a_warm_up(clock):
    time_ratio(clock.call("candidate", *[1.0] * 5), clock.call("reference", *[1.0] * 5), 3, CPU)
    assert clock.log == ["reference"] * 2 + ["candidate"] * 2 + ["reference", "candidate"] * 3


def test_ratio_is_the_median_of_neighbours(clock):
    # The machine is four times as slow during the last pair: neither ratio nor median moves.
    reference = clock.call("reference", 9, 1, 1, 1, 4)
    candidate = clock.call("candidate", 9, 3, 3, 2, 12)
    ratio = time_ratio(candidate, reference, 3, CPU)
    assert (ratio.low, ratio.median, ratio.high) == (2.5, 3, 3)
    assert (ratio.seconds, ratio.reference_seconds) == (3, 1)


def test_one_repeat(clock):
    ratio = time_ratio(clock.call("candidate", 1, 1, 2), clock.call("reference", 1, 1, 1), 1, CPU)
    assert (ratio.low, ratio.median, ratio.high) == (2, 2, 2)


def test_a_short_call_is_repeated_within_a_measurement(clock):
    seconds = best_seconds(clock.call("short", *[0.0078125] * 10), 1, CPU)
    assert len(clock.log) == 2 + 3
    assert seconds == 0.0078125
