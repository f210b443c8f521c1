"""What ``import hf_schatten`` loads: nothing that only some runs need."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

# Of pictures, cards, other trainers and commands. transformers' Trainer loads some of them itself.
LATER = ("matplotlib", "jinja2", "trl", "accelerate.commands", "accelerate.launchers", "huggingface_hub.repocard")

PROGRAM = """
import json, sys
{first}
before = set(sys.modules)
{second}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def loaded(first: str, second: str) -> list[str]:
    """Return the modules that the second statement loads after the first, in a process of its own."""
    program = PROGRAM.format(first=first, second=second)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def test_the_import_loads_nothing_but_the_package_and_what_a_trainer_loads():
    names = loaded("from transformers import Trainer, TrainingArguments", "import hf_schatten")
    assert "hf_schatten.report.figures" in names
    assert not [name for name in names if f"{name}.".startswith(tuple(f"{later}." for later in LATER))]
    packages = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert packages <= {"hf_schatten", "torch", "transformers", "accelerate", "safetensors", "numpy"}
    # What transformers has loaded already does not show in a process: no module names it at its top.
    for name in names:
        if name.partition(".")[0] == "hf_schatten":
            tree = ast.parse(Path(importlib.import_module(name).__file__).read_text(encoding="utf-8"))
            for node in tree.body:
                found = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                found += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
                assert not set(found) & {*LATER, "ModelCard", "ModelCardData", "TrainingSummary", "matplotlib.figure"}


def test_a_picture_loads_what_draws_it(tmp_path):
    first = f"import pathlib; from hf_schatten.report import figures; path = pathlib.Path({str(tmp_path)!r}) / 'p.png'"
    names = loaded(first, "figures.plot_p_by_layer([{'step': 1, 'schatten_p/a': 2.0}], path)")
    assert "matplotlib.figure" in names
    assert (tmp_path / "p.png").is_file()
