"""Several processes share the updates: the same weights as one process, and each its part of the work."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from limits import MIB, limits
from processes import together
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

import hf_schatten
from hf_schatten.distributed.owners import BUFFER, MOST_SHARING, assign, sharing_groups
from hf_schatten.distributed.replicated import _ALL_GATHER, rounds_of

STEPS = 3
SETTINGS = {
    "pinned": {"p": 3.0},
    "small buffer": {"p": 3.0, "buffer": MIB},
    "preconditioned": {"p": 3.0, "precondition": "adam", "p_overrides": ["*.c_proj:inf"]},
    "ball": {"p": 2.0, "step_rule": "ball"},
    "coupled": {"p": 2.0, "step_rule": "regularized", "coupling_order": 2, "coupling_weights": "sqrt_n_over_m"},
    "max-coupled": {"p": 2.0, "step_rule": "ball", "coupling_order": math.inf},
    "not shared": {"p": 3.0, "share_work": False},
    "a NaN": {"p": 2.0, "bad_step": 1},
    "bfloat16": {"p": 2.0, "dtype": torch.bfloat16},
    "wide": {"p": 3.0, "width": 256, "buffer": 2 * MIB},
    # A matrix of 256 by 1024 in float32 fills the buffer, so that those of two processes travel one after another.
    "one by one": {"p": 3.0, "width": 256, "buffer": MIB},
}


def model_of(width=32, layers=2, dtype=torch.float32):
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=2, vocab_size=30, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).to(dtype)


def train(dtype=torch.float32, width=32, bad_step=None, **options):
    """Take steps with random gradients, the same on every process; return weights, work and collectives."""
    model = model_of(width, dtype=dtype)
    optimizer = hf_schatten.create_schatten_optimizer(model, 1e-2, verbose=False, **options)
    generator = torch.Generator().manual_seed(1)
    gathered, broadcast, peers = [], [], set()
    original, original_broadcast = getattr(dist, _ALL_GATHER), dist.broadcast

    def count(output, sent, **kwargs):
        gathered.append((output.numel(), output.element_size()))
        peers.add(kwargs["group"].size())
        return original(output, sent, **kwargs)

    def count_broadcast(buffer, **kwargs):
        broadcast.append((buffer.numel(), buffer.element_size()))
        return original_broadcast(buffer, **kwargs)

    setattr(dist, _ALL_GATHER, count)
    dist.broadcast = count_broadcast
    flops = FlopCounterMode(display=False)
    try:
        for step in range(STEPS):
            for number, parameter in enumerate(model.parameters()):
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
                if step == bad_step and number == 4:
                    parameter.grad.fill_(math.nan)
            with flops:
                optimizer.step()
    finally:
        setattr(dist, _ALL_GATHER, original)
        dist.broadcast = original_broadcast
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "flops": flops.get_total_flops(),
        "gathered": gathered,
        "broadcast": broadcast,
        "peers": peers,
        "skipped": optimizer.skipped_steps(),
    }


def train_some(
    names: Collection[str] = SETTINGS.keys(), most_sharing: int = MOST_SHARING
) -> dict[str, dict[str, Any]]:
    """Return what some settings give, where no more processes share with each other."""
    results = {}
    for name in names:
        options = dict(SETTINGS[name])
        with limits(buffer=options.pop("buffer", BUFFER), most_sharing=most_sharing):
            results[name] = train(**options)
    return results


@pytest.fixture(scope="module")
def alone():
    """Return what one process gets of each setting."""
    return train_some()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return what each of two processes gets of each setting."""
    return together(train_some, 2, tmp_path_factory.mktemp("pair"))


def assert_same_weights(alone, results):
    for name, of_one in alone.items():
        tolerances = {"atol": 2e-3, "rtol": 2e-2} if name == "bfloat16" else {"atol": 1e-7, "rtol": 1e-5}
        for key, weights in of_one["weights"].items():
            for result in results:
                torch.testing.assert_close(result[name]["weights"][key], weights, **tolerances)
                assert torch.equal(result[name]["weights"][key], results[0][name]["weights"][key]), name


def test_the_weights_are_those_of_one_process(alone, pair):
    assert_same_weights(alone, pair)


@pytest.mark.slow
def test_the_weights_of_three_processes_are_those_of_one(alone, tmp_path):
    assert_same_weights(alone, together(train_some, 3, tmp_path))


def test_each_process_computes_its_part_and_buffers_are_bounded(alone, pair):
    for result in pair:
        assert result["wide"]["flops"] <= (1 / 2 + 0.1) * alone["wide"]["flops"]
        bytes_of_step = 4 * 2 * 12 * 256 * 256  # of all matrices in float32
        gathered = [numbers * size for numbers, size in result["wide"]["gathered"]]
        assert bytes_of_step <= sum(gathered) / STEPS <= 1.1 * bytes_of_step
        assert max(gathered) <= 2 * MIB
        assert not result["not shared"]["gathered"]
        assert {size for _, size in result["bfloat16"]["gathered"]} == {2}
    assert not alone["wide"]["gathered"]


