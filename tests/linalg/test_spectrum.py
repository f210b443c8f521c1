"""Spectra and Schatten norms in log space, against torch's SVD, the definition in float64 and each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_schatten.linalg import estimated_spectra
from hf_schatten.linalg.estimated_spectra import orthonormalised_by_cholesky
from hf_schatten.linalg.iterate_norms import iterate_log_norms
from hf_schatten.linalg.spectrum import (
    LOG_NORM_ESTIMATORS,
    exact_log_norms,
    exact_log_spectrum,
    log_schatten_norm,
)
from hf_schatten.option_names import EstimatorName


@pytest.mark.parametrize("shape", [(20, 20), (7, 30), (30, 7), (3, 5, 9), (1, 4), (4, 1)])
def test_the_spectrum_is_the_svds(shape):
    torch.manual_seed(0)
    X = torch.randn(shape)
    expected = torch.linalg.svdvals(X.double()).flip(-1)
    torch.testing.assert_close(exact_log_spectrum(X).exp(), expected, atol=1e-7, rtol=1e-7)


def test_a_rank_deficient_matrix_has_zero_singular_values():
    X = torch.ones(4, 6)
    spectrum = exact_log_spectrum(X).exp()
    torch.testing.assert_close(spectrum, torch.tensor([0, 0, 0, math.sqrt(24)]).double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("order", [0.8, 1.0, 1.3, 2.0, 7.0, 60.0])
def test_a_norm_is_the_p_norm_of_the_singular_values(order):
    torch.manual_seed(0)
    sigma = torch.rand(5, 12, dtype=torch.float64)
    norm = log_schatten_norm(sigma.log(), torch.tensor([1 / order], dtype=torch.float64)).exp().squeeze(-1)
    torch.testing.assert_close(norm, (sigma**order).sum(-1) ** (1 / order), atol=1e-12, rtol=1e-10)


def test_order_infinity_is_the_spectral_norm_also_with_multiplicity():
    log_spectrum = torch.tensor([0.5, 2.0, 2.0, -math.inf], dtype=torch.float64)
    norm = log_schatten_norm(log_spectrum, torch.tensor([0.0, 1e-300], dtype=torch.float64))
    torch.testing.assert_close(norm, torch.tensor([2.0, 2.0]).double(), atol=1e-12, rtol=1e-12)


def test_a_huge_norm_does_not_overflow():
    log_spectrum = torch.tensor([600.0, 500.0], dtype=torch.float64)
    norm = log_schatten_norm(log_spectrum, torch.tensor([0.5, 0.0], dtype=torch.float64))
    torch.testing.assert_close(norm, torch.tensor([600.0, 600.0]).double(), atol=1e-9, rtol=1e-9)


def test_a_matrix_with_nan_has_a_nan_spectrum_and_spoils_no_other():
    X = torch.ones(2, 3, 3)
    X[0, 1, 1] = torch.nan
    spectrum = exact_log_spectrum(X)
    assert spectrum[0].isnan().all()
    assert not spectrum[1].isnan().any()


def test_multiplicities_count_a_value_several_times():
    spectrum = torch.tensor([1.0, 2.0], dtype=torch.float64).log()
    multiplicity = torch.tensor([3.0, 2.0], dtype=torch.float64).log()
    inverse_orders = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    norms = log_schatten_norm(spectrum, inverse_orders, multiplicity).exp()
    torch.testing.assert_close(norms, torch.tensor([2.0, 11**0.5, 7.0]).double(), atol=1e-12, rtol=1e-7)


# The estimators. Inverse orders of the criterion: inputs from 0 to 5/6, gradients from 1/2 to 4/3.
INVERSE_ORDERS = torch.tensor([0.0, 0.01, 0.1, 0.25, 0.35, 0.5, 0.6, 0.75, 0.9, 1.0, 1.2, 4 / 3], dtype=torch.float64)
ESTIMATORS = sorted(set(LOG_NORM_ESTIMATORS) - {"auto"})  # which is one of the others
ROWS, COLUMNS = 400, 500  # above the size from which the Krylov space is worth its while


@pytest.fixture(autouse=True)
def _one_thread():
    """On a busy machine, the threads of small products wait for each other far longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_spectrum(sigma: Tensor) -> Tensor:
    """Return a float32 matrix (ROWS, COLUMNS) with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(5)
    U, V = (
        torch.linalg.qr(torch.randn(side, ROWS, generator=generator, dtype=torch.float64)).Q
        for side in (ROWS, COLUMNS)
    )
    return ((U * sigma) @ V.mT).float()


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


INDEX = torch.arange(1, ROWS + 1, dtype=torch.float64)
MATRICES = {
    "gaussian": lambda: gaussian(ROWS, COLUMNS),
    "log-uniform, condition 1e4": lambda: with_spectrum(10 ** (-4 * (INDEX - 1) / (ROWS - 1))),
    "low rank plus noise": lambda: with_spectrum((INDEX <= 8).double()) + 6e-5 * gaussian(ROWS, COLUMNS),
    "power law": lambda: with_spectrum(1 / INDEX),
    "degenerate": lambda: with_spectrum(torch.ones(ROWS)),
    "one value above many equal ones": lambda: with_spectrum(torch.where(INDEX > 1, 0.01, 1.0)),
}
# Largest error of log ‖X‖_order: spectral norm, orders from 2, from 1, from 3/4.
TOLERANCES = {
    "exact": (1e-9, 1e-9, 1e-9, 1e-9),
    "lanczos": (2e-3, 5e-3, 0.012, 0.04),
    "iterates": (2e-3, 2e-3, 0.01, 0.06),
}


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimate_is_close_to_the_exact_norms(name: EstimatorName, matrix):
    X = MATRICES[matrix]()
    error = (LOG_NORM_ESTIMATORS[name](X, INVERSE_ORDERS) - exact_log_norms(X, INVERSE_ORDERS)).abs()
    worst = [error[INVERSE_ORDERS.le(bound)].max().item() for bound in (0, 0.5, 1, 4 / 3)]
    assert all(e <= t for e, t in zip(worst, TOLERANCES[name], strict=True)), worst


@pytest.mark.parametrize("matrix", MATRICES)
def test_products_of_half_precision_give_the_norms_that_float32_gives(matrix):
    """A GPU takes them; the smallest singular values are 1e-4 of the largest, and their squares would be lost."""
    X = MATRICES[matrix]()
    X = X / X.abs().max()
    half = iterate_log_norms(X[None], INVERSE_ORDERS, torch.float16)
    torch.testing.assert_close(half, iterate_log_norms(X[None], INVERSE_ORDERS), atol=1.5e-3, rtol=0)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 300), (300, 1), (5, 7), (64, 65), (128, 130), (193, 194), (385, 390), (500, 400)]
)
def test_every_shape_and_its_transpose(name, shape):
    X = gaussian(*shape)
    norms = LOG_NORM_ESTIMATORS[name](X, INVERSE_ORDERS)
    assert norms.dtype == torch.float64
    assert norms.shape == INVERSE_ORDERS.shape
    tolerance = TOLERANCES[name][-1] + 0.01
    torch.testing.assert_close(norms, exact_log_norms(X, INVERSE_ORDERS), atol=tolerance, rtol=0)
    # The products of a transpose may be summed in another order.
    torch.testing.assert_close(LOG_NORM_ESTIMATORS[name](X.mT, INVERSE_ORDERS), norms, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_rank_one(name):
    X = gaussian(ROWS, 1) @ gaussian(1, COLUMNS)
    norms = LOG_NORM_ESTIMATORS[name](X, INVERSE_ORDERS)
    frobenius = torch.linalg.matrix_norm(X.double()).log()
    # A float32 Gram matrix sees no singular value below 3e-4 of the largest, and reports its rounding instead.
    atol = 0.05 if name == "iterates" else 5e-3
    wanted = INVERSE_ORDERS <= 1
    torch.testing.assert_close(norms[wanted], frobenius.expand_as(norms)[wanted], atol=atol, rtol=0)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_scale_shifts_the_logarithm(name, scale):
    X = gaussian(ROWS, COLUMNS)
    X = X / X.abs().max()
    norms, scaled = (LOG_NORM_ESTIMATORS[name](Y, INVERSE_ORDERS) for Y in (X, X * scale))
    torch.testing.assert_close(scaled, norms + math.log(scale), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_other_dtypes(name, dtype):
    X = gaussian(ROWS, COLUMNS).to(dtype)
    norms = LOG_NORM_ESTIMATORS[name](X, INVERSE_ORDERS)
    torch.testing.assert_close(norms, LOG_NORM_ESTIMATORS[name](X.float(), INVERSE_ORDERS), atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(8, 12), (390, 390)])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_batch_member_depends_on_itself_alone(name, shape):
    X = torch.stack([gaussian(*shape), gaussian(*shape).cumsum(-1), gaussian(*shape) ** 3])
    batch = torch.cat([X, torch.zeros(1, *shape), torch.full((1, *shape), 1e20), X[:2] * 1e-20])
    batch[5, 0, 0] = torch.nan
    batch[6, -1, -1] = torch.inf
    norms = LOG_NORM_ESTIMATORS[name](batch[None], INVERSE_ORDERS)
    assert norms.shape == (1, 7, len(INVERSE_ORDERS))
    for member, norm in zip(X, norms[0], strict=False):
        torch.testing.assert_close(norm, LOG_NORM_ESTIMATORS[name](member, INVERSE_ORDERS), atol=1e-3, rtol=0)
    assert not norms[0, 3].isfinite().any()
    assert norms[0, 4].isfinite().all()
    assert norms[0, 5:].isnan().all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimate_repeats_and_leaves_the_generator_alone(name):
    X = gaussian(ROWS, COLUMNS)
    first = LOG_NORM_ESTIMATORS[name](X, INVERSE_ORDERS)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    torch.testing.assert_close(LOG_NORM_ESTIMATORS[name](X, INVERSE_ORDERS), first, atol=0, rtol=0)
    torch.testing.assert_close(torch.get_rng_state(), state, atol=0, rtol=0)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_argument_is_not_written_to(name):
    X = gaussian(ROWS, COLUMNS)
    copy = X.clone()
    LOG_NORM_ESTIMATORS[name](X, INVERSE_ORDERS)
    torch.testing.assert_close(X, copy, atol=0, rtol=0)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def operations_of(X):
    LOG_NORM_ESTIMATORS["auto"](X, INVERSE_ORDERS)  # makes constants
    with Operations() as seen:
        norms = LOG_NORM_ESTIMATORS["auto"](X, INVERSE_ORDERS)
    assert norms.shape == (len(X), len(INVERSE_ORDERS))
    return seen.names


def test_an_accelerator_decomposes_no_matrices_one_by_one():
    """A device without memory stands for it: the same number of operations for one matrix and for many."""
    names = operations_of(torch.empty(48, 768, 3072, device="meta"))
    assert len(names) == len(operations_of(torch.empty(1, 768, 3072, device="meta"))) < 200
    assert not [name for name in names if "linalg" in name and "vector_norm" not in name and "vecdot" not in name]


def test_large_matrices_are_decomposed_where_products_of_their_gram_matrices_take_longer():
    names = operations_of(torch.empty(1, 4096, 4096, device="meta"))
    assert "aten::_linalg_eigh" in names


def test_by_default_a_cpu_takes_lanczos():
    X = gaussian(ROWS, COLUMNS)
    found, expected = (LOG_NORM_ESTIMATORS[name](X, INVERSE_ORDERS) for name in ("auto", "lanczos"))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("rank", [16, 5, 0])
def test_orthonormalisation_by_cholesky(rank):
    """What an accelerator uses: the same space as a QR decomposition's, whatever the condition; zero where it ends."""
    torch.manual_seed(0)
    scales = torch.logspace(0, -6, 16)
    block = torch.randn(3, 200, rank) @ torch.randn(3, rank, 16) * scales
    Q = orthonormalised_by_cholesky(block).double()
    values = torch.linalg.svdvals(Q)
    torch.testing.assert_close(values[:, :rank], torch.ones(3, rank).double(), atol=1e-5, rtol=0.0)
    assert (values[:, rank:] < 1.0 + 1e-5).all()
    assert Q.isfinite().all()
    if rank == 16:
        expected = torch.linalg.qr(block.double()).Q
        torch.testing.assert_close(Q @ Q.mT, expected @ expected.mT, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("rank", [500, 100, 3])
def test_estimates_do_not_depend_on_how_blocks_are_orthonormalised(rank, monkeypatch):
    torch.manual_seed(0)
    X = (torch.randn(500, rank) * torch.logspace(0, -2, rank)) @ torch.randn(rank, 600)
    orders = torch.linspace(0, 4 / 3, 9, dtype=torch.float64)
    expected = LOG_NORM_ESTIMATORS["lanczos"](X, orders)
    monkeypatch.setattr(estimated_spectra, "_orthonormal", orthonormalised_by_cholesky)
    torch.testing.assert_close(LOG_NORM_ESTIMATORS["lanczos"](X, orders), expected, atol=1e-3, rtol=0.0)
