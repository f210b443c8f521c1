"""What is sampled of weights that no module is called with, and of convolutions: the gradient tells what was right.

The gradient of a weight is a sum of products of output gradients and inputs. So its rows lie in the span of the inputs
of the matrix, and with fewer inputs than features no other rows span it.
"""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from hf_schatten import create_schatten_optimizer, route_parameters
from hf_schatten.adaptive.probe import Probe
from hf_schatten.matrices.layout import matrix_name


class Reader(nn.Module):
    """Calls a module with inputs that it is made with."""

    def __init__(self, module, *inputs, **options):
        super().__init__()
        self.module, self.inputs, self.options = module, inputs, options

    def forward(self):
        output = self.module(*self.inputs, **self.options)
        return output[0] if isinstance(output, tuple) else output


class Tokens(nn.Module):
    """Calls a language model with tokens."""

    def __init__(self, model, count):
        super().__init__()
        self.module, self.tokens = model, torch.arange(count)[None] % 13

    def forward(self):
        return self.module(input_ids=self.tokens).logits


def attention(**options):
    return nn.MultiheadAttention(12, 2, batch_first=True, **options)


def x(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


class LowRank(nn.Module):
    """Multiplies with A and B as AdaLoRA does, with a number for each rank."""

    def __init__(self):
        super().__init__()
        config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["0"])
        self.module = peft.get_peft_model(nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 2)), config)
        for name, parameter in self.module.named_parameters():
            if "lora_E" in name:
                nn.init.normal_(parameter)

    def forward(self):
        return self.module(x(2, 12))


SMALL = {"vocab_size": 13, "hidden_size": 32, "num_hidden_layers": 1, "pad_token_id": 0}
HEADED = {**SMALL, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 40}
MADE = {
    "bilinear": lambda: Reader(nn.Bilinear(4, 5, 6), x(3, 4), x(3, 5)),
    "conv1d": lambda: Reader(nn.Conv1d(6, 8, 3, stride=2, padding=1, dilation=2), x(2, 6, 9)),
    "conv2d": lambda: Reader(nn.Conv2d(5, 7, (2, 3), stride=(1, 2), padding=1), x(5, 4, 4)),
    "conv3d": lambda: Reader(nn.Conv3d(5, 7, (2, 3, 1), padding="same", padding_mode="circular"), x(1, 5, 2, 3, 2)),
    "conv1d in groups": lambda: Reader(nn.Conv1d(6, 8, 5, groups=2, padding=2), x(1, 6, 9)),
    "conv2d in groups": lambda: Reader(nn.Conv2d(6, 9, (2, 3), groups=3), x(6, 4, 4)),
    "conv_transpose1d": lambda: Reader(nn.ConvTranspose1d(9, 6, 3, stride=2), x(1, 9, 4)),
    "conv_transpose2d": lambda: Reader(nn.ConvTranspose2d(9, 6, 2, stride=2, padding=1), x(1, 9, 2, 2)),
    "conv_transpose2d in groups": lambda: Reader(nn.ConvTranspose2d(10, 6, 2, stride=2, groups=2), x(1, 10, 2, 2)),
    "self-attention": lambda: Reader(attention(), *[x(1, 5, 12)] * 3),
    "cross-attention": lambda: Reader(attention(), x(1, 4, 12), x(1, 6, 12), x(1, 6, 12) + 1),
    "mamba": lambda: Tokens(MambaForCausalLM(MambaConfig(**SMALL, state_size=4, time_step_rank=8)), 5),
    "xlnet": lambda: Tokens(
        XLNetLMHeadModel(XLNetConfig(vocab_size=13, d_model=32, n_layer=1, n_head=2, d_inner=40)), 5
    ),
    "jetmoe": lambda: Tokens(
        JetMoeForCausalLM(JetMoeConfig(**HEADED, kv_channels=16, num_local_experts=3, num_experts_per_tok=2)), 6
    ),
    "adalora": LowRank,
    "dbrx": lambda: Tokens(
        DbrxForCausalLM(
            DbrxConfig(
                d_model=32,
                n_heads=2,
                n_layers=1,
                vocab_size=13,
                attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
                ffn_config={"ffn_hidden_size": 40, "hidden_size": 32, "moe_num_experts": 3, "moe_top_k": 2},
            )
        ),
        6,
    ),
    "llama4": lambda: Tokens(
        Llama4ForCausalLM(
            Llama4TextConfig(
                **HEADED, intermediate_size_mlp=40, head_dim=16, num_local_experts=3, interleave_moe_layer_step=1
            )
        ),
        6,
    ),
}


def sampled(model):
    routes = route_parameters(model).to("schatten_p")
    probe = Probe(model, {route.name: route.module for route in routes}, 1000)
    probe.arm(True)
    model.train()().square().sum().backward()
    found = probe.take()
    probe.remove()
    return routes, found


MODULES = ("bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d")


# The fewest matrices of each that have fewer rows than features, so that their rows alone span the gradient.
READ = {
    **dict.fromkeys(MODULES, 1),
    "conv1d in groups": 2,
    "conv2d in groups": 3,
    "conv_transpose2d in groups": 2,
    "self-attention": 4,
    "cross-attention": 4,
    "mamba": 7,
    "xlnet": 7,
    "jetmoe": 3,
    "llama4": 9,
    "dbrx": 9,
    "adalora": 2,
}


