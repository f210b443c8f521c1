"""Cards from the template, filled in from a Trainer's record."""

import jinja2
import pytest
from transformers import Trainer

from recipes.recipe_parts.card_template import card_from_template
from recipes.recipe_parts.run_record import TEMPLATE

TEXTS = {
    name: f"The {name}."
    for name in ("title", "description", "intended_use", "data", "results", "circumstances", "command")
}


def test_the_template_is_filled_from_the_trainers_record(gpt2, token_dataset, training_arguments):
    arguments = training_arguments(
        optim_args="p=4", max_steps=2, weight_decay=0.25, eval_strategy="steps", eval_steps=1, seed=7
    )
    trainer = Trainer(model=gpt2, args=arguments, train_dataset=token_dataset, eval_dataset=token_dataset[:4])
    trainer.evaluate()  # from here on, Trainer's metrics tell how long it took to prepare the model
    trainer.train()
    assert any("eval_model_preparation_time" in entry for entry in trainer.state.log_history)
    card = card_from_template(TEMPLATE, trainer, TEXTS, tasks="text-generation", pipeline_tag="text-generation")
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.library_name == "transformers"
    assert "# The title.\n" in card.text
    assert all(text in card.text for text in TEXTS.values())
    assert "More information needed" not in card.text
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in card.text.splitlines()
        if line.startswith("|")
    ]
    hyperparameters = card.text.partition("Hyperparameters: ")[2].partition(".\n")[0].split(", ")
    assert {"weight_decay 0.25", "seed 7", "optimizer schatten_p", "learning_rate 0.003"} <= set(hyperparameters)
    losses = [f"{entry['eval_loss']:.4f}" for entry in trainer.state.log_history if "eval_loss" in entry]
    evaluations = [row for row in rows if len(row) == 4][2:]
    assert [(row[2], row[3]) for row in evaluations] == [("1", losses[0]), ("2", losses[1])]


def test_a_text_that_the_template_names_must_be_given(gpt2, token_dataset, training_arguments):
    trainer = Trainer(model=gpt2, args=training_arguments(), train_dataset=token_dataset)
    with pytest.raises(jinja2.UndefinedError, match="'data' is undefined"):
        card_from_template(TEMPLATE, trainer, {name: text for name, text in TEXTS.items() if name != "data"})
