"""DeepSpeed ZeRO, stages 1 to 3: partitions train as whole parameters do, and DeepSpeed's checkpoints hold all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from limits import MIB, limits
from processes import together
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM

import hf_schatten
from hf_schatten import UnsupportedEngineError

pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")

STEPS, LENGTH, GLOBAL_BATCH, CLIPPED = 30, 8, 16, 0.5
SHARES = 4  # of the same rows in a micro-batch, one for each of as many processes
ADAPTIVE = {"p": "adaptive", "p_max": 1000, "p_interval": 10, "p_first_step": 5}  # due: 5, 10, 20, 30
SETTINGS: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2, "accumulated": 4},
    "stage 3": {"stage": 3, "born": True, "zero": {"sub_group_size": 4000}},
}
MORE: dict[str, dict[str, Any]] = {
    "stage 1, accumulated": {"stage": 1, "accumulated": 4},
    "stage 2, fixed p": {"stage": 2, "options": {"p": 2.0}},
    "stage 2, small buffer": {"stage": 2, "options": {"p": 2.0}, "width": 260, "buffer": MIB, "steps": 3},
    "stage 3, accumulated": {"stage": 3, "accumulated": 4},
    "stage 3, one sub-group": {"stage": 3},
}


def model_of(width=28):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=63,
        hidden_size=width,
        intermediate_size=width + 16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


def optimizer_of(model, options=None):
    options = ADAPTIVE if options is None else options
    return hf_schatten.create_schatten_optimizer(model, 1e-3, verbose=False, eps=1e-6, **options)


def batches(accumulated, steps=STEPS):
    """Yield global batches whose every micro-batch has the same rows for all processes."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(0, 63, (GLOBAL_BATCH // SHARES, LENGTH), generator=generator)
        rows[::2] %= 4
        yield [share.repeat(SHARES, 1) for share in rows.chunk(accumulated)]


def train_alone(accumulated=1, width=28, options=None, steps=STEPS, **_):
    model = model_of(width)
    optimizer = optimizer_of(model, options)
    for micro_batches in batches(accumulated, steps):
        for rows in micro_batches:
            (model(input_ids=rows, labels=rows).loss / accumulated).backward()
        clip_grad_norm_(model.parameters(), CLIPPED)
        optimizer.step()
        optimizer.zero_grad()
    return {
        "weights": {name: W.detach().clone() for name, W in model.named_parameters()},
        "p": optimizer.learned_p(),
        "updates": updates_of(optimizer),
        "log": [],
    }


def updates_of(optimizer):
    return {name: torch.stack(pair) for name, pair in optimizer.policy.updates.items()} if optimizer.policy else {}


