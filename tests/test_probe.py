"""The probe counts every training row once, whatever wraps the forward, and touches no random generator."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo import eval_frame
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_schatten.adaptive.probe import Probe
from hf_schatten.adaptive.row_sample import RowSample


class Net(nn.Module):
    """Two layers, the second behind a checkpoint of the asked kind."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).relu()
        if self.use_reentrant is None:
            return self.second(hidden)
        return checkpoint(self.second, hidden, use_reentrant=self.use_reentrant)


def armed_probe(net: nn.Module, capacity: int = 1000) -> Probe:
    probe = Probe(net, {"first.weight": net.first, "second.weight": net.second}, capacity)
    probe.arm(True)
    return probe


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_each_row_is_sampled_once_over_accumulated_micro_batches(use_reentrant):
    torch.manual_seed(0)
    net = Net(use_reentrant)
    probe = armed_probe(net)
    batches = torch.randn(3, 5, 2, 3)  # micro-batches × sequences × tokens × features
    for batch in batches:
        net(batch).sum().backward()
        with torch.no_grad():
            net(batch)  # a reference forward, as preference training makes
        net.eval()
        net(batch)
        net.train()
    samples = probe.take()
    torch.testing.assert_close(samples["first.weight"], batches.reshape(-1, 3), atol=0.0, rtol=0.0)
    expected = net.first(batches).relu().reshape(-1, 4).detach()
    torch.testing.assert_close(samples["second.weight"], expected, atol=1e-6, rtol=1e-6)


def test_nothing_is_sampled_unless_armed():
    net = Net(None)
    probe = armed_probe(net)
    probe.arm(False)
    net(torch.randn(2, 3)).sum().backward()
    assert probe.take() == {}


def test_take_forgets_and_remove_ends():
    net = Net(None)
    probe = armed_probe(net)
    net(torch.randn(2, 3)).sum().backward()
    assert set(probe.take()) == {"first.weight", "second.weight"}
    assert probe.take() == {}
    probe.remove()
    net(torch.randn(2, 3)).sum().backward()
    assert probe.take() == {}


def test_the_global_random_generator_is_untouched():
    net = Net(None)
    probe = armed_probe(net, capacity=4)
    batch = torch.randn(64, 3)
    before = torch.get_rng_state()
    net(batch).sum().backward()
    probe.take()
    assert torch.equal(torch.get_rng_state(), before)


def add(sample: RowSample, rows: torch.Tensor) -> None:
    sample.offer(len(rows), rows.__getitem__)()


@pytest.mark.parametrize("capacity", [1, 7, 64, 1000])
@pytest.mark.parametrize("pieces", [2, 8, 37])
def test_the_sample_does_not_depend_on_the_micro_batches(capacity, pieces):
    rows = torch.arange(600.0).unsqueeze(1)
    whole, cut, late, early = (RowSample(capacity) for _ in range(4))
    add(whole, rows)
    for piece in rows.tensor_split(pieces):
        add(cut, piece)
    for sample, at_once in ((late, False), (early, True)):
        keeps = [sample.offer(len(each), each.__getitem__, at_once=at_once) for each in rows.tensor_split(pieces)]
        for keep in reversed(keeps):
            keep()
    assert torch.equal(whole.rows(), cut.rows())
    assert torch.equal(whole.rows(), late.rows())
    assert torch.equal(whole.rows(), early.rows())
    assert len(whole.rows()) <= capacity


def test_the_sample_is_spread_evenly_over_positions_of_a_sequence():
    length = 64  # a power of two, with which a fixed stride would meet the same positions again and again
    sample = RowSample(capacity=1024)
    add(sample, (torch.arange(64 * length).unsqueeze(1) % length).float())
    counts = torch.bincount(sample.rows().flatten().long(), minlength=length)
    assert 0.8 * 1024 < len(sample.rows()) <= 1024
    assert counts.max() - counts.min() <= 0.5 * counts.float().mean()


def test_nothing_is_held_after_a_thousand_micro_batches_but_the_sample():
    sample = RowSample(capacity=16)
    for _ in range(1000):
        add(sample, torch.zeros(64, 1))
    assert sum(len(rows) for _, rows in sample._pieces) <= 16


