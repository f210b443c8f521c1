"""Whether a device runs the Triton kernels."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch

from hf_schatten.linalg.place import Place

logger = logging.getLogger(__name__)

_OLDEST = 8  # major compute capability with products of bfloat16


@functools.cache
def kernels_of(device: torch.device) -> ModuleType | None:
    """Return the module of kernels where a device runs them and they are right there, else None.

    Builds of torch for GPUs bring Triton along. Where it is missing, or the kernels fail, a warning says so, and
    torch's own operations do the same work in more launches.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < _OLDEST:
        return None
    try:
        from hf_schatten.linalg import triton_kernels  # noqa: PLC0415 - slow to import, and missing on a CPU

        check(triton_kernels, device)
    except Exception as error:
        logger.warning(
            "The Triton kernels do not run on %s (%s: %s): updates are computed by torch's operations, which is "
            "slower. `python -m pip install triton` where it is missing.",
            torch.cuda.get_device_name(device),
            type(error).__name__,
            error,
        )
        return None
    return triton_kernels


def check(kernels: ModuleType, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
    """Compile every kernel and compare it with torch on small matrices, of a dtype where they are in half precision.

    Raises:
        RuntimeError: when a result is wrong; whatever Triton raises when it cannot compile.
    """
    X = torch.linspace(-1, 1, 3 * 96 * 208, device=device).mul(7).sin().div(9).view(3, 96, 208)
    half, numbers = X.to(dtype), torch.linspace(0.1, 0.4, 3, device=device)
    precise = kernels.symmetric(X, X, X.new_empty(3, 96, 96))
    gram = kernels.symmetric(half, half, half.new_empty(3, 96, 96))
    exact = half.float() @ half.float().mT
    few = kernels.symmetric(half[:, :8], half[:, :8], X.new_empty(3, 8, 8))
    square = kernels.symmetric(gram, gram, torch.empty_like(gram), (numbers, numbers, numbers))
    A = gram.float()
    polynomial = numbers[:, None, None] * (torch.eye(96, device=device) + A + A @ A)
    total = kernels.weighted_sum(X, half[None], numbers[:, None].expand(3, 2).contiguous(), torch.empty_like(X))
    products = kernels.inner_products(half, half)
    average, weights, slot = X.clone(), X.clone(), torch.empty_like(half)
    places = [Place((1, 96, 1, 208), (0, 208, 0, 1), index * 96 * 208) for index in range(3)]
    ones = torch.ones(3, dtype=torch.float64, device=device)
    kernels.advance_averages([average] * 3, places, [half] * 3, places, [0.5] * 3, [True] * 3, ones, slot, 2 * ones)
    kernels.add_updates([weights] * 3, places, list(half), numbers.double(), 0 * ones)
    mean = torch.lerp(X, half.float(), 0.5)
    one, row = X.new_ones(3), X.new_tensor([[2.0, 4.0, 8.0, 5.0, 0.5]])  # a, b, c and two weights of one step
    given = X.new_ones(3, 16), None, (one[:1], row), 1, 0, one, one, True
    columns, *_ = kernels.iteration_numbers(*given, (1.0, 0.5, 10.0))  # of the squared norm √16^½ = 2
    pairs = {
        "symmetric product in float32": (precise, (X.double() @ X.double().mT).float()),
        "symmetric product": (gram, exact),
        "symmetric product of few rows": (few, exact[:, :8, :8]),
        "symmetric polynomial": (square, polynomial),
        "weighted sum": (total, numbers[:, None, None] * (X + half)),
        "inner products": (products, half.float().square().sum((1, 2)).expand(2, 3)),
        "largest magnitudes": (kernels.largest_magnitudes(list(X)), X.abs().amax((1, 2))),
        "largest elements": (kernels.squared_units(gram)[0], gram.float().amax((1, 2))),
        "numbers of an iteration": (columns, X.new_tensor([[1.0], [1.0], [1.0], [0.5], [0.0]]).expand(5, 3)),
        "moving average": (average, mean),
        "look-ahead": (slot, torch.lerp(mean, half.float(), 0.5) / 2),
        "update": (weights, X - numbers[:, None, None] * half),
    }
    for name, (found, expected) in pairs.items():
        error = 1e-5 if found.dtype == torch.float32 else 0.02
        if not torch.allclose(found.float(), expected.float(), atol=error * float(expected.abs().max()), rtol=error):
            raise RuntimeError(f"the {name} of a Triton kernel is not that of torch")
