"""Fills in `model_cards/template.md`, or another template of a model card, from a Trainer's record."""

from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer
from transformers.modelcard import TrainingSummary, make_markdown_table

VERSIONS = ("hf_schatten", "transformers", "torch", "datasets", "tokenizers")  # given in a card, where installed


def card_from_template(template: Path, trainer: Trainer, texts: Mapping[str, str], **metadata: Any) -> ModelCard:
    """Return a model card that is filled in from a Trainer's record and the given texts.

    The template is Jinja, as the Hub's are. Besides the texts it has `card_data` (the metadata as YAML),
    `hyperparameters` and `versions` (pairs of name and value), and `training_table` (Markdown, "" without
    evaluations).

    Args:
        template: The file.
        trainer: After training.
        texts: Whatever else the template names.
        **metadata: Arguments of `Trainer.create_model_card`, and further fields of the metadata.

    Raises:
        jinja2.UndefinedError: The template names something that is not given.
    """
    names = {field.name for field in fields(TrainingSummary)}
    record = TrainingSummary.from_trainer(trainer, **{key: metadata.pop(key) for key in set(metadata) & names})
    data = record.create_metadata() | metadata
    if not any(model["results"] for model in data["model-index"]):
        del data["model-index"]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, autoescape=False)
    content = environment.from_string(template.read_text(encoding="utf-8")).render(
        card_data=ModelCardData(**data).to_yaml(),
        hyperparameters=_hyperparameters(trainer, record),
        training_table=_training_table(record),
        versions=[(name, found) for name in VERSIONS if (found := _installed_version(name))],
        **texts,
    )
    return ModelCard(content)


def _hyperparameters(trainer: Trainer, record: TrainingSummary) -> list[tuple[str, Any]]:
    """Return what the record has, and what a reader needs besides to repeat the run."""
    args = trainer.args
    return list(
        {
            **(record.hyperparameters or {}),
            "optimizer": getattr(args.optim, "value", args.optim),
            "adam_betas": (args.adam_beta1, args.adam_beta2),
            "adam_epsilon": args.adam_epsilon,
            "weight_decay": args.weight_decay,
            "max_grad_norm": args.max_grad_norm,
        }.items()
    )


def _training_table(record: TrainingSummary) -> str:
    """Return the evaluations during training, without the time that Trainer took to prepare the model."""
    evaluations: Any = record.eval_lines or []  # dictionaries, declared as text
    lines = [{name: value for name, value in line.items() if name != "Model Preparation Time"} for line in evaluations]
    return make_markdown_table(lines).strip() if lines else ""


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