def test_what_does_not_fit_into_the_buffer_together_travels_one_by_one(alone, pair):
    for result in pair:
        sent = [numbers * size for numbers, size in result["one by one"]["broadcast"]]
        assert sent
        assert max(sent) <= MIB
        gathered = [numbers * size for numbers, size in result["one by one"]["gathered"]]
        assert max(gathered) <= MIB
        assert sum(sent) + sum(gathered) <= 1.1 * STEPS * 4 * 2 * 12 * 256 * 256
        assert result["one by one"]["flops"] <= (1 / 2 + 0.1) * alone["one by one"]["flops"]
        assert not result["wide"]["broadcast"]


IN_PAIRS = ("pinned", "coupled", "max-coupled", "a NaN", "one by one")


def test_four_processes_share_in_pairs(alone, tmp_path):
    results = together(train_some, 4, tmp_path, IN_PAIRS, 2)
    assert_same_weights({name: alone[name] for name in IN_PAIRS}, results)
    for result in results:
        assert result["pinned"]["peers"] == {2}
        work = [of["one by one"]["flops"] for of in (result, alone)]
        assert work[0] <= (1 / 2 + 0.1) * work[1]


@pytest.mark.slow
def test_five_processes_share_in_groups_of_two_and_three(alone, tmp_path):
    results = together(train_some, 5, tmp_path, IN_PAIRS, 3)
    assert_same_weights({name: alone[name] for name in IN_PAIRS}, results)
    assert [result["pinned"]["peers"] for result in results] == [{2}] * 2 + [{3}] * 3
    whole = alone["one by one"]["flops"]
    work = [result["one by one"]["flops"] / whole for result in results]
    assert work[4] == 0  # it receives only
    assert work[:2] == work[2:4]
    assert max(work) <= 1 / 2 + 0.1


def test_a_skipped_matrix_deadlocks_nobody(alone, pair):
    assert pair[0]["a NaN"]["skipped"] == pair[1]["a NaN"]["skipped"] == alone["a NaN"]["skipped"] != {}


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_no_process_has_more_than_its_share_and_one_task(costs, processes):
    owners = assign(costs, processes)
    loads = [
        sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(processes)
    ]
    assert sum(loads) == sum(costs)
    assert max(loads) <= sum(costs) / processes + max(costs)


def test_shares_of_gpt2_small_are_even():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=12, n_embd=768))
    optimizer = hf_schatten.create_schatten_optimizer(model, p=2, verbose=False)
    costs = [matrix.cost for matrix in optimizer.matrices()]
    for processes in (2, 4, 8, 16):
        owners = assign(costs, processes)
        loads = [
            sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(processes)
        ]
        assert max(loads) <= (1 / processes + 0.1) * sum(costs)


def matrices_of(config):
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    return list(hf_schatten.create_schatten_optimizer(model, p=2, verbose=False).matrices())


GPT2_SMALL = GPT2Config(n_layer=12, n_embd=768)


@pytest.mark.parametrize(("processes", "groups"), [(8, 1), (24, 1), (1024, 32)])
def test_so_many_processes_share_that_padding_is_little(processes, groups):
    matrices = matrices_of(GPT2_SMALL)
    with limits(most_sharing=1024):
        assert sharing_groups(matrices, processes) == groups
    largest = max(math.prod(matrix.wide_shape) for matrix in matrices)
    assert processes // groups * largest <= 1.5 * sum(math.prod(matrix.wide_shape) for matrix in matrices)


@pytest.mark.parametrize(
    ("processes", "most", "groups"),
    [(16, 8, 2), (16, 6, 4), (7, 4, 2), (2, 1, 2), (17, 16, 2), (21, 16, 3), (25, 16, 2), (34, 16, 3), (64, 16, 4)],
)
def test_no_more_processes_share_than_are_allowed(processes, most, groups):
    """Groups of one size, where they are more than half as large as those of two sizes."""
    with limits(most_sharing=most):
        assert sharing_groups(matrices_of(GPT2_SMALL), processes) == groups


def test_any_number_of_processes_shares_the_work():
    matrices = matrices_of(GPT2_SMALL)
    costs = [matrix.cost for matrix in matrices]
    for processes in range(2, 65):
        groups = sharing_groups(matrices, processes)
        size, largest = processes // groups, math.ceil(processes / groups)
        assert min(processes, 7) <= size <= largest <= 16, processes
        owners = assign(costs, size)
        loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(size)]
        assert max(loads) <= (1 / largest + 0.1) * sum(costs), processes


def test_one_matrix_is_computed_by_all():
    """Its update would cross the network to save nothing."""
    optimizer = hf_schatten.SchattenP([torch.nn.Parameter(torch.zeros(4, 8))], p=2)
    assert sharing_groups(list(optimizer.matrices()), 4) == 4


def test_rounds_hold_every_matrix_once_within_the_buffer():
    optimizer = hf_schatten.create_schatten_optimizer(model_of(256), p=2, verbose=False)
    matrices = list(optimizer.matrices())
    owners = assign([matrix.cost for matrix in matrices], 3)
    with limits(buffer=MIB):
        rounds = list(rounds_of(matrices, owners, 3))
    sent = [[matrix.name for current in rounds for matrix in current[rank]] for rank in range(3)]
    for rank, names in enumerate(sent):
        expected = [matrix.name for matrix, owner in zip(matrices, owners, strict=True) if owner == rank]
        assert sorted(names) == sorted(expected)
    for current in rounds:
        for group in current:
            elements = sum(math.prod(matrix.wide_shape) for matrix in group)
            assert len(group) <= 1 or 3 * 4 * elements <= MIB
