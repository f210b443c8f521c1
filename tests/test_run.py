"""The runner of unmodified scripts runs them as Python does, and says when they train with another optimizer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
from scripts import materials
from torch import distributed as dist

from hf_schatten import CheckpointError, run

# What a script or module can find out about how it was started.
FACTS = """\"\"\"Says how it was started.\"\"\"
import json, os, sys
import neighbour
print(json.dumps([
    __name__, __file__, __package__, __spec__ and __spec__.name, __doc__, sys.argv, sys.path[0], neighbour.__file__,
    os.getcwd() in sys.path, sys.modules["__main__"].__dict__ is globals(),
]))
"""

GROUP = """from torch import distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
"""


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Return what runs the runner with these arguments in a folder with files, as ``python -m`` starts it."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    materials.restore_after_runner(monkeypatch)
    sys.path.insert(0, str(tmp_path / "cwd"))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf_schatten/run.py", *map(str, arguments)])
        for name in ("neighbour", "pack", "pack.neighbour", "pack.inner"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        run.main()

    return call


def write(files):
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    "command",
    [
        ["folder/script.py", "--help", "-m", "a b"],
        ["folder/../script.py"],
        ["./script.py"],
        ["link.py", "--optim", "schatten_p"],
        ["-m", "script", "--flag"],
        ["-m", "pack", "--help"],
        ["-m", "pack.inner"],
    ],
    ids=" ".join,
)
def test_a_script_finds_itself_as_python_would_have_started_it(command, start, tmp_path, capfd):
    here = tmp_path / "cwd"
    write({here / folder / "neighbour.py": "" for folder in ("", "folder", "elsewhere")})
    write({here / "script.py": FACTS, here / "folder" / "script.py": FACTS, here / "elsewhere" / "script.py": FACTS})
    write({here / "pack" / name: FACTS for name in ("__main__.py", "inner.py")} | {here / "pack" / "__init__.py": ""})
    (here / "link.py").symlink_to("elsewhere/script.py")
    expected = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True).stdout
    start(*command)
    output = capfd.readouterr()
    assert json.loads(output.out) == json.loads(expected)
    target = command[1] if command[0] == "-m" else command[0]
    assert f"warning: {target} has ended, and no Trainer in it has trained" in output.err


def test_spawned_workers_find_the_scripts_classes_and_the_exit_status_is_the_scripts(tmp_path):
    script = """
        import sys
        import torch
        from torch.utils.data import DataLoader, Dataset

        class Squares(Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, index):
                return torch.tensor(index**2)

        if __name__ == "__main__":
            from transformers import HfArgumentParser, TrainingArguments
            (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
            loader = DataLoader(Squares(), num_workers=1, multiprocessing_context="spawn")
            print(arguments.optim.value, [int(value) for value in loader], flush=True)
            sys.exit(5)
    """
    (tmp_path / "script.py").write_text("\n".join(line[8:] for line in script.splitlines()))
    command = [sys.executable, "-m", "hf_schatten.run", "script.py", "--use_cpu", "--optim", "schatten_p"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.stdout == "schatten_p [0, 1, 4, 9]\n", result.stderr
    assert result.returncode == 5
    assert "hf_schatten.run: warning" not in result.stderr


def test_an_exception_of_the_script_is_its_own(start, tmp_path):
    write({tmp_path / "cwd" / "script.py": "\n\nraise LookupError('mine')\n"})
    with pytest.raises(LookupError, match="mine") as error:
        start("script.py")
    last = error.traceback[-1]
    assert (str(last.path), last.lineno) == (str(tmp_path / "cwd" / "script.py"), 2)  # counted from 0


@pytest.mark.parametrize("end", ["", "raise SystemExit", "raise SystemExit(0)"])
def test_a_script_that_succeeds_leaves_its_process_group(end, start, tmp_path):
    write({tmp_path / "cwd" / "script.py": f"{GROUP}\n{end}"})
    with pytest.raises(SystemExit) if end else nullcontext():
        start("script.py")
    assert not dist.is_initialized()


@pytest.mark.parametrize("end", ["raise SystemExit(3)", "raise LookupError"])
def test_a_script_that_fails_does_not_wait_for_its_process_group(end, start, tmp_path):
    write({tmp_path / "cwd" / "script.py": f"{GROUP}\n{end}"})
    with pytest.raises((SystemExit, LookupError)):
        start("script.py")
    assert dist.is_initialized()
    dist.destroy_process_group()


def test_help_is_the_usage_and_its_status_0(start, capsys):
    assert start("--help") is None
    assert capsys.readouterr().out.startswith("usage: python -m hf_schatten.run SCRIPT.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a script, or a module after -m"),
        (["-m"], "name a script, or a module after -m"),
        (["--optim", "schatten_p", "train.py"], "its own options come after it"),
        (["tran.py"], r"there is no script '.*cwd/tran\.py'\. Did you mean 'train\.py'\?"),
        (["missing/train.py"], r"the folder '.*missing' does not exist"),
        (["pack"], "pack', which is a folder: name a file in it, or run a package with -m"),
        (["-m", "train.py"], "'train.py' is a file and no module: leave -m out"),
        (["-m", "pack.nothing"], "there is no module named 'pack.nothing'"),
        (["-m", "nothing.at.all"], "there is no module named 'nothing.at.all'"),
    ],
)
def test_a_wrong_command_line_is_explained(arguments, message, start, tmp_path, capsys):
    write({tmp_path / "cwd" / name: "" for name in ("train.py", "pack/__init__.py")})
    with pytest.raises(SystemExit) as error:
        start(*arguments)
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_module_that_lacks_a_requirement_fails_by_itself(start, tmp_path):
    write({tmp_path / "cwd" / "pack" / "__init__.py": "import not_installed_anywhere\n"})
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        start("-m", "pack.inner")


TRAINING = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments
(arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8, n_positions=4, bos_token_id=0))
own = torch.optim.SGD(model.parameters(), lr=0.1) if arguments.run_name == "own" else None
row = {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3])}
trainer = Trainer(model, arguments, train_dataset=[row] * 4, optimizers=(own, None))
trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
"""


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ([], "training uses optim='adamw_torch_fused': add --optim schatten_p to the script's arguments."),
        (["--optim", "adafactor"], "training uses optim='adafactor': add --optim schatten_p"),
        (
            ["--optim", "schatten_p", "--run_name", "own"],
            "optim='schatten_p' has no effect: the Trainer was given an optimizer of its own, SGD.",
        ),
        (["--optim", "schatten_p"], None),
    ],
)
def test_training_with_another_optimizer_is_said(options, warning, start, tmp_path, capfd):
    write({tmp_path / "cwd" / "train.py": TRAINING})
    start("train.py", "--max_steps", "1", "--use_cpu", "--report_to", "none", "--save_strategy", "no", *options)
    said = [line for line in capfd.readouterr().err.splitlines() if "hf_schatten.run: warning: " in line]
    assert len(said) == (warning is not None)
    assert all(warning in line for line in said)


def test_a_damaged_checkpoint_is_named(start, tmp_path):
    write({tmp_path / "cwd" / "train.py": TRAINING})
    arguments = ["train.py", "--use_cpu", "--report_to", "none", "--optim", "schatten_p", "--save_steps", "1"]
    start(*arguments, "--output_dir", "run", "--max_steps", "1")
    checkpoint = tmp_path / "cwd" / "run" / "checkpoint-1"
    for name in ("optimizer.pt", "model.safetensors"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match=r"A file of run/checkpoint-1 is truncated.*from an earlier checkpo"):
            start(*arguments, "--max_steps", "2", "--resume_from_checkpoint", "run/checkpoint-1")
