"""What every row of the table of support shares: its arguments, and runs without pictures."""

from __future__ import annotations

import pytest
import torch

pytest.register_assert_rewrite("support_runs")  # before its import, or its assertions show no values

from datasets import Dataset  # noqa: E402
from support_models import in_steps, word_tokenizer  # noqa: E402
from support_runs import RUN  # noqa: E402

from hf_schatten import SchattenCallback  # noqa: E402


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Leave out the pictures, nine tenths of a tiny run's time; tests/test_trainer.py holds them."""
    monkeypatch.setattr(SchattenCallback, "_draw", lambda *args: None)


@pytest.fixture(autouse=True)
def one_thread():
    """Compute on one thread: transformers' batched experts add up rows in an order that threads decide.

    Runs are compared bitwise here, and with two threads such a model does not repeat itself.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def arguments(training_arguments):
    """Return arguments of twelve steps with three estimates and a checkpoint at the sixth."""
    return training_arguments(**RUN)


@pytest.fixture
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def trl_arguments(tmp_path):
    """Return the settings of a run in trl's terms, whose defaults bf16 and gradient checkpointing stay."""
    quiet = {"output_dir": str(tmp_path / "run"), "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return RUN | quiet | {"optim": "schatten_p", "lr_scheduler_type": "cosine", "logging_steps": 1}


@pytest.fixture
def preferences():
    """Return pairs in which the answer that goes on is preferred to the one that stays."""
    return Dataset.from_list(
        [
            {"prompt": in_steps(i, 1, 3), "chosen": " " + in_steps(i + 3, 1, 3), "rejected": " " + in_steps(i, 0, 4)}
            for i in range(32)
        ]
    )
