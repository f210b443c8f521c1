"""Time ratios that survive a shared machine: both sides run alternately, and only their ratio is kept."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# A measurement shorter than this many seconds repeats its call: below, the clock and the launch of kernels show.
_SHORTEST = 0.02


@dataclass(frozen=True)
class Ratio:
    """A candidate's time relative to its reference's.

    Attributes:
        median: Of the ratios of neighbouring measurements.
        low: First quartile of them.
        high: Third quartile of them.
        seconds: Median time of one call of the candidate.
        reference_seconds: The same of the reference.
    """

    median: float
    low: float
    high: float
    seconds: float
    reference_seconds: float


def time_ratio(
    candidate: Callable[[], object], reference: Callable[[], object], repeats: int, device: torch.device
) -> Ratio:
    """Time two calls alternately, the reference first.

    Both run once before, which pays for caches, allocations and compilation.

    Args:
        candidate: The call to be measured.
        reference: What it is compared with.
        repeats: Measurements of each.
        device: Where both work; it is waited for.
    """
    reference_calls, candidate_calls = (_calls(call, device) for call in (reference, candidate))
    pairs = [
        (_seconds(reference, reference_calls, device), _seconds(candidate, candidate_calls, device))
        for _ in range(repeats)
    ]
    ratios = [own / base for base, own in pairs]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if repeats > 1 else ratios * 3
    base, own = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Ratio(median, low, high, own, base)


def best_seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The shortest time of one call, in seconds: for a machine's peak, where noise only ever adds."""
    calls = _calls(call, device)
    return min(_seconds(call, calls, device) for _ in range(repeats))


def _calls(call: Callable[[], object], device: torch.device) -> int:
    """How many calls make a measurement long enough, found by a warm-up."""
    call()
    return int(_SHORTEST / _seconds(call, 1, device)) + 1


def _seconds(call: Callable[[], object], calls: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _wait(device)
    return (time.perf_counter() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
