"""Spectra of X (B, m, n), m <= n, float32, of unit scale, for less than a decomposition of X.

From a block Krylov space, ``Z, (X Xᵀ) Z, …, (X Xᵀ)^{depth-1} Z`` of a random block Z: a few products of X with a thin
block (C. Musco and C. Musco 2015, "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value
Decomposition"). Random numbers have generators of their own: training does not notice, and
a resumed run repeats.
"""

from functools import lru_cache

import torch
from torch import Tensor

from hf_schatten.linalg.symmetric_product import symmetric_product

_SEED = 0

_WIDTH = 32  # columns of a block: thinner ones take a CPU as long
_LANCZOS_DEPTH = 6
# Rows for each dimension of the space, up to which a float32 eigenvalue decomposition is faster on a CPU.
_WORTHWHILE = 2

_RESOLVED = 0.1  # residual of a Ritz pair, relative to its value, below which the value counts once
_CORRECTION = 4.0  # largest factor between the quadrature's energy and the true one: beyond, it is all rounding
_SHIFT = 1e-13  # of a Gram matrix's diagonal, relative to its trace: above the rounding of float64


def lanczos_spectrum(X: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate spectra by stochastic Lanczos quadrature whose large nodes count once.

    A Ritz value of the space is a node of the quadrature of ``tr f(X Xᵀ)``, weighted by its share in the random
    block (S. Ubaru, J. Chen and Y. Saad 2017, "Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature"). Of the
    few values that dominate a gradient's or an input's norms, such random weights err by tens of per cent. Nodes with
    a small residual are singular values: these count exactly once, and the others share the rest of the rank and of
    the squared Frobenius norm, both of which are known.

    Returns:
        logarithms of singular values and of their multiplicities, (B, d + 1) float64 each; all m of a small X.
    """
    if X.shape[-2] <= _WORTHWHILE * _WIDTH * _LANCZOS_DEPTH:
        log_sigma = _gram_log_spectrum(X.to(torch.float64))  # cheap, and the same to 1e-6 however a batch is cut
        return log_sigma, torch.zeros_like(log_sigma)
    energy, share, resolved = _quadrature(*_block_krylov(X, _LANCZOS_DEPTH))
    count = X.shape[-2] - resolved.sum(-1, keepdim=True)  # (B, 1), at least m - d
    missing = _squared_frobenius(X) - torch.where(resolved, energy, 0.0).sum(-1, keepdim=True)
    multiplicity = share * (count / _positive(share.sum(-1, keepdim=True)))
    correction = missing / _positive((multiplicity * energy).sum(-1, keepdim=True))
    energy = torch.where(resolved, energy, energy * correction.clamp(1 / _CORRECTION, _CORRECTION))
    # Of a degenerate singular value the space holds some copies, resolved, and no node that the rest could go to.
    homeless = torch.where(resolved.all(-1, keepdim=True), count, 0.0)
    energy = torch.cat([energy, _positive(missing / count)], -1)
    multiplicity = torch.cat([torch.where(resolved, 1.0, multiplicity), homeless], -1)
    return 0.5 * energy.log(), _positive(multiplicity).log()


def _gram_log_spectrum(X: Tensor) -> Tensor:
    """Logarithms of all singular values, (B, m) float64, ascending, from the Gram matrix in X's precision."""
    # In float32, those below 3e-4 of the largest are rounding. What rounds above zero makes up for the small values
    # that are lost: the nuclear norms of a small GPT-2's gradients err by 0.4 %, by 1 to 3 % where both are dropped.
    eigenvalues = torch.linalg.eigvalsh(symmetric_product(X, X.mT)).to(torch.float64)
    return 0.5 * eigenvalues.clamp_min(torch.finfo(torch.float64).tiny).log()


def _squared_frobenius(X: Tensor) -> Tensor:
    """Squared Frobenius norms, (B, 1) float64."""
    # In float64 from the norms of the rows on: without a copy of X, and exact enough to subtract from.
    return torch.linalg.vector_norm(X, dim=-1).to(torch.float64).square().sum(-1, keepdim=True)


def _block_krylov(X: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """What X Xᵀ is on the space with the orthonormal basis K (m, d), by block Lanczos with full reorthogonalisation.

    Returns Kᵀ X Xᵀ K, (B, d, d) float64, and the part of X Xᵀ times the last block that leaves the space, (B, m, w).
    """
    block = _random_orthonormal(X.shape[-2], X.device).expand(len(X), -1, -1)
    basis, images = block, []
    for step in range(depth):
        images.append(X.mT @ block)  # (B, n, w)
        residual = _orthogonalised(X @ images[-1], basis)
        if step < depth - 1:
            # A block that almost lies in the space is mostly rounding: orthogonalise what remains once more.
            block = _orthonormal(_orthogonalised(_orthonormal(residual), basis))
            basis = torch.cat([basis, block], -1)
    image = torch.cat(images, -1).to(torch.float64)  # Xᵀ K, (B, n, d): not squared yet, so that small values survive
    return image.mT @ image, residual


def _quadrature(rayleigh: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The d Ritz values, ascending, the shares of those that are no singular value, and whether each is one."""
    energy, vectors = torch.linalg.eigh(rayleigh)  # (B, d), (B, d, d)
    energy = _positive(energy)
    last = vectors[:, -_WIDTH:]  # only the last block's image leaves the space
    resolved = torch.linalg.vector_norm(residual.to(last.dtype) @ last, dim=-2) < _RESOLVED * energy
    return energy, torch.where(resolved, 0.0, vectors[:, :_WIDTH].square().sum(-2)), resolved


def _orthogonalised(block: Tensor, basis: Tensor) -> Tensor:
    """Remove from a block (B, m, w) its part in an orthonormal basis (B, m, d), twice: once leaves rounding."""
    for _ in range(2):
        block = block - basis @ (basis.mT @ block)
    return block


def _orthonormal(block: Tensor) -> Tensor:
    """Return an orthonormal basis of what the columns of a block (B, m, w) span."""
    if block.device.type == "cpu":
        return torch.linalg.qr(block).Q
    return orthonormalised_by_cholesky(block)  # QR decompositions would follow one another there


def orthonormalised_by_cholesky(block: Tensor) -> Tensor:
    """Return an orthonormal basis of a block's columns, (B, m, w) float32, by float64 products and triangular solves.

    A column that depends on those before it, to a relative 3e-7, comes out shorter or as zero (T. Fukaya et al. 2020,
    "Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices").
    """
    Q = block.to(torch.float64)
    for _ in range(2):
        gram = Q.mT @ Q  # (B, w, w)
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(_positive(_SHIFT * diagonal.sum(-1, keepdim=True)))
        L = torch.linalg.cholesky_ex(gram).L  # whose errors would have to be waited for
        Q = torch.linalg.solve_triangular(L.mT, Q, upper=True, left=False)
    return Q.to(block.dtype)


def _positive(x: Tensor) -> Tensor:
    return x.clamp_min(torch.finfo(x.dtype).tiny)


@lru_cache(maxsize=64)
def _random_orthonormal(rows: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.linalg.qr(torch.randn(rows, _WIDTH, generator=generator)).Q.to(device)
