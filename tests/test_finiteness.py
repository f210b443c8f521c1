"""Whether tensors are finite, or zero: the same as asking every element."""

from __future__ import annotations

import math

import pytest
import torch

from hf_schatten.optim.finite_gradients import finite_and_zero


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (40, 7), (3, 50, 60)])
def test_one_element_decides(bad, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    X.view(-1)[-1] = torch.finfo(dtype).max if bad is None else bad  # whose square or sum would not be finite
    (finite,), (zero,) = finite_and_zero([X])
    assert not zero
    assert finite.dtype == torch.bool
    assert finite.shape == ()
    assert finite.item() == (bad is None)


def test_each_of_several_for_itself():
    torch.manual_seed(0)
    tensors = [torch.randn(5, 6).mT, torch.randn(4, 4).bfloat16(), torch.empty(0, 3), torch.randn(9).double()]
    tensors += [X.clone() for X in tensors]
    tensors[4][2, 1], tensors[7][0] = math.nan, -math.inf
    tensors[5].zero_()
    finite, zero = finite_and_zero(tensors)
    assert [each.item() for each in finite] == [bool(X.isfinite().all()) for X in tensors]
    assert [each.item() for each in zero] == [not X.any() for X in tensors]
    assert finite_and_zero([]) == ([], [])
