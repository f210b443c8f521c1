"""FSDP version 2: sharded parameters, uneven and empty shards, train as whole ones do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from limits import MIB, limits
from processes import together
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import hf_schatten
from hf_schatten import UnsupportedEngineError
from hf_schatten.distributed.owners import BUFFER

STEPS, LENGTH, GLOBAL_BATCH = 12, 8, 8
SHARES = 4  # of the same rows in a batch, one for each of as many processes
# With p inside its range, and a last step that is due.
DUE = {"p_interval": 4, "p_first_step": 2}
ADAPTIVE = {"p": "adaptive", "p_max": 1000} | DUE
# The mean of the processes' statistics is that of one process.
ALIKE = ADAPTIVE | {"shares": SHARES}
SETTINGS = {
    "fixed p": {"p": 3.0},
    "adaptive": ALIKE,
    "other rows": ADAPTIVE,
    "small buffer": {"p": 2.0, "buffer": MIB, "width": 260},
    "ball": {"p": 2.0, "step_rule": "ball", "nesterov": False},
    "a NaN": {"p": 2.0, "bad_step": 3},
    "split heads": ALIKE | {"split_heads": True},
    "uneven": ALIKE | {"width": 31},
    # An expert has few tokens: its p amplifies what float32 rounds.
    "experts": ALIKE | {"width": 32, "experts": 5, "dtype": torch.float64},
    "many experts": {"p": 2.0, "buffer": MIB, "width": 64, "experts": 48},
    "idle experts": {"p": 2.0, "width": 32, "experts": 31, "chosen": 1, "scale": "match_rms_adamw"},
}
MEASURED = [name for name, options in SETTINGS.items() if options["p"] == "adaptive"]


def model_of(width=30, experts=0, chosen=8):
    """Return a GPT-2, or with experts a Mixtral, each of whose layers is a module of its own for FSDP."""
    torch.manual_seed(0)
    heads = 1 if experts or width % 2 else 2
    tokens = {"vocab_size": 63, "bos_token_id": 0, "eos_token_id": 0}
    if experts:
        config = MixtralConfig(
            num_hidden_layers=1,
            hidden_size=width,
            intermediate_size=width + 4,  # torch's grouped product wants rows of 16 bytes
            num_attention_heads=heads,
            num_key_value_heads=heads,
            num_local_experts=experts,
            num_experts_per_tok=min(experts, chosen),
            max_position_embeddings=LENGTH,
            **tokens,
        )
        model = MixtralForCausalLM(config)
        return model, model.model.layers
    config = GPT2Config(n_layer=2, n_embd=width, n_head=heads, n_positions=LENGTH, **tokens)
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, key, 0.0)
    model = GPT2LMHeadModel(config)
    return model, model.transformer.h


def train(width=30, experts=0, chosen=8, bad_step=None, shares=1, dtype=torch.float32, mesh=None, **options):
    """Train on one process' share of the global batch; return weights, p, sizes of updates, and what was moved."""
    model, layers = model_of(width, experts, chosen)
    model.to(dtype)
    if experts and dtype == torch.float64:
        model.set_experts_implementation("eager")  # torch's grouped product knows no float64
    optimizer = hf_schatten.create_schatten_optimizer(model, 3e-4, verbose=False, eps=1e-6, **options)
    rank, count = (dist.get_rank(), dist.get_world_size()) if mesh is not None else (0, 1)
    if mesh is not None:
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        present = dict(model.named_parameters())
        for group in optimizer.param_groups:  # as accelerate does
            group["params"] = [present[name] for name in group["param_names"]]
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    moved, computed = [], []
    original, direction = dist.all_to_all_single, optimizer.direction

    def count_bytes(output, sent, *args, **kwargs):
        moved.append(sent.numel() * sent.element_size())
        return original(output, sent, *args, **kwargs)

    def count_work(momenta, p):
        computed.append(momenta.numel())
        return direction(momenta, p)

    optimizer.direction = count_work
    dist.all_to_all_single = count_bytes
    generator = torch.Generator().manual_seed(1)
    try:
        for step in range(STEPS):
            rows = torch.randint(0, 63, (GLOBAL_BATCH // shares, LENGTH), generator=generator)
            rows[::2] %= 4
            rows = rows.repeat(shares, 1)
            share = rows.chunk(count)[rank]
            loss = model(input_ids=share, labels=share).loss
            (loss * math.nan if step == bad_step else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        dist.all_to_all_single = original
    parameters = [matrix.parameter for matrix in optimizer.matrices()]
    state = optimizer.state[parameters[0]]
    return {
        "weights": {
            name: (W.full_tensor() if isinstance(W, DTensor) else W).detach().clone()
            for name, W in model.named_parameters()
        },
        "p": optimizer.learned_p(),
        "updates": {name: torch.stack(pair) for name, pair in optimizer.policy.updates.items()}
        if optimizer.policy
        else {},
        "statistics": torch.stack([matrix.statistics for matrix in optimizer.matrices()]),
        "skipped": optimizer.skipped_steps(),
        "absence": torch.cat([optimizer.state[W]["absence"] for W in dict.fromkeys(parameters)]),
        "moved": moved,
        "computed": sum(computed),
        "rows": [W.to_local().shape[0] if isinstance(W, DTensor) else W.shape[0] for W in parameters],
        "momentum is sharded": isinstance(state["momentum"], DTensor),
    }


def train_within_limits(buffer=BUFFER, **options):
    with limits(buffer=buffer):
        return train(**options)


def train_sharded(replicas: int) -> dict[str, Any]:
    """Return what every setting gives on this process, and what is refused."""
    count = dist.get_world_size()
    if replicas == 1:
        mesh = init_device_mesh("cpu", (count,))
        settings = SETTINGS
    else:
        mesh = init_device_mesh("cpu", (replicas, count // replicas), mesh_dim_names=("replicate", "shard"))
        settings = {name: SETTINGS[name] for name in ("fixed p", "adaptive")}
    results = {name: train_within_limits(mesh=mesh, **options) for name, options in settings.items()}
    return results | {"refused": refusals(init_device_mesh("cpu", (count,)))}


def refusals(mesh):
    """Return the messages of what is not supported with sharded parameters."""
    messages = []
    for placement, options in [
        (Partial(), {}),
        (Shard(0), {"precondition": "adam"}),
        (Shard(0), {"step_rule": "ball", "coupling_order": 2}),
    ]:
        layer = nn.Linear(6, 8, bias=False)
        weight = layer.weight.detach()[: 8 // mesh.size() if placement.is_shard() else 8]
        layer.weight = nn.Parameter(DTensor.from_local(weight, mesh, [placement], run_check=False))
        optimizer = hf_schatten.SchattenP([("layer.weight", layer.weight)], p=2, **options)
        layer.weight.grad = torch.zeros_like(layer.weight)
        with pytest.raises(UnsupportedEngineError) as error:
            optimizer.step()
        messages.append(str(error.value))
    return messages


@pytest.fixture(scope="module")
def alone():
    return {name: train_within_limits(**options) for name, options in SETTINGS.items()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return together(train_sharded, 2, tmp_path_factory.mktemp("pair"), 1)


def assert_same(one, two, name):
    s, expected = ({key: 1 / p for key, p in result["p"].items()} for result in (two, one))
    assert s.keys() == expected.keys()
    error = max(abs(s[key] - expected[key]) for key in s)
    if name == "other rows":
        assert error <= 0.2  # an approximation, where processes have different inputs
        return
    assert error <= 1e-6, name
    for key, weights in one["weights"].items():
        if not key.endswith("c_attn.bias"):  # a key's has no gradient but rounding, which AdamW makes large
            distance = (two["weights"][key] - weights).norm() / weights.norm().clamp_min(1e-3)
            assert distance <= 1e-5, (name, key)


def assert_same_updates(one, results):
    """Compare stable rank and relative size of the last step's updates, rows of two, with those of one process."""
    assert results[0]["updates"].keys() == one["updates"].keys() == one["p"].keys()
    for name, expected in one["updates"].items():
        assert all(torch.equal(result["updates"][name], results[0]["updates"][name]) for result in results), name
        of_rank, of_size = (results[0]["updates"][name] / expected - 1).abs().tolist()
        assert of_rank <= 5e-3, name  # which float32 rounds, where p is large and the momentum has not the full rank
        assert of_size <= 1e-3, name


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_and_p_are_those_of_one_process(name, alone, pair):
    assert pair[0][name]["momentum is sharded"]
    assert_same(alone[name], pair[0][name], name)
    assert pair[0][name]["p"] == pair[1][name]["p"]
    assert all(math.isfinite(W.norm()) for W in pair[0][name]["weights"].values())


def test_p_was_adapted(alone, pair):
    for name in ("adaptive", "split heads", "uneven", "experts"):
        inside = {round(p, 3) for p in pair[0][name]["p"].values() if 1.002 < p < 500}
        assert len(inside) >= 3, name
    error = [abs(1 / pair[0]["other rows"]["p"][key] - 1 / p) for key, p in alone["other rows"]["p"].items()]
    assert max(error) > 1e-3


@pytest.mark.parametrize("name", MEASURED)
def test_sizes_of_updates_are_those_of_one_process(name, alone, pair):
    if name != "other rows":
        assert_same_updates(alone[name], [result[name] for result in pair])
    else:  # which have another p
        assert pair[0][name]["updates"].keys() == alone[name]["p"].keys()
    ranks = [float(rank) for rank, _ in pair[0][name]["updates"].values()]
    assert max(ranks) > 1.2 * min(ranks)


def test_each_matrix_is_computed_once_and_moved_twice(alone, pair):
    for name in ("fixed p", "small buffer"):
        total = sum(result[name]["computed"] for result in pair)
        assert total == alone[name]["computed"]
        shares = [result[name]["computed"] / total for result in pair]
        assert max(shares) <= 0.6
    width, steps = 30, STEPS
    elements = 2 * 12 * width * width
    assert sum(sum(result["fixed p"]["moved"]) for result in pair) == steps * 2 * 4 * elements


def test_buffers_are_bounded(pair):
    """At width 260 the largest matrix has 4 · 260² elements: one megabyte and more, which travels alone."""
    largest = 4 * 4 * 260 * 260
    assert max(pair[0]["small buffer"]["moved"]) <= 2 * max(largest, MIB)


def test_experts_stay_where_they_are_and_buffers_of_stacks_are_bounded(alone, pair):
    """The stack of 48 experts' ``gate_up_proj`` has 1.7 MB, of which each process has a half."""
    for result in pair:
        assert max(result["many experts"]["moved"]) <= 2 * MIB
        assert result["many experts"]["computed"] <= 0.6 * alone["many experts"]["computed"]
    experts = 48 * 3 * 64 * 68
    assert sum(sum(result["many experts"]["moved"]) for result in pair) <= STEPS * 2 * 4 * 1.2 * experts


def test_gradients_of_zeros_are_known_on_all_processes(alone, pair):
    absence = alone["idle experts"]["absence"]
    assert (absence == 0).any()
    assert (absence > 0).any()
    for results in pair:
        torch.testing.assert_close(results["idle experts"]["absence"], absence, rtol=1e-12, atol=0.0)
        assert not results["fixed p"]["absence"].any()


def test_shards_are_uneven(pair):
    """Sides of 31, 93 and 124 rows, and 5 experts."""
    rows = [result["uneven"]["rows"] for result in pair]
    assert {16, 62} <= set(rows[0])
    assert 15 in rows[1]
    assert [max(result["experts"]["rows"][-1:]) for result in pair] == [3, 2]


def test_a_step_that_is_not_finite_is_skipped_everywhere(alone, pair):
    assert pair[0]["a NaN"]["skipped"] == alone["a NaN"]["skipped"]
    assert set(pair[1]["a NaN"]["skipped"].values()) == {1}


def test_what_is_not_supported_is_refused_by_name(pair):
    of_sums, preconditioned, coupled = pair[0]["refused"]
    assert "'layer.weight' has the placements (Partial(sum),)" in of_sums
    assert "precondition='adam' is not supported where the parameters are sharded" in preconditioned
    assert "coupling_order=2 is not supported where the parameters are sharded" in coupled


@pytest.mark.slow
@pytest.mark.parametrize(("count", "replicas"), [(3, 1), (4, 1), (4, 2)])
def test_more_processes_some_without_rows_and_replicas_of_shards(count, replicas, alone, tmp_path):
    results = together(train_sharded, count, tmp_path, replicas)
    for name in results[0].keys() - {"refused"}:
        assert results[0][name]["p"] == results[-1][name]["p"]
        assert results[0][name]["updates"].keys() == (alone[name]["p"].keys() if name in MEASURED else set())
        if count != 3:  # which do not share the batch evenly
            assert_same(alone[name], results[0][name], name)
            if name in MEASURED and name != "other rows":
                assert_same_updates(alone[name], [result[name] for result in results])
