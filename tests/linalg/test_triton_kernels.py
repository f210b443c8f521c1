"""The Triton kernels, run by Triton's interpreter on a CPU, against torch's operations that they stand for.

The interpreter of Triton 3.7 multiplies bfloat16 wrongly (it takes the bits for integers), so products are tested in
float16 and float32, the rest in bfloat16 too. ``tests/test_cuda.py`` compares all of it on a GPU.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from hf_schatten.linalg import accelerated, many_matrices
from hf_schatten.linalg.coefficient_table import Coefficients
from hf_schatten.linalg.iterate_norms import iterate_log_norms
from hf_schatten.linalg.iteration_numbers import iteration_numbers
from hf_schatten.linalg.place import Place
from hf_schatten.linalg.spectral_power import spectral_power

pytest.importorskip("triton")

# Of linalg, those that ask for the kernels.
MODULES = ("many_matrices", "symmetric_product", "iteration_numbers")


# Three steps, all their numbers different.
LADDER = Coefficients((3.4, 2.9, 2.5), (-4.7, -3.1, -2.2), (2.0, 1.3, 0.7), (0.1, -0.2, 0.4, 0.8))


@pytest.fixture(scope="module")
def kernels():
    if os.environ.get("TRITON_INTERPRET") != "1":  # the tests' conftest sets it where there is no GPU
        pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1")
    from hf_schatten.linalg import triton_kernels

    return triton_kernels


@pytest.fixture
def interpreted(kernels, monkeypatch):
    """Compute with the kernels, though there is no GPU."""
    for module in MODULES:
        monkeypatch.setattr(f"hf_schatten.linalg.{module}.kernels_of", lambda device: kernels)


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_kernels_compile_for_a_gpu_that_is_not_here(capability):
    """An A100 and an H100; of shared memory an A100 has 163 KiB for a block."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run(
        [sys.executable, str(script), str(capability)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    rows = [line.split() for line in run.stdout.splitlines()]
    assert len(rows) == 16
    for name, shared, size, wgmma in rows:
        assert int(shared) <= 163 << 10
        assert int(size) > 0
        assert (wgmma == "wgmma") <= (name == "_symmetric_kernel" and capability == 90), name
    assert sum("wgmma" in row for row in rows) == (3 if capability == 90 else 0)


def test_the_check_before_the_first_use_passes(kernels):
    accelerated.check(kernels, torch.device("cpu"), torch.float16)


def test_the_check_finds_a_wrong_kernel(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "inner_products", lambda A, B: torch.zeros(2, len(A)))
    with pytest.raises(RuntimeError, match="inner products"):
        accelerated.check(kernels, torch.device("cpu"), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "k"), [(1, 5), (40, 40), (64, 200), (150, 70), (300, 130)])
def test_symmetric_product(kernels, m, k, dtype):
    torch.manual_seed(0)
    X = torch.randn(2, m, k).div(math.sqrt(k)).to(dtype)
    found = kernels.symmetric(X, X, X.new_empty(2, m, m))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(found.double(), X.double() @ X.double().mT, atol=tolerance, rtol=tolerance)
    assert torch.equal(found, found.mT)


def test_inner_products_of_few_long_rows_that_lie_apart(kernels):
    torch.manual_seed(0)
    X = torch.randn(7, 6, 200).transpose(0, 1)
    found = kernels.symmetric(X, X, X.new_empty(6, 7, 7))
    torch.testing.assert_close(found.double(), X.double() @ X.double().mT, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("m", [3, 64, 150, 300])
def test_polynomial_with_coefficients_for_each_matrix(kernels, m, dtype):
    torch.manual_seed(0)
    X = torch.randn(3, m, m).div(math.sqrt(m))
    A = (X @ X.mT / 4).to(dtype)
    a, b, c = torch.tensor([[3.4, 1.0, 0.0], [-4.7, 0.0, 1.0], [2.0, 1.0, -1.0]])
    found = kernels.symmetric(A, A, torch.empty_like(A), (a, b, c))
    exact = A.double()
    a, b, c = (number.double()[:, None, None] for number in (a, b, c))
    expected = a * torch.eye(m, dtype=torch.float64) + b * exact + c * exact @ exact
    torch.testing.assert_close(found.double(), expected, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 5])
