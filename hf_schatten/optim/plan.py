"""The plan of a step: which matrices are stacked, who computes them, and how their updates reach the weights.

It holds from step to step, until other parameters have gradients, a group's rules change, or a state is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from hf_schatten.distributed.owners import Delivery, sharing_peers
from hf_schatten.distributed.pieces import is_sharded
from hf_schatten.distributed.processes import ALONE, Peers
from hf_schatten.distributed.replicated import Replicated
from hf_schatten.distributed.sharded import Sharded
from hf_schatten.matrices.layout import LAYOUT
from hf_schatten.optim.finite_gradients import FiniteGradients
from hf_schatten.optim.matrix import Group, Matrix, State
from hf_schatten.optim.stack import MomentaDtype, stacks_of
from hf_schatten.options import SchattenOptions

_RULES = "spectral", *LAYOUT, "step_rule", "scale", "precondition"


class Planner:
    """The maker of the plan of each step, or the keeper of the last one where it still holds.

    Args:
        share_work: whether processes with the same gradients share the work.
        options_of: the options of a group.
        momenta_dtype: in which dtype momenta are stacked; see :func:`hf_schatten.optim.stack.stacks_of`.
    """

    def __init__(
        self, share_work: bool, options_of: Callable[[Group], SchattenOptions], momenta_dtype: MomentaDtype
    ) -> None:
        self._share_work = share_work
        self._options_of = options_of
        self._momenta_dtype = momenta_dtype
        self._sharing: Peers | None = None  # made once, since it may create process groups
        self._key: object = None
        self._deliveries: list[Delivery] = []

    def deliveries(
        self,
        groups: Iterable[Group],
        states: Mapping[Tensor, State],
        matrices: Callable[[], Iterable[Matrix]],
        gradients: FiniteGradients,
        alone: bool,
    ) -> list[Delivery]:
        """Return how the updates of all matrices with a gradient reach their weights.

        Unless it trains ``alone``, a process calls it together with all others, at least when the plan changes.
        ``matrices`` yields those without a gradient too.
        """
        key = (
            alone,
            [
                (
                    *(group[rule] for rule in _RULES),
                    [(id(each), id(states[each]), each.stride()) for each in gradients.of(group["params"])],
                )
                for group in groups
            ],
        )
        if key != self._key:
            self._key, self._deliveries = key, self._planned(list(matrices()), gradients, alone)
        return self._deliveries

    def _planned(self, matrices: list[Matrix], gradients: FiniteGradients, alone: bool) -> list[Delivery]:
        whole = [matrix for matrix in matrices if not is_sharded(matrix.parameter)]
        updated = [matrix for matrix in whole if matrix.parameter in gradients]
        sharded = [matrix for matrix in matrices if is_sharded(matrix.parameter) and matrix.parameter in gradients]
        deliveries: list[Delivery] = []
        if updated:
            peers = ALONE if alone else self._peers(whole)
            deliveries.append((Delivery if peers.size == 1 else Replicated)(updated, self._stacks, peers))
        if sharded:
            deliveries.append(Sharded(sharded, self._stacks))
        return deliveries

    def _peers(self, whole: list[Matrix]) -> Peers:
        if not self._share_work:
            return ALONE
        if self._sharing is None:
            self._sharing = sharing_peers(whole)
        return self._sharing

    def _stacks(self, matrices: Iterable[Matrix]) -> Any:
        return stacks_of(matrices, self._options_of, self._momenta_dtype)
