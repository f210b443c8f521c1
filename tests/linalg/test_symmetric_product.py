"""Symmetric products against the plain ones, below and above the size from which blocks are used."""

from __future__ import annotations

import pytest
import torch

from hf_schatten.linalg.symmetric_product import symmetric_product


@pytest.mark.parametrize("m", [1, 63, 768, 800])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_equals_the_plain_product(m, dtype):
    torch.manual_seed(0)
    A = torch.randint(-3, 4, (2, m, 7)).to(dtype)  # small integers: every dtype computes them exactly
    expected = A.double() @ A.mT.double()
    torch.testing.assert_close(symmetric_product(A, A.mT).double(), expected, atol=0.0, rtol=0.0)
    out = torch.full((2, m, m), torch.nan, dtype=dtype)
    assert symmetric_product(A, A.mT, out=out) is out
    torch.testing.assert_close(out.double(), expected, atol=0.0, rtol=0.0)


def test_commuting_factors():
    torch.manual_seed(0)
    A = torch.randn(1, 770, 770, dtype=torch.float64) / 770**0.5
    P = A + A.mT
    torch.testing.assert_close(symmetric_product(P, P @ P), P @ P @ P, atol=1e-8, rtol=1e-8)
