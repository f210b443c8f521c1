"""The published ways to compute ``U diag(σ^{1/p}) Vᵀ``, each our own implementation, and ours at every step count.

A `Method` is one of them at one setting, such as five steps: a point of the plane of error and time. The
polynomial peers run on our own engine (`spectral_function`: Gram space, tight normaliser), so that the table
compares what a method's coefficients achieve, and not how well its code was tuned.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from hf_schatten.linalg import Coefficients, spectral_function, spectral_power

# K. Jordan's Muon, kellerjordan.github.io/posts/muon: the largest slope at zero, at the price of convergence.
MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MUON_STEPS = 5

EXPONENTS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, math.inf)  # the p of the tables

OURS = "ours"

# Lower ends of the intervals that minimax steps are fitted on: Polar Express' own (arXiv 2505.16932), and one that
# suits matrices of condition 100 and no more.
LOWEST = (1e-3, 1e-2)
_POINTS = 400
# Once all x have come together, every quintic through one point is optimal, and most explode beside it.
_COEFFICIENT_PENALTY = 1e-6

# Qi et al. (arXiv 2602.04669) add this part of the mean eigenvalue to a matrix before they take its root.
_DAMPING = 1e-4

_TAYLOR_ORDER = 5
_POWER_ITERATIONS = 8


@dataclass(frozen=True)
class Method:
    """One way to compute a spectral power, at one setting.

    Attributes:
        family: Name shared by all settings of a method.
        setting: What distinguishes this one, e.g. ``K = 5``.
        compute: Takes X (m, n) and p and returns (m, n). Its cost does not depend on p.
        exponents: The p for which it exists.
        relative: Whether the result is that of X/c, c being X's Schatten-8 norm with the margin of
            `spectral_function`. An optimizer pins the norm of its update: putting c^{1/p} back costs nothing.
    """

    family: str
    setting: str
    compute: Callable[[Tensor, float], Tensor]
    exponents: tuple[float, ...] = EXPONENTS
    relative: bool = False

    @property
    def name(self) -> str:
        """Family and setting."""
        return f"{self.family}, {self.setting}" if self.setting else self.family


def all_methods(dtype: torch.dtype, steps: tuple[int, ...]) -> list[Method]:
    """Ours and every peer.

    Args:
        dtype: Of the matrix products. Coupled square roots and the SVD stay in float32, as published.
        steps: The numbers of steps K of ours and of the compositions.
    """
    return [
        *(Method(OURS, f"K = {k}", _ours(k, dtype)) for k in steps),
        *(Method("least squares, a+b+c = 1", f"N = {k}", _composed(lagrange, k, dtype), relative=True) for k in steps),
        *(
            Method(f"minimax on [{lowest:g}, 1]", f"N = {k}", _composed(minimax, k, dtype), relative=True)
            for lowest, minimax in ((lowest, partial(minimax_composition, lowest=lowest)) for lowest in LOWEST)
            for k in steps
        ),
        *(Method("polar + Taylor", f"{k} + {_TAYLOR_ORDER}", _polar_taylor(k, dtype)) for k in (5, 8)),
        *(
            Method("coupled square roots", f"{k} iterations", _coupled(k, halvings), exponents=(2.0**halvings,))
            for halvings in (1, 2)
            for k in (6, 9, 12, 15)
        ),
        Method("exact SVD", "", svd_power),
    ]


def newton_schulz(X: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Muon's five Newton–Schulz steps: the price that every table is relative to.

    Three products a step on X itself, normalised by the Frobenius norm; additions are fused into the products.

    Args:
        X: Shape (m, n) or (B, m, n).
        dtype: Of the products.

    Returns:
        Approximately ``U Vᵀ``, of X's shape and of ``dtype``.
    """
    if X.shape[-2] > X.shape[-1]:
        return newton_schulz(X.mT, dtype).mT
    a, b, c = MUON_COEFFICIENTS
    multiply_add = torch.addmm if X.ndim == 2 else torch.baddbmm
    X = X.to(dtype)
    X = X / torch.linalg.matrix_norm(X, keepdim=True)
    for _ in range(MUON_STEPS):
        gram = X @ X.mT
        polynomial = multiply_add(gram, gram, gram, beta=b, alpha=c)
        X = multiply_add(X, polynomial, X, beta=a)
    return X


