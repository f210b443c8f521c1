"""Error against time of every method, and whether ours is on the frontier at every p."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.spectral_power.bench import Bench
from benchmarks.spectral_power.frontier import DIVERGED, Point, dominating_peers, families_left, label_of, plot
from benchmarks.spectral_power.peers import EXPONENTS, OURS, Method, all_methods, newton_schulz
from benchmarks.tables import print_table
from hf_schatten.linalg import spectral_power_svd

PICTURE = "spectral_power.png"
_MARGIN = 1.01  # of the norm that `spectral_function` divides by, see its documentation


@dataclass(frozen=True)
class Subject:
    """A matrix and what is to be made of it.

    Attributes:
        name: For the tables.
        X: Shape (m, n), float32.
        exact: ``U Σ^{1/p} Vᵀ`` by p, float64.
        norm: What the results of relative methods are relative to.
    """

    name: str
    X: Tensor
    exact: dict[float, Tensor]
    norm: float

    @classmethod
    def of(cls, name: str, X: Tensor) -> "Subject":
        """Compute everything from X."""
        norm = torch.linalg.svdvals(X.double()).pow(8).sum().item() ** (1 / 8)
        return cls(name, X, {p: spectral_power_svd(X, p) for p in EXPONENTS}, _MARGIN * norm)

    def relative_error(self, method: Method, p: float) -> float:
        """Frobenius error of a method relative to the exact result; inf where it gives NaN or inf."""
        result = method.compute(self.X, p).double()
        if method.relative:
            result *= self.norm ** (1 / p)
        error = torch.linalg.matrix_norm(result - self.exact[p]) / torch.linalg.matrix_norm(self.exact[p])
        return error.item() if error.isfinite() else math.inf


def measure_methods(bench: Bench, output: Path) -> dict[str, Any]:
    """Measure every method on every matrix; print the tables, draw the picture and return both for the JSON file."""
    points: list[Point] = []
    for subject in subjects(bench):
        group = [
            point
            for method in all_methods(bench.dtype, bench.sizes.steps)
            for point in measure_method(bench, subject, method)
        ]
        print(f"### {subject.name}: relative error in %\n")
        _print_errors(group)
        print()
        points += group
    verdicts = frontier_by_p(points)
    print("### Frontier of error against time: our settings on it\n")
    print_table(tuple(verdicts[0]), [tuple(verdict.values()) for verdict in verdicts])
    where = f"{bench.device.type}, {bench.dtype_name}"
    plot(points, output / PICTURE, f"Error of U Σ^(1/p) Vᵀ against time; more steps to the right ({where})")
    return {"points": [point.record() for point in points], "frontier": verdicts}


def subjects(bench: Bench) -> Iterator[Subject]:
    """Square and wide Gaussian, and log-uniform spectra of condition 100 and 1000."""
    rows = bench.sizes.rows
    yield Subject.of(f"Gaussian {rows} × {rows}", bench.gaussian(rows, rows))
    yield Subject.of(f"Gaussian {rows // 2} × {2 * rows}", bench.gaussian(rows // 2, 2 * rows))
    left, right = (torch.linalg.qr(bench.gaussian(rows, rows, seed=seed).double()).Q for seed in (1, 2))
    for decades in (2, 3):
        spectrum = torch.logspace(0, -decades, rows, dtype=torch.float64, device=bench.device)
        yield Subject.of(f"condition {10**decades}, {rows} × {rows}", (left * spectrum @ right).float())


def measure_method(bench: Bench, subject: Subject, method: Method) -> list[Point]:
    """Points of one method, one for each p; it is timed at one p, since no method's cost depends on it."""
    X, p = subject.X, method.exponents[-1]
    ratio = bench.ratio(lambda: method.compute(X, p), lambda: newton_schulz(X, bench.dtype))
    return [
        Point(subject.name, p, method.family, method.setting, subject.relative_error(method, p), ratio.median)
        for p in method.exponents
    ]


def frontier_by_p(points: list[Point]) -> list[dict[str, str]]:
    """The verdict for each p: which of our settings no peer dominates, on each matrix; and who else is there."""
    names = list(dict.fromkeys(point.matrix for point in points))
    verdicts = []
    for p in EXPONENTS:
        groups = {name: [point for point in points if (point.matrix, point.p) == (name, p)] for name in names}
        others = sorted(set().union(*map(families_left, groups.values())) - {OURS})
        cells = {name: _verdict(group) for name, group in groups.items()}
        verdicts.append({"p": label_of(p), **cells, "peers on it too": "; ".join(others)})
    return verdicts


def _verdict(group: list[Point]) -> str:
    """Our settings on the frontier, and the families that put the others off it; all on one matrix, for one p."""
    better = dominating_peers(group)
    if not better:
        return "all"
    left = [point.setting for point in group if point.family == OURS and point.setting not in better]
    families = dict.fromkeys(peer.family for peer in better.values())
    return f"{', '.join(left) or 'none'} (others behind {'; '.join(families)})"


def _percent(error: float) -> str:
    return f"{100 * error:.2g}" if error < DIVERGED else "diverges"


def _print_errors(points: list[Point]) -> None:
    """A line for each method and time, a column for each p."""
    lines: dict[tuple[str, float], dict[float, float]] = {}
    for point in points:
        lines.setdefault((point.name, point.time), {})[point.p] = point.error
    print_table(
        ("method", "time ratio", *(f"p = {label_of(p)}" for p in EXPONENTS)),
        [
            (name, f"{time:.2f}", *(_percent(errors[p]) if p in errors else "" for p in EXPONENTS))
            for (name, time), errors in lines.items()
        ],
    )
