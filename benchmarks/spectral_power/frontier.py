"""Which points are on the frontier of error against time, and the picture of it."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.spectral_power.peers import OURS

# Differences below these are noise: of two timings, and of rounding at p = 1.
TIME_MARGIN = 0.03
ERROR_MARGIN = 0.03
_ROUNDING = 1e-6

_MARKERS = "osDdP^v"
DIVERGED = 10.0  # a relative error that is no approximation any more


@dataclass(frozen=True)
class Point:
    """One method at one setting on one matrix, for one p.

    Attributes:
        matrix: Name of the matrix.
        p: The exponent.
        family: The method.
        setting: Its setting.
        error: Relative Frobenius error against the float64 SVD; inf where the method diverged.
        time: Time relative to five plain Newton–Schulz steps on the same matrix.
    """

    matrix: str
    p: float
    family: str
    setting: str
    error: float
    time: float

    @property
    def name(self) -> str:
        """Family and setting."""
        return f"{self.family}, {self.setting}" if self.setting else self.family

    def record(self) -> dict[str, str | float | None]:
        """All attributes as JSON can hold them: p as the tables write it, no error where it is infinite."""
        error = self.error if math.isfinite(self.error) else None
        return {**dataclasses.asdict(self), "p": label_of(self.p), "error": error}

    def dominates(self, other: "Point") -> bool:
        """Whether it is clearly better in error or time, and no worse in the other beyond the margins."""
        return self._error_at_most(other, 1 + ERROR_MARGIN, _ROUNDING) and (
            self.time <= other.time * (1 + TIME_MARGIN)
            and (
                self._error_at_most(other, 1 - ERROR_MARGIN, -_ROUNDING) or self.time < other.time * (1 - TIME_MARGIN)
            )
        )

    def _error_at_most(self, other: "Point", factor: float, rounding: float) -> bool:
        return self.error <= other.error * factor + rounding


def dominating_peers(points: Sequence[Point]) -> dict[str, Point]:
    """Our settings that are off the frontier, each with the most accurate peer that dominates it.

    Args:
        points: All methods on one matrix and for one p.
    """
    ours = [point for point in points if point.family == OURS]
    peers = sorted((point for point in points if point.family != OURS), key=lambda point: point.error)
    found = {point.setting: next((peer for peer in peers if peer.dominates(point)), None) for point in ours}
    return {setting: peer for setting, peer in found.items() if peer}


def families_left(points: Sequence[Point]) -> set[str]:
    """The families with a point that no other point dominates; points as for `dominating_peers`."""
    return {point.family for point in points if not any(other.dominates(point) for other in points)}


def plot(points: Sequence[Point], path: Path, title: str) -> None:
    """Draw error against time, one panel for each p; a point stands for its method on all matrices.

    Args:
        points: All of them.
        path: The PNG to write.
        title: Of the whole picture.
    """
    exponents = list(dict.fromkeys(point.p for point in points))
    families = list(dict.fromkeys(point.family for point in points))
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    panels = figure.subplots(2, (len(exponents) + 1) // 2, sharex=True, sharey=True, squeeze=False)
    for panel, p in zip(panels.flat, exponents, strict=False):
        _draw_panel(panel, [point for point in points if point.p == p], families)
        panel.set_title(f"p = {label_of(p)}")
    for panel in panels[-1]:
        panel.set_xlabel("time / five NS steps, mean")
    for panel in panels[:, 0]:
        panel.set_ylabel("relative error, worst matrix")
    handles = {line.get_label(): line for panel in panels.flat for line in panel.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(families), frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def label_of(p: float) -> str:
    """P as the tables write it."""
    return "∞" if math.isinf(p) else f"{p:g}"


def _draw_panel(panel: Axes, points: list[Point], families: list[str]) -> None:
    for index, family in enumerate(families):
        settings: dict[str, list[Point]] = {}
        for point in points:
            if point.family == family:
                settings.setdefault(point.setting, []).append(point)
        coordinates = [_summary(group) for group in settings.values()]
        drawn = [(time, error) for time, error in coordinates if error < DIVERGED]
        if drawn:
            ours = family == OURS
            panel.plot(
                *zip(*drawn, strict=True),
                marker=_MARKERS[index],
                color=f"C{index}",
                markersize=6 if ours else 4,
                linewidth=2 if ours else 1,
                zorder=3 if ours else 2,
                label=family,
            )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.grid(alpha=0.3)


def _summary(group: list[Point]) -> tuple[float, float]:
    """Mean time and worst error of one setting over the matrices."""
    return statistics.fmean(point.time for point in group), max(point.error for point in group)
