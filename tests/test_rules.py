"""What the user says of single parameters: weight decay, modules that are routed, and learning rates."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer

from hf_schatten import RoutingError, SchattenTrainer, create_schatten_optimizer, route_parameters


def groups_of(optimizer):
    """Return the group of every parameter by name."""
    return {name: group for group in optimizer.param_groups for name in group["param_names"]}


def stepped(model, **options):
    """Return the weights by name after a step on the same loss."""
    model = copy.deepcopy(model)
    optimizer = create_schatten_optimizer(model, lr=0.01, verbose=False, p=4, **options)
    tokens = torch.arange(16)[None] % 7
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    return {name: value.detach() for name, value in model.named_parameters()}


class WithoutDecayOf(Trainer):
    """A Trainer whose users exempt the MLPs from weight decay, and decay one norm."""

    def get_decay_parameter_names(self, model):
        kept = [name for name in super().get_decay_parameter_names(model) if ".mlp." not in name]
        return [*kept, "model.norm.weight"]


@pytest.mark.parametrize("base", [Trainer, SchattenTrainer])
def test_weight_decay_is_what_the_trainer_says(base, llama, token_dataset, training_arguments):
    trainer_class = type(
        "Mine", (SchattenTrainer, WithoutDecayOf) if base is SchattenTrainer else (WithoutDecayOf,), {}
    )
    arguments = training_arguments(weight_decay=0.3, max_steps=1, optim_args="p=4")
    trainer = trainer_class(model=llama, args=arguments, train_dataset=token_dataset)
    optimizer = trainer.create_optimizer()
    decays = {name: group["weight_decay"] for name, group in groups_of(optimizer).items()}
    named = set(trainer.get_decay_parameter_names(llama))
    assert {name for name, decay in decays.items() if decay == 0.3} == named
    assert {name for name, decay in decays.items() if decay == 0.0} == decays.keys() - named
    assert any(".mlp." in name for name in decays.keys() - named)


def test_groups_change_the_step_by_their_decay_and_rate(llama):
    def groups(model, decay, rate):
        own = {name: value for name, value in model.named_parameters() if "q_proj" in name or "embed" in name}
        others = [value for name, value in model.named_parameters() if name not in own]
        return [{"params": others, "weight_decay": 0.0}, {"params": own.values(), "weight_decay": decay, "lr": rate}]

    ends = []
    for decay, rate in ((0.0, 0.01), (0.5, 0.01), (0.5, 0.02)):
        model = copy.deepcopy(llama)
        optimizer = create_schatten_optimizer(
            model, lr=0.01, verbose=False, p=4, param_groups=groups(model, decay, rate)
        )
        tokens = torch.arange(16)[None] % 7
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        ends.append(dict(model.named_parameters()))
    for name, start in llama.named_parameters():
        plain, decayed, faster = (end[name] - start for end in ends)
        own = "q_proj" in name or "embed" in name
        expected = plain - 0.01 * 0.5 * start if own else plain
        torch.testing.assert_close(decayed, expected, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(faster, 2 * decayed if own else decayed, atol=1e-6, rtol=1e-4)


def test_what_is_in_no_group_is_not_trained(llama):
    params = [value for name, value in llama.named_parameters() if ".1." in name]
    optimizer = create_schatten_optimizer(llama, p="adaptive", verbose=False, param_groups=[{"params": params}])
    assert {id(each) for group in optimizer.param_groups for each in group["params"]} == set(map(id, params))
    assert all(".1." in name for name in optimizer.policy.matrices)


def test_groups_of_another_model_and_groups_without_a_matrix_are_refused(llama):
    foreign = [*llama.parameters(), nn.Parameter(torch.zeros(3, 5))]
    with pytest.raises(RoutingError, match=r"have 1 parameters that are not the model's, of shapes \(3, 5\): give"):
        create_schatten_optimizer(llama, verbose=False, param_groups=[{"params": foreign}])
    with pytest.raises(RoutingError, match="groups have no matrix"):
        create_schatten_optimizer(llama, verbose=False, param_groups=[{"params": [llama.model.norm.weight]}])


# Modules that are listed


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        num_labels=3,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config)


@pytest.mark.parametrize(
    ("listed", "pattern"),
    [
        (["q_proj", "v_proj"], r".*\.[qv]_proj\.weight"),
        (r".*layers\.1\.mlp.*", r".*layers\.1\.mlp\..*"),
        ([r".*\.down_proj"], r".*\.down_proj\.weight"),
        (["o_proj", "score"], r".*o_proj\.weight|score\.weight"),
        ("all-linear", r"model\.layers\..*_proj\.weight"),
        (None, r"model\.layers\..*_proj\.weight"),
    ],
)
def test_the_listed_modules_are_what_is_routed(listed, pattern, classifier, training_arguments):
    arguments = training_arguments(optim_target_modules=listed)
    optimizer = Trainer(model=classifier, args=arguments).create_optimizer()
    names = {name for name, group in groups_of(optimizer).items() if group["spectral"]}
    assert names == {name for name, _ in classifier.named_parameters() if re.fullmatch(pattern, name)}
    assert {name for name, _ in classifier.named_parameters()} == groups_of(optimizer).keys()


@pytest.mark.parametrize("entry", ["c_attn", "embed_tokens", "norm"])
def test_a_listed_module_without_a_matrix_is_refused(entry, classifier):
    with pytest.raises(RoutingError, match=rf"target_modules='{entry}' .* names no module with a matrix"):
        route_parameters(classifier, target_modules=["q_proj", entry])


# Learning rates


RATIOS = "*.layers.0.*:0.5;*_proj:3;*.norm:0.25"


def ratio_of(name):
    return 0.5 if ".layers.0." in name else 3.0 if "_proj" in name else 0.25 if name == "model.norm.weight" else 1.0


@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_rates_multiply_the_steps_of_every_parameter(ratio, llama):
    """A ratio of r is a learning rate of r times as much, for matrices, vectors and their weight decay."""
    found = stepped(llama, schatten_lr_ratio=ratio, lr_ratios=RATIOS, weight_decay=0.2)
    plain = stepped(llama, schatten_lr_ratio=ratio, weight_decay=0.2)
    for name, start in llama.named_parameters():
        expected = ratio_of(name) * (plain[name] - start)
        torch.testing.assert_close(found[name] - start, expected, atol=1e-6, rtol=1e-4)


def test_rates_are_printed_saved_and_compared_at_a_resume(llama, token_dataset, training_arguments, capfd, caplog):
    arguments = training_arguments(
        max_steps=2, save_strategy="steps", save_steps=1, optim_args=f"p=4,lr_ratios={RATIOS}"
    )
    SchattenTrainer(model=llama, args=arguments, train_dataset=token_dataset).train()
    assert "*.layers.0.*: 9 tensors at 0.5 times the learning rate" in capfd.readouterr().out
    arguments = training_arguments(max_steps=2, optim_args="p=4,lr_ratios=*.norm:2")
    resumed = SchattenTrainer(model=llama, args=arguments, train_dataset=token_dataset)
    resumed.train(resume_from_checkpoint=f"{arguments.output_dir}/checkpoint-1")
    assert "lr_ratios ['*.layers.0.*:0.5', '*_proj:3', '*.norm:0.25'] -> ['*.norm:2']" in caplog.text
    groups = groups_of(resumed.optimizer.optimizer)
    assert groups["model.norm.weight"]["lr_ratio_by_parameter"] == {"model.norm.weight": 2.0}
    assert groups["model.layers.0.mlp.up_proj.weight"]["lr_ratio_by_parameter"] == {}


def test_a_pattern_of_rates_that_matches_nothing_is_refused(llama):
    with pytest.raises(RoutingError, match=r"lr_ratios has '\*\.c_attn', which matches nothing; names look like"):
        create_schatten_optimizer(llama, verbose=False, lr_ratios="*.c_attn:2")
