"""The LoRA recipe: its options, its headers, prompts and answers, its adapters, and runs of a tiny base model.

One long file, in the order of a run, for most of it shares the base model and its tokenizer.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers.trainer
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoTokenizer, EvalPrediction, GPT2Config, GPT2LMHeadModel

import hf_schatten
from recipes.lora_sft import adapters, answers, arguments, data, lora_sft, prompts
from recipes.recipe_parts import blocks
from recipes.recipe_parts.command_line import InputError
from recipes.recipe_parts.documents import load_hub_dataset
from recipes.recipe_parts.metrics import load_metric

pytestmark = pytest.mark.filterwarnings(
    r"error:::recipes\.",
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning",
)

RECIPE = Path(lora_sft.__file__).parent
PATTERN = r"#### *(-?[0-9.,]+)"
CONTEXT = 48


def sums(count: int) -> list[dict[str, str]]:
    """Return questions and answers of GSM8K's form."""
    return [
        {"question": f"What is {a} plus {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}
        for a in range(10)
        for b in range(10)
    ][:count]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with a small GPT-2 and its tokenizer, as the recipe pretrain_clm leaves them."""
    folder = tmp_path_factory.mktemp("base")
    texts = [f"{row['question']}\n{row['answer']}\n" for row in sums(100)]
    tokenizer = blocks.train_tokenizer(Dataset.from_dict({"text": texts}), vocab_size=300)
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1,
        n_embd=16,
        n_head=2,
        n_positions=CONTEXT,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture
def questions(tmp_path) -> Path:
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sums(40)))
    return path


def completions_of(rows: list[dict[str, str]]) -> DatasetDict:
    columns = {"prompt": [row["question"] for row in rows], "completion": [row["answer"] for row in rows]}
    return DatasetDict(train=Dataset.from_dict(columns), validation=Dataset.from_dict(columns))


# Options


def test_without_arguments_it_continues_the_first_recipe():
    model, data_args, training = arguments.parse_arguments([])
    assert model.model_name_or_path == "outputs/pretrain_clm"
    assert data_args.source == data.HEADERS_NAME
    assert data_args.columns == {"text": "text"}
    assert training.output_dir == "outputs/lora_sft"
    assert training.do_train
    assert training.do_eval


@pytest.mark.parametrize("name", ["gpt2_headers.yaml", "llama3_gsm8k.yaml"])
def test_shipped_files_are_valid(name):
    _, _, training = arguments.parse_arguments([str(RECIPE / name), "--use_cpu"])
    assert training.optim == "schatten_p"
    assert training.max_steps > 0 or training.num_train_epochs > 0


def test_the_file_for_gsm8k_learns_answers():
    _, data_args, _ = arguments.parse_arguments([str(RECIPE / "llama3_gsm8k.yaml"), "--use_cpu"])
    assert data_args.columns == {"prompt": "question", "completion": "answer"}
    assert data_args.max_new_tokens


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_rank", "4"], "unknown option 'lora_rank' in the command line. Did you mean"),
        (["--lora_r", "0"], "--lora_r 0 is too small: give at least 1"),
        (["--lora_alpha", "0"], r"--lora_alpha 0\.0 is not above 0"),
        (["--lora_dropout", "1"], r"--lora_dropout 1\.0 is not at least 0 and below 1"),
        (["--dtype", "int8"], "--dtype int8 is not known: give float32, "),
        (["--dataset_name", "a", "--train_file", "b.txt"], "exclude each other"),
        (["--validation_file", "b.txt"], "needs a --train_file"),
        (["--validation_fraction", "1"], r"1\.0 is not between 0 and 1"),
        (["--block_size", "1"], "--block_size 1 is too small"),
        (["--max_new_tokens", "8"], "--max_new_tokens 8 needs prompts: give --prompt_column"),
        (["--completion_column", "a"], "--completion_column a needs prompts: give --prompt_column"),
        (["--prompt_column", "q"], "--prompt_column q needs a --dataset_name or a --train_file"),
        (["--prompt_column", "q", "--completion_column", "q", "--train_file", "a.json"], "are both q"),
        (
            ["--prompt_column", "q", "--train_file", "a.json", "--prompt_template", "Q: "],
            "--prompt_template 'Q: ' does not contain '{prompt}'",
        ),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(InputError, match=message):
        arguments.parse_arguments(flags)


# Headers


def test_headers_are_those_that_people_wrote(tmp_path):
    kept = ["c10/core/Device.h", "c10/util/a/b.h", "torch/csrc/autograd/node.h"]
    others = ["ATen/ops/add.h", "torch/csrc/generated/c.h", "c10/cuda/d.h", "c10/core/e.cpp", "torch/library.h"]
    for name in kept + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"// {name}\n")
    assert [path.relative_to(tmp_path).as_posix() for path in data.header_files(tmp_path)] == kept


def test_the_running_torch_has_headers():
    root = Path(torch.__file__).parent / "include"
    files = data.header_files(root)
    assert root / "c10" / "core" / "Device.h" in files
    assert sum(path.stat().st_size for path in files) > 2_000_000


def test_headers_are_split_by_file(tmp_path):
    names = [f"c10/core/h{i}.h" for i in range(60)]
    (tmp_path / "c10" / "core").mkdir(parents=True)
    for name in names:
        (tmp_path / name).write_text(f"// {name} é\n", encoding="utf-8")
    loaded = data.load_headers(0.2, tmp_path)
    train, held_out = list(loaded["train"]["text"]), list(loaded["validation"]["text"])
    assert set(train).isdisjoint(held_out)
    assert sorted(train + held_out) == sorted(f"// {name} é\n" for name in names)
    with pytest.raises(InputError, match=r"none of the 0 files to read below .* falls into the train split"):
        data.load_headers(0.2, tmp_path / "elsewhere")


# Prompts


def test_only_the_completion_is_learned(tokenizer):
    rows = sums(3)
    examples = prompts.make_examples(completions_of(rows), tokenizer, "Q{x}: {prompt}\n", CONTEXT)["train"]
    for row, example in zip(rows, examples, strict=True):
        learned = [label for label in example["labels"] if label != prompts.IGNORED]
        assert tokenizer.decode(example["input_ids"]) == f"Q{{x}}: {row['question']}\n{row['answer']}<|endoftext|>"
        assert tokenizer.decode(learned) == f"{row['answer']}<|endoftext|>"
        assert tokenizer.decode(prompts.prompt_of(example)) == f"Q{{x}}: {row['question']}\n"
        assert example["labels"][-len(learned) :] == example["input_ids"][-len(learned) :] == learned
        assert example["completion"] == row["answer"]


def test_padding_changes_no_loss(base, tokenizer):
    model = GPT2LMHeadModel.from_pretrained(base).eval()
    rows = [{"question": "What is 1 plus 2?", "answer": "#### 3"}, sums(100)[99]]
    examples = list(prompts.make_examples(completions_of(rows), tokenizer, "{prompt}\n", CONTEXT)["train"])
    batch = prompts.Padding(tokenizer.eos_token_id)(examples)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
    total, tokens = 0.0, 0
    for example in examples:  # the reference: each alone, the logarithm of every completion token's probability
        ids = torch.tensor(example["input_ids"])
        scores = model(ids[None]).logits[0].log_softmax(dim=-1)
        first = len(prompts.prompt_of(example))
        total -= sum(scores[at - 1, ids[at]].item() for at in range(first, len(ids)))
        tokens += len(ids) - first
    torch.testing.assert_close(model(**batch).loss.item(), total / tokens, rtol=1e-5, atol=1e-5)


def test_what_is_too_long_is_left_out_and_counted(tokenizer, caplog):
    rows = sums(8)
    rows[3]["answer"] *= 20
    examples = prompts.make_examples(completions_of(rows), tokenizer, "{prompt}\n", CONTEXT)
    assert len(examples["train"]) == 7
    assert "1 of the 8 examples of the train split exceed --block_size 48 and are left out" in caplog.text
    with pytest.raises(InputError, match=r"every example of the train split exceeds --block_size 4; the shortest has"):
        prompts.make_examples(completions_of(rows), tokenizer, "{prompt}\n", 4)


def test_accuracy_is_that_of_the_tokens_learned():
    labels = np.array([[-100, -100, 5, 6], [-100, 7, 8, -100]])
    predictions = np.array([[0, 5, 9, 0], [7, 8, 0, 0]])  # of the token after: right, wrong; right, right
    found = lora_sft.token_accuracy()(EvalPrediction(predictions=predictions, label_ids=labels))
    assert found == {"accuracy": 0.75}


def test_a_data_set_without_validation_is_evaluated_on_its_test_split(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, rows in (("train", sums(20)), ("test", sums(100)[95:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--dataset_name", str(folder), "--prompt_column", "question", "--completion_column", "answer"]
    _, data_args, _ = arguments.parse_arguments(given)
    loaded = lora_sft.load_rows(data_args)
    assert list(loaded["train"]["prompt"]) == [row["question"] for row in sums(20)]
    assert list(loaded["validation"]["completion"]) == [row["answer"] for row in sums(100)[95:]]
    other = load_hub_dataset(str(folder), None, data_args.columns, fraction=0.1)  # as the recipe pretrain_clm does
    assert list(other["validation"]["prompt"]) == [row["question"] for row in sums(20)[18:]]
    _, data_args, _ = arguments.parse_arguments([*given, "--completion_column", "solution"])
    with pytest.raises(InputError, match=r"--completion_column solution is not a column of .* has: question, answer"):
        lora_sft.load_rows(data_args)


# Answers


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("so 3 + 4 = 7\n#### 7", True),
        ("#### 7.", True),
        ("####7", True),
        ("#### 7\nWhat is 1 plus 1?\n#### 2", True),
        ("#### 8\n#### 7", False),
        ("#### 77", False),
        ("7", False),
        ("", False),
    ],
)
def test_an_answer_is_right_if_its_number_is(text, right):
    metric = load_metric("answer_match")
    found = metric.compute(predictions=[text, "#### 1,000"], references=["#### 7", "#### 1000"], pattern=PATTERN)
    assert found == {"answer_match": (1 + right) / 2}


def test_a_pattern_without_a_group_is_compared_whole():
    found = load_metric("answer_match").compute(predictions=["is  yes "], references=["yes"], pattern="yes|no")
    assert found == {"answer_match": 1.0}


def test_a_reference_without_an_answer_is_an_error():
    with pytest.raises(ValueError, match="finds no answer in the reference 'seven'"):
        load_metric("answer_match").compute(predictions=["#### 7"], references=["seven"], pattern=PATTERN)


def test_prompts_that_are_padded_get_the_answers_that_they_get_alone(base, tokenizer, make_trainer):
    trainer, length = make_trainer(), 6
    asked = [tokenizer(text)["input_ids"] for text in ("What", "What is 1 plus 2?\n", "7 + 8 = ")]
    check = answers.AnswerCheck(tokenizer, PATTERN, length)
    expected = []
    for ids in asked:  # the reference: the likeliest token, one after another, without a cache
        written = list(ids)
        while len(written) < len(ids) + length and written[-1] != tokenizer.eos_token_id:
            scores = trainer.model(torch.tensor([written])).logits[0, -1]
            written.append(int(scores.argmax()))
        expected.append(tokenizer.decode(written[len(ids) :], skip_special_tokens=True))
    assert check.answer(trainer, asked) == expected
    assert len(set(expected)) > 1


def test_the_share_of_right_answers(tokenizer, make_trainer, monkeypatch):
    rows = sums(10)  # the longest question first: they are asked in another order
    questions = [{**row, "question": "Say: " * (9 - number) + row["question"]} for number, row in enumerate(rows)]
    examples = prompts.make_examples(completions_of(questions), tokenizer, "{prompt}\n", 2 * CONTEXT)["validation"]
    check, asked = answers.AnswerCheck(tokenizer, PATTERN, 4), []

    def answer(trainer, batch):
        asked.append(len(batch))
        return ["#### 3" if "plus 3?" in tokenizer.decode(ids) else "#### 99" for ids in batch]

    monkeypatch.setattr(check, "answer", answer)
    assert check.share_right(make_trainer(per_device_eval_batch_size=4), examples) == pytest.approx(0.1, abs=0, rel=0)
    assert asked == [4, 4, 2]


def test_bad_patterns(tokenizer):
    with pytest.raises(InputError, match=r"--answer_pattern '\(' is not a regular expression"):
        answers.AnswerCheck(tokenizer, "(", 4)
    with pytest.raises(InputError, match="finds no answer in the completion 'seven'"):
        answers.AnswerCheck(tokenizer, PATTERN, 4).require_answers(Dataset.from_dict({"completion": ["seven"]}))


@pytest.fixture
def make_trainer(base, training_arguments):
    """Return a maker of a Trainer of a model to answer with, whose weights are so large that every token counts."""

    def make(**overrides):
        torch.manual_seed(0)
        config = GPT2Config.from_pretrained(base, initializer_range=1.0)
        model = GPT2LMHeadModel(config)
        return transformers.Trainer(model, training_arguments(optim="adamw_torch", **overrides))

    return make


# Adapters


def test_a_missing_base_model_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no base model in outputs/pretrain_clm .* run `make train`"):
        lora_sft.main(["--use_cpu"])
    (tmp_path / "outputs" / "pretrain_clm").mkdir(parents=True)
    (tmp_path / "outputs" / "pretrain_clm" / "config.json").write_text("{}")  # a run that has not ended
    with pytest.raises(InputError, match="no base model"):
        adapters.require_base("outputs/pretrain_clm")
    (tmp_path / "outputs" / "pretrain_clm" / "model.safetensors").touch()
    adapters.require_base("outputs/pretrain_clm")
    adapters.require_base("owner/model")


def adapted(base: Path, **options):
    model_args = arguments.ModelArguments(model_name_or_path=str(base), **options)
    _, _, training_args = arguments.parse_arguments(["--use_cpu"])
    return adapters.add_adapters(adapters.load_base(model_args, training_args), model_args, training_args)


def test_only_the_adapters_are_trained(base):
    model = adapted(base, lora_r=2, dtype="bfloat16")
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 4
    assert all(".lora_" in name for name in trained)
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert model.get_base_model().transformer.wte.weight.dtype == torch.bfloat16


def test_the_layers_asked_for_get_adapters(base):
    names = [name for name, _ in adapted(base, lora_target_modules="c_attn, c_fc").named_parameters()]
    assert {name.split(".")[-4] for name in names if "lora_" in name} == {"c_attn", "c_fc"}
    with pytest.raises(InputError, match=r"--lora_target_modules q_proj: "):
        adapted(base, lora_target_modules="q_proj")


def test_four_bits_need_bitsandbytes_and_a_gpu(base, monkeypatch):
    with monkeypatch.context() as without:
        without.setattr(adapters.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(InputError, match="--load_in_4bit needs the package bitsandbytes: pip install"):
            adapted(base, load_in_4bit=True)
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(InputError, match="--load_in_4bit needs a GPU, and this run is on a CPU"):
        adapted(base, load_in_4bit=True)


def test_the_first_step_leaves_what_has_no_gradient(base):
    model = adapted(base)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = hf_schatten.create_schatten_optimizer(
        model, lr=1e-2, weight_decay=0.0, p="adaptive", p_interval=1, p_init=7
    )
    ids = torch.arange(32).reshape(2, 16)

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    step()
    learned = optimizer.learned_p()
    for name, weight in model.named_parameters():
        if name in before:
            assert torch.equal(weight, before[name]) == ("lora_A" in name)
            parts = [p for key, p in learned.items() if key.startswith(name)]  # of c_attn's B: q, k and v
            assert parts
            assert 7 not in parts  # a factor that was not measured yet has the median of the others
    step()
    for name, weight in model.named_parameters():
        if name in before:
            assert weight.isfinite().all()
            assert not torch.equal(weight, before[name])
    assert 7 not in optimizer.learned_p().values()


# Runs

COMMON = [
    *("--lora_r", "2", "--optim", "schatten_p", "--optim_args", "p=adaptive,p_interval=2,p_first_step=2"),
    *("--learning_rate", "1e-2", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--use_cpu"),
    *("--disable_tqdm", "true", "--report_to", "none", "--seed", "3"),
]


def flags(base: Path, questions: Path, output: Path, *more: str) -> list[str]:
    data = ["--train_file", str(questions), "--prompt_column", "question", "--completion_column", "answer"]
    sizes = ["--block_size", str(CONTEXT), "--validation_fraction", "0.1"]
    return ["--model_name_or_path", str(base), *data, *sizes, *COMMON, "--output_dir", str(output), *more]


def losses(folder: Path) -> list[float]:
    return [
        row["loss"] for row in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in row
    ]


def test_prompts_and_completions_from_start_to_card(base, questions, tmp_path):
    out = tmp_path / "out"
    answering = ["--max_new_tokens", "8", "--prompt_template", "Q: {prompt}\nA: ", "--lora_target_modules", "c_attn"]
    lora_sft.main(flags(base, questions, out, *answering, "--max_steps", "4", "--save_steps", "2"))
    metrics = json.loads((out / "all_results.json").read_text())
    untrained = GPT2LMHeadModel.from_pretrained(base).eval()
    total, rows = 0.0, sums(40)[36:]  # one batch: the mean over all its tokens
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = prompts.make_examples(completions_of(rows), tokenizer, "Q: {prompt}\nA: ", CONTEXT)["train"]
    total = untrained(**prompts.Padding(0)(list(examples))).loss.item()
    assert metrics["eval_start_loss"] == pytest.approx(total, rel=1e-5, abs=1e-5)  # the base model's own
    assert metrics["eval_loss"] < metrics["eval_start_loss"]
    for name in ("eval_start", "eval"):
        assert 0 <= metrics[f"{name}_answer_match"] <= 1
        assert 0 <= metrics[f"{name}_accuracy"] <= 1
        assert metrics[f"{name}_perplexity"] == pytest.approx(np.exp(metrics[f"{name}_loss"]), rel=1e-9, abs=0)

    parts = ("A.default.weight", *(f"B.default.weight.{part}" for part in "qkv"))
    names = {f"transformer.h.0.attn.c_attn.lora_{part}" for part in parts}
    learned = hf_schatten.load_learned_p(out / "checkpoint-4")
    assert {name.removeprefix("base_model.model.") for name in learned} == names
    loaded = AutoPeftModelForCausalLM.from_pretrained(out)
    assert set(loaded.peft_config["default"].target_modules) == {"c_attn"}

    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "peft"
    assert {"lora", "schatten-p", "generated_from_trainer"} == set(card.data.tags)
    for text in (
        "for `sums.jsonl`",
        "with LoRA of rank 2 (alpha 16, dropout 0) in `c_attn`, 128 parameters, for 4 steps of 4 completions, 16 in",
        "`sums.jsonl`: 36 prompts with completions to train on, 4 held out.",
        r"A prompt is read as `'Q: {prompt}\nA: '`.",
        "| right answers | ",
        "## Optimizer: Schatten-p",
    ):
        assert text in card.text, text
    assert str(tmp_path) not in (out / "README.md").read_text()


def test_a_resumed_run_is_the_run_that_did_not_stop(base, questions, tmp_path):
    steps = ["--max_steps", "6", "--save_steps", "3", "--warmup_steps", "2", "--lora_dropout", "0.1"]
    steps += ["--optim_args", "p=adaptive,p_interval=3"]
    lora_sft.main(flags(base, questions, tmp_path / "straight", *steps))
    checkpoint = str(tmp_path / "straight" / "checkpoint-3")
    lora_sft.main(flags(base, questions, tmp_path / "resumed", *steps, "--resume_from_checkpoint", checkpoint))
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    straight, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("straight", "resumed"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    starts = [
        json.loads((tmp_path / name / "eval_start_results.json").read_text()) for name in ("straight", "resumed")
    ]
    assert starts[0]["eval_start_loss"] == starts[1]["eval_start_loss"]  # the base model's, whatever is resumed


def test_another_run_starts_from_the_p_that_was_learned(base, questions, tmp_path):
    lora_sft.main(flags(base, questions, tmp_path / "first", "--max_steps", "2"))
    learned = hf_schatten.load_learned_p(tmp_path / "first" / "checkpoint-2")
    again = f"p=adaptive,p_init={tmp_path / 'first' / 'checkpoint-2'},p_first_step=9,p_interval=9"
    lora_sft.main(flags(base, questions, tmp_path / "second", "--max_steps", "1", "--optim_args", again))
    assert hf_schatten.load_learned_p(tmp_path / "second" / "checkpoint-1") == learned
    assert len(set(learned.values())) > 1


def test_checkpointed_activations_give_the_same_losses(base, questions, tmp_path):
    for name, more in (("plain", []), ("checkpointed", ["--gradient_checkpointing"])):
        lora_sft.main(flags(base, questions, tmp_path / name, "--max_steps", "4", "--do_eval", "false", *more))
    assert losses(tmp_path / "checkpointed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5, abs=1e-5)


def test_a_push_takes_adapters_and_card_along(base, questions, tmp_path, monkeypatch):
    pushed = []

    class Hub:
        """Keeps what an upload would send."""

        def create_repo(self, repo_id, **kwargs):
            return type("Repository", (), {"repo_id": repo_id})()

        def upload_folder(self, repo_id, folder_path, **kwargs):
            files = sorted(path.name for path in Path(folder_path).glob("*.safetensors"))
            pushed.append((repo_id, files, (Path(folder_path) / "README.md").read_text()))

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    hub = ["--push_to_hub", "--hub_model_id", "owner/tiny", "--hub_strategy", "end"]
    lora_sft.main(flags(base, questions, tmp_path / "out", "--max_steps", "1", "--do_eval", "false", *hub))
    name, files, text = pushed[-1]
    assert name == "owner/tiny"
    assert files == ["adapter_model.safetensors"]
    assert "## Intended use" in text
    assert text.count("## Optimizer: Schatten-p") == 1


def test_text_of_my_own(base, tmp_path):
    (tmp_path / "mine.txt").write_text("\n\n".join(f"What is {i} plus {i}? It is {2 * i}." for i in range(200)))
    out = tmp_path / "out"
    text = ["--train_file", str(tmp_path / "mine.txt"), "--block_size", "32", "--max_steps", "2"]
    lora_sft.main(["--model_name_or_path", str(base), *text, *COMMON, "--output_dir", str(out)])
    assert "cut into blocks of 32" in (out / "README.md").read_text()
    assert "of 128 tokens, 256 in all" in (out / "README.md").read_text()


def test_blocks_longer_than_the_context(base, tmp_path):
    (tmp_path / "mine.txt").write_text("\n\n".join(f"What is {i} plus {i}? It is {2 * i}." for i in range(200)))
    text = ["--train_file", str(tmp_path / "mine.txt"), "--block_size", "64"]
    with pytest.raises(InputError, match="--block_size 64 exceeds the model's context of 48 tokens"):
        lora_sft.main(["--model_name_or_path", str(base), *text, *COMMON, "--output_dir", str(tmp_path / "out")])


def run_script(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HOME": str(cwd / "hf_home"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(RECIPE / "lora_sft.py"), *args],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_the_script_trains_on_the_headers(base, tmp_path):
    small = ["--block_size", "32", "--max_train_samples", "64", "--max_eval_samples", "8", "--max_steps", "3"]
    small += ["--optim_args", "p=adaptive,p_interval=3"]
    given = ["--model_name_or_path", str(base), *COMMON, *small, "--output_dir", "out"]
    result = run_script(str(RECIPE / "gpt2_headers.yaml"), *given, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "perplexity" in result.stdout
    assert "The C++ headers of torch" in (tmp_path / "out" / "README.md").read_text()
    for name in ("adapter_model.safetensors", "tokenizer.json", "figures/p_by_layer.png", "checkpoint-3/scheduler.pt"):
        assert (tmp_path / "out" / name).is_file(), f"{name} was not written"


@pytest.mark.slow
def test_the_comparison_trains_adapters_with_muon(base, questions, tmp_path):
    result, script = tmp_path / "result.json", str(RECIPE / "lora_sft.py")
    muon = ["--optim", "muon", "--max_steps", "2", "--save_strategy", "no"]
    timed_run = [sys.executable, str(RECIPE.parents[1] / "benchmarks/comparison/timed_run.py"), str(result), script]
    subprocess.run([*timed_run, *flags(base, questions, tmp_path / "out", *muon)], check=True, timeout=300)
    assert json.loads(result.read_text())["curve"][-1][0] == 2


@pytest.mark.slow
def test_an_input_error_is_one_line(tmp_path):
    result = run_script("--use_cpu", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("lora_sft.py: error: there is no base model in outputs/pretrain")
    assert "Traceback" not in result.stderr
