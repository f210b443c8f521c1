"""The pretraining recipe: its options, its corpus, its tokenizer and blocks, and one whole run.

One long file, in the order of a run, for most of it shares a small library and a tokenizer.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, are_progress_bars_disabled
from transformers import TrainingArguments

from recipes.pretrain_clm import arguments, data, pretrain_clm
from recipes.recipe_parts import blocks
from recipes.recipe_parts.command_line import InputError, checkpoint_to_resume
from recipes.recipe_parts.documents import load_files
from recipes.recipe_parts.run_record import side_by_side
from recipes.recipe_parts.splits import is_held_out
from recipes.recipe_parts.terminal import bars_of_datasets

pytestmark = pytest.mark.filterwarnings(r"error:::recipes\.")

SOURCE = 'def area(radius):\n    """Of a circle."""\n    return 3.14159 * radius ** 2\n'


def text_of(dataset: Dataset) -> list[str]:
    return list(dataset["text"])


@pytest.fixture(scope="module")
def tokenizer():
    return blocks.train_tokenizer(Dataset.from_dict({"text": [SOURCE] * 4}), vocab_size=300)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small stand-in for the standard library: 60 modules, and files that are not to be read."""
    root = tmp_path / "library"
    names = [f"module_{i}.py" for i in range(50)] + [f"package/part_{i}.py" for i in range(10)]
    unwanted = ["site-packages/a.py", "package/test/b.py", "encodings/c.py", "_sysconfigdata_x.py", "d.txt"]
    for name in names + unwanted:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n{SOURCE}")
    return root


# Options


def write_config(tmp_path: Path, text: str, name: str = "config.yaml") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_flags_alone(tmp_path):
    model, data_args, training = arguments.parse_arguments(
        ["--n_layer", "2", "--block_size", "64", "--max_steps", "5", "--output_dir", str(tmp_path)]
    )
    assert (model.n_layer, data_args.block_size, training.max_steps) == (2, 64, 5)
    assert training.output_dir == str(tmp_path)


def test_without_arguments_trains_and_evaluates():
    _, data_args, training = arguments.parse_arguments([])
    assert training.do_train
    assert training.do_eval
    assert training.output_dir == "outputs/pretrain_clm"
    assert data_args.source == data.STDLIB_NAME


def test_flags_override_the_file(tmp_path):
    config = write_config(tmp_path, "n_layer: 3\nn_embd: 128\nmax_steps: 300\noptim: adamw_torch\ndo_eval: false\n")
    model, _, training = arguments.parse_arguments([config, "--max_steps", "20", "--n_layer=1", "--do_eval"])
    assert (model.n_layer, model.n_embd, training.max_steps) == (1, 128, 20)
    assert training.optim == "adamw_torch"
    assert training.do_eval


def test_file_values_have_the_types_of_flags(tmp_path):
    # YAML reads 2e-3 as a string.
    config = write_config(
        tmp_path, "learning_rate: 2e-3\ndisable_tqdm: true\nlr_scheduler_kwargs: {min_lr_rate: 0.1}\nseed: null\n"
    )
    _, _, training = arguments.parse_arguments([config])
    assert training.learning_rate == 0.002
    assert training.disable_tqdm is True
    assert training.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


def test_json_file(tmp_path):
    config = write_config(tmp_path, '{"vocab_size": 512, "max_steps": 7}', "config.json")
    model, _, training = arguments.parse_arguments([config])
    assert (model.vocab_size, training.max_steps) == (512, 7)


