"""The documentation is true: snippets run, commands parse, messages and options are the package's, links lead on.

Snippets of a page run in order in one namespace, with small stand-ins for what they take from their reader: a model, a
data set, a script ``train.py``. Commands are parsed by the parsers of what they call; a few are run.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import os
import re
import runpy
import shlex
import statistics
import subprocess
import sys
import tomllib
from argparse import ArgumentParser
from itertools import pairwise
from pathlib import Path

import pytest
import trl
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.run import get_args_parser
from torch.utils.data import DataLoader, default_collate
from transformers import AutoModelForCausalLM, HfArgumentParser, PreTrainedTokenizerFast, TrainingArguments

from hf_schatten import OptionError, SchattenOptions
from hf_schatten.adaptive.criterion import CRITERIA, NODES

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
WRITTEN = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
WRITTEN += sorted(
    path for folder in ("recipes", "benchmarks", "model_cards") for path in ROOT.glob(f"{folder}/**/*.md")
)
ALL_PAGES = PAGES + [path for path in WRITTEN if path.name != "template.md"]  # a template's links are its product's

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
OPTIONS = {field.name: field for field in dataclasses.fields(SchattenOptions)}


def name_of(page):
    return page.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)


def blocks(page, language):
    return [text for kind, text in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def prose(page):
    return FENCE.sub("", page.read_text(encoding="utf-8"))


# Python


@pytest.fixture
def reader(gpt2, token_dataset, tmp_path, monkeypatch):
    """Return what a page's reader is expected to have, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    # There is no Hub in the tests.
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: copy.deepcopy(gpt2))
    vocabulary = {word: number for number, word in enumerate(["<pad>", "a", "b", "c"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    batches = [default_collate(token_dataset[start : start + 8]) for start in range(0, 64, 8)]
    yield {
        "model": copy.deepcopy(gpt2),
        "dataset": token_dataset,
        "batches": batches * 2,
        "loader": DataLoader(token_dataset, batch_size=8),
        "texts": Dataset.from_dict({"text": ["a b c a b c", "c b a c b a"] * 4}),
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>"),
    }
    AcceleratorState._reset_state(reset_partial_state=True)


def run_snippets(page, namespace):
    for number, text in enumerate(blocks(page, "python"), start=1):
        # 64 sequences, batches of 8, 3 epochs.
        program = text.replace("checkpoint-500", "checkpoint-24")
        AcceleratorState._reset_state(reset_partial_state=True)  # a page's programs may differ in their precision
        exec(compile(program, f"{name_of(page)}, snippet {number}", "exec"), namespace)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # trl uses the name
@pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to False:UserWarning"
)  # peft finds out that GPT-2 has Conv1D
def test_snippets_of_the_readme(reader, capsys, monkeypatch):
    # Its default bf16 asks for a GPU, or for this.
    monkeypatch.setattr(trl, "SFTConfig", functools.partial(trl.SFTConfig, use_cpu=True))
    run_snippets(README, reader)
    assert capsys.readouterr().out.count("{'transformer.h.0.attn.c_attn.weight.q': ") == 2
    assert "## Optimizer: Schatten-p" in Path("run/README.md").read_text()
    assert "## Optimizer: Schatten-p" in Path("sft/README.md").read_text()
    assert reader["loss"].item() < math.log(64)  # that of a uniform guess


def test_two_programs_take_ten_lines():
    trainer, *others = blocks(README, "python")
    loop = next(text for text in others if "zero_grad" in text)
    for text in (trainer, loop):
        assert len([line for line in text.splitlines() if line.strip()]) <= 12


@pytest.mark.parametrize("page", [page for page in PAGES if page != README and blocks(page, "python")], ids=name_of)
def test_snippets_of_other_pages(page, reader, monkeypatch):
    if page.name == "troubleshooting.md":  # reads the checkpoint that the README's first snippet has written
        exec(blocks(README, "python")[0].replace("checkpoint-500", "checkpoint-24"), dict(reader))
    run_snippets(page, reader)


# Commands


class Parsed(BaseException):
    """A program has parsed its command line; nothing after it is wanted."""


@pytest.fixture
def parse(monkeypatch):
    """Return what calls a program up to the end of its parsing, with errors where it refuses an argument."""
    # A reader may have a GPU for bf16.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    parse_args, parse_dataclasses = ArgumentParser.parse_args, HfArgumentParser.parse_args_into_dataclasses

    @functools.wraps(parse_args)
    def stop_after_arguments(self, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        raise Parsed

    @functools.wraps(parse_dataclasses)
    def stop_after_dataclasses(self, *args, **kwargs):
        *_, remaining = parse_dataclasses(self, *args, **kwargs | {"return_remaining_strings": True})
        assert remaining == []
        raise Parsed

    def call(program, arguments):
        with monkeypatch.context() as patch:
            patch.setattr(ArgumentParser, "parse_args", stop_after_arguments)
            patch.setattr(HfArgumentParser, "parse_args_into_dataclasses", stop_after_dataclasses)
            patch.chdir(ROOT)
            patch.setattr(sys, "argv", [str(program), *arguments])
            patch.setattr(sys, "path", [str(Path(program).parent), *sys.path])
            sys.modules.pop(f"{program}.__main__", None)  # of a test before, which runpy would warn of
            run = runpy.run_path if str(program).endswith(".py") else runpy.run_module
            with pytest.raises(Parsed):
                run(str(program), run_name="__main__")

    return call


def commands(page):
    """Yield the commands of a page's shell snippets as words, without comments."""
    for text in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def check_options(words):
    """Check the optimizer's options of a command line."""
    for flag, value in pairwise(words):
        if flag == "--optim_args":
            SchattenOptions.from_optim_args(value)


def check_python(words, parse):
    """Check the arguments of ``python``: a script or a module, and what that takes."""
    if words[:2] == ["-m", "hf_schatten.run"]:
        check_trained(words[2:], parse)
        return
    if ("--optim", "schatten_p") in pairwise(words):
        assert imports_the_package(words), f"put hf_schatten.run before {words[0]}"
    if words[0] == "-m":
        if words[1] != "pip":
            assert importlib.util.find_spec(words[1]) is not None
            parse(words[1], words[2:])
    elif words[0] == "train.py":
        check_trained(words, parse)
    else:
        check_script(words, parse)


def imports_the_package(words):
    """Whether a script does, or takes the recipes' parts, which do; the reader's knows nothing of the package."""
    script = ROOT / words[0]
    imported = re.compile(r"^(import|from) (hf_schatten|recipes)\b", flags=re.MULTILINE)
    return script.is_file() and imported.search(script.read_text(encoding="utf-8"))


def check_script(words, parse):
    script = ROOT / words[0]
    assert script.is_file(), f"there is no {words[0]}"
    if script.name in {"support_table.py", "collect.py"}:
        return  # without options, they begin at once
    words = [word.replace("TASK.yaml", "recipes/pretrain_clm/comparison.yaml") for word in words]
    parse(script, words[1:])


def check_trained(words, parse):
    """Check what the runner is given: a script of the reader's, one of ours, or a module."""
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None
        parser = importlib.import_module(words[1]).make_parser()
        *_, remaining = parser.parse_args_and_config(words[2:], return_remaining_strings=True)
        assert remaining == []
    elif words[0] == "train.py":
        *_, remaining = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
            words[1:], return_remaining_strings=True
        )
        assert remaining == []
    else:
        check_script(words, parse)


def check_make(words, parse):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    arguments = dict(word.split("=", 1) for word in words if "=" in word)
    goals = [word for word in words if "=" not in word]
    assert goals
    assert set(goals) <= set(targets)
    assert set(arguments) <= {"ARGS"}
    if arguments and goals == ["train"]:
        recipe = "recipes/pretrain_clm"
        given = shlex.split(arguments["ARGS"])
        check_script([f"{recipe}/pretrain_clm.py", f"{recipe}/gpt2_stdlib.yaml", *given], parse)


def check_launched(parsed, script, arguments, parse):
    """Check a launcher's script or module; both launchers name it apart from its arguments."""
    assert bool(parsed.module) != script.endswith(".py")
    check_python([*(["-m"] if parsed.module else []), script, *arguments], parse)


def check_accelerate(words, parse):
    assert words[0] == "launch"
    parsed = launch_command_parser().parse_args(words[1:])
    check_launched(parsed, parsed.training_script, parsed.training_script_args, parse)


def check_torchrun(words, parse):
    parsed = get_args_parser().parse_args(words)
    check_launched(parsed, parsed.training_script, parsed.training_script_args, parse)


def check_pip(words, parse):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] in ("install", "wheel")
    for word in words[1:]:
        place, _, named = word.partition("[")
        assert place in ("-e", "--no-deps", ".", "path/to/this/folder") or importlib.util.find_spec(place)
        assert set(filter(None, named.rstrip("]").split(","))) <= set(extras)


def check_pre_commit(words, parse):
    assert words == ["install"]


CHECKS = {
    "python": check_python,
    "make": check_make,
    "accelerate": check_accelerate,
    "torchrun": check_torchrun,
    "pip": check_pip,
    "pre-commit": check_pre_commit,
}


def check_command(words, parse):
    words = list(words)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # of the environment
        del words[0]
    check_options(words)
    if words[0].startswith("--"):  # options to add to another command
        assert {"--optim", "--optim_args"} >= set(words[::2])
        return
    CHECKS[words[0].removeprefix(".venv/bin/")](words[1:], parse)


@every_page
@pytest.mark.filterwarnings("ignore::UserWarning")  # of arguments that this machine has no device for
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_commands_name_what_exists_and_take_their_options(page, parse):
    for words in commands(page):
        check_command(words, parse)


@pytest.mark.parametrize(
    "command",
    [
        "python no_script.py",
        "python docs/draw_figures.py --outputs x",
        "python -m hf_schatten.runn train.py",
        "python benchmarks/geometry/erasure.py --stepps 3",
        "python -m hf_schatten.run train.py --output_dir run --optim schatten_q",
        "python -m hf_schatten.run train.py --output_dir run --optim_args p_intervall=3",
        "python train.py --output_dir run --optim schatten_p",
        "accelerate launch train.py --output_dir run --optim schatten_p",
        "python -m trl.scripts.sft --output_dir run --dataset_name data --optim schatten_p",
        "make trian",
        'make train ARGS="--learning_rates 1"',
        "accelerate launch --num_procs 2 -m hf_schatten.run train.py --output_dir run --optims x",
        "torchrun --nproc_per_nodes 2 -m hf_schatten.run train.py --output_dir run",
        "pip install -e '.[devel]'",
        "pip install trll",
    ],
)
def test_wrong_commands_are_found(command, parse):
    with pytest.raises((AssertionError, SystemExit, ValueError, ImportError)):
        check_command(shlex.split(command), parse)


TRAIN = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments

if __name__ == "__main__":
    arguments = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()[0]
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=8))
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(64 * 8).view(64, 8) % 32]
    Trainer(model, arguments, train_dataset=rows).train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("page", [README, DOCS / "distributed.md"], ids=name_of)
