"""The two places of a step where communication hides behind computation, event by event."""

from collections.abc import Sequence
from typing import NamedTuple


class Exchanged(NamedTuple):
    """How long an exchange of updates takes.

    Attributes:
        seconds: From its begin until the last rank has applied the last round.
        computing: The same if rounds travelled in no time.
    """

    seconds: float
    computing: float

    @property
    def exposed(self) -> float:
        """Communication that nothing hides."""
        return self.seconds - self.computing


def gradients_exposed(backward: float, travelling: Sequence[float]) -> float:
    """Time from the end of the backward pass until all gradients have been added up.

    Args:
        backward: Seconds of the backward pass, in which buckets of gradients become ready at equal distances.
        travelling: Seconds of each bucket's all-reduce; they travel one after another.
    """
    finished = 0.0
    for number, seconds in enumerate(travelling, start=1):
        finished = max(finished, backward * number / len(travelling)) + seconds
    return max(0.0, finished - backward)


def exchange(
    computing: Sequence[Sequence[float]], travelling: Sequence[float], applying: Sequence[float], overlaps: bool = True
) -> Exchanged:
    """Follow :class:`hf_schatten.distributed.replicated.Replicated`: a round travels while its ranks compute the next.

    A rank computes its part of a round and sends it; then it waits for the round before, and applies that one.

    Args:
        computing: Seconds of each round, for each rank.
        travelling: Seconds of each round's all-gather, which begins when the last rank sends.
        applying: Seconds in which a rank applies a round of everybody's updates.
        overlaps: Whether a rank computes while a round travels; else it does nothing else.
    """
    nothing = [0.0] * len(travelling)
    return Exchanged(
        _finish(computing, travelling, applying, overlaps), _finish(computing, nothing, applying, overlaps)
    )


def _finish(
    computing: Sequence[Sequence[float]], travelling: Sequence[float], applying: Sequence[float], overlaps: bool
) -> float:
    if not computing:
        return 0.0
    clocks = [0.0] * len(computing[0])
    arrived, to_apply = 0.0, 0.0
    for own, seconds, apply in zip(computing, travelling, applying, strict=True):
        sent = [clock + part for clock, part in zip(clocks, own, strict=True)]
        arrives = max(*sent, arrived) + seconds
        free = sent if overlaps else [arrives] * len(sent)
        clocks = [max(clock, arrived) + to_apply for clock in free]
        arrived, to_apply = arrives, apply
    return max(*clocks, arrived) + to_apply
