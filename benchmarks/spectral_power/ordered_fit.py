"""The multi-scale fit of a family whose f must not rise from one column to the next, as x^s falls with s.

Columns that are fitted for themselves cross between their points; a penalty on the rises keeps them in order.
"""

from dataclasses import dataclass

import numpy as np

from hf_schatten.linalg.multiscale_fit import Array, Linearization, MultiscaleFit

_SMALLEST_ERROR = 1e-5  # the identity's is zero


@dataclass(frozen=True)
class OrderedFit(MultiscaleFit):
    """A `MultiscaleFit` with a penalty on disorder.

    Attributes:
        order: Penalty on f rising from one column to the next, shape (S - 1,).
    """

    order: Array

    def ordered_weights(self, curves: Array, strictness: Array, iterations: int = 60) -> Array:
        """Weights that also keep f from rising from one column to the next.

        A least-squares problem in the weights of all columns together, in units of each column's own error, with
        a penalty on the points where the order is violated.

        Args:
            curves: Curves (2K, D).
            strictness: Factor of the penalty between neighbours, shape (S - 1,).
            iterations: Largest number of times that the violated points are determined again.

        Returns:
            Weights, shape (S, K + 1).

        Raises:
            ValueError: If the iterates overflow.
        """
        free, ran = self.linearize(curves), self._run(curves)
        if free is None or ran is None:
            raise ValueError("the iterates of these curves overflow")
        iterates, _ = ran
        columns, points, size = iterates.shape
        error = np.maximum(free.error, _SMALLEST_ERROR)
        unit = error * self._root_mean_squares * np.sqrt(points)  # (S,)
        scaled = iterates / unit[:, None, None]
        damping = (self.damping / error)[:, None, None] ** 2 * np.diag(np.arange(size) > 0)
        hessian = np.zeros((columns, size, columns, size))
        hessian[range(columns), :, range(columns), :] = scaled.mT @ scaled + damping
        wanted = (scaled.mT @ (self.targets / unit[:, None])[..., None]).ravel()

        weights, violated = free.weights, np.zeros((columns - 1, points), dtype=bool)
        for _ in range(iterations):
            values = (iterates @ weights[..., None])[..., 0]
            before, violated = violated, values[1:] > values[:-1]
            if (violated == before).all():
                break
            penalised = hessian.copy()
            for s in range(columns - 1):
                rise = np.concatenate([-iterates[s], iterates[s + 1]], 1)[violated[s]]  # times both weights: f's rise
                rise *= strictness[s] / np.sqrt(unit[s] * unit[s + 1])
                penalised[s : s + 2, :, s : s + 2, :] += (rise.T @ rise).reshape(2, size, 2, size)
            weights = np.linalg.solve(penalised.reshape(wanted.size, -1), wanted).reshape(columns, size)
        return weights

    def _rises(self, at: Linearization) -> Array:
        """How far f rises from each column to the next, shape (S - 1, N), times the root of its penalty."""
        points = len(self.x)
        values = self.targets + at.residual[:, :points] * (np.sqrt(points) * self._root_mean_squares)[:, None]
        return np.maximum(np.diff(values, axis=0), 0) * np.sqrt(self.order / points)[:, None]

    def _objective(self, at: Linearization, curves: Array) -> float:
        return super()._objective(at, curves) + float((self._rises(at) ** 2).sum() / 2)

    def _normal_equations(self, at: Linearization, curves: Array) -> tuple[Array, Array]:
        """Those of the fit, and of the rises that there are."""
        size, points = len(curves), len(self.x)
        flat_gradient, flat_hessian = super()._normal_equations(at, curves)
        gradient = flat_gradient.reshape(curves.shape)  # (2K, D)
        hessian = flat_hessian.reshape(curves.shape * 2)  # (2K, D, 2K, D); both are views that are added to
        rises, unit = self._rises(at), np.sqrt(points) * self._root_mean_squares
        for s in np.flatnonzero(rises.any(1)):
            where = rises[s] > 0
            falling, rising = (at.jacobian[t, :points][where] * unit[t] for t in (s, s + 1))
            rise = np.sqrt(self.order[s] / points) * np.concatenate([-falling, rising], 1)  # (violated, 4K)
            support = np.flatnonzero(self.basis[s : s + 2].any(0))  # all that a pair of free columns touches is two
            basis = self.basis[s : s + 2, support]
            curvature = np.einsum("piqj,pd,qe->idje", (rise.T @ rise).reshape(2, size, 2, size), basis, basis)
            every = np.arange(size)
            hessian[np.ix_(every, support, every, support)] += curvature
            gradient[:, support] += (rise.T @ rises[s][where]).reshape(2, size).T @ basis
        return flat_gradient, flat_hessian
