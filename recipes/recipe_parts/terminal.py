"""What a terminal shows of a recipe: the run, and of other packages what takes long or is wrong."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

_SECONDS = 3  # what transformers finishes sooner, such as a small model's files, gets no progress bar
_DOCUMENTS = 10_000  # what datasets makes of fewer gets none


def prepare_terminal(args: TrainingArguments) -> None:
    """Show the recipe's messages, and keep other packages from what tells a reader nothing."""
    logging.basicConfig(
        level=logging.INFO if args.should_log else logging.WARNING, format="%(asctime)s %(name)s: %(message)s"
    )
    if hasattr(transformers_logging, "set_tqdm_hook"):  # 5.3 has none
        transformers_logging.set_tqdm_hook(_late_bar)
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where installed, warns that it finds no GPU


@contextmanager
def bars_of_datasets(documents: int) -> Iterator[None]:
    """Let datasets draw progress bars of many documents only."""
    if documents >= _DOCUMENTS or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _late_bar(factory: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    return factory(*args, **{"delay": _SECONDS} | dict(options))
