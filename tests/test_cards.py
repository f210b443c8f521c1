"""Model cards: the optimizer's section in any Trainer's card, and the folder of cards."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import Seq2SeqTrainer, Trainer

from hf_schatten import SchattenCallback, SchattenOptions, SchattenTrainer, SchattenTrainerMixin, load_learned_p
from hf_schatten.report import card_section, read_card_section, write_card_section
from hf_schatten.report.card import SECTION_END, SECTION_START, options_text

ADAPTIVE = "p=adaptive,p_interval=4,p_first_step=2"
HEADING = "## Optimizer: Schatten-p"
DESTINATIONS = {"schatten_p": (20, 123_456), "adamw": (0, 0)}
CARDS = Path(__file__).parents[1] / "model_cards"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Leave the end of training without pictures, which take most of a tiny run's time."""
    monkeypatch.setattr(SchattenCallback, "_draw", lambda *args: None)


def section_of(text):
    """Return what stands between the markers, which occur once."""
    assert text.count(SECTION_START) == text.count(SECTION_END) == 1
    return text.partition(SECTION_START)[2].partition(SECTION_END)[0]


def table_rows(text):
    """Return the cells of every row of the Markdown tables of a text."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]


# The section's text


@pytest.mark.parametrize(
    "optim_args",
    [
        "p=adaptive",
        "p=adaptive,p_interval=50,p_max=inf,p_ema_decay=0.95",
        "p=inf,nesterov=false,schatten_lr_ratio=20,exclude=*.mlp.*;*.gate",
        "p=4.5,p_overrides=*.c_proj:inf;*.q_proj:2,coupling_order=2,step_rule=ball,report=none",
        "p=schedule,p_schedule=4:inf:300",
    ],
)
def test_the_options_shown_are_those_that_give_the_same_run(optim_args):
    options = SchattenOptions.from_optim_args(optim_args)
    shown = options_text(options)
    assert SchattenOptions.from_optim_args(shown) == options
    assert {pair.partition("=")[0] for pair in shown.split(",")} == {
        pair.partition("=")[0] for pair in optim_args.split(",")
    }
    command = card_section(options, DESTINATIONS, {}, None).partition("```bash\n")[2].partition("\n")[0]
    assert shlex.split(command) == ["--optim", "schatten_p", "--optim_args", shown]


def test_p_is_shown_by_kind_of_layer():
    learned_p = {f"model.layers.{i}.mlp.up.weight": 100.0 for i in range(30)}
    learned_p |= {f"model.layers.{i}.attn.v.weight": [2.0, 3.0, 100.0][i % 3] for i in range(9)}
    section = card_section(SchattenOptions(p="adaptive", p_max=100), DESTINATIONS, learned_p, Path("figures/p.png"))
    rows = table_rows(section)
    assert ["schatten_p", "20", "123,456"] in rows
    assert not [row for row in rows if row[0] == "adamw"]
    assert ["`model.layers.*.mlp.up`", "30", "100", "100", "100"] in rows
    assert ["`model.layers.*.attn.v`", "9", "2", "3", "100"] in rows
    assert "Over all 39 matrices: min 2, median 100, max 100." in section
    assert "![p of each layer over training](figures/p.png)" in section


@pytest.mark.parametrize(("p", "label"), [(math.inf, "∞"), (4.0, "4")])
def test_one_p_for_all_is_one_sentence(p, label):
    section = card_section(SchattenOptions(p=p), DESTINATIONS, {"a.weight": p, "b.weight": p}, None)
    assert f"p = {label} for all 2 matrices." in section
    assert "| layers |" not in section


def test_the_cards_in_the_repository_fit_a_page():
    cards = [path for path in CARDS.glob("*.md") if path.stem not in ("README", "template")]
    assert len(cards) == 3
    for path in cards:
        assert len(path.read_text().splitlines()) <= 100, path.name


# The section's place

SECTION = f"{HEADING}\n\nNew.\n\n```python\nx = 1\n```"
OLD = f"{HEADING}\n\nOld.\n\n### Options\n\nOld too."


@pytest.mark.parametrize(
    "text",
    [
        f"# Title\n\nBefore.\n\n{SECTION_START}\n{OLD}\n{SECTION_END}\n\n## After\n\nWords.\n",
        # other words and blanks in the markers
        (
            f"# Title\n\nBefore.\n\n<!--hf_schatten: START of it-->\n{OLD}\n<!-- hf_schatten:  the end -->\n\n"
            "## After\n\nWords.\n"
        ),
        # twice
        (
            f"# Title\n\nBefore.\n\n{SECTION_START}\n{OLD}\n{SECTION_END}\n\n## After\n\nWords.\n\n"
            f"{SECTION_START}\n{OLD}\n{SECTION_END}\n"
        ),
        # the end deleted, the start deleted, the start doubled, and an end left over
        f"# Title\n\nBefore.\n\n{SECTION_START}\n{OLD}\n\n## After\n\nWords.\n",
        f"# Title\n\nBefore.\n\n{OLD}\n{SECTION_END}\n\n## After\n\nWords.\n",
        f"# Title\n\nBefore.\n\n{SECTION_START}\n{SECTION_START}\n{OLD}\n{SECTION_END}\n\n## After\n\nWords.\n",
        f"# Title\n\nBefore.\n\n{SECTION_START}\n{OLD}\n{SECTION_END}\n{SECTION_END}\n\n## After\n\nWords.\n",
        # as a template has it
        f"# Title\n\nBefore.\n\n{SECTION_START}\n{SECTION_END}\n\n## After\n\nWords.\n",
    ],
)
def test_the_section_takes_the_place_of_earlier_ones(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(f"---\ntags: demo\n---\n{text}")
    for _ in range(3):
        write_card_section(path, SECTION, ["schatten-p"])
    card = ModelCard.load(path)
    marked = f"{SECTION_START}\n{SECTION}\n{SECTION_END}"
    assert card.text.strip() == f"# Title\n\nBefore.\n\n{marked}\n\n## After\n\nWords."
    assert card.data.tags == ["demo", "schatten-p"]
    assert read_card_section(path) == SECTION


def test_a_card_without_a_section_gets_it_at_the_end(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# Title\n\nOur words on hf_schatten start here, and end.\n")
    assert read_card_section(path) is None
    assert read_card_section(tmp_path / "missing.md") is None
    write_card_section(path, SECTION, ["schatten-p"])
    text = ModelCard.load(path).text
    assert text.strip().startswith("# Title\n\nOur words on hf_schatten start here, and end.\n\n<!--")
    assert text.rstrip().endswith(SECTION_END)


# Trainers


class OwnCard(Trainer):
    """Rewrites its whole card at every save, as trl's trainers do."""

    saves = 0

    def create_model_card(self, model_name=None):
        self.saves += 1
        ModelCard(f"---\ntags: own\n---\n# {model_name}, save {self.saves}\n").save(
            f"{self.args.output_dir}/README.md"
        )

    def _save_checkpoint(self, model, trial):
        self.create_model_card(model_name="own")
        super()._save_checkpoint(model, trial)


