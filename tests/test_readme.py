"""The README's two examples run as they are printed."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from torch.utils.data import default_collate
from transformers import AutoModelForCausalLM

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def examples():
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_ten_lines_with_trainer(examples, gpt2, token_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: gpt2)  # there is no Hub in the tests
    program = examples[0].replace("checkpoint-500", "checkpoint-24")  # 64 sequences, batches of 8, 3 epochs
    exec(program, {"dataset": token_dataset})
    assert "{'transformer.h.0.attn.c_attn.weight.q': " in capsys.readouterr().out
    assert "## Optimizer: Schatten-p" in Path("run/README.md").read_text()


def test_ten_lines_without_trainer(examples, gpt2, token_dataset, capsys):
    batches = [default_collate(token_dataset[start : start + 8]) for start in range(0, 64, 8)] * 2
    namespace = {"model": gpt2, "batches": batches}
    exec(examples[1], namespace)
    assert namespace["loss"].item() < math.log(64)  # that of a uniform guess
    assert len([line for line in examples[1].splitlines() if line.strip()]) <= 12
    assert "{'transformer.h.0.attn.c_attn.weight.q': " in capsys.readouterr().out
