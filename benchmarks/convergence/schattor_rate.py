"""Does Schattor keep the rate that its theorems promise? Stationarity against the horizon, and against the size.

Problem, theory, measurement and page are in one long file, to be read as one argument.

The problem has known constants. With matrices ``A_j`` (m, n) of dual Schatten norm 1 and targets ``b_j = ±b``::

    f(X) = mean_j φ(⟨A_j, X⟩ - b_j),    |φ''| <= 1,    X_0 = 0,    stochastic gradient = ∇f(X) + noise

- The gradient is Lipschitz from the Schatten-r norm, r = p + 1, to its dual norm with constant L = 1.
- f has the minimum 0, hence the gap f(X_0) - min f = φ(b), which b sets to 1/4 for both φ: the quadratic t²/2, and the
  nonconvex, bounded t² / (2 + 2 t²).
- The noise is Gaussian with covariance ``E[noise noiseᵀ] = S²``, S a multiple of the identity of dual norm σ = 1/5.

For a horizon of T steps, with weight α of the newest gradient (1 - momentum) and learning rate η:

- α = min(1, √(L gap / T) / σ) for both step rules; η = √(α gap / (L T)) for the ball, whose radius it is, and
  η = α / (4 L) for the regularized oracle, whose penalty is 1 / η.
- Promised is E‖∇f‖, averaged over the T iterates, of the order T^(-1/4) for the ball, and E‖∇f‖² of the order T^(-1/2)
  for the regularized oracle, whose root is measured here; in the dual norm, and whatever the size of the matrix.

Source: B. Ma, J. Zhang and C. He 2026, "Schattor: Schatten-family methods for deep learning optimization", theorems 1
and 2, which promise the classical optimal rate whatever the size. The constants of α and η, and the bounds that the
last column refers to, are derived here along its lemmas 5 to 10, for single samples and the bias-corrected momentum of
`hf_schatten.SchattenP`, with which everything is computed; they need not be the paper's. The paper assumes exact
oracles, these take five Newton–Schulz steps.

Usage:
    python benchmarks/convergence/schattor_rate.py          # three minutes on one core; writes to results
    python benchmarks/convergence/schattor_rate.py --quick  # seconds: does it run? Writes to outputs/benchmarks
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

from hf_schatten import SchattenP
from hf_schatten.option_names import StepRule

L, GAP, SIGMA = 1.0, 0.25, 0.2
TERMS = 4  # matrices A_j
ORDERS = (1.0, 2.0, math.inf)  # p
RULES: tuple[StepRule, ...] = ("ball", "regularized")
# φ' and the b at which φ is the gap.
LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "quadratic": (lambda t: t, math.sqrt(2 * GAP)),
    "nonconvex": (lambda t: t / (1 + t.square()).square(), math.sqrt(2 * GAP / (1 - 2 * GAP))),
}
_MEASUREMENTS = 256  # iterates, equally spaced, at which the true gradient is measured


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        horizons: Numbers of steps T of the first table, on matrices of ``rows`` rows.
        rows: Rows m there; a matrix has 3 m / 2 columns.
        sizes: Rows of the second table, after ``steps`` steps.
        steps: Number of steps there.
        seeds: Repetitions, each with matrices A_j of its own.
    """

    horizons: tuple[int, ...]
    rows: int
    sizes: tuple[int, ...]
    steps: int
    seeds: int


FULL = Plan(horizons=(64, 256, 1024, 4096, 16384), rows=8, sizes=(4, 8, 16, 32, 64), steps=512, seeds=6)
QUICK = Plan(horizons=(16, 64), rows=4, sizes=(2, 4), steps=16, seeds=2)


@dataclass(frozen=True)
class Case:
    """One line of a table: a loss, a p and a step rule."""

    loss: str
    p: float
    rule: StepRule

    def cells(self) -> tuple[str, str, str]:
        """Return the first cells of the line."""
        return self.loss, f"{self.p:g}".replace("inf", "∞"), self.rule


