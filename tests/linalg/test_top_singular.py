"""`top_singular_direction` against the SVD."""

import pytest
import torch

from hf_schatten.linalg import top_singular_direction

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (2, 3, 5, 8), (1, 7), (7, 1)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_agrees_with_the_svd(shape: tuple[int, ...], scale: float) -> None:
    X = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, sigma, Vh = torch.linalg.svd(X, full_matrices=False)
    sigma[..., 1:] *= 0.9  # a gap that 128 steps of power iteration resolve
    X = (U * sigma.unsqueeze(-2)) @ Vh * scale
    torch.testing.assert_close(top_singular_direction(X), U[..., :1] @ Vh[..., :1, :], rtol=1e-4, atol=1e-4)


def test_top_direction_may_miss_the_longest_row() -> None:
    X = torch.block_diag(torch.ones(2, 2), torch.tensor([[1.9]]))
    expected = torch.block_diag(torch.full((2, 2), 0.5), torch.zeros(1, 1))
    torch.testing.assert_close(top_singular_direction(X, squarings=9), expected, rtol=1e-5, atol=1e-5)


def test_zero_stays_zero() -> None:
    assert not top_singular_direction(torch.zeros(2, 3, 4)).any()
