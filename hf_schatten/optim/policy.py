"""What may change p during training, and what it sees of the optimizer."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from hf_schatten.exponent import p_label
from hf_schatten.optim.matrix import Matrix
from hf_schatten.options import SchattenOptions

logger = logging.getLogger(__name__)


class Optimized(Protocol):
    """What a policy sees of an optimizer."""

    @property
    def alone(self) -> bool:
        """Whether this process trains for itself, so that nothing is averaged over processes."""

    def matrices(self) -> Iterator[Matrix]:
        """Yield every matrix of the spectral groups."""

    def steps_taken(self) -> int:
        """Return how many steps the matrices have taken."""

    def stop_following(self) -> None:
        """Keep every p as it is from now on."""


class Policy:
    """What changes the p of named matrices of an optimizer, which calls it around each step; this one does nothing."""

    estimates = 0

    def __init__(self, matrices: Collection[str]) -> None:
        self.matrices = frozenset(matrices)

    def before_update(self, optimizer: Optimized) -> None:
        """Change p, where this step asks for it; every process takes part."""

    def observe(self, matrices: Sequence[Matrix], directions: Tensor, factors: Tensor) -> None:
        """See the updates of a stack: ``factors`` (B,) times ``directions`` (B, m, n), m <= n.

        Of several processes that share the work, the one that computes a stack sees it.
        """

    def after_update(self, optimizer: Optimized) -> None:
        """Prepare the next step; every process takes part."""

    def after_load(self, optimizer: Optimized) -> None:
        """Prepare the next step after another state has been loaded."""

    def pause(self) -> None:
        """Leave forwards alone until the next update is prepared."""

    def remove(self) -> None:
        """Leave the model as it was."""


def warn_of_missing(options: SchattenOptions) -> None:
    """Warn where p should change and there is no policy that changes it."""
    if isinstance(options.p, str) and not options.p_overrides:
        logger.warning(
            "p=%s, and nothing changes p: it stays %s. Make the optimizer by "
            "hf_schatten.create_schatten_optimizer(model), which knows the model, or give SchattenP a number for p.",
            options.p,
            p_label(options.initial_p),
        )
