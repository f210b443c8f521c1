"""FSDP version 2 through Trainer: train, save, resume, also on another number of processes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState
from processes import together
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_schatten import SchattenTrainer, load_learned_p
from hf_schatten.matrices.layout import layer_name
from hf_schatten.report.figures import UPDATES
from hf_schatten.report.log import RELATIVE_SIZE_PREFIX, STABLE_RANK_PREFIX

STEPS, LENGTH, GLOBAL_BATCH = 8, 8, 8
KINDS = {
    "whole": {},
    "sharded": {"state_dict_type": "SHARDED_STATE_DICT"},
    "plain Trainer, whole": {"trainer_class": Trainer},
    "plain Trainer, sharded": {"trainer_class": Trainer, "state_dict_type": "SHARDED_STATE_DICT"},
}


def allow_fsdp_on_the_cpu() -> None:
    """Let accelerate use FSDP where it has no accelerator: it would fall back to DDP, and say nothing."""
    original = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


def make(folder, name, trainer_class=SchattenTrainer, state_dict_type="FULL_STATE_DICT", **settings):
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=30, n_head=2, vocab_size=63, n_positions=LENGTH, bos_token_id=0, eos_token_id=0
    )
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, key, 0.0)
    generator = torch.Generator().manual_seed(3)
    # Both processes have the same rows: the mean of their statistics is that of one process.
    rows = torch.randint(0, 63, (STEPS, GLOBAL_BATCH // 2, LENGTH), generator=generator)
    rows[:, ::2] %= 4
    rows = rows.repeat(1, 2, 1).flatten(0, 1)
    wrapping = {"transformer_layer_cls_to_wrap": ["GPT2Block"], "state_dict_type": state_dict_type}
    sharding = {"fsdp": True, "fsdp_config": wrapping, "ddp_backend": "gloo"}
    arguments = TrainingArguments(
        str(Path(folder) / name),
        optim="schatten_p",
        optim_args="p=adaptive,p_interval=3,p_first_step=2,p_max=1000",
        max_steps=STEPS,
        save_steps=STEPS // 2,
        per_device_train_batch_size=GLOBAL_BATCH // processes,
        train_sampling_strategy="sequential",
        learning_rate=5e-4,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **(sharding if processes > 1 else {}),
        **settings,
    )
    assert arguments.world_size == processes
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    return trainer_class(GPT2LMHeadModel(config), arguments, train_dataset=dataset)


def outcome(trainer):
    history = trainer.state.log_history
    return {
        "p": trainer.optimizer.optimizer.learned_p(),
        "estimates": [entry["step"] for entry in history if "schatten_p_median" in entry],
        "weights": {
            name: (W.full_tensor() if isinstance(W, DTensor) else W).detach().clone()
            for name, W in trainer.model.named_parameters()
        },
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "sizes": [
            {key: size for key, size in entry.items() if key.startswith((STABLE_RANK_PREFIX, RELATIVE_SIZE_PREFIX))}
            for entry in history
            if "schatten_p_median" in entry
        ],
    }


def train_and_resume(folder: str) -> dict[str, Any]:
    allow_fsdp_on_the_cpu()
    results = {}
    for name, settings in KINDS.items():
        straight = make(folder, f"{name}, straight", **settings)
        straight.train()
        assert dist.get_world_size() == 2
        assert all(isinstance(parameter, DTensor) for parameter in straight.model.parameters())
        checkpoint = str(Path(folder) / f"{name}, straight" / f"checkpoint-{STEPS // 2}")
        resumed = make(folder, f"{name}, resumed", **settings)
        resumed.train(resume_from_checkpoint=checkpoint)
        results[name] = {"straight": outcome(straight), "resumed": outcome(resumed)}
    return results


def assert_near(found, expected):
    """Compare p and weights."""
    assert found["p"].keys() == expected["p"].keys()
    for key, p in expected["p"].items():
        assert abs(1 / found["p"][key] - 1 / p) <= 1e-6
    for key, weights in expected["weights"].items():
        if not key.endswith("c_attn.bias"):  # a key's has no gradient but rounding, which AdamW makes large
            assert (found["weights"][key] - weights).norm() <= 1e-5 * weights.norm().clamp_min(1e-3), key


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folder of the runs, and what each of two processes got."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, together(train_and_resume, 2, folder, str(folder))


@pytest.mark.parametrize("name", KINDS)
def test_a_resume_is_exact(runs, name):
    _, results = runs
    straight, resumed = results[0][name]["straight"], results[0][name]["resumed"]
    assert straight["estimates"] == [2, 3, 6]
    assert straight["p"] == resumed["p"] == results[1][name]["straight"]["p"]
    assert straight["losses"] == resumed["losses"]
    for key, weights in straight["weights"].items():
        assert torch.equal(weights, resumed["weights"][key]), key


def test_it_trains_as_one_process_does(runs, tmp_path):
    _, results = runs
    alone = make(tmp_path, "alone", save_strategy="no")
    alone.train()
    expected, found = outcome(alone), results[0]["whole"]["straight"]
    assert_near(expected, found)
    inside = [p for p in found["p"].values() if 1.002 < p < 500]
    assert len(inside) >= 3  # p is not only at the ends of its range
    for at_one_step, of_one_process in zip(found["sizes"], expected["sizes"], strict=True):
        # Where p is large, float32 rounds the stable ranks of momenta that have not the full rank.
        assert at_one_step == pytest.approx(of_one_process, rel=5e-3, abs=0)


@pytest.mark.parametrize("name", KINDS)
def test_stable_ranks_and_relative_sizes_are_logged_and_drawn(runs, name):
    folder, results = runs
    straight, resumed = results[0][name]["straight"], results[0][name]["resumed"]
    layers = [layer_name(matrix) for matrix in straight["p"]]
    keys = {prefix + layer for prefix in (STABLE_RANK_PREFIX, RELATIVE_SIZE_PREFIX) for layer in layers}
    assert [entry.keys() for entry in straight["sizes"]] == [keys] * 3
    assert straight["sizes"] == resumed["sizes"] == results[1][name]["straight"]["sizes"]
    assert (folder / f"{name}, straight" / UPDATES).is_file()


def test_one_process_without_fsdp_resumes_it(runs, tmp_path):
    folder, results = runs
    shutil.copytree(folder / "whole, straight" / f"checkpoint-{STEPS // 2}", tmp_path / f"checkpoint-{STEPS // 2}")
    resumed = make(tmp_path, "alone", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert_near(outcome(resumed), results[0]["whole"]["straight"])


@pytest.mark.parametrize("name", KINDS)
def test_the_learned_p_is_read_from_the_checkpoint(runs, name):
    folder, results = runs
    checkpoint = folder / f"{name}, straight" / f"checkpoint-{STEPS}"
    assert load_learned_p(checkpoint) == results[0][name]["straight"]["p"]


def test_the_file_holds_whole_matrices(runs):
    folder, _ = runs
    checkpoint = folder / "whole, straight" / f"checkpoint-{STEPS}"
    assert (checkpoint / "optimizer.safetensors").stat().st_size > 4 * 2 * 12 * 30 * 30
