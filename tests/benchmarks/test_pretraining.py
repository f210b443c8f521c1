"""Pretraining on a GPU, at a size for a CPU: it learns, its attention needs no mask, its shapes are GPT-2's."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.comparison import regime
from benchmarks.comparison.corpus import LENGTH, Corpus, CorpusError, save
from benchmarks.comparison.outcomes import Run
from benchmarks.comparison.pretraining import PRETRAINING, from_corpus, gpt2
from benchmarks.comparison.regime import Regime

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Return the file of a corpus whose tokens follow one another as 7 n modulo 60, and its vocabulary of 64."""
    tokens = np.array([pow(7, power, 61) for power in range(24 * LENGTH)], dtype=np.uint16).reshape(-1, LENGTH)
    file = tmp_path_factory.mktemp("corpus") / "c.tokens"
    save(Corpus(64, tokens[:20], tokens[20:]), file)
    return file


def tiny(path, **options) -> Regime:
    make = partial(from_corpus, layers=1, width=64, sequences=2, path=path)
    return Regime(make, 8, 0.1, (8e-3,), (4e-3,), {}, on_gpu=True, evaluations=2, **options)


@pytest.mark.parametrize("candidate", ["p=-4", "muon", "adamw"])
def test_a_tiny_one_learns_and_repeats(candidate, path):
    first, again = (tiny(path).train(Run("tiny", candidate, 8e-3, 1), CPU) for _ in range(2))
    assert [step for step, _, _ in first.curve] == [4, 8]
    assert first.loss == first.curve[-1][2] < first.curve[0][2] < math.log(64)
    assert [loss for _, _, loss in first.curve] == [loss for _, _, loss in again.curve]


def test_compiling_is_outside_the_seconds_and_changes_nothing(path, monkeypatch):
    events: list[str] = []
    warm_up, now = Regime._warm_up, regime.now
    monkeypatch.setattr(Regime, "_warm_up", lambda *arguments: warm_up(*arguments) or events.append("warm"))
    monkeypatch.setattr(regime, "now", lambda device: events.append("clock") or now(device))
    run = Run("tiny", "adamw", 4e-3, 0)
    outcome = tiny(path).train(run, CPU)
    assert events.index("warm") < events.index("clock")
    assert events.count("warm") == 1
    monkeypatch.setattr(Regime, "_warm_up", lambda *arguments: None)
    assert tiny(path).train(run, CPU).loss == outcome.loss


def test_seeds_have_other_weights_and_another_order(path):
    first, again, other = (from_corpus(seed, layers=1, width=64, sequences=2, path=path) for seed in (1, 1, 2))
    for same, one in ((True, again), (False, other)):
        assert torch.equal(first.batch(3)[0], one.batch(3)[0]) == same
        assert torch.equal(first.model.lm_head.weight, one.model.lm_head.weight) == same
    assert [batch[0].shape for batch in first.validation] == [(2, LENGTH)] * 2


def test_without_a_corpus_it_says_how_to_make_one(tmp_path):
    with pytest.raises(CorpusError, match=r"corpus\.py makes it"):
        from_corpus(0, layers=1, width=64, sequences=2, path=tmp_path / "c.tokens")


def test_the_loss_is_that_of_transformers_own_attention():
    torch.manual_seed(0)
    model = gpt2(64, layers=2, width=128)
    options = model.config.to_dict() | {"attn_implementation": "eager"}
    reference = GPT2LMHeadModel(GPT2Config(**options))
    assert reference.config._attn_implementation == "eager"
    reference.load_state_dict(model.state_dict())
    tokens = torch.randint(64, (2, 100))
    logits = reference(tokens).logits
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(model(tokens, labels=tokens).loss, expected, rtol=1e-5, atol=1e-5)


def test_it_compiles_to_one_graph_with_causal_attention_and_no_mask_and_a_second_model_uses_it():
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    tokens = torch.randint(64, (2, 16))
    for _ in range(2):
        model = gpt2(64, layers=2, width=64)
        compiled = torch.compile(model, backend=backend)
        compiled(input_ids=tokens, labels=tokens).loss.backward()
    assert len(graphs) == 1
    calls = [node for node in graphs[0].graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    assert [(call.kwargs["attn_mask"], call.kwargs["is_causal"]) for call in calls] == [(None, True)] * 2
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("vocabulary", "layers", "width", "parameters"),
    [(50257, 12, 768, 124_439_808), (32768, 12, 768, 111_008_256), (32768, 6, 256, 13_389_824)],
)
def test_shapes_are_those_of_gpt2(vocabulary, layers, width, parameters):
    with torch.device("meta"):
        assert gpt2(vocabulary, layers, width).num_parameters() == parameters


def test_a_long_run_sees_100_million_tokens():
    small = PRETRAINING["gpt2 small"]
    assert small.make.keywords == {"layers": 12, "width": 768, "sequences": 64}
    assert small.steps * 64 * LENGTH >= 100_000_000
    assert all(each.on_gpu for each in PRETRAINING.values())