class OwnCardWithSchatten(SchattenTrainerMixin, OwnCard):
    pass


def test_the_mixin_works_with_a_trainer_that_rewrites_its_card(gpt2, token_dataset, training_arguments):
    arguments = training_arguments(optim_args=ADAPTIVE, save_strategy="steps", save_steps=5)
    trainer = OwnCardWithSchatten(model=gpt2, args=arguments, train_dataset=token_dataset)
    trainer.train()
    folder = Path(arguments.output_dir)
    files = {path.name for path in (folder / "checkpoint-5").iterdir()}
    assert {"optimizer.safetensors", "optimizer_config.json"} <= files
    card = ModelCard.load(folder / "README.md")
    assert "# own, save 2" in card.text
    assert "(figures/p_by_layer.png)" in section_of(card.text)
    assert card.data.tags == ["own", "schatten-p"]
    assert not (folder / "figures").exists()  # a save draws nothing; the end of training would have


def test_a_card_shows_the_picture_that_the_training_drew(gpt2, token_dataset, training_arguments, monkeypatch):
    monkeypatch.undo()
    arguments = training_arguments(optim_args=ADAPTIVE, max_steps=2)
    trainer = SchattenTrainer(model=gpt2, args=arguments, train_dataset=token_dataset)
    trainer.train()
    monkeypatch.setattr("hf_schatten.integration.trainer.plot_p_by_layer", None)
    trainer.create_model_card()
    assert "(figures/p_by_layer.png)" in section_of((Path(arguments.output_dir) / "README.md").read_text())


def test_a_resume_through_the_mixin_is_bitwise(gpt2, token_dataset, training_arguments):
    initial = {name: value.clone() for name, value in gpt2.state_dict().items()}
    arguments = training_arguments(optim_args=ADAPTIVE, save_strategy="steps", save_steps=5)
    OwnCardWithSchatten(model=gpt2, args=arguments, train_dataset=token_dataset).train()
    straight = {name: value.clone() for name, value in gpt2.state_dict().items()}
    gpt2.load_state_dict(initial)
    resumed = OwnCardWithSchatten(model=gpt2, args=arguments, train_dataset=token_dataset)
    resumed.train(resume_from_checkpoint=f"{arguments.output_dir}/checkpoint-5")
    assert all(value.equal(straight[name]) for name, value in gpt2.state_dict().items())


def test_the_section_says_how_to_resume(gpt2, token_dataset, training_arguments):
    other_weights = type(gpt2)(gpt2.config)
    arguments = {"optim_args": "p=3", "save_strategy": "steps", "save_steps": 2}
    trained = SchattenTrainer(gpt2, training_arguments(max_steps=2, **arguments), train_dataset=token_dataset)
    trained.train()
    trained.create_model_card()
    section = section_of((Path(trained.args.output_dir) / "README.md").read_text())
    program = section.partition("### Resume\n")[2].partition("```python\n")[2].partition("```")[0]
    longer = training_arguments(max_steps=3, **arguments)
    reader = {"model": other_weights, "arguments": longer, "dataset": token_dataset}
    exec(program, reader)
    resumed = reader["trainer"]
    assert resumed.optimizer.optimizer.steps_taken() == 3
    assert resumed.state.log_history[:2] == trained.state.log_history[:2]  # the checkpoint's


