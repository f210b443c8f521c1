"""Sets the constants of :mod:`hf_schatten.distributed.owners` in a process, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from hf_schatten.distributed import owners, replicated, sharded

MIB = 1 << 20


@contextmanager
def limits(*, buffer: int = owners.BUFFER, most_sharing: int = owners.MOST_SHARING) -> Iterator[None]:
    """Train with others than the package's.

    Args:
        buffer: bytes of a buffer.
        most_sharing: most processes that share with each other.
    """
    with ExitStack() as patches:
        for module in (owners, replicated, sharded):
            patches.enter_context(patch.object(module, "BUFFER", buffer))
        patches.enter_context(patch.object(owners, "MOST_SHARING", most_sharing))
        yield