def lagrange(s: float, steps: int = 5) -> Coefficients:
    """One constrained least-squares quintic for x^{s^{1/K}}, composed K times (T. Massena 2026).

    The quintic minimises ``∫₀¹ (a x + b x³ + c x⁵ - x^t)² dx`` subject to ``a + b + c = 1``, where ``t^K = s``;
    its Lagrange conditions are four linear equations.

    Args:
        s: Spectral exponent 1/p in [0, 1].
        steps: How often the quintic is composed, K.

    Returns:
        K equal steps, of which only the last iterate has a weight.
    """
    powers = np.array([1, 3, 5])
    conditions = np.ones((4, 4))
    conditions[:3, :3] = 1 / (powers[:, None] + powers + 1)  # ∫ x^i x^j
    conditions[3, 3] = 0
    moments = np.append(1 / (powers + s ** (1 / steps) + 1), 1)
    a, b, c, _ = np.linalg.solve(conditions, moments).tolist()
    return Coefficients((a,) * steps, (b,) * steps, (c,) * steps, (0.0,) * steps + (1.0,))


@functools.cache
def minimax_composition(s: float, steps: int, *, lowest: float = LOWEST[0]) -> Coefficients:
    """Quintics composed N times, each with the smallest maximal error towards its target on [lowest, 1].

    The k-th step takes what the steps before it made of x to ``x^{t^k}`` with ``t^N = s``: Massena's chain of
    targets with the step-wise optimality of Polar Express (arXiv 2505.16932), which this is at s = 0. For large p
    the chain does worse than steps that all aim at ``x^s``; the better of the two is returned.

    Args:
        s: Spectral exponent 1/p in [0, 1].
        steps: Number of quintics N.
        lowest: Lower end of the interval.

    Returns:
        N steps, of which only the last iterate has a weight.
    """
    x = np.geomspace(lowest, 1, _POINTS)
    chain, direct = [x ** (s ** (k / steps)) for k in range(1, steps + 1)], [x**s] * steps
    compositions = [_greedy_composition(x, targets) for targets in (chain, direct)]
    return min(compositions, key=lambda composition: abs(composition.transfer(x) - x**s).max())


def _greedy_composition(x: np.ndarray, targets: list[np.ndarray]) -> Coefficients:
    """Minimax steps towards one target (points,) after the other, each from what the last one reached."""
    steps = []
    for target in targets:
        steps.append(_minimax_step(x, target))
        x = steps[-1].transfer(x)
    columns = np.array([step.row[:3] for step in steps]).T.tolist()
    return Coefficients.from_row([*columns[0], *columns[1], *columns[2], *[0.0] * len(steps), 1.0])


def _minimax_step(x: np.ndarray, target: np.ndarray) -> Coefficients:
    """The quintic that minimises ``max |a x + b x³ + c x⁵ - target|`` over given points: a linear program.

    Its variables are a, b, c, the bound E on the error and the bound M on the coefficients.
    """
    powers = np.stack([x, x**3, x**5], axis=1)
    error, none = -np.ones((len(x), 1)), np.zeros((len(x), 1))
    unit, size = np.eye(3), -np.ones((3, 1))
    solution = linprog(
        c=[0, 0, 0, 1, _COEFFICIENT_PENALTY],
        A_ub=np.block(
            [
                [powers, error, none],
                [-powers, error, none],
                [unit, np.zeros((3, 1)), size],
                [-unit, np.zeros((3, 1)), size],
            ]
        ),
        b_ub=np.concatenate([target, -target, np.zeros(6)]),
        bounds=(None, None),
    )
    return Coefficients.from_row([*solution.x[:3].tolist(), 0.0, 1.0])