def test_weighted_sum_in_place_of_a_term(kernels, count, dtype):
    torch.manual_seed(0)
    first, others, weights = torch.randn(2, 70, 70), torch.randn(count, 2, 70, 70).to(dtype), torch.randn(2, count + 1)
    terms = [first.double(), *others.double()]
    expected = sum(weights[:, k].double()[:, None, None] * term for k, term in enumerate(terms))
    expected.diagonal(dim1=-2, dim2=-1).add_(torch.tensor([[2.0], [-1.0]]))
    found = kernels.weighted_sum(first, others, weights, others[-1], torch.tensor([2.0, -1.0]))
    assert found.data_ptr() == others[-1].data_ptr()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inner_products(kernels, dtype):
    torch.manual_seed(0)
    A, B = torch.randn(3, 50, 170).to(dtype), torch.randn(3, 50, 170).to(dtype)
    a, b = A.double().flatten(1), B.double().flatten(1)
    expected = torch.stack([(a * b).sum(1), (b * b).sum(1)]).float()
    torch.testing.assert_close(kernels.inner_products(A, B), expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("from_start", [False, True])
@pytest.mark.parametrize("direct", [0, 2, 4])
@pytest.mark.parametrize("steps", [5, 8])
@pytest.mark.parametrize("row", [None, LADDER])
def test_numbers_of_an_iteration(kernels, row, steps, direct, from_start):
    """Exponents at, between and beyond nodes of the table; norms that are zero, small, large or no number."""
    if row is not None:
        steps, direct = row.steps, min(direct, row.steps - 1)
    s = None if row is not None else torch.tensor([-0.25, 1.0, 0.0, 0.3333, -0.199, 0.5, 0.5])
    norms = torch.rand(7, 40).div(40).add(torch.arange(7.0)[:, None]).to(torch.bfloat16)
    norms[2], norms[5, 3] = 0.0, math.nan
    largest, squared_unit = torch.logspace(-20, 12, 7), torch.logspace(-9, 9, 7)
    numbers = row.row if row is not None else []
    given = numbers, steps, direct, norms
    doubled = None if s is None else s.double()
    expected = iteration_numbers(doubled, *given, largest, squared_unit.double(), from_start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_schatten.linalg.iteration_numbers.kernels_of", lambda device: kernels)
        found = iteration_numbers(s, *given, largest, squared_unit, from_start)
    names = ("inverse_norms", "identity", "inner", "outer")
    pairs = [(getattr(found, name), getattr(expected, name)) for name in names]
    for one, other in zip(found.steps, expected.steps, strict=True):
        pairs += zip(one, other, strict=True)
    for mine, exact in pairs:
        torch.testing.assert_close(mine.double(), exact.expand_as(mine), atol=1e-5, rtol=1e-5, equal_nan=True)
    assert torch.isnan(found.outer[5]).any()
    assert not torch.isnan(found.outer[[0, 1, 2, 3, 4, 6]]).any()


def test_largest_elements_of_gram_matrices(kernels):
    X = torch.randn(3, 40, 90)
    X[1] = 0
    gram = X @ X.mT
    found, inverse = kernels.squared_units(gram)
    expected = gram.amax((1, 2))
    expected[1] = 1
    assert torch.equal(found, expected)
    torch.testing.assert_close(inverse, 1 / expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_magnitudes(kernels, dtype, aligned):
    torch.manual_seed(0)
    sizes = [1, 8192, 8193, 30_000, 7, 5, 4]
    tensors = [torch.randn(size + 1).to(dtype)[0 if aligned else 1 :] for size in sizes]
    tensors[0][:], tensors[4][3], tensors[5][-1] = 0, math.nan, -math.inf
    tensors[6].mul_(1e-30)
    found = kernels.largest_magnitudes(tensors)
    expected = torch.stack([tensor.abs().amax().float() for tensor in tensors])
    expected[4] = math.inf
    assert torch.equal(found, expected)


# All of it a multiple of 16, which has accesses of its own, and not.
WIDE_SHAPES = [(48, 112), (40, 100)]


def matrices(shape, m, n):
    """Return places of matrices of one wide shape (m, n) in a tensor of its own each, and the tensors' shapes."""
    if shape == "tall and wide":
        return [((r, c), Place((1, r, 1, c), (0, c, 0, 1), 0)) for r, c in ((m, n), (n, m))]
    if shape == "parts":  # columns of a fused projection, as Conv1D stores it
        return [((m, 3 * n), Place((1, m, 1, n), (0, 3 * n, 0, 1), n * part)) for part in range(3)]
    if shape == "blocks":  # rows in two blocks, every other one
        place = (2, m // 2, 1, n), (m * n, 2 * n, 0, 1)
        return [((4, m // 4, 2 * n), Place(*place, n * part)) for part in range(2)]
    assert shape == "channels last"
    return [((m, n // 4, 2, 2), Place((1, m, n // 4, 4), (0, n, 1, n // 4), 0))]


def test_places_that_are_multiples_of_16_are_accessed_widely(kernels):
    from hf_schatten.linalg.triton_placed import _table

    for shape, (m, n), aligned in [
        ("tall and wide", (48, 112), True),
        ("parts", (48, 112), True),
        ("tall and wide", (40, 100), False),
        ("blocks", (48, 112), False),
    ]:
        sizes, places = zip(*matrices(shape, m, n), strict=True)
        assert _table([torch.zeros(size) for size in sizes], places, torch.device("cpu"))[1] == aligned
    off_by_one = torch.zeros(48 * 112 + 1)[1:].view(48, 112)
    assert not _table([off_by_one], [Place((1, 48, 1, 112), (0, 112, 0, 1), 0)], torch.device("cpu"))[1]


@pytest.mark.parametrize(("m", "n"), WIDE_SHAPES)
@pytest.mark.parametrize("shape", ["tall and wide", "parts", "blocks", "channels last"])
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, None])
def test_averages_are_those_of_torch(kernels, shape, m, n, gradient_dtype, out_dtype):
    torch.manual_seed(0)
    sizes, places = zip(*matrices(shape, m, n), strict=True)
    count = len(sizes)
    averages = [torch.randn(size) for size in sizes]
    gradients = [torch.randn(size).to(gradient_dtype) for size in sizes]
    gradients[0].view(-1)[-1] = math.nan
    keep = torch.ones(count, dtype=torch.float64)
    keep[0] = 0
    divisors = torch.linspace(0.5, 2, count, dtype=torch.float64)
    results = []
    for compute in (kernels.advance_averages, many_matrices.advance_averages):
        mine = [average.clone() for average in averages]
        out = None if out_dtype is None else torch.zeros(count, m, n, dtype=out_dtype)
        ahead = [index % 2 == 0 for index in range(count)]
        rates, divided = [0.05, 0.7, 0.3][:count], None if out is None else divisors
        compute(mine, places, gradients, places, rates, ahead, keep, out, divided)
        results.append((mine, out))
    (found, found_out), (expected, expected_out) = results
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert not any(average.isnan().any() for average in found)
    if out_dtype is not None:
        torch.testing.assert_close(
            found_out, expected_out, atol=1e-6, rtol=1e-2 if out_dtype == torch.bfloat16 else 1e-5
        )


@pytest.mark.parametrize(("m", "n"), WIDE_SHAPES)
@pytest.mark.parametrize("shape", ["tall and wide", "parts", "blocks", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("update_dtype", [torch.float32, torch.bfloat16])
def test_updates_are_those_of_torch(kernels, shape, m, n, dtype, update_dtype):
    torch.manual_seed(0)
    sizes, places = zip(*matrices(shape, m, n), strict=True)
    weights = [torch.randn(size).to(dtype) for size in sizes]
    updates = list(torch.randn(len(sizes), m, n).to(update_dtype))
    factors, decays = torch.linspace(-0.5, 0.5, len(sizes)).double(), torch.linspace(0.0, 0.2, len(sizes)).double()
    results = []
    for compute in (kernels.add_updates, many_matrices.add_updates):
        mine = [tensor.clone() for tensor in weights]
        compute(mine, places, updates, factors, decays)
        results.append(mine)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(32, 32), (24, 80), (80, 24)])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, -5.0])
def test_spectral_power_with_kernels_rounds_as_much_as_without(interpreted, shape, p):
    """Of the same iteration in float64, so that nothing but rounding is compared; the condition is 300."""
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(8, *shape), full_matrices=False)
    X = U * torch.logspace(0, math.log10(1 / 300), min(shape)) @ Vh
    found = spectral_power(X, p, compute_dtype=torch.float16).double()
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            patch.setattr(f"hf_schatten.linalg.{module}.kernels_of", lambda device: None)
        plain = spectral_power(X, p, compute_dtype=torch.float16).double()
        exact = spectral_power(X.double(), p)
    assert (found - exact).norm() <= 1.1 * (plain - exact).norm() + 2e-5 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(70, 130), (130, 70)])
def test_norms_by_products_are_those_of_torchs_operations(interpreted, shape, dtype):
    torch.manual_seed(0)
    X, orders = torch.randn(2, *shape).cumsum(-1), torch.linspace(0, 4 / 3, 9, dtype=torch.float64)
    X = X / X.abs().max()
    estimate = partial(iterate_log_norms, X if shape[0] <= shape[1] else X.mT, orders, dtype)
    found = estimate()
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            patch.setattr(f"hf_schatten.linalg.{module}.kernels_of", lambda device: None)
        expected = estimate()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