def engine_of(stage, accumulated=1, width=28, options=None, zero=None, born=False, bf16=False):
    """Return an engine of DeepSpeed and the optimizer in it; where it is ``born`` so, the model was never whole."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.comm.torch

    deepspeed.comm.torch.build_shm_op = lambda: None  # which compiles for a minute what tests do not need
    config = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size() // accumulated,
        "gradient_accumulation_steps": accumulated,
        "gradient_clipping": CLIPPED,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **(zero or {})},
    }
    deepspeed.init_distributed("gloo")
    model = model_of(width)
    if born:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
        assert not model.lm_head.weight.numel()
    optimizer = optimizer_of(model, options)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, optimizer


def gathered(engine):
    import deepspeed

    weights = {}
    for name, W in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([W]):
            weights[name] = W.detach().clone()
    return weights


def steps_of(engine, accumulated, steps):
    for micro_batches in steps:
        for rows in micro_batches:
            share = rows.chunk(dist.get_world_size())[dist.get_rank()]
            engine.backward(engine(input_ids=share, labels=share).loss)
            engine.step()


def train(accumulated=1, steps=STEPS, buffer=None, **settings):
    engine, optimizer = engine_of(accumulated=accumulated, **settings)
    computed, moved = [], []
    direction, exchange = optimizer.direction, dist.all_to_all_single

    def count_work(momenta, p):
        computed.append(momenta.numel())
        return direction(momenta, p)

    def count_bytes(output, sent, *args, **kwargs):
        moved.append(sent.numel() * sent.element_size())
        return exchange(output, sent, *args, **kwargs)

    optimizer.direction, dist.all_to_all_single = count_work, count_bytes
    try:
        with limits(**({"buffer": buffer} if buffer else {})):
            steps_of(engine, accumulated, batches(accumulated, steps))
    finally:
        dist.all_to_all_single = exchange
    return {
        "weights": gathered(engine),
        "p": optimizer.learned_p(),
        "updates": updates_of(optimizer),
        "computed": sum(computed),
        "moved": moved,
        "momentum": sum(state["momentum"].numel() for state in optimizer.state.values() if "momentum" in state),
        "steps": optimizer.steps_taken(),
    }


def resume(folder, **settings):
    """Return the weights of a run that goes on after a save, and of one that resumes there."""
    engine, optimizer = engine_of(**settings)
    every = list(batches(1))
    steps_of(engine, 1, every[:15])
    engine.save_checkpoint(folder, tag="15")
    steps_of(engine, 1, every[15:])
    again, fresh = engine_of(**settings)
    again.load_checkpoint(folder, tag="15")
    loaded = fresh.learned_p()
    steps_of(again, 1, every[15:])
    state, restored = (dict(enumerate(each.state.values())) for each in (optimizer, fresh))
    same = all(torch.equal(value, restored[i][key]) for i, s in state.items() for key, value in s.items())
    return {"went on": gathered(engine), "resumed": gathered(again), "same state": same, "p": loaded}


def train_all(names, folder):
    every = SETTINGS | MORE
    results: dict[str, Any] = {name: train(**every[name]) for name in names}
    if folder:
        for stage in (2, 3):
            results[f"resumed {stage}"] = resume(str(Path(folder) / str(stage)), stage=stage)
    return results | {"refused": refusals()}


def refusals():
    messages = []
    for options in ({"p": 2.0, "precondition": "adam"}, {"p": 2.0, "step_rule": "ball", "coupling_order": 2}):
        engine, _ = engine_of(2, options=options)
        with pytest.raises(UnsupportedEngineError) as error:
            steps_of(engine, 1, batches(1, 1))
        messages.append(str(error.value))
    for zero, known in (({"round_robin_gradients": True}, True), ({}, False)):
        engine, optimizer = engine_of(2, zero=zero, options={"p": 2.0})
        optimizer.parameter_of = optimizer.parameter_of if known else None
        with pytest.raises(UnsupportedEngineError) as error:
            steps_of(engine, 1, batches(1, 1))
        messages.append(str(error.value))
    return messages


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return together(train_all, 2, folder, list(SETTINGS), str(folder))


def assert_same(name, one, result):
    s, expected = ({key: 1 / p for key, p in each["p"].items()} for each in (result, one))
    assert s.keys() == expected.keys()
    assert max(abs(s[key] - expected[key]) for key in s) <= 1e-6
    for key, weights in one["weights"].items():
        distance = (result["weights"][key] - weights).norm() / weights.norm()
        assert distance <= 1e-5, (name, key)
    assert result["updates"].keys() == one["updates"].keys()
    for key, expected_update in one["updates"].items():
        torch.testing.assert_close(result["updates"][key], expected_update, rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_and_p_are_those_of_one_process(name, pair):
    one = train_alone(**SETTINGS[name])
    for result in pair:
        assert_same(name, one, result[name])
        assert result[name]["steps"] == STEPS
    inside = {round(p, 3) for p in one["p"].values() if 1.002 < p < 500}
    assert len(inside) >= 3


def test_each_matrix_is_computed_once_and_moved_twice_and_momentum_is_sharded(pair):
    matrices = sum(W.numel() for name, W in pair[0]["stage 1"]["weights"].items() if "_proj" in name)
    for name in SETTINGS:
        results = [result[name] for result in pair]
        assert sum(result["computed"] for result in results) == STEPS * matrices
        kept = sum(result["momentum"] for result in results)
        assert matrices <= kept <= 1.02 * matrices  # DeepSpeed fills partitions up
        assert max(result["momentum"] for result in results) <= 0.52 * kept
        moved = sum(sum(result["moved"]) for result in results)
        due = 4 * 2 * 4 * matrices  # on each of four, gradients and weights
        assert moved == STEPS * 2 * 4 * matrices + due


def test_resuming_is_exact(pair):
    for result in pair:
        for stage in (2, 3):
            ends = result[f"resumed {stage}"]
            assert ends["same state"]
            for name, W in ends["went on"].items():
                assert torch.equal(W, ends["resumed"][name]), (stage, name)
            assert len({round(p, 3) for p in ends["p"].values()}) >= 3


def test_what_is_not_supported_is_refused_by_name(pair):
    preconditioned, coupled, reordered, unknown = pair[0]["refused"]
    assert "precondition='adam' is not supported where the parameters are sharded" in preconditioned
    assert "coupling_order=2 is not supported where" in coupled
    assert "round_robin_gradients: leave it out" in reordered
    assert "make it by hf_schatten.create_schatten_optimizer(model)" in unknown


@pytest.mark.slow
def test_more_settings_and_four_processes(tmp_path):
    every = SETTINGS | MORE
    results = together(train_all, 4, tmp_path, list(every), None)
    for name, settings in every.items():
        one = train_alone(**settings)
        for result in results:
            assert_same(name, one, result[name])
    small = [max(result["stage 2, small buffer"]["moved"]) for result in results]
    assert max(small) <= 2 * max(MIB, 4 * 260 * 276)


@pytest.mark.slow
def test_more_settings_on_two_processes(tmp_path):
    results = together(train_all, 2, tmp_path, list(MORE), None)
    for name, settings in MORE.items():
        one = train_alone(**settings)
        for result in results:
            assert_same(name, one, result[name])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_trains_within_its_rounding(stage, tmp_path):
    options = {**ADAPTIVE, "p_first_step": 3}
    results = together(_in_bfloat16, 2, tmp_path, stage, options)
    one = train_alone(steps=20, options=options)
    for result in results:
        assert result["p"] == results[0]["p"]
        for name, weights in one["weights"].items():
            distance = (result["weights"][name].float() - weights).norm() / weights.norm()
            assert distance <= 2e-2, name


def _in_bfloat16(stage, options):
    return train(stage=stage, steps=20, options=options, bf16=True)
