"""The card of the pretraining recipe: filled in from a run, also on the way to the Hub, and without secrets."""

from pathlib import Path

import pytest
import transformers.trainer
from huggingface_hub import ModelCard

from recipes.pretrain_clm import card
from recipes.pretrain_clm.arguments import DataTrainingArguments, ModelArguments
from recipes.recipe_parts import run_record
from recipes.recipe_parts.command_line import InputError


@pytest.fixture
def make_trainer(gpt2, token_dataset, training_arguments):
    """Return a maker of the recipe's Trainer on tiny data, and what the script tells of the run."""

    def make(data_args=None, model_args=None, **overrides):
        run = card.Run(
            model_args=model_args or ModelArguments(),
            data_args=data_args or DataTrainingArguments(block_size=16),
            command=["gpt2_stdlib.yaml", "--max_steps", "2", "--hub_token", "hf_secret"],
            documents={"train": 1234, "validation": 5},
            blocks={"train": 64, "validation": 4},
            vocabulary=64,
        )
        arguments = training_arguments(**{"optim_args": "p=adaptive,p_first_step=1", "max_steps": 2} | overrides)
        return card.PretrainingTrainer(
            run=run, model=gpt2, args=arguments, train_dataset=token_dataset, eval_dataset=token_dataset[:4]
        )

    return make


def written(trainer):
    return ModelCard.load(Path(trainer.args.output_dir) / "README.md")


def test_the_card_tells_the_run(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=4, gradient_accumulation_steps=2, seed=7)
    trainer.train()
    trainer.run.metrics = {
        "eval_start": {"eval_start_loss": 4.15, "eval_start_perplexity": 63.4},
        "eval": {"eval_loss": 2.0, "eval_perplexity": 7.389},
    }
    trainer.run.seconds = 75.0
    trainer.create_model_card()
    found = written(trainer)
    for text in (
        "# A language model of 28,032 parameters on Python standard library source",
        "A `GPT2LMHeadModel` (layers 2, width 32, context 16, vocabulary 64). Trained from scratch for 2 steps of 128 "
        "tokens, 256 in all, with `--optim schatten_p`",
        "1,234 documents to train on, 5 held out",
        "with 64 tokens, and cut into blocks of 16: 64 to train on, 4 to evaluate on.",
        "| loss | 4.15 | 2 |\n| perplexity per token | 63.4 | 7.389 |",
        "Seed 7, float32, ",
        "The training took 1 min 15 s.",
        "python recipes/pretrain_clm/pretrain_clm.py gpt2_stdlib.yaml --max_steps 2\n",
        "## Optimizer: Schatten-p",
        "![p of each layer over training](figures/p_by_layer.png)",
    ):
        assert text in found.text
    assert "hf_secret" not in found.text
    assert "More information needed" not in found.text
    assert found.data.license == "apache-2.0"
    assert found.data.pipeline_tag == "text-generation"
    assert set(found.data.tags) == {"generated_from_trainer", "schatten-p"}


def test_without_training_the_card_says_what_is_known(make_trainer):
    trainer = make_trainer(optim="adamw_torch", optim_args=None)
    trainer.create_model_card()
    assert "Not evaluated." in written(trainer).text
    assert "## Optimizer" not in written(trainer).text


def test_names_of_local_files_are_no_metadata(make_trainer, tmp_path):
    (tmp_path / "text.jsonl").touch()
    (tmp_path / "base").mkdir()
    data_args = DataTrainingArguments(train_file=str(tmp_path / "text.jsonl"), block_size=16)
    trainer = make_trainer(data_args, ModelArguments(model_name_or_path=str(tmp_path / "base")))
    trainer.create_model_card()
    found = written(trainer)
    assert "`text.jsonl`: 1,234 documents" in found.text
    assert "Trained further from `base`" in found.text
    assert found.data.get("base_model") is found.data.get("datasets") is found.data.license is None
    assert str(tmp_path) not in (Path(trainer.args.output_dir) / "README.md").read_text()


def test_hub_names_are_metadata(make_trainer):
    data_args = DataTrainingArguments(dataset_name="owner/text", block_size=16)
    trainer = make_trainer(data_args, ModelArguments(model_name_or_path="owner/model"))
    trainer.create_model_card()
    found = written(trainer)
    assert found.data.base_model == "owner/model"
    assert found.data.datasets == ["owner/text"]


def test_a_push_takes_the_card_along(make_trainer, monkeypatch):
    pushed = []

    class Hub:
        """Keeps the card that an upload would send."""

        def upload_folder(self, repo_id, folder_path, **kwargs):
            pushed.append((repo_id, ModelCard.load(Path(folder_path) / "README.md")))

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    trainer = make_trainer()
    trainer.hub_model_id = "owner/tiny"
    trainer.train()
    trainer.push_to_hub()
    trainer.push_to_hub(tags="again", license="mit")
    assert [name for name, _ in pushed] == ["owner/tiny"] * 2
    for _, found in pushed:
        assert "## Intended use" in found.text
        assert found.text.count("## Optimizer: Schatten-p") == 1
    assert "again" in pushed[1][1].data.tags
    assert pushed[1][1].data.license == "mit"


@pytest.mark.parametrize(
    ("command", "kept"),
    [
        (["--hub_token", "x", "--seed", "1"], ["--seed", "1"]),
        (["--seed", "1", "--hub_token=x"], ["--seed", "1"]),
        (["--hub_token", "x", "--hub_token=y=", "a.yaml"], ["a.yaml"]),
        (["--hub_token"], []),
        (
            ["recipes/a.yaml", "--optim_args", "p=4,exclude=*/a"],
            ["recipes/a.yaml", "--optim_args", "p=4,exclude=*/a"],
        ),
        (["/somewhere/else/my.txt", "--output_dir=/somewhere/out"], ["my.txt", "--output_dir=out"]),
        (
            [f"{run_record.REPOSITORY}/recipes/a.yaml", "--output_dir", f"{run_record.REPOSITORY}/out"],
            ["recipes/a.yaml", "--output_dir", "out"],
        ),
    ],
)
def test_the_command_has_no_access_tokens_and_no_folders_of_this_machine(command, kept):
    assert run_record.public(command) == kept


@pytest.mark.parametrize(
    ("count", "text"),
    [(28_032, "28,032"), (614_400, "0.614 million"), (4_273_664, "4.27 million"), (10_000_000_000, "10 billion")],
)
def test_counts_as_people_say_them(count, text):
    assert run_record.quantity(count) == text


def test_a_missing_template_is_said_before_the_training(make_trainer, monkeypatch, tmp_path):
    monkeypatch.setattr(run_record, "TEMPLATE", tmp_path / "template.md")
    with pytest.raises(InputError, match=r"template\.md is missing: run the recipe in a whole checkout"):
        make_trainer()