def polar_taylor(X: Tensor, p: float, *, polar: Coefficients, dtype: torch.dtype = torch.float32) -> Tensor:
    """Polar factor P by Newton–Schulz, then a Taylor series for the power of ``H = X Pᵀ`` ("From SGD to Muon", 2026).

    The paper's code was not at hand. This reading, with an exact P, errs by 16.6 % at p = 2 for the norm
    ``‖X‖_{S4}``, and does better here, with the spectral norm c::

        U Σ^s Vᵀ = c^s (H/c)^s P ≈ c^s Σ_k binom(s, k) (H/c - I)^k P,      k = 0 … 5

    Five products for the series and one for H, after those of the polar factor.

    Args:
        X: Shape (m, n).
        p: At least 1.
        polar: Newton–Schulz steps of the polar factor, such as the minimax composition at s = 0.
        dtype: Of the products.

    Returns:
        Shape (m, n), of X's dtype.
    """
    if X.shape[-2] > X.shape[-1]:
        return polar_taylor(X.mT, p, polar=polar, dtype=dtype).mT
    s = 1 / p
    P = spectral_function(X, polar, compute_dtype=dtype).to(dtype)
    modulus = X.to(dtype) @ P.mT  # H, (m, m)
    modulus = (modulus + modulus.mT) / 2
    norm = _largest_eigenvalue(modulus)
    difference = modulus / norm
    difference.diagonal().sub_(1)
    *rest, last = _binomials(s, _TAYLOR_ORDER)
    series = last * difference
    for coefficient in reversed(rest[1:]):
        series.diagonal().add_(coefficient)
        series = difference @ series
    series.diagonal().add_(1)
    return (series @ P).to(X.dtype) * norm.to(X.dtype) ** s


def _binomials(s: float, order: int) -> list[float]:
    """binom(s, k) for k = 0 … order."""
    values = [1.0]
    for k in range(order):
        values.append(values[-1] * (s - k) / (k + 1))
    return values


def _largest_eigenvalue(H: Tensor) -> Tensor:
    """Of a positive semidefinite H (m, m), a few percent below the truth: the series converges up to twice c."""
    vector = torch.linalg.vector_norm(H, dim=0)
    for _ in range(_POWER_ITERATIONS):
        vector = H @ (vector / torch.linalg.vector_norm(vector))
    return torch.linalg.vector_norm(vector)


def coupled_half_power(X: Tensor, iterations: int) -> Tensor:
    """Qi et al. 2026 (arXiv 2602.04669): ``U Σ^{1/2} Vᵀ = (X Xᵀ)^{-1/4} X`` by coupled Newton–Schulz twice.

    Args:
        X: Shape (m, n).
        iterations: Of each of the two square roots; the authors take 15.

    Returns:
        Shape (m, n).
    """
    if X.shape[-2] > X.shape[-1]:
        return coupled_half_power(X.mT, iterations).mT
    _, inverse_root = coupled_square_roots(X @ X.mT, iterations)
    fourth_root, _ = coupled_square_roots(inverse_root, iterations)
    return fourth_root @ X


def coupled_square_roots(A: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """``A^{1/2}`` and ``A^{-1/2}`` of a positive semidefinite A (m, m), by products: three an iteration.

    ``T = (3I - Z Y)/2``, ``Y ← Y T``, ``Z ← T Z`` from ``Y = A/‖A‖_F``, ``Z = I`` (Higham, "Functions of
    Matrices", section 6.3).
    """
    identity = torch.eye(len(A), dtype=A.dtype, device=A.device)
    A = A + _DAMPING * A.diagonal().mean() * identity
    norm = torch.linalg.matrix_norm(A)
    Y, Z = A / norm, identity
    for _ in range(iterations):
        T = torch.addmm(identity, Z, Y, beta=1.5, alpha=-0.5)
        Y, Z = Y @ T, T @ Z
    return Y * norm.sqrt(), Z / norm.sqrt()


def svd_power(X: Tensor, p: float) -> Tensor:
    """Exact, in X's precision: ``torch.linalg.svd`` and one product."""
    U, sigma, Vh = torch.linalg.svd(X, full_matrices=False)
    return (U * sigma ** (1 / p)) @ Vh


def _ours(steps: int, dtype: torch.dtype) -> Callable[[Tensor, float], Tensor]:
    return partial(spectral_power, steps=steps, compute_dtype=dtype)


def _composed(
    method: Callable[[float, int], Coefficients], steps: int, dtype: torch.dtype
) -> Callable[[Tensor, float], Tensor]:
    coefficients = functools.cache(method)  # fitted offline: no part of the price
    return lambda X, p: spectral_function(X, coefficients(1 / p, steps), compute_dtype=dtype)


def _polar_taylor(polar_steps: int, dtype: torch.dtype) -> Callable[[Tensor, float], Tensor]:
    return partial(polar_taylor, polar=minimax_composition(0.0, polar_steps), dtype=dtype)


def _coupled(iterations: int, halvings: int) -> Callable[[Tensor, float], Tensor]:
    def compute(X: Tensor, p: float) -> Tensor:
        for _ in range(halvings):
            X = coupled_half_power(X, iterations)
        return X

    return compute