def test_a_peft_card_keeps_section_and_tags_over_later_saves(gpt2, token_dataset, training_arguments):
    """PEFT writes the tags anew at every save, from those of the base model."""
    model = get_peft_model(gpt2, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    arguments = training_arguments(optim_args="p=3", max_steps=1)
    trainer = SchattenTrainer(model, arguments, train_dataset=token_dataset)
    trainer.train()
    trainer.create_model_card()
    trainer.save_model()
    card = ModelCard.load(Path(arguments.output_dir) / "README.md")
    assert {"schatten-p", "lora"} <= set(card.data.tags)
    assert "p = 3 for all 8 matrices." in section_of(card.text)


def test_a_trainer_that_only_loads_keeps_the_section(gpt2, token_dataset, training_arguments):
    arguments = training_arguments(optim_args="p=3", max_steps=2)
    trained = SchattenTrainer(model=gpt2, args=arguments, train_dataset=token_dataset)
    trained.train()
    trained.create_model_card()
    path = Path(arguments.output_dir) / "README.md"
    section = section_of(path.read_text())
    assert "p = 3 for all 12 matrices." in section

    SchattenTrainer(model=gpt2, args=arguments).create_model_card(model_name="loaded")
    assert "# loaded" in path.read_text()
    assert section_of(path.read_text()) == section

    other = training_arguments(optim="adamw_torch", max_steps=1)
    trainer = SchattenTrainer(model=gpt2, args=other, train_dataset=token_dataset)
    trainer.train()
    trainer.create_model_card()
    assert HEADING not in path.read_text()


def test_a_trainer_without_a_card_gets_none(gpt2, token_dataset, training_arguments):
    class NoCard(Trainer):
        def create_model_card(self, **kwargs):
            pass

    class NoCardWithSchatten(SchattenTrainerMixin, NoCard):
        pass

    arguments = training_arguments(max_steps=1)
    trainer = NoCardWithSchatten(model=gpt2, args=arguments, train_dataset=token_dataset)
    trainer.train()
    trainer.create_model_card()
    assert not (Path(arguments.output_dir) / "README.md").exists()


def test_the_wrong_order_of_bases_is_refused():
    with pytest.raises(TypeError, match=r"write class Wrong\(SchattenTrainerMixin, Seq2SeqTrainer\)"):

        class Wrong(Seq2SeqTrainer, SchattenTrainerMixin):
            pass

    class Right(SchattenTrainerMixin, Seq2SeqTrainer):
        pass

    class Further(Right):
        pass

    assert Further.create_model_card is SchattenTrainerMixin.create_model_card


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # trl uses the name
def test_trls_sft_trainer_keeps_the_section_over_its_saves(gpt2, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    class MySFTTrainer(SchattenTrainerMixin, trl.SFTTrainer):
        pass

    words = [f"w{i}" for i in range(20)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<eos>", *words])}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = MySFTTrainer(
        model=gpt2,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            optim="schatten_p",
            optim_args="p=adaptive,p_interval=2",
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            max_length=16,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": [" ".join(words[i : i + 8]) for i in range(8)]}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>"),
    )
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert "trained using [TRL]" in card.text
    assert "'p=adaptive,p_interval=2'" in section_of(card.text)
    assert (tmp_path / "figures" / "p_by_layer.png").is_file()
    assert {"trl", "sft", "schatten-p"} <= set(card.data.tags)
    assert load_learned_p(tmp_path / "checkpoint-4") == trainer.optimizer.optimizer.learned_p()


# The folder of cards


@pytest.fixture
def collect(monkeypatch):
    monkeypatch.syspath_prepend(CARDS)
    import collect

    return collect


@pytest.fixture
def finished_run(tmp_path):
    folder = tmp_path / "outputs" / "my_run"
    (folder / "figures").mkdir(parents=True)
    for name in ("p_by_layer", "updates", "spectra"):
        (folder / "figures" / f"{name}.png").write_bytes(name.encode())
    text = (
        "# A run\n\n![p](figures/p_by_layer.png) ![u](figures/updates.png) ![x](https://example.org/figures/x.png)\n"
    )
    (folder / "README.md").write_text(text)
    return folder


def test_a_card_is_collected_with_the_pictures_that_it_shows(collect, finished_run, tmp_path):
    card = collect.collect(finished_run, "example", tmp_path / "cards")
    assert card == tmp_path / "cards" / "example.md"
    assert card.read_text() == (
        "# A run\n\n![p](figures/example_p_by_layer.png) ![u](figures/example_updates.png) "
        "![x](https://example.org/figures/x.png)\n"
    )
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "cards" / "figures").iterdir()}
    assert pictures == {"example_p_by_layer.png": b"p_by_layer", "example_updates.png": b"updates"}


def test_a_folder_without_a_card_is_named(collect, tmp_path, capsys):
    with pytest.raises(SystemExit):
        collect.main([str(tmp_path)])
    assert f"{tmp_path}/README.md is missing: give the output folder of a finished run." in capsys.readouterr().err