@pytest.mark.parametrize("name", ["gpt2_stdlib.yaml", "gpt2_packages.yaml", "gpt2_fineweb.yaml"])
def test_shipped_files_are_valid(recipe, name):
    _, _, training = arguments.parse_arguments([str(recipe / name), "--use_cpu"])
    assert training.optim == "schatten_p"
    assert training.max_steps > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_step: 3\n", "unknown option 'max_step' in .*config.yaml. Did you mean 'max_steps'?"),
        ("- 1\n", "must hold lines like"),
        ("a: [\n", "cannot be read"),
    ],
)
def test_bad_file(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        arguments.parse_arguments([write_config(tmp_path, text)])


def test_missing_file():
    with pytest.raises(InputError, match=r"nowhere\.yaml: there is no such file"):
        arguments.parse_arguments(["nowhere.yaml"])


def test_wrong_type_in_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        arguments.parse_arguments([write_config(tmp_path, "max_steps: many\n")])
    assert "invalid int value: 'many'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--blocksize", "3"], "unknown option 'blocksize' in the command line. Did you mean 'block_size'?"),
        (["--dataset_name", "a", "--train_file", "b.txt"], "exclude each other"),
        (["--validation_file", "b.txt"], "needs a --train_file"),
        (["--validation_fraction", "1.5"], "1.5 is not between 0 and 1"),
        (["--block_size", "1"], "--block_size 1 is too small"),
        (["--max_eval_samples", "0"], "--max_eval_samples 0 is too small"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(InputError, match=message):
        arguments.parse_arguments(flags)


# Corpus


def test_stdlib_files_are_ordered_and_library_code_only(library):
    names = [path.relative_to(library).as_posix() for path in data.python_files(library)]
    assert names == sorted(names)
    assert len(names) == 60
    assert all(name.startswith(("module_", "package/part_")) for name in names)


def test_the_running_python_has_a_library():
    files = data.python_files(Path(os.__file__).parent)
    assert Path(os.__file__) in files
    assert sum(path.stat().st_size for path in files) > 4_000_000


def test_stdlib_split_is_disjoint_complete_and_repeatable(library):
    first, second = (data.load_python(library, 0.2) for _ in range(2))
    train, held_out = text_of(first["train"]), text_of(first["validation"])
    assert set(train).isdisjoint(held_out)
    assert sorted(train + held_out) == sorted(path.read_text() for path in data.python_files(library))
    assert text_of(second["train"]) == train
    assert text_of(second["validation"]) == held_out


def test_a_changed_file_is_read_again(library):
    before = text_of(data.load_python(library, 0.2)["train"])
    path = library / before[0].partition("\n")[0].removeprefix("# ")
    path.write_text("changed = True\n")
    assert text_of(data.load_python(library, 0.2)["train"])[0] == "changed = True\n"


def test_held_out_share():
    held_out = sum(is_held_out(f"package/module_{i}.py", 0.25) for i in range(4000))
    assert held_out == pytest.approx(1000, abs=100)


def test_coding_line_is_obeyed(library):
    (library / "module_0.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"))
    loaded = data.load_python(library, 0.2)
    assert any("'é'" in text for split in loaded.values() for text in split["text"])


def test_a_file_that_is_no_text_is_left_out(library, caplog):
    (library / "module_0.py").write_bytes(b"name = '\xff'\n")
    loaded = data.load_python(library, 0.2)
    assert [text for split in loaded.values() for text in split["text"]].count("") == 1
    assert "module_0.py is left out" in caplog.text


def test_sources_of_python():
    assert data.source_root("stdlib") == Path(os.__file__).parent
    assert (data.source_root("packages") / "transformers").is_dir()
    assert data.source_name("/somewhere/my_project") == "Python source in my_project"
    with pytest.raises(InputError, match=r"nowhere: no such folder\. Give one, or stdlib or packages"):
        data.source_root("nowhere")


def test_stdlib_without_files(tmp_path):
    with pytest.raises(InputError, match="falls into the train split"):
        data.load_python(tmp_path, 0.1)


