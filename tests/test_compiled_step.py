"""A training step under ``torch.compile``: the optimizer's part runs as it is."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_schatten import create_schatten_optimizer


@pytest.mark.filterwarnings("ignore")  # of the compiler, on what it leaves out
@pytest.mark.parametrize("compiled", ["training step", "optimizer's step"])
def test_weights_and_p_are_those_of_an_eager_step(compiled, gpt2):
    gpt2.train()
    for module in gpt2.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.manual_seed(0)
    rows = torch.randint(gpt2.config.vocab_size, (4, 8))

    def trained(compiled):
        model = copy.deepcopy(gpt2)
        optimizer = create_schatten_optimizer(model, 1e-2, p="adaptive", p_interval=3, p_first_step=2, verbose=False)
        compile_one = compiled == "optimizer's step"
        step = torch.compile(optimizer.step, backend="eager") if compile_one else optimizer.step

        def train():
            model(input_ids=rows, labels=rows).loss.backward()
            step()
            optimizer.zero_grad()

        train_once = torch.compile(train, backend="eager") if compiled == "training step" else train
        for _ in range(7):
            train_once()
        assert optimizer.policy.estimates == 3  # steps 2, 3 and 6
        return dict(model.named_parameters()), optimizer.learned_p()

    (expected, expected_p), (found, found_p) = trained(None), trained(compiled)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
    assert found_p == pytest.approx(expected_p, rel=1e-4, abs=1e-4)
