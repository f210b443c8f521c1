"""What the tests of benchmarks share."""

from collections.abc import Iterator

import pictures
import pytest
import torch


def pytest_runtest_setup() -> None:
    """Render the pictures of all tests here, as if they were marked to: few draw, and those look at them."""
    pictures.rendered = True


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Keep tiny products on one thread: on a busy machine, threads wait for each other far longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
