"""The documentation is true: snippets run, commands parse, messages, options and numbers are those of their sources.

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

from benchmarks.comparison.outcomes import NAME, load
from benchmarks.comparison.report import Standing, with_error
from benchmarks.comparison.scripts import Script
from docs.write_tables import TABLES, split_at
from hf_schatten import SchattenOptions, load_learned_p
from hf_schatten.optim.matrix import CURVES, NODES

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
WRITTEN = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
WRITTEN += sorted(
    path for folder in ("recipes", "benchmarks", "model_cards") for path in ROOT.glob(f"{folder}/**/*.md")
)
ALL_PAGES = PAGES + [path for path in WRITTEN if path.name != "template.md"]  # a template's links are its product's

# Cards are records of runs, by the version of the package that they name, whose options may be gone.
WITH_COMMANDS = [page for page in ALL_PAGES if page.parent.name != "model_cards" or page.stem == "README"]

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
def test_snippets_of_the_quickstart(reader, capsys, monkeypatch):
    # Its default bf16 asks for a GPU, or for this.
    monkeypatch.setattr(trl, "SFTConfig", functools.partial(trl.SFTConfig, use_cpu=True))
    run_snippets(DOCS / "quickstart.md", reader)
    assert "{'transformer.h.0.attn.c_attn.weight.q': " in capsys.readouterr().out
    assert "## Optimizer: Schatten-p" in Path("sft/README.md").read_text()
    assert reader["loss"].item() < math.log(64)  # that of a uniform guess


def test_snippets_of_the_readme(reader):
    run_snippets(README, reader)
    assert "## Optimizer: Schatten-p" in Path("run/README.md").read_text()


def test_the_first_program_takes_ten_lines():
    assert len([line for line in blocks(README, "python")[0].splitlines() if line.strip()]) <= 10


OTHERS = [page for page in PAGES if page.stem not in ("README", "quickstart") and blocks(page, "python")]


@pytest.mark.parametrize("page", OTHERS, ids=name_of)
def test_snippets_of_other_pages(page, reader):
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


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
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
        # A free port: tests of other pages may launch at the same time.
        if words[:2] == ["accelerate", "launch"]:
            words[2:2] = ["--main_process_port", "0"]
        elif words[0] == "torchrun":
            words[1:1] = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        ran = subprocess.run(words, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert load_learned_p(output / "checkpoint-12")


@pytest.mark.pictures
def test_pictures_are_drawn_by_their_command(tmp_path):
    runpy.run_path(str(DOCS / "draw_figures.py"))["main"](["--output", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (DOCS / "figures").iterdir()}


@pytest.mark.parametrize(("gradient", "inputs"), [(1.5, 0.25), (1.5, 0.5), (2.0, 0.5), (1.0, 0.55), (0.75, 0.75)])
def test_maximum_of_the_criterion_for_powers_is_where_the_page_says(gradient, inputs):
    chosen = runpy.run_path(str(DOCS / "draw_figures.py"))["criterion_of"](gradient, inputs)[2]
    assert chosen == pytest.approx(max(-0.25, 1 - 2 * inputs / gradient), rel=0, abs=1e-3)


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_what_their_command_writes(name):
    file, make = TABLES[name]
    _, written, _ = split_at((ROOT / file).read_text(encoding="utf-8"), name)
    assert written == make(), "run python docs/write_tables.py"


def test_a_page_without_one_place_for_a_table_is_refused():
    begin, end = "<!-- errors: written by docs/write_tables.py -->\n", "<!-- errors: end -->\n"
    for text in ("", begin, end + begin, 2 * (begin + end)):
        with pytest.raises(ValueError, match="once, each on a line of its own"):
            split_at(text, "errors")


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
        elif "script" in settings:
            file = tmp_path / "comparison.yaml"
            file.write_text(text)
            Script.load(file)  # likewise
        else:
            assert set(settings) <= known
            SchattenOptions.from_optim_args(settings.get("optim_args"))


@pytest.mark.parametrize("page", ["distributed", "how_it_works"])
def test_pages_have_the_bytes_of_an_estimate(page):
    numbers = re.findall(r"\d+", (DOCS / f"{page}.md").read_text(encoding="utf-8"))
    assert {str(NODES), str(CURVES * (NODES + 1) * 8)} <= set(numbers)


# Options


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


def cells(page, name):
    """Return the cells of the row whose first one has this name."""
    rows = [line.strip("|").split("|") for line in page.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    return [[cell.strip() for cell in row] for row in rows if name in row[0]]


def compared(recipe, candidate, task="comparison"):
    """Return mean and standard error, as pages write them, of a candidate at its best learning rate."""
    folder = Path("recipes") / recipe
    outcomes = load(ROOT / folder / "results" / NAME)
    own = [each for each in outcomes if each.regime == f"{folder / task}.yaml" and each.candidate == candidate]
    return with_error([*Standing.of(candidate, own).losses.values()], digits=3)


CRITERIA = {f"`{name}`": f"p=adaptive,criterion={name}" for name in ("holder", "kronecker", "alignment", "decrease")}


@pytest.mark.parametrize(("name", "candidate"), [*CRITERIA.items(), ("p = -5 for all", "p=-5"), ("Muon", "muon")])
def test_losses_of_the_negative_results_are_those_of_the_comparisons(name, candidate):
    (row,) = cells(DOCS / "negative_results.md", name)
    recipes = "pretrain_clm", "image_classification", "lora_sft"
    assert row[1:] == [compared(recipe, candidate) for recipe in recipes]


COMPARED = {"AdamW": "adamw:0.999", "Muon": "muon", "p = ∞": "p=inf", "p = -5": "p=-5", "p = -4": "p=-4"}


@pytest.mark.parametrize("recipe", ["pretrain_clm", "image_classification", "lora_sft"])
def test_losses_of_the_recipes_are_those_of_their_comparisons(recipe):
    tasks = ["comparison", "resmlp_comparison"] if recipe == "image_classification" else ["comparison"]
    page = ROOT / "recipes" / recipe / "README.md"
    stated = {name: [row[2] for row in cells(page, f"`{name}`")] for name in COMPARED}
    for name in ("AdamW", "Muon", *(name for name, losses in stated.items() if losses)):
        assert stated[name] == [compared(recipe, COMPARED[name], task) for task in tasks], name


def test_costs_of_the_readme_are_those_that_were_measured():
    stated = [(row[0], row[1]) for row in cells(README, "step")]
    results = ROOT / "benchmarks"
    rows = json.loads((results / "comparison/results/step_overhead_auto.json").read_text())["rows"]
    small = sorted(f"{row['step']['median']:.2f}" for row in rows)
    on_gpu, on_cpu = (
        json.loads((results / f"results/optimizer_step{name}.json").read_text())["timings"] for name in ("_h200", "")
    )
    gpt2, llama = (on_gpu[model]["torch.optim.Muon and AdamW"] for model in ("gpt2-small", "llama-554m"))
    measured = [gpt2["ours over it there"], llama["ours over it there"], gpt2["ours over it"], llama["ours over it"]]
    measured.append(on_cpu["gpt2-small"]["torch.optim.Muon and AdamW"]["ours over it"])
    assert [ratio for _, ratio in stated] == [f"{small[0]}–{small[-1]}", *(f"{ratio:.2f}" for ratio in measured)]


def test_contributors_find_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Where it is in the code\n")[2]
    named = {name.rstrip("/") for name in re.findall(r"`(\w+(?:\.py|/))`", text)} - {"hf_schatten"}
    rooms = {
        path.name for path in (ROOT / "hf_schatten").iterdir() if path.name[0] not in "_p" or path.suffix == ".py"
    }
    assert named == rooms - {"__init__.py", "__pycache__", "py.typed"}


# Messages


def source_texts():
    """Return all texts in the package's source, each as its constant parts: between them something is filled in."""
    texts = []
    for path in (ROOT / "hf_schatten").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append([part.value if isinstance(part, ast.Constant) else "\0" for part in node.values])
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append([re.sub(r"%[ds]", "\0", node.value)])
    return ["".join(parts) for parts in texts]


