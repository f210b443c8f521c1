"""Rows of the table of support: trainers of other packages."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from support_models import LABELS, WORDS, in_steps, layers, word_tokenizer
from support_runs import (
    DUE,
    FIRST_P,
    check_equal,
    check_estimates,
    optimizer_of,
    record_samples,
    routed,
    weights,
)
from transformers import BertConfig, BertForSequenceClassification, BertModel

from hf_schatten import SchattenTrainerMixin

THEME = "Trainers"
PARTS = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
ENCODER = layers("encoder.layer", 2, [*PARTS, "intermediate.dense", "output.dense"])
POOLER = "pooler.dense.weight"  # which has no part in a mean over tokens
BODY = "model.0.model."  # where losses have the encoder
LENGTH = 5


def bert_config(**options):
    return BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(WORDS) + 3,
        max_position_embeddings=16,
        **options,
    )


def tokenizer():
    words = word_tokenizer("<unk>")
    words.unk_token = "<unk>"
    return words


@pytest.fixture
def make_encoder(package, tmp_path):
    """Return a maker of sentence encoders that starts from one model."""
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(0)
    BertModel(bert_config()).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")

    def make():
        modules = [Transformer(str(tmp_path / "bert")), Pooling(32)]
        return package.SentenceTransformer(modules=modules, device="cpu")

    return make


@pytest.fixture
def pairs():
    """Return sentences of two to five words, of which the second goes on from the first in one of four ways."""
    return Dataset.from_list(
        [
            {"first": in_steps(i, 1, 2 + i % 4), "second": in_steps(i, i % LABELS, 2 + i % 4), "label": i % LABELS}
            for i in range(32)
        ]
    )


@pytest.fixture
def package():
    return pytest.importorskip("sentence_transformers")


def trainer_of(package):
    return type("EncoderTrainer", (SchattenTrainerMixin, package.SentenceTransformerTrainer), {})


@pytest.mark.supports(
    THEME,
    "sentence-transformers' `SentenceTransformerTrainer`",
    "exact resume with the mixin; padding is sampled, too",
)
def test_sentence_transformers(package, trl_arguments, make_encoder, pairs, monkeypatch):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    samples, ends = record_samples(monkeypatch), []
    arguments = package.SentenceTransformerTrainingArguments(**trl_arguments)
    for checkpoint in (None, f"{arguments.output_dir}/checkpoint-6"):
        model = make_encoder()
        loss = MultipleNegativesRankingLoss(model)
        trainer = trainer_of(package)(
            model=model, args=arguments, train_dataset=pairs.remove_columns("label"), loss=loss
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        assert routed(trainer) == {f"{BODY}{name}" for name in (*ENCODER, POOLER)}
        check_estimates(trainer)
        ends.append(weights(trainer.model))
    check_equal(*ends)
    assert len(samples) == len(DUE) + 1
    for counts in samples:  # it calls the encoder's forward past all hooks, so that no mask is seen
        assert counts == {f"{BODY}{name}": 2 * 8 * LENGTH for name in ENCODER}


@pytest.mark.slow
@pytest.mark.supports(
    THEME, "a loss of sentence-transformers with weights", "they use AdamW; `learning_rate_mapping` counts"
)
def test_a_loss_with_weights(package, trl_arguments, make_encoder, pairs):
    from sentence_transformers.sentence_transformer.losses import SoftmaxLoss

    options = {"learning_rate_mapping": {"classifier": 0.003}, "weight_decay": 0.1}
    arguments = package.SentenceTransformerTrainingArguments(**trl_arguments, **options)
    model = make_encoder()
    loss = SoftmaxLoss(model, 32, LABELS)
    before = loss.classifier.weight.clone()
    trainer = trainer_of(package)(model=model, args=arguments, train_dataset=pairs, loss=loss)
    trainer.train()
    groups = {name: group for group in optimizer_of(trainer).param_groups for name in group["param_names"]}
    assert {name for name, group in groups.items() if group["initial_lr"] == 0.003} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert not groups["classifier.weight"]["spectral"]
    assert groups["classifier.weight"]["weight_decay"] == 0.1
    assert groups["classifier.bias"]["weight_decay"] == 0.0
    assert not torch.equal(loss.classifier.weight, before)


@pytest.mark.slow
@pytest.mark.supports(THEME, "sentence-transformers' `CrossEncoderTrainer`", "the classifier's head uses AdamW")
def test_cross_encoder(package, trl_arguments, tmp_path):
    torch.manual_seed(0)
    BertForSequenceClassification(bert_config(num_labels=1)).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    rows = [{"query": in_steps(i, 1, 3), "answer": in_steps(i, i % 2, 3), "label": float(i % 2)} for i in range(32)]
    arguments = package.CrossEncoderTrainingArguments(**trl_arguments)

    model = package.CrossEncoder(str(tmp_path / "bert"), device="cpu")
    trainer = package.CrossEncoderTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows))
    trainer.train()
    check_estimates(trainer)
    names = {name.partition("bert.")[2] for name in routed(trainer)}
    assert names == ENCODER | {POOLER}


@pytest.mark.slow
@pytest.mark.supports(THEME, "SetFit's `Trainer`", "the body's contrastive training; its head is fitted afterwards")
def test_setfit(trl_arguments, make_encoder, tmp_path):
    setfit = pytest.importorskip("setfit")
    body = make_encoder()
    model = setfit.SetFitModel(body, model_head=setfit.modeling.LogisticRegression())
    rows = [{"text": in_steps(i, i % 2, LENGTH), "label": i % 2} for i in range(16)]
    arguments = setfit.TrainingArguments(
        output_dir=str(tmp_path / "setfit"), batch_size=8, max_steps=12, body_learning_rate=1e-2, report_to="none"
    )
    trainer = setfit.Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows))
    inner = trainer.st_trainer
    inner.args.optim, inner.args.optim_args = "schatten_p", trl_arguments["optim_args"]
    trainer.train()
    learned = optimizer_of(inner).learned_p()
    assert learned.keys() == {f"{BODY}{name}" for name in (*ENCODER, POOLER)}
    assert FIRST_P not in learned.values()  # the pooler, which nothing uses, has the median of the others
    assert "schatten_p_median" in {key for entry in inner.state.log_history for key in entry}
    assert set(model.predict([in_steps(i, i % 2, LENGTH) for i in range(4)]).tolist()) <= {0, 1}
