"""Makes the modules of the benchmark importable, as they are when its script runs."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pictures
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


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