# By horizon or size; each tensor is (2, seeds): over all iterates, and over the last quarter of them.
Results = dict[int, dict[Case, Tensor]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    plan = QUICK if options.quick else FULL
    torch.set_num_threads(1)
    start = time.perf_counter()
    by_horizon = {T: measure(plan.rows, T, plan.seeds) for T in plan.horizons}
    by_size = {m: measure(m, plan.steps, plan.seeds) for m in plan.sizes}
    text = report(plan, by_horizon, by_size)
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "schattor_rate.md").write_text(text + "\n", "utf-8")
    plot(by_horizon, by_size, plan, options.output / "schattor_rate.png")
    print(f"\nWritten to {options.output} in {time.perf_counter() - start:.0f} seconds")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="short horizons, only to check that everything runs")
    parser.add_argument(
        "--output", type=Path, help="folder (default: results beside this file; with --quick outputs/benchmarks)"
    )
    options = parser.parse_args(arguments)
    if options.output is None:
        options.output = Path("outputs/benchmarks") if options.quick else Path(__file__).parent / "results"
    return options


def measure(m: int, steps: int, seeds: int) -> dict[Case, Tensor]:
    """Run both step rules on every loss, p and seed.

    Returns:
        The stationarity (2, seeds) of each case, over all iterates and over the last quarter: the mean of the dual
        norms of the true gradients for the ball, the root of their mean square for the regularized oracle.
    """
    results: dict[Case, Tensor] = {}
    lines = list(product(LOSSES, ORDERS))
    for rule in RULES:
        norms = run(m, steps, seeds, rule)  # (measurements, losses × p, seeds)
        parts = (norms, norms[3 * len(norms) // 4 :])
        power = 1 if rule == "ball" else 2
        average = torch.stack([(part**power).mean(0) ** (1 / power) for part in parts], 1)  # (losses × p, 2, seeds)
        results |= {Case(loss, p, rule): row for (loss, p), row in zip(lines, average, strict=True)}
    return results


def run(m: int, steps: int, seeds: int, rule: StepRule) -> Tensor:
    """Return the dual norms of the true gradients along one run, (measurements, losses × p, seeds).

    All losses, p and seeds are matrices of one parameter, which SchattenP updates in one batch, each by itself.
    """
    problem = Problem.of(m, seeds)
    alpha, eta = parameters_of(rule, steps)
    X = nn.Parameter(torch.zeros(problem.shape))
    group = {"params": [X], "p": problem.p}
    optimizer = SchattenP([group], lr=eta, step_rule=rule, momentum=1 - alpha, nesterov=False, weight_decay=0.0)
    generator = torch.Generator().manual_seed(steps)
    stride, measured = max(1, steps // _MEASUREMENTS), []
    for step in range(steps):
        gradient = problem.gradient(X.detach())
        if step % stride == stride // 2:  # the first of each stride would count the start too much
            measured.append(problem.dual_norms(gradient))
        X.grad = gradient + problem.noise_scale * torch.randn(problem.shape, generator=generator)
        optimizer.step()
    return torch.stack(measured).unflatten(1, (-1, seeds))


def parameters_of(rule: StepRule, steps: int) -> tuple[float, float]:
    """Return the weight α of the newest gradient and the learning rate η for this horizon."""
    alpha = min(1.0, math.sqrt(L * GAP / steps) / SIGMA)
    return alpha, math.sqrt(alpha * GAP / (L * steps)) if rule == "ball" else alpha / (4 * L)


def bound(rule: StepRule, steps: int) -> float:
    """Return the bound on the stationarity after this many steps; it knows nothing of the matrix' size.

    The momentum's error has two parts. The lag behind moving iterates is at most ``(1 - α)/α`` steps long. The noise
    at step k has the expected square norm σ² Σ w², w being the weights of the moving average, since
    ``E‖Σ w N‖² <= ‖(E Σ w² N Nᵀ)^{1/2}‖²`` for dual orders up to 2.
    """
    alpha, eta = parameters_of(rule, steps)
    left = (1 - alpha) ** torch.arange(1, steps + 1, dtype=torch.float64)
    squares = SIGMA**2 * alpha / (2 - alpha) * (1 + left) / (1 - left)  # σ² Σ w² at each step
    if rule == "ball":
        lag = L * eta * (1 - alpha) / alpha
        return GAP / (eta * steps) + L * eta / 2 + 2 * (lag + squares.sqrt().mean().item())
    return math.sqrt(7.2 * GAP / (eta * steps) + 11.2 * squares.mean().item())


@dataclass(frozen=True)
class Problem:
    """All losses, p and seeds at one size, B of them.

    Attributes:
        A: (B, terms, m, n), of dual norm 1.
        b: (B, terms).
        p: B of them.
        noise_scale: (B, 1, 1), what standard normal noise is multiplied by.
    """

    A: Tensor
    b: Tensor
    p: tuple[float, ...]
    noise_scale: Tensor

    @classmethod
    def of(cls, m: int, seeds: int) -> "Problem":
        """Draw the matrices of each seed, the same for all losses and p but for their norms."""
        n = 3 * m // 2
        draws = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        gaussians = torch.stack([torch.randn(TERMS, m, n, generator=draw) for draw in draws])
        signs = torch.stack([torch.randn(TERMS, generator=draw).sign() for draw in draws])
        cases = list(product(LOSSES.values(), ORDERS))
        A = torch.stack([gaussians / _dual_norms(gaussians, p)[..., None, None] for _, p in cases])
        b = torch.stack([b * signs for (_, b), _ in cases])
        scales = [SIGMA / (math.sqrt(n) * m ** (1 / (1 + 1 / p))) for _, p in cases for _ in range(seeds)]
        return cls(
            A.flatten(0, 1), b.flatten(0, 1), tuple(p for _, p in cases for _ in range(seeds)),
            torch.tensor(scales)[:, None, None],
        )  # fmt: skip

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, m, n)."""
        return len(self.A), *self.A.shape[-2:]

    def gradient(self, X: Tensor) -> Tensor:
        """Return the true gradients at X, both (B, m, n)."""
        residual = torch.einsum("bjmn,bmn->bj", self.A, X) - self.b
        slopes = [
            derivative(part)
            for (derivative, _), part in zip(LOSSES.values(), residual.chunk(len(LOSSES)), strict=True)
        ]
        return torch.einsum("bj,bjmn->bmn", torch.cat(slopes) / TERMS, self.A)

    def dual_norms(self, gradient: Tensor) -> Tensor:
        """Return the norms (B,) of gradients (B, m, n), each in the order dual to p + 1."""
        sigma = torch.linalg.svdvals(gradient.double())
        return torch.stack([torch.linalg.vector_norm(row, 1 + 1 / p) for row, p in zip(sigma, self.p, strict=True)])


def _dual_norms(X: Tensor, p: float) -> Tensor:
    return torch.linalg.vector_norm(torch.linalg.svdvals(X), 1 + 1 / p, dim=-1)


def slope(points: dict[int, Tensor]) -> tuple[float, float, float]:
    """Fit a power law to each seed.

    Args:
        points: stationarity (seeds,) by horizon or size.

    Returns:
        The mean exponent and the ends of its 95 % confidence interval, of the t distribution over the seeds.
    """
    x = torch.tensor(list(points), dtype=torch.float64).log()
    y = torch.stack(list(points.values())).log()  # (points, seeds)
    slopes = ((x - x.mean())[:, None] * y).sum(0) / (x - x.mean()).square().sum()
    middle, error = slopes.mean().item(), slopes.std().item() / math.sqrt(len(slopes))
    low, high = stats.t.interval(0.95, len(slopes) - 1, loc=middle, scale=max(error, 1e-12))
    return middle, float(low), float(high)


def report(plan: Plan, by_horizon: Results, by_size: Results) -> str:
    """Return both tables with their headings, in Markdown."""
    m, n = plan.rows, 3 * plan.rows // 2
    late = plan.horizons[len(plan.horizons) // 2]
    long = {T: result for T, result in by_horizon.items() if late <= T}
    return "\n".join(
        [
            "# The rate of Schattor, measured",
            "",
            "Written by `python benchmarks/convergence/schattor_rate.py`, which states the problem and the choice of "
            "parameters.",
            f"L = {L:g}, gap {GAP:g}, σ = {SIGMA:g}; {plan.seeds} seeds.",
            "",
            "Stationarity is the mean over all iterates of the true gradient's dual norm (ball), or the root of its",
            "mean square (regularized). Exponents are means over the seeds, with their 95 % interval.",
            "",
            f"## Stationarity after T steps, {m} × {n}",
            "",
            "Promised: an exponent of -0.25.",
            "",
            *table(by_horizon, "T", lambda case, T: bound(case.rule, T)),
            "",
            "## Exponents in T",
            "",
            *exponents({"all T": (by_horizon, 0), f"T >= {late}": (long, 0), "of the last quarter": (long, 1)}),
            "",
            f"The last quarter of the iterates alone, for T >= {late} too; the theorems say nothing of it.",
            "",
            f"## Stationarity of an m × 1.5 m matrix after {plan.steps} steps",
            "",
            "Promised: no growth with m.",
            "",
            *table(by_size, "m", lambda case, m: bound(case.rule, plan.steps)),
            "",
            "## Exponents in m",
            "",
            *exponents({"all m": (by_size, 0)}),
            "",
            "## What this says, and what not",
            "",
            "The averages keep the promised order because the parameters do: f falls by the gap at most, which bounds",
            "the mean of η ‖∇f‖ (ball) or η ‖∇f‖² (regularized), with η proportional to T^(-3/4) or T^(-1/2). Nothing",
            "here is a worst case: what is measured stays far below the bound, and the last iterates of the "
            "regularized",
            "oracle, whose steps shrink with the gradient, fall faster than promised. Those of the ball, whose "
            "steps do",
            "not shrink, keep the order of the average.",
        ]
    )


def table(results: Results, variable: str, limit: Callable[[Case, int], float]) -> list[str]:
    """Return a Markdown table of the means over the seeds, and of measured over bound at worst."""
    rows = []
    for case in _cases(results):
        means = [result[case][0].mean().item() for result in results.values()]
        worst = max(mean / limit(case, x) for mean, x in zip(means, results, strict=True))
        rows.append([*case.cells(), *(f"{mean:.4f}" for mean in means), f"{worst:.2f}"])
    return _markdown([*_HEADER, *(f"{variable} = {x}" for x in results), "of the bound, at most"], rows)


def exponents(columns: dict[str, tuple[Results, int]]) -> list[str]:
    """Return a Markdown table of fitted exponents: a column for each set of results and part of the iterates."""
    rows = []
    for case in _cases(next(iter(columns.values()))[0]):
        fits = [slope({x: result[case][part] for x, result in results.items()}) for results, part in columns.values()]
        rows.append([*case.cells(), *(f"{middle:+.3f} ({low:+.3f} to {high:+.3f})" for middle, low, high in fits)])
    return _markdown([*_HEADER, *columns], rows)


_HEADER = ("φ", "p", "step rule")


def _cases(results: Results) -> list[Case]:
    return list(next(iter(results.values())))


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]


def plot(by_horizon: Results, by_size: Results, plan: Plan, path: Path) -> None:
    """Draw stationarity against horizon and against size, with the bounds, on logarithmic axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex="col", sharey=True)
    for row, rule in zip(axes, RULES, strict=True):
        _draw(row[0], rule, by_horizon, [bound(rule, T) for T in by_horizon])
        _draw(row[1], rule, by_size, [bound(rule, plan.steps)] * len(by_size))
        row[0].set_ylabel(f"stationarity, {rule}")
    axes[1][0].set_xlabel(f"horizon T, {plan.rows} × {3 * plan.rows // 2}")
    axes[1][1].set_xlabel(f"rows m, {plan.steps} steps")
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _draw(ax: Any, rule: StepRule, results: Results, bounds: Sequence[float]) -> None:
    xs = list(results)
    ax.loglog(xs, bounds, "k--", label="bound")
    for case in next(iter(results.values())):
        if case.rule == rule:
            ys = [result[case][0].mean().item() for result in results.values()]
            loss, p, _ = case.cells()
            color = f"C{ORDERS.index(case.p)}"
            ax.loglog(
                xs,
                ys,
                marker="o",
                color=color,
                linestyle="-" if loss == "nonconvex" else ":",
                label=f"{loss}, p = {p}",
            )
    ax.set_xticks(xs, [str(x) for x in xs])
    ticks = [0.03, 0.05, 0.1, 0.2, 0.5]
    ax.set_yticks(ticks, [str(y) for y in ticks])
    ax.minorticks_off()
    ax.grid(alpha=0.3)


if __name__ == "__main__":
    main()
