"""Says how many steps matrices have skipped because their gradient was not finite."""

from __future__ import annotations

import logging
from collections.abc import Mapping

logger = logging.getLogger(__name__)


def report_skipped(skipped: Mapping[str, int]) -> None:
    """Warn of skipped steps.

    Args:
        skipped: number of steps by matrix parameter, at least one.
    """
    most = max(skipped.values())
    with_most = [name for name, count in skipped.items() if count == most]
    if len(with_most) == 1:
        logger.warning(
            "The gradients of %d of the matrices were not finite (NaN or infinite) on some steps, which were "
            "skipped: of %s, %d steps in all. Lower the learning rate, or look for the layer that overflows.",
            *(len(skipped), with_most[0], most),
        )
    else:
        logger.warning(
            "The gradients of %d of the matrices were not finite (NaN or infinite) on some steps, which were "
            "skipped: %d of them skipped %d steps. A Trainer, and any clipping by the norm of all gradients, "
            "makes all of them NaN where one is, so that this names no layer. Lower the learning rate, or find "
            "the layer with --debug underflow_overflow.",
            *(len(skipped), len(with_most), most),
        )