def test_the_readers_script_trains_by_every_launcher(page, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    run = [words for words in commands(page) if "train.py" in words]
    assert run
    for number, words in enumerate(run):
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            del words[0]
        output = tmp_path / f"run{number}"
        words[words.index("--output_dir") + 1] = str(output)
        words += ["--use_cpu", "--max_steps", "12", "--save_steps", "12", "--report_to", "none"]
        subprocess.run(words, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
        state = json.loads((output / "checkpoint-12" / "trainer_state.json").read_text())
        assert any("schatten_p_median" in entry for entry in state["log_history"])


@pytest.mark.pictures
def test_pictures_and_table_are_drawn_by_their_command(tmp_path, capsys):
    module = runpy.run_path(str(DOCS / "draw_figures.py"))
    module["main"](["--output", str(tmp_path)])
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (DOCS / "figures").iterdir()}
    printed = capsys.readouterr().out.strip()
    assert printed in (DOCS / "how_it_works.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("gradient", "inputs"), [(1.5, 0.25), (1.5, 0.5), (2.0, 0.5), (1.0, 0.25), (0.75, 0.75)])
def test_maximum_of_the_criterion_for_powers_is_where_the_page_says(gradient, inputs):
    chosen = runpy.run_path(str(DOCS / "draw_figures.py"))["criterion_of"](gradient, inputs)[2]
    assert chosen == pytest.approx(max(0.0, 1 - 2 * inputs / gradient), abs=1e-3)


# Data


@every_page
def test_yaml_and_json_are_what_they_claim_to_be(page, tmp_path):
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for text in blocks(page, "json"):
        json.loads(text)
    for text in blocks(page, "yaml"):
        settings = yaml.safe_load(text)
        if "distributed_type" in settings:
            file = tmp_path / "accelerate.yaml"
            file.write_text(text)
            load_config_from_file(str(file))  # raises on a key that it does not know
        else:
            assert set(settings) <= known
            SchattenOptions.from_optim_args(settings.get("optim_args"))


def test_distributed_page_has_the_bytes_of_a_due_step():
    bytes_of = {name: criterion.curves * (NODES + 1) * 8 for name, criterion in CRITERIA.items()}
    assert bytes_of["holder"] == bytes_of["decrease"]
    text = " ".join((DOCS / "distributed.md").read_text(encoding="utf-8").split())
    assert f"takes {bytes_of['holder']} bytes" in text
    assert f"two curves of {NODES} float64 numbers" in text
    assert f"and {bytes_of['alignment']} with `alignment`" in text
    assert f"GPT-2 small take {72 * bytes_of['holder'] / 1000:.0f} kB" in text
    assert bytes_of["kronecker"] == bytes_of["holder"]
    assert f"at {NODES} Chebyshev nodes" in (DOCS / "how_it_works.md").read_text(encoding="utf-8")


# Options


def default_text(value):
    """Return a default as the table of options writes it."""
    if value in (None, ()):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{value}`" if isinstance(value, str) or math.isinf(value) else f"{value:g}"


def option_rows(page):
    """Return the (option, default) cells of the tables of options."""
    return re.findall(r"^\| `(\w+)` \| ([^|]+?) \| [^|]+ \|$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_page_of_options_has_every_option_in_its_order_with_its_default():
    rows = option_rows(DOCS / "options.md")
    assert rows == [(name, default_text(field.default)) for name, field in OPTIONS.items()]


def test_readme_has_the_defaults_of_the_options_that_it_shows():
    rows = dict(option_rows(README))
    assert {"p", "p_interval"} <= rows.keys()
    assert rows == {name: default_text(OPTIONS[name].default) for name in rows}


@every_page
def test_settings_are_options_that_go_together(page):
    spans = re.findall(r"`([a-z_]+=[^`]+)`", prose(page)) + re.findall(r'optim_args="([^"]*)"', page.read_text())
    for text in spans:
        names = [part.partition("=")[0] for part in text.split(",")]
        if set(names) <= OPTIONS.keys() and not text.endswith("…"):
            SchattenOptions.from_optim_args(text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_of_options_exist(page):
    """Words that look like an option's name are one, or another name of the package or of its neighbours."""
    for name in re.findall(r"`((?:p|schatten|coupling|probe|ns)_[a-z_]+)`", prose(page)):
        allowed = {"schatten_p", "schatten_p_min", "schatten_p_median", "schatten_p_max", "schatten_skipped_steps"}
        assert name in OPTIONS or name in allowed, name


# Numbers and rooms


RESULTS = README.read_text(encoding="utf-8").partition("## Results\n")[2].partition("\n## ")[0]
RECIPES = "pretrain_clm", "image_classification", "lora_sft"
CANDIDATES = {
    "adaptive p": "kronecker",
    "criterion=holder": "holder",
    "`p=-5`": "p = -5",
    "`p=inf`": "p = inf",
    "criterion=alignment": "alignment",
    "torch.optim.Muon": "Muon",
    "AdamW |": "AdamW",
}


def compared(recipe, candidate):
    """Return mean and standard error, None of one seed, of a candidate at its best learning rate."""
    outcomes = json.loads((ROOT / "recipes" / recipe / "results/comparison.json").read_text())
    own = [outcome for outcome in outcomes if outcome["candidate"] == candidate]
    swept = {outcome["learning_rate"]: outcome["eval_loss"][-1] for outcome in own if outcome["seed"] == 42}
    best = min(swept, key=swept.get)
    losses = [outcome["eval_loss"][-1] for outcome in own if outcome["learning_rate"] == best]
    error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None
    return statistics.fmean(losses), error


@pytest.mark.parametrize("name", CANDIDATES)
def test_results_of_the_readme_are_those_of_the_comparisons(name):
    row = next(line for line in RESULTS.splitlines() if line.startswith("|") and name in line)
    for cell, recipe in zip(row.strip("|").split("|")[1:], RECIPES, strict=True):
        mean, _, error = cell.replace("*", "").replace("(one seed)", "").strip().partition(" ± ")
        measured, measured_error = compared(recipe, CANDIDATES[name])
        decimals = len(mean.partition(".")[2])
        assert mean == f"{measured:.{decimals}f}"
        assert error == ("" if measured_error is None else f"{measured_error:.{decimals}f}")
        assert ("one seed" in cell) == (measured_error is None)


def test_numbers_of_the_readme_are_those_of_the_pages_that_it_links():
    recipe, benchmarks = ((ROOT / name / "README.md").read_text() for name in ("recipes/pretrain_clm", "benchmarks"))
    card = (ROOT / "model_cards/pretrain_clm.md").read_text()
    trained = re.search(r"\| loss \| (\S+) \| (\S+) \|", card).groups()
    for number in trained:
        assert number in RESULTS
        assert number in recipe
    sentences = {
        "auto": "takes {} to {} times `torch",
        "float32": "takes {} to {} times Muon's",
        "h100": "takes {} times Muon's, and {} times at width 1024",
    }
    for file, sentence in sentences.items():
        rows = json.loads((ROOT / f"benchmarks/comparison/results/step_overhead_{file}.json").read_text())["rows"]
        ratios = sorted(f"{row['step']['median']:.2f}" for row in rows)
        assert sentence.format(ratios[0], ratios[-1]) in " ".join(RESULTS.split())
    for rounded, measured in (("1.32 times", "| 1.320 ("), ("0.24 times", "| 0.239 ("), ("0.48 %", "| +0.48 %")):
        assert rounded in " ".join(RESULTS.split())
        assert measured in benchmarks


def test_page_on_the_works_names_every_module():
    text = (DOCS / "how_it_works.md").read_text(encoding="utf-8").partition("## Where it is in the code\n")[2]
    named = {name.rstrip("/") for name in re.findall(r"`(\w+(?:\.py|/))`", text)} - {"hf_schatten"}
    rooms = {
        path.name for path in (ROOT / "hf_schatten").iterdir() if path.name[0] not in "_p" or path.suffix == ".py"
    }
    assert named == rooms - {"__init__.py", "__pycache__", "py.typed"}


# Messages


def message_patterns():
    """Return patterns of all texts in the package's source, with a wildcard for what is filled in."""
    patterns = set()
    for path in (ROOT / "hf_schatten").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if id(node) in documentation:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
                parts[-1] = parts[-1] and parts[-1].rstrip()
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [part for piece in re.split(r"%[ds]", node.value) for part in (piece, None)][:-1]
            else:
                continue
            if len("".join(filter(None, parts))) >= 20:
                patterns.add("".join(".*?" if part is None else re.escape(one_line(part)) for part in parts))
    return [re.compile(pattern, flags=re.DOTALL) for pattern in patterns]


def one_line(text):
    return re.sub(r"\s+", " ", text)


MESSAGES = [text.strip() for text in blocks(DOCS / "troubleshooting.md", "text")]
# Made of two texts, of which the second is a rule's, or what has replaced an option.
OPTION_RULE = re.compile(r"(\w+)=(\S+) is not allowed: (.+)\.")
REMOVED_OPTION = re.compile(r"The option '(\w+)' (.+)\.")


def is_in_the_source(message, patterns):
    rule, removed = OPTION_RULE.fullmatch(message), REMOVED_OPTION.fullmatch(message)
    if removed is not None or (rule is not None and rule[1] in OPTIONS):
        given = f"{removed[1]}=1" if removed else f"{rule[1]}={rule[2]}"
        with pytest.raises(OptionError) as error:
            SchattenOptions.from_optim_args(given)
        return str(error.value) == message
    return any(pattern.fullmatch(one_line(message)) for pattern in patterns)


def test_quoted_messages_are_the_packages():
    patterns = message_patterns()
    assert len(MESSAGES) >= 25
    assert [message for message in MESSAGES if not is_in_the_source(message, patterns)] == []
    for changed in (message.replace("the", "a") for message in MESSAGES if " the " in message):
        assert not is_in_the_source(changed, patterns)


def test_every_entry_has_cause_and_fix():
    entries = re.split(r"^### ", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(entries) >= 25
    for entry in entries:
        positions = [entry.find(word) for word in ("**Cause.** ", "**Fix.** ")]
        assert 0 < positions[0] < positions[1], entry.partition("\n")[0]


# Links


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@every_page
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        destination = (page.parent / path).resolve() if path else page
        assert destination.exists(), target
        assert destination.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(destination if destination.is_file() else destination / "README.md"), target


def test_readme_names_every_page():
    text = README.read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"]({name_of(page)})" in text


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_are_no_longer_than_those_of_code(page):
    generated_or_quoted = r"^```text\n.*?^```$|^## Support\n.*?(?=^## )"
    text = re.sub(generated_or_quoted, "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    long = [line for line in text.splitlines() if len(line) > 119 and not line.startswith(("|", "!["))]
    assert long == []


def test_the_pages_are_there():
    pages = ["README", "architectures", "distributed", "how_it_works", "multi_node", "options", "troubleshooting"]
    assert [page.stem for page in PAGES] == pages