def test_text_file_holds_paragraphs(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("\n\n".join(f"Paragraph {i},\nin two lines." for i in range(10)))
    loaded = load_files(str(path), None, {"text": "text"}, fraction=0.2)
    assert text_of(loaded["train"])[0] == "Paragraph 0,\nin two lines."
    assert text_of(loaded["validation"]) == [f"Paragraph {i},\nin two lines." for i in (8, 9)]


def test_column_and_validation_file(tmp_path):
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"body": "{name} {i}", "id": {i}}}\n' for i in range(3)))
    files = [str(tmp_path / f"{name}.jsonl") for name in ("train", "validation")]
    loaded = load_files(*files, {"text": "body"}, fraction=0.1)
    assert text_of(loaded["train"]) == [f"train {i}" for i in range(3)]
    assert text_of(loaded["validation"]) == [f"validation {i}" for i in range(3)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", r"--train_file .*empty\.txt is empty \(0 bytes\)\. Give a file with text"),
        ("one.txt", "One paragraph only.", r"has 1 document\(s\), too few to hold out 1 .* --validation_file"),
        ("notes.docx", "?", r"notes\.docx: unknown kind of file; use one of \.txt, "),
        ("table.csv", "title,body\na,b\n", r"--text_column text is not a column of .* has: title, body"),
        ("missing.txt", None, r"--train_file .*missing\.txt: there is no such file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_files(str(path), None, {"text": "text"}, fraction=0.1)


# Tokenizer and blocks


@pytest.mark.parametrize("text", [SOURCE, "  spaces , and\ttabs \n\n", "naïve 漢字 🙂", "\x00\x7f", "a  b ."])
def test_tokenizer_round_trip(tokenizer, tmp_path, text):
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert loaded(text)["input_ids"] == ids
    assert loaded.eos_token == blocks.END_OF_TEXT


def test_tokenizer_is_repeatable(tokenizer):
    again = blocks.train_tokenizer(Dataset.from_dict({"text": [SOURCE] * 4}), vocab_size=300)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(again) <= 300


def test_vocabulary_too_small():
    with pytest.raises(InputError, match="--vocab_size 256 has no room"):
        blocks.train_tokenizer(Dataset.from_dict({"text": [SOURCE]}), vocab_size=256)


@pytest.mark.parametrize("lengths", [[], [3], [4], [5, 0, 7], [1] * 13, [9, 4, 40]])
def test_cutting_loses_only_the_tail(lengths):
    stream = iter(range(sum(lengths)))
    rows = [[next(stream) for _ in range(length)] for length in lengths]
    cut = blocks.cut_into_blocks({"input_ids": rows}, block_size=4)["input_ids"]
    assert all(len(block) == 4 for block in cut)
    joined = [token for block in cut for token in block]
    assert joined == list(range(sum(lengths)))[: len(joined)]
    assert sum(lengths) - len(joined) < 4


def test_blocks_are_the_documents_joined_by_end_of_text(tokenizer):
    documents = DatasetDict(
        train=Dataset.from_dict({"text": [SOURCE, "", "x = 1\n"]}), validation=Dataset.from_dict({"text": [SOURCE]})
    )
    made = blocks.make_blocks(documents, tokenizer, block_size=8)
    tokens = [token for block in made["train"]["input_ids"] for token in block]
    end = blocks.END_OF_TEXT
    assert (SOURCE + end + "x = 1\n" + end).startswith(tokenizer.decode(tokens))
    batch = blocks.collate([made["train"][0], made["train"][1]])
    assert batch["input_ids"].shape == (2, 8)
    assert batch["labels"].tolist() == batch["input_ids"].tolist()


def test_too_short_for_a_block(tokenizer):
    documents = DatasetDict(
        train=Dataset.from_dict({"text": [SOURCE] * 9}), validation=Dataset.from_dict({"text": ["x"]})
    )
    with pytest.raises(InputError, match="validation split has 2 tokens, too few for one block of --block_size 64"):
        blocks.make_blocks(documents, tokenizer, block_size=64)


# Model and script


def test_model_has_the_size_asked_for(tokenizer):
    args = arguments.ModelArguments(n_layer=1, n_embd=16, n_head=2, config_overrides="activation_function=relu")
    config = pretrain_clm.build_model(args, tokenizer, block_size=32).config
    assert (config.n_layer, config.n_embd, config.n_positions) == (1, 16, 32)
    assert (config.vocab_size, config.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)
    assert config.activation_function == "relu"


def test_continue_from_saved_weights(tokenizer, tmp_path):
    args = arguments.ModelArguments(n_layer=1, n_embd=16, n_head=2)
    pretrain_clm.build_model(args, tokenizer, block_size=32).save_pretrained(tmp_path)
    again = arguments.ModelArguments(model_name_or_path=str(tmp_path))
    assert pretrain_clm.build_model(again, tokenizer, block_size=16).config.n_positions == 32
    with pytest.raises(InputError, match="--block_size 64 exceeds the model's context of 32 tokens"):
        pretrain_clm.build_model(again, tokenizer, block_size=64)


def test_heads_must_divide_the_width(tokenizer):
    with pytest.raises(InputError, match="--n_embd 10 is not a multiple of --n_head 3"):
        pretrain_clm.build_model(arguments.ModelArguments(n_embd=10, n_head=3), tokenizer, block_size=8)


def test_sample_is_evenly_spaced():
    rows = Dataset.from_dict({"row": list(range(10))})
    assert list(pretrain_clm.sample(rows, 4)["row"]) == [0, 2, 5, 7]
    assert len(pretrain_clm.sample(rows, None)) == len(pretrain_clm.sample(rows, 99)) == 10


def test_checkpoint_to_resume(tmp_path):
    def find(value: str | None) -> str | None:
        return checkpoint_to_resume(TrainingArguments(output_dir=str(tmp_path / "out"), resume_from_checkpoint=value))

    assert find(None) is None
    with pytest.raises(InputError, match="no complete checkpoint-\\* folder"):
        find("last")
    for step in (9, 10):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    newest = str(tmp_path / "out" / "checkpoint-10")
    assert find("last") == find("true") == find(newest) == newest
    with pytest.raises(InputError, match="there is no such folder"):
        find(str(tmp_path / "elsewhere"))


def test_comparison_lists_start_and_end():
    before = {"eval_start_loss": 8.317, "eval_start_perplexity": 4094.0}
    metrics = {"eval_start": before, "eval": {"eval_loss": 2.0, "eval_perplexity": 7.389}}
    table = side_by_side(metrics, pretrain_clm.PretrainingTrainer.quantities)
    assert [line.split() for line in table.splitlines()] == [
        ["validation", "start", "end"],
        ["loss", "8.317", "2"],
        ["perplexity", "4094", "7.389"],
    ]


def run_script(recipe: Path, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HOME": str(cwd / "hf_home"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(recipe / "pretrain_clm.py"), *args],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_datasets_draws_progress_bars_of_many_documents_only():
    for documents in (9, 100_000):
        with bars_of_datasets(documents):
            assert are_progress_bars_disabled() == (documents == 9)
        assert not are_progress_bars_disabled()


def test_help_page(recipe, tmp_path):
    result = run_script(recipe, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for word in ("schatten_p", "--train_file", "--learning_rate", "--n_layer"):
        assert word in result.stdout


@pytest.mark.slow
def test_whole_run_and_resume(recipe, tmp_path):
    lines = [f"The {animal} sat on mat number {i}." for i in range(200) for animal in ("cat", "dog", "owl")]
    (tmp_path / "animals.txt").write_text("\n\n".join(lines))
    config = write_config(
        tmp_path,
        "train_file: animals.txt\nn_layer: 2\nn_embd: 32\nn_head: 2\nvocab_size: 300\nblock_size: 32\n"
        "optim: schatten_p\noptim_args: p=adaptive,p_interval=10\nlearning_rate: 1e-2\nmax_steps: 20\n"
        "save_steps: 10\nlogging_steps: 5\noutput_dir: out\nuse_cpu: true\n",
    )
    result = run_script(recipe, config, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "perplexity" in result.stdout
    for noise in ("warning", "loss_type", "Setting accelerator", "Writing model shards", "Tokenizing"):
        assert noise.lower() not in (result.stdout + result.stderr).lower()

    out = tmp_path / "out"
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "all_results.json",
        "eval_start_results.json",
        "eval_results.json",
        "trainer_state.json",
        "figures/p_by_layer.png",
        "checkpoint-10/trainer_state.json",
        "checkpoint-20/trainer_state.json",
    ):
        assert (out / name).is_file(), f"{name} was not written"
    metrics = json.loads((out / "all_results.json").read_text())
    assert metrics["eval_loss"] < metrics["eval_start_loss"] - 1
    assert metrics["eval_perplexity"] < metrics["eval_start_perplexity"]

    resumed = run_script(recipe, config, "--resume_from_checkpoint", "last", "--max_steps", "24", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 24
    assert json.loads((out / "all_results.json").read_text())["eval_loss"] <= metrics["eval_loss"]


@pytest.mark.slow
def test_an_input_error_is_one_line(recipe, tmp_path):
    (tmp_path / "empty.txt").touch()
    result = run_script(recipe, "--train_file", "empty.txt", "--use_cpu", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("pretrain_clm.py: error: --train_file empty.txt is empty")
    assert "Traceback" not in result.stderr