@pytest.mark.parametrize(("name", "read"), READ.items())
def test_gradients_lie_in_the_span_of_what_is_sampled(name, read):
    torch.manual_seed(0)
    model = MADE[name]()
    routes, inputs = sampled(model)
    told = 0
    for route in routes:
        shape = route.parameter.shape
        for index, part in enumerate(route.layout.part_names(shape)):
            own = matrix_name(route.name, part)
            shared = matrix_name(route.name, route.layout.expert(shape, index))
            rows = inputs.get(own, inputs.get(shared))
            gradient = route.layout.matrix(route.parameter.grad, index)
            gradient = (gradient.mT if route.layout.transposed else gradient).double()
            if rows is None:  # an expert without tokens
                assert "expert" in type(route.module).__name__.lower()
                assert not gradient.any()
                continue
            assert rows.shape[1] == gradient.shape[1]
            inside = gradient @ torch.linalg.pinv(rows.double(), rtol=1e-6) @ rows.double()
            atol = 1e-5 * float(gradient.abs().max())
            torch.testing.assert_close(inside, gradient, atol=atol, rtol=1e-4)
            told += gradient.any() and len(rows) < rows.shape[1]
    assert told >= read, "too few matrices have fewer rows than features, so that nothing was shown"


class InGroups(nn.Module):
    """Convolutions of a part of the channels each."""

    def __init__(self, convolution):
        super().__init__()
        kind, groups = type(convolution), convolution.groups
        sizes = convolution.in_channels // groups, convolution.out_channels // groups
        self.parts = nn.ModuleList([kind(*sizes, convolution.kernel_size, bias=False) for _ in range(groups)])
        for part, weight in zip(self.parts, convolution.weight.detach().chunk(groups), strict=True):
            part.weight.data.copy_(weight)

    def forward(self, x):
        each = zip(self.parts, x.chunk(len(self.parts), dim=1), strict=True)
        return torch.cat([part(channels) for part, channels in each], dim=1)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolution_in_groups_trains_as_a_convolution_of_each(kind):
    torch.manual_seed(0)
    together = kind(15, 9, 2, groups=3, bias=False)
    options = {"p_first_step": 2, "p_interval": 2, "p": "adaptive", "p_max": 1000.0}
    ends = []
    for model in (InGroups(together), together):
        optimizer = create_schatten_optimizer(model, 1e-2, **options, verbose=False)
        for step in range(4):
            inputs = x(4, 15, 5, 5 + step)
            model.train()(inputs).sub(1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights = torch.cat([parameter.detach() for parameter in model.parameters()])
        ends.append((weights, torch.tensor([1 / p for p in optimizer.learned_p().values()])))
    torch.testing.assert_close(*ends, atol=1e-5, rtol=1e-4)
    assert len(set(ends[1][1].tolist())) == 3


def test_a_weight_that_is_read_in_another_module_is_not_sampled_twice():
    torch.manual_seed(0)
    routes, inputs = sampled(MADE["self-attention"]())
    assert {route.name for route in routes} == {"module.in_proj_weight", "module.out_proj.weight"}
    assert {name: len(rows) for name, rows in inputs.items()} == {route.name: 5 for route in routes}
    torch.testing.assert_close(inputs["module.in_proj_weight"], x(1, 5, 12)[0], atol=0, rtol=0)


def test_sampling_leaves_random_numbers_alone():
    def after(armed):
        torch.manual_seed(0)
        model = Reader(attention(dropout=0.5), *[x(1, 5, 12)] * 3)
        probe = Probe(model, {"module.out_proj.weight": model.module.out_proj}, 9)
        probe.arm(armed)
        output = model()
        probe.remove()
        return output, torch.get_rng_state()

    for plain, watched in zip(after(False), after(True), strict=True):
        assert torch.equal(plain, watched)


USES = {
    "linear by keyword": lambda W: torch.nn.functional.linear(W, weight=W),
    "product by keyword": lambda W: torch.matmul(W, other=W.mT),
    "product with itself": lambda W: W @ W.mT,
    "sum of squares": lambda W: torch.einsum("ij,ij->", W, W),
    "Gram matrix": lambda W: torch.einsum("ij,kj->ik", W, W),
    "diagonal": lambda W: torch.einsum("ij,kk->ij", W, torch.eye(3)),
    "list of operands": lambda W: torch.einsum("ij,kj->ik", [W, W]),
}


@pytest.mark.parametrize("use", USES)
def test_other_uses_of_a_weight_break_no_forward(use):
    class Penalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            penalty = USES[use](self.layer.weight).sum()  # before the layer is known to be called
            return self.layer(x).sum() + penalty

    model, rows = Penalised(), torch.randn(3, 4)
    probe = Probe(model, {"layer.weight": model.layer}, 8)
    probe.arm(True)
    model(rows).backward()
    torch.testing.assert_close(probe.take()["layer.weight"], rows, rtol=0, atol=0)
    assert model.layer.weight.grad.isfinite().all()
