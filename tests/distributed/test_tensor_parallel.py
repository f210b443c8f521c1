"""Tensor and expert parallelism of transformers, alone and with FSDP version 2: pieces train as whole matrices do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import together
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.distributed import DistributedConfig

import hf_schatten
from hf_schatten.integration.checkpoint import CONFIG_FILE, STATE_FILE, load_optimizer, save_optimizer

STEPS, LENGTH, GLOBAL_BATCH = 30, 8, 8
ADAPTIVE = {"p": "adaptive", "p_max": 1000, "p_interval": 10, "p_first_step": 5}  # due: 5, 10, 20, 30
SETTINGS: dict[str, tuple[str, dict[str, int], dict[str, Any]]] = {
    "columns and rows": ("llama", {"tp_size": 2}, ADAPTIVE),
    "experts in halves": ("mixtral", {"tp_size": 2}, ADAPTIVE),
    "experts apart": ("mixtral", {"tp_size": 2, "ep_size": 2}, ADAPTIVE),
}
ON_FOUR: dict[str, tuple[str, dict[str, int], dict[str, Any]]] = {
    "with FSDP": ("llama", {"tp_size": 2, "fsdp_size": 2}, ADAPTIVE),
    "with replicas": ("llama", {"tp_size": 2, "dp_replicate_size": 2}, ADAPTIVE),
    "experts with FSDP": ("mixtral", {"tp_size": 2, "fsdp_size": 2}, ADAPTIVE),
    "experts apart with FSDP": ("mixtral", {"fsdp_size": 4, "ep_size": 2}, {"p": 3.0}),
    "on all": ("llama", {"tp_size": 4}, ADAPTIVE),
}


def model_of(kind):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": LENGTH,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **shape))
    return MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, num_local_experts=4, **shape))


def train(folder, kind, sizes, options, checkpoint=None):
    """Train a model of a folder, in the pieces that the sizes say; return weights, p, and shapes of momenta."""
    model = AutoModelForCausalLM.from_pretrained(
        Path(folder) / kind,
        dtype=torch.float64,  # p of few tokens amplifies what float32 rounds
        experts_implementation="eager",
        **({"distributed_config": DistributedConfig(**sizes)} if sizes else {}),
    ).train()
    if sizes:
        assert any(isinstance(W, DTensor) for W in model.parameters())
    optimizer = hf_schatten.create_schatten_optimizer(model, 1e-3, verbose=False, eps=1e-6, **options)
    shares = sizes.get("fsdp_size", 1) * sizes.get("dp_replicate_size", 1)
    share = dist.get_rank() * shares // dist.get_world_size() if sizes else 0
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        rows = torch.randint(0, 64, (GLOBAL_BATCH // 4, LENGTH), generator=generator)
        rows[::2] %= 4
        rows = rows.repeat(4, 1).chunk(shares)[share]
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if checkpoint:
        save_optimizer(optimizer, checkpoint, write=dist.get_rank() == 0)
        dist.barrier()
        before = {key: value.clone() for key, value in local_state(optimizer).items()}
        load_optimizer(optimizer, checkpoint)
        assert all(torch.equal(before[key], value) for key, value in local_state(optimizer).items())
    matrices = list(optimizer.matrices())
    return {
        "weights": {
            name: (W.full_tensor() if isinstance(W, DTensor) else W).detach().clone()
            for name, W in model.named_parameters()
        },
        "p": optimizer.learned_p(),
        "updates": {name: torch.stack(pair) for name, pair in optimizer.policy.updates.items()}
        if optimizer.policy
        else {},
        "statistics": torch.stack([matrix.statistics for matrix in matrices]),
        "momentum": sum(
            (M.to_local() if isinstance(M, DTensor) else M).numel()
            for M in {matrix.parameter_name: matrix.state["momentum"] for matrix in matrices}.values()
        ),
    }


def local_state(optimizer):
    return {
        (name, key): value.to_local() if isinstance(value, DTensor) else value
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        for key, value in optimizer.state[parameter].items()
    }


def train_all(folder, names):
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    every = SETTINGS | ON_FOUR
    return {
        name: train(folder, *every[name], checkpoint=folder if name == "columns and rows" else None) for name in names
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in ("llama", "mixtral"):
        model_of(kind).save_pretrained(folder / kind)
    return folder


@pytest.fixture(scope="module")
def pair(folder):
    return together(train_all, 2, folder, str(folder), list(SETTINGS))


def assert_same(name, folder, results):
    kind, _, options = (SETTINGS | ON_FOUR)[name]
    one = train(folder, kind, {}, options)
    for result in results:
        s, expected = ({key: 1 / p for key, p in each["p"].items()} for each in (result[name], one))
        assert s.keys() == expected.keys()
        assert max(abs(s[key] - expected[key]) for key in s) <= 1e-6
        for key, weights in one["weights"].items():
            distance = (result[name]["weights"][key] - weights).norm() / weights.norm()
            assert distance <= 1e-6, (name, key)
        assert result[name]["updates"].keys() == one["updates"].keys()
        for key, update in one["updates"].items():
            torch.testing.assert_close(result[name]["updates"][key], update, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(result[name]["statistics"], one["statistics"], rtol=1e-5, atol=1e-6)
    return one


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_and_p_are_those_of_one_process(name, folder, pair):
    one = assert_same(name, folder, pair)
    assert len({round(p, 3) for p in one["p"].values()}) >= 3


def test_momentum_is_cut_as_weights_are(pair):
    for name in SETTINGS:
        matrices = sum(W.numel() for key, W in pair[0][name]["weights"].items() if "_proj" in key)
        assert [result[name]["momentum"] for result in pair] == [matrices // 2] * 2


def test_a_checkpoint_holds_whole_matrices(folder, pair):
    state = load_file(folder / STATE_FILE)
    learned = {key.removesuffix("/p"): float(p) for key, p in state.items() if key.endswith("/p")}
    assert learned == pytest.approx(pair[0]["columns and rows"]["p"], rel=1e-6)
    for key, W in pair[0]["columns and rows"]["weights"].items():
        if f"{key}/momentum" in state:
            assert state[f"{key}/momentum"].shape == W.shape
    assert json.loads((folder / CONFIG_FILE).read_text())["options"]["p_interval"] == 10


@pytest.mark.slow
def test_four_processes(folder):
    results = together(train_all, 4, folder, str(folder), list(ON_FOUR))
    for name in ON_FOUR:
        assert_same(name, folder, results)
