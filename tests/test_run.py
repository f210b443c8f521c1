"""Unmodified scripts behind ``python -m hf_schatten.run``."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from neighbour import NAME
from transformers import HfArgumentParser, TrainingArguments
assert "hf_schatten" not in open(__file__).read().splitlines()[1]
(arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
print(__name__, NAME, arguments.optim.value, sys.argv[0].endswith("script.py"))
"""


def run(*arguments, folder):
    command = [sys.executable, "-m", "hf_schatten.run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def test_a_script_runs_as_main_with_its_arguments_and_neighbours(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "script.py").write_text(SCRIPT)
    (tmp_path / "folder" / "neighbour.py").write_text("NAME = 'neighbour'\n")
    result = run("folder/script.py", "--output_dir", "x", "--optim", "schatten_p", "--use_cpu", folder=tmp_path)
    assert result.stdout.split() == ["__main__", "neighbour", "schatten_p", "True"], result.stderr


def test_a_module_runs_too_and_no_script_prints_the_usage(tmp_path):
    (tmp_path / "module.py").write_text("import sys; print(__name__, sys.argv[1:])\n")
    assert run("-m", "module", "--flag", folder=tmp_path).stdout.strip() == "__main__ ['--flag']"
    result = run(folder=tmp_path)
    assert result.returncode == 1
    assert "usage: python -m hf_schatten.run" in result.stderr
