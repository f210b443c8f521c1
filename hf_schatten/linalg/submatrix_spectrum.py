"""The spectrum of a uniformly sampled submatrix, corrected in scale and in number by two norms that are known.

Sampling is the estimate of T. Massena 2026, "Using Schatten-p norms to dynamically interpolate between Adam and Muon",
with "an extra spectral norm computation". The Frobenius norm costs nothing and anchors the curve too.
"""

from functools import lru_cache

import torch
from torch import Tensor

from hf_schatten.linalg.gram_spectrum import gram_log_spectrum
from hf_schatten.linalg.krylov_spectrum import log_frobenius_norm, spectral_norm

_FRACTION = 2  # one row in two and one column in two: an eighth of the operations
_FEWEST = 64  # rows or columns
_SEED = 0


def submatrix_spectrum(X: Tensor) -> tuple[Tensor, Tensor]:
    """Sample rows and columns of X, and correct the norms of the sample to those of X at orders 2 and ∞.

    A factor α of all singular values and a factor μ of their number shift log ‖·‖_order by ``log α + log μ / order``:
    the spectral norm determines α and the Frobenius norm μ. For a random matrix, both are what sampling took away; for
    one of low rank, from which sampling takes scale alone, μ comes out near 1.

    Args:
        X: (B, m, n) float32, m <= n, of unit scale.

    Returns:
        Logarithms of the sampled singular values and of their multiplicities, (B, r) float64.
    """
    rows, columns = (_sample(side, X.device) for side in X.shape[-2:])
    sample = X.index_select(-2, rows).index_select(-1, columns)
    log_sigma = gram_log_spectrum(sample)  # (B, r)
    largest = log_sigma.amax(-1, keepdim=True)
    frobenius = 0.5 * (2 * log_sigma).logsumexp(-1, keepdim=True)
    scale = spectral_norm(X) - largest
    number = 2 * (log_frobenius_norm(X) - frobenius - scale)
    return log_sigma + scale, number.expand_as(log_sigma)


@lru_cache(maxsize=64)
def _sample(side: int, device: torch.device) -> Tensor:
    """The sampled indices of a side, ascending, from a generator of its own, so that a resumed run repeats."""
    size = min(side, max(_FEWEST, side // _FRACTION))
    chosen = torch.randperm(side, generator=torch.Generator().manual_seed(_SEED))[:size]
    return chosen.sort().values.to(device)
