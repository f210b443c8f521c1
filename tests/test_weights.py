"""Checkpoints whose files name the weights otherwise than the model does."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_schatten.integration.converted_weights import load_converted_weights


def experts(seed, dtype=torch.float32):
    """Return a mixture of three experts, which are one tensor in the model and many in its file."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=16,
        hidden_size=8,
        moe_intermediate_size=4,
        num_experts=3,
        num_experts_per_tok=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        num_hidden_layers=1,
    )
    return Qwen3MoeForCausalLM(config).to(dtype)


def test_sharded_parameters_are_left_to_their_engine(tmp_path):
    model = experts(1)
    experts(0).save_pretrained(tmp_path)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
        assert not load_converted_weights(model, tmp_path)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_size", ["1GB", "1KB"])
def test_experts_are_joined_again(dtype, shard_size, tmp_path):
    saved, model = experts(0, dtype), experts(1, dtype)
    saved.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "1KB")
    assert load_converted_weights(model, tmp_path)
    assert model.dtype == dtype
    for name, value in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_file_that_names_the_weights_as_the_model_is_left_to_trainer(gpt2, tmp_path):
    gpt2.save_pretrained(tmp_path)  # its tied head is not in the file
    before = gpt2.transformer.wpe.weight.clone()
    with torch.no_grad():
        gpt2.transformer.wpe.weight.add_(1)
    assert not load_converted_weights(gpt2, tmp_path)
    assert torch.equal(gpt2.transformer.wpe.weight, before + 1)


def test_what_is_no_such_checkpoint_is_left_to_trainer(gpt2, tmp_path):
    assert not load_converted_weights(gpt2, tmp_path)
    save_file({"strange": torch.ones(1)}, tmp_path / "model.safetensors")
    assert not load_converted_weights(nn.Linear(1, 1), tmp_path)


def test_a_file_with_weights_missing_is_refused(tmp_path):
    experts(0).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"does not hold the weights of this Qwen.*1 missing_keys, such as 'mod"):
        load_converted_weights(experts(1), tmp_path)
