"""Starts real processes that train together over gloo on this machine, for the tests of this folder."""

from __future__ import annotations

import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pictures
import torch
import torch.distributed as dist
from torch import multiprocessing

from hf_schatten.linalg import compute_dtype

PATIENCE = 300.0  # seconds, after which processes are killed and their test fails; a busy machine takes 120

# Imported once, by the process that all others are forked from.
_PRELOADED = ["torch.distributed", "transformers.trainer", "transformers.models.gpt2.modeling_gpt2", "hf_schatten"]


@dataclass(frozen=True)
class Outcome:
    """How a process has ended.

    Attributes:
        exit_code: negative where a signal ended it.
        result: what its function has returned, None where it has not.
        error: the traceback that has ended it, empty where none has.
        ended: time of the result or the error, in seconds of ``time.time``.
    """

    exit_code: int
    result: Any
    error: str
    ended: float


def together(function: Callable[..., Any], count: int, folder: Path, *args: Any) -> list[Any]:
    """Return what each of several processes has got from ``function(*args)``, by rank; all must succeed."""
    ends = outcomes(function, count, folder, *args)
    for rank, outcome in enumerate(ends):
        assert outcome.exit_code == 0, (
            f"process {rank} of {count} has ended with {outcome.exit_code}:\n{outcome.error}"
        )
    return [outcome.result for outcome in ends]


def outcomes(
    function: Callable[..., Any],
    count: int,
    folder: Path,
    *args: Any,
    timeout: timedelta = timedelta(seconds=PATIENCE),
    stopped: Collection[int] = (),
) -> list[Outcome]:
    """Call ``function(*args)`` in processes of one gloo group, and return how each has ended, by rank.

    Args:
        function: of a module, not local; returns what ``torch.load`` reads with ``weights_only``.
        count: how many processes.
        folder: where a folder of this call is made.
        *args: of the function.
        timeout: of the group's collectives.
        stopped: ranks that never end; they are killed when all others have ended.
    """
    room = Path(tempfile.mkdtemp(dir=folder))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    task = count, port, room, timeout, function, args
    processes = [context.Process(target=_work, args=(rank, *task)) for rank in range(count)]
    deadline = time.monotonic() + PATIENCE
    try:
        for process in processes:
            process.start()
        for rank, process in enumerate(processes):
            if rank not in stopped:
                process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()  # does nothing to those that have ended
            process.join()
    return [_outcome(room / str(rank), process.exitcode) for rank, process in enumerate(processes)]


def _work(
    rank: int,
    count: int,
    port: int,
    room: Path,
    timeout: timedelta,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    pictures.install()
    pictures.rendered = False
    compute_dtype.CPU_MULTIPLIES_BFLOAT16 = False  # as in the process that compares
    try:
        dist.init_process_group("gloo", timeout=timeout)
        assert dist.get_world_size() == count
        torch.save(function(*args), room / f"{rank}.result")
    except BaseException:
        (room / f"{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
        raise
    dist.destroy_process_group()


def _outcome(path: Path, exit_code: int | None) -> Outcome:
    assert exit_code is not None
    result, error = path.with_suffix(".result"), path.with_suffix(".error")
    ended = max((file.stat().st_mtime for file in (result, error) if file.exists()), default=0.0)
    return Outcome(
        exit_code,
        torch.load(result, weights_only=True) if exit_code == 0 else None,
        error.read_text(encoding="utf-8") if error.exists() else "",
        ended,
    )