class Masked(nn.Module):
    """A layer behind a model that is called with an attention mask, as transformers' models are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.layer(hidden)


@pytest.mark.parametrize("flat", [False, True])
def test_padding_is_left_out(flat):
    torch.manual_seed(0)
    model = Masked()
    probe = Probe(model, {"layer.weight": model.layer}, 100)
    probe.arm(True)
    hidden, mask = torch.randn(4, 5, 3), torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [0] * 4 + [1], [1, 1, 0, 0, 0]])
    for half in (slice(0, 2), slice(2, 4)):
        rows = hidden[half].reshape(-1, 3) if flat else hidden[half]
        model(rows, attention_mask=mask[half]).sum().backward()
    assert torch.equal(probe.take()["layer.weight"], hidden[mask.bool()])


def test_a_decoder_takes_its_own_mask():
    class EncoderDecoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, hidden, attention_mask, decoder_attention_mask):
            return self.decoder(self.encoder(hidden))

    model = EncoderDecoder()
    probe = Probe(model, {"encoder.weight": model.encoder, "decoder.weight": model.decoder}, 100)
    probe.arm(True)
    first, second = torch.tensor([[1, 0, 0]]), torch.tensor([[1, 1, 0]])
    model(torch.randn(1, 3, 3), attention_mask=first, decoder_attention_mask=second).sum().backward()
    assert {name: len(rows) for name, rows in probe.take().items()} == {
        "encoder.weight": 1,
        "decoder.weight": 2,
    }


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2)},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolutions_rows_times_its_filters_are_its_output(options, memory_format):
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 4, **options)
    probe = Probe(layer, {"weight": layer}, 10_000)
    probe.arm(True)
    images = torch.randn(2, 5, 9, 7).to(memory_format=memory_format)
    output = layer(images)
    output.sum().backward()
    expected = output.detach().permute(0, 2, 3, 1).reshape(-1, 4) - layer.bias.detach()
    found = probe.take()["weight"] @ layer.weight.detach().flatten(1).mT
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_an_experts_rows_give_its_weights_gradient(architecture):
    """The gradient of an expert's weight is δᵀA for its rows A alone: it lies in their span."""
    torch.manual_seed(0)
    model = experts_model(architecture)
    experts = model.model.layers[0].mlp.experts
    probe = Probe(model, {"experts.gate_up_proj": experts, "experts.down_proj": experts}, 1000)
    probe.arm(True)
    tokens = torch.randint(1, 30, (2, 5))
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    model(input_ids=tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss.backward()
    samples = probe.take()
    assert sum(len(rows) for name, rows in samples.items() if "gate" in name) == 8 * 2
    for name in ("gate_up_proj", "down_proj"):
        for expert in range(8):
            gradient = getattr(experts, name).grad[expert]
            gradient = gradient.mT if architecture == "gpt_oss" else gradient
            rows = samples.get(f"experts.{name}.{expert}", torch.zeros(0, gradient.shape[1]))
            outside = torch.linalg.lstsq(rows.mT, gradient.mT, driver="gelsd").solution if len(rows) else None
            rest = gradient if outside is None else gradient.mT - rows.mT @ outside
            assert rest.norm() <= 1e-5 * gradient.norm()


def experts_model(architecture: str) -> nn.Module:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 30,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
    }
    if architecture == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**sizes, experts_implementation="eager"))
    return GptOssForCausalLM(GptOssConfig(**sizes, head_dim=16, experts_implementation="eager"))


def test_rows_are_copied_when_the_gradient_passes():
    net = Net(None)
    probe = armed_probe(net)
    loss = net(torch.randn(2, 3)).sum()
    assert not any(sample._pieces for sample in probe._samples.values())
    loss.backward()
    assert set(probe.take()) == {"first.weight", "second.weight"}


def test_an_input_is_let_go_while_backward_goes_on():
    net = Net(None)
    probe = armed_probe(net)
    hidden = []
    net.second.register_forward_pre_hook(lambda module, args: hidden.append(weakref.ref(args[0])))
    loss = net(torch.randn(2, 3)).sum()
    loss.backward()
    assert hidden[0]() is None  # though the loss and the graph's nodes with their hooks are alive
    assert set(probe.take()) == {"first.weight", "second.weight"}


@pytest.mark.parametrize("capacity", [4, 1000])
def test_rows_are_copied_at_once_where_autograd_keeps_a_converted_copy(capacity):
    net = Net(None)
    probe = armed_probe(net, capacity)
    batch = torch.randn(20, 3)
    before = batch.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = net(batch).sum()
    batch.zero_()
    loss.backward()
    rows = probe.take()["first.weight"]
    assert len(rows) == min(capacity, 20)
    assert all((row == before).all(dim=1).any() for row in rows)


def test_inputs_whose_rows_are_copied_at_once_are_let_go_before_backward():
    """Else the inputs of all layers would add to the peak of memory."""
    net = Net(None)
    probe = armed_probe(net, 4)
    memory = np.ones((20, 3), dtype=np.float32)  # of which a weak reference tells whether any tensor still has it
    given = weakref.ref(memory)
    batch = torch.from_numpy(memory)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = net(batch).sum()
    del batch, memory
    assert given() is None
    loss.backward()
    assert set(probe.take()) == {"first.weight", "second.weight"}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("capacity", [6, 1000])
def test_a_forward_without_a_gradient_does_not_count(autocast, capacity):
    """As DoRA calls its factors on an identity, whose outputs it detaches, before the tokens."""
    net = Net(None)
    probe, alone = armed_probe(net, capacity), RowSample(capacity)
    tokens = torch.randn(2, 7, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        norm = net(torch.eye(3)).detach().norm()
        loss = (net(tokens) / norm).sum()
    loss.backward()
    rows = probe.take()["first.weight"]
    add(alone, tokens.flatten(0, 1))
    assert len(rows) >= min(capacity, len(alone.rows()))
    assert all((row == tokens.flatten(0, 1)).all(dim=1).any() for row in rows)


@pytest.fixture
def fresh_compiler():
    gc.collect()  # armed probes of other tests
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_model_has_one_graph_and_runs_eagerly_while_armed(fresh_compiler):
    net = Net(None)
    probe = Probe(net, {"first.weight": net.first, "second.weight": net.second}, 100)
    compiled = torch.compile(net, backend=(counter := CompileCounter()))
    for step in range(12):
        probe.arm(step % 4 == 2)
        compiled(torch.full((2, 3), float(step))).sum().backward()
        if probe.armed:
            assert torch.equal(probe.take()["first.weight"], torch.full((2, 3), float(step)))
    assert counter.frame_count == 1


def test_a_second_armed_probe_and_a_forgotten_one_leave_the_compiler_as_it_was(fresh_compiler):
    for probe in (probes := [armed_probe(Net(None)) for _ in range(3)])[:2]:
        probe.arm(False)
    assert eval_frame._stance.stance == "eager_on_recompile"
    del probes, probe
    gc.collect()
    assert eval_frame._stance.stance == "default"
