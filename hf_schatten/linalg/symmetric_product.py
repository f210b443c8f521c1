"""Products of matrices that are known to be symmetric, at less than the price of a full product on a CPU."""

from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from hf_schatten.linalg.accelerated import kernels_of
from hf_schatten.linalg.many_matrices import weighted_sum

# Into how many blocks a side the product is divided: 3 save a third of the operations. On two cores, spectral_power
# took 0.86 to 0.92 of its time with it at m = 768, and up to 1.3 times as long at m = 256; half precision lost too.
_BLOCKS = 3
_SMALLEST_BLOCK = 256  # rows
_SMALLEST_HALVED = 1024  # rows, of matrices in half precision on a GPU


def symmetric_product(A: Tensor, B: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``A @ B`` (B, m, m) where it is known to be symmetric: only blocks on and above the diagonal are taken.

    A is (B, m, n), and B, (B, n, m), is ``A.mT`` or, contiguous as A is, a polynomial of A. On an accelerator rows of
    A are contiguous. ``out`` shares no memory with them, and may be float32 where they are in half precision.
    """
    kernels = _kernels_for(A)
    wider = out is not None and out.dtype != A.dtype
    if kernels is not None and (wider or not _is_as_fast_in_full(A)):
        product = A.new_empty(*A.shape[:-1], A.shape[-2]) if out is None else out
        return kernels.symmetric(A, B if B.shape == A.shape and B.stride(-1) == 1 else B.mT, product)
    if out is not None and wider:
        A, B = A.to(out.dtype), B.to(out.dtype)
    m = A.shape[-2]
    product = A.new_empty(*A.shape[:-1], m) if out is None else out
    if not _is_taken_in_blocks(A):
        return torch.bmm(A, B, out=product)
    edges = [m * k // _BLOCKS for k in range(_BLOCKS + 1)]
    for top, bottom in pairwise(edges):
        product[:, top:bottom, top:] = A[:, top:bottom] @ B[..., top:]
        product[:, bottom:, top:bottom] = product[:, top:bottom, bottom:].mT
    return product


def commuting_product(A: Tensor, B: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``A @ B`` of symmetric matrices (B, m, m) that commute, so that it is symmetric but for rounding.

    In half precision all of it is computed. A triangle and its mirror image would take half as much, but with them
    small singular values have up to twice the error; ``tests/linalg/test_triton_kernels.py`` fails.
    """
    if A.dtype.itemsize < torch.float32.itemsize:
        return torch.bmm(A, B) if out is None else torch.bmm(A, B, out=out)
    return symmetric_product(A, B, out)


def symmetric_polynomial(A: Tensor, a: Tensor, b: Tensor, c: Tensor, out: Tensor) -> Tensor:
    """Write ``a I + b A + c A²`` of symmetric A (B, m, m) into ``out`` and return it; a, b, c are (B,), or (1,)."""
    if len(b) == 1 and A.device.type == "cpu" and not _is_taken_in_blocks(A):
        if c.item():
            torch.baddbmm(A, A, A, beta=b.item(), alpha=c.item(), out=out)
        else:  # torch 2.13 leaves out as it is where both factors are 0, in half precision
            torch.mul(A, b.item(), out=out)
        out.diagonal(dim1=-2, dim2=-1).add_(a[:, None])
        return out
    kernels = _kernels_for(A)
    if kernels is not None:
        return kernels.symmetric(A, A, out, (a, b, c))
    return combined_with_square(A, symmetric_product(A, A, out=out), a, b, c)


def combined_with_square(A: Tensor, square: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Write ``a I + b A + c A²`` of A (B, m, m), whose square is known, in its place and return it."""
    weights = torch.stack([b, c], dim=1).expand(len(A), -1).contiguous()
    weighted_sum(A, square[None], weights, square, diagonal=a.expand(len(A)).contiguous())
    return square


def _kernels_for(A: Tensor) -> ModuleType | None:
    return None if A.dtype == torch.float64 else kernels_of(A.device)


def _is_as_fast_in_full(A: Tensor) -> bool:
    """Return whether cuBLAS takes no longer for both halves than the kernel for one: so on an H200."""
    return A.dtype.itemsize < torch.float32.itemsize and A.shape[-2] < _SMALLEST_HALVED


def _is_taken_in_blocks(A: Tensor) -> bool:
    large = A.shape[-2] >= _BLOCKS * _SMALLEST_BLOCK
    return large and A.device.type == "cpu" and A.dtype.itemsize >= torch.float32.itemsize
