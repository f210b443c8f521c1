"""Time of `spectral_power` against plain Newton–Schulz, and of a `SchattenP` step against ``torch.optim.Muon``'s."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.interleaved_timing import Ratio
from benchmarks.spectral_power.bench import GPT2_SMALL, Bench
from benchmarks.spectral_power.peers import newton_schulz
from benchmarks.tables import print_table
from hf_schatten import SchattenP
from hf_schatten.linalg import spectral_power

BATCH = 12  # matrices, each with its own p


class Call(NamedTuple):
    """Something to time, under a name for the table."""

    name: str
    run: Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        candidate: What is timed.
        reference: What it is compared with.
        ratio: Their times.
        flops: Floating-point operations of the candidate's matrix products.
        target: Largest ratio aimed at, in float32 on a CPU and at full size; else None.
    """

    candidate: str
    reference: str
    ratio: Ratio
    flops: int
    target: float | None

    @property
    def verdict(self) -> str:
        """The target, and whether the median meets it."""
        if self.target is None:
            return "–"
        return f"≤ {self.target:.2f} {'met' if self.ratio.median <= self.target else 'missed'}"


class SchattenInDtype(SchattenP):
    """`SchattenP` with its matrix products in a given dtype, and not in the default of the device."""

    def __init__(self, matrices: list[torch.nn.Parameter], dtype: torch.dtype) -> None:
        super().__init__([{"params": matrices, "transposed": True}], p=2.0)
        self._dtype = dtype

    def direction(self, momenta: Tensor, p: Tensor) -> Tensor:
        """Return the spectral powers (B, m, n) of the momenta."""
        return spectral_power(momenta, p, compute_dtype=self._dtype)


def measure_calls(bench: Bench) -> list[dict[str, Any]]:
    """Time single calls on a square and on a wide matrix, and many p against one; print and return the table."""
    hidden = bench.sizes.hidden
    return _report(
        bench,
        [
            *_against_newton_schulz(bench, bench.gaussian(hidden, hidden), target=1.05),
            *_against_newton_schulz(bench, bench.gaussian(hidden, 4 * hidden), target=0.60),
            _many_p_against_one(bench, bench.gaussian(BATCH, hidden, hidden), target=1.05),
        ],
    )


def measure_optimizers(bench: Bench) -> list[dict[str, Any]]:
    """Time whole steps on the matrices of GPT-2 in its (in, out) layout; print and return the table.

    ``torch.optim.Muon`` computes in bfloat16 everywhere: slow on a CPU without instructions for it, and fast on
    one that has them. The second line compares at equal dtype.
    """
    bench = dataclasses.replace(bench, repeats=max(1, bench.repeats // 2))  # a step of Muon's takes long on a CPU
    ours = SchattenInDtype(gpt2_matrices(bench), bench.dtype)
    muon = torch.optim.Muon(gpt2_matrices(bench))
    gradients = [matrix.grad for matrix in gpt2_matrices(bench) if matrix.grad is not None]

    def orthogonalize_all() -> None:
        for gradient in gradients:
            newton_schulz(gradient, bench.dtype)

    name = f"SchattenP.step, {bench.dtype_name}"
    step = Call(name, ours.step)
    pairs: list[tuple[Call, Call, float | None]] = [
        (step, Call("torch.optim.Muon.step, bfloat16", muon.step), 0.35),
        (step, Call(f"only five NS steps of each matrix, {bench.dtype_name}", orthogonalize_all), None),
    ]
    if bench.compiled:
        compiled = Call(f"{name}, compiled", torch.compile(ours.step))
        pairs.append((compiled, Call("torch.optim.Muon.step, compiled", torch.compile(muon.step)), None))
    flops = count_flops(ours.step)
    return _report(bench, [_time(bench, *pair, flops) for pair in pairs])


def gpt2_matrices(bench: Bench) -> list[torch.nn.Parameter]:
    """The matrices of GPT-2's layers, stored (in, out) as in ``Conv1D``, with Gaussian gradients."""
    hidden = bench.sizes.hidden
    shapes = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)]
    matrices = []
    for seed, shape in enumerate(shapes * bench.sizes.layers):
        matrix = torch.nn.Parameter(torch.zeros(shape, device=bench.device))
        matrix.grad = bench.gaussian(*shape, seed=seed)
        matrices.append(matrix)
    return matrices


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in one call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def _against_newton_schulz(bench: Bench, X: Tensor, target: float) -> list[Row]:
    """Ours against plain Newton–Schulz on one matrix X (m, n): as they are and compiled."""
    ours, plain = partial(spectral_power, compute_dtype=bench.dtype), partial(newton_schulz, dtype=bench.dtype)
    flops = count_flops(lambda: ours(X, 2.0))
    name = f"spectral_power {_shape(X)}"
    rows = [_time(bench, Call(name, lambda: ours(X, 2.0)), Call("five NS steps", lambda: plain(X)), target, flops)]
    if bench.compiled:
        ours_compiled, plain_compiled = torch.compile(ours), torch.compile(plain)
        candidate = Call(f"{name}, compiled", lambda: ours_compiled(X, 2.0))
        rows.append(_time(bench, candidate, Call("five NS steps, compiled", lambda: plain_compiled(X)), None, flops))
    return rows


def _many_p_against_one(bench: Bench, X: Tensor, target: float) -> Row:
    """A batch X (B, m, n) with a p for each matrix against the same batch with one p."""
    p = torch.linspace(1, 10, len(X), device=X.device)
    ours = partial(spectral_power, X, compute_dtype=bench.dtype)
    candidate = Call(f"spectral_power {_shape(X)}, {len(X)} p", lambda: ours(p))
    return _time(bench, candidate, Call("the same, one p", lambda: ours(2.0)), target, count_flops(candidate.run))


def _shape(X: Tensor) -> str:
    return " × ".join(str(side) for side in X.shape)


def _time(bench: Bench, candidate: Call, reference: Call, target: float | None, flops: int) -> Row:
    ratio = bench.ratio(candidate.run, reference.run)
    aimed_at = (bench.device.type, bench.dtype, bench.sizes) == ("cpu", torch.float32, GPT2_SMALL)
    return Row(candidate.name, reference.name, ratio, flops, target if aimed_at else None)


def _report(bench: Bench, rows: list[Row]) -> list[dict[str, Any]]:
    peak = bench.matmul_peak()
    print_table(
        ("candidate", "reference", "time ratio (quartiles)", "target", "candidate, ms", "GFLOP", "of matmul peak"),
        [
            (
                row.candidate,
                row.reference,
                f"{row.ratio.median:.3f} ({row.ratio.low:.3f}–{row.ratio.high:.3f})",
                row.verdict,
                f"{1e3 * row.ratio.seconds:.1f}",
                f"{row.flops / 1e9:.3g}",
                f"{row.flops / row.ratio.seconds / peak:.0%}",
            )
            for row in rows
        ],
    )
    return [{**dataclasses.asdict(row), "of_matmul_peak": row.flops / row.ratio.seconds / peak} for row in rows]