def quoted_messages():
    """Return the messages that the page on trouble quotes: texts of several words in its first column."""
    rows = [line.split("|")[1] for line in prose(DOCS / "troubleshooting.md").splitlines() if line.startswith("|")]
    return [span for cell in rows for span in re.findall(r"`([^`]+)`", cell) if len(span.split()) > 1]


def is_in_the_source(message, texts):
    """Whether one text of the source has the parts of a message, which stand between its "…", in their order."""
    pattern = re.compile(".*".join(map(re.escape, message.split("…"))), flags=re.DOTALL)
    return any(pattern.search(text) for text in texts)


def test_quoted_messages_are_the_packages():
    texts, messages = source_texts(), quoted_messages()
    assert len(messages) >= 25
    assert [message for message in messages if not is_in_the_source(message, texts)] == []
    assert not any(is_in_the_source(message.replace(" ", "  ", 1), texts) for message in messages)


def test_every_symptom_has_cause_and_fix():
    lines = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert len(rows) >= 25
    assert all(len(row) == 3 and all(row) for row in rows)


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


BY_HAND = [page for page in ALL_PAGES if page.parent == DOCS or page.stem.isupper()]


@pytest.mark.parametrize("page", BY_HAND, ids=name_of)
def test_lines_are_no_longer_than_those_of_code(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 119 and not line.startswith(("|", "!["))] == []


def words(page):
    """Return the number of a page's words, without tables that are made from tests or results."""
    text = re.sub(
        r"<!-- (support|comparison|controls): .*?: end -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    return sum(any(letter.isalnum() for letter in word) for word in text.split())


def test_pages_are_short():
    assert words(README) <= 1200
    assert sum(words(page) for page in DOCS.glob("*.md") if page.stem != "architectures") <= 8000
