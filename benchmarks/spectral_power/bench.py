"""Where and on what to measure."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.interleaved_timing import Ratio, best_seconds, time_ratio


@dataclass(frozen=True)
class Sizes:
    """How large the matrices are.

    Attributes:
        hidden: Width of the transformer; single calls are timed on hidden × hidden and hidden × 4 hidden.
        layers: Its layers, four matrices each.
        rows: Errors are measured on rows × rows, and rows/2 × 2 rows.
        peak: Side of the square matrices that measure the device's peak.
        steps: Numbers of steps K whose errors are measured.
    """

    hidden: int
    layers: int
    rows: int
    peak: int
    steps: tuple[int, ...]


GPT2_SMALL = Sizes(hidden=768, layers=12, rows=512, peak=2048, steps=(3, 4, 5, 6, 7, 8))
QUICK = Sizes(hidden=32, layers=1, rows=48, peak=128, steps=(3, 5))


@dataclass(frozen=True)
class Bench:
    """Where and how to measure.

    Attributes:
        device: The device.
        dtype: Of the matrix products.
        sizes: Of the matrices.
        repeats: Measurements of each side of a ratio.
        compiled: Whether to time the compiled variants too.
    """

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    repeats: int
    compiled: bool

    @property
    def dtype_name(self) -> str:
        """The dtype without ``torch.``."""
        return str(self.dtype).removeprefix("torch.")

    def ratio(self, candidate: Callable[[], object], reference: Callable[[], object]) -> Ratio:
        """Time of ``candidate`` over that of ``reference``."""
        return time_ratio(candidate, reference, self.repeats, self.device)

    def gaussian(self, *shape: int, seed: int = 0) -> Tensor:
        """Float32 tensor with independent standard normal elements, the same on every device."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def matmul_peak(self) -> float:
        """Floating-point operations per second of one large product of square matrices, the best of the repeats."""
        side = self.sizes.peak * (4 if self.device.type == "cuda" else 1)
        X = self.gaussian(side, side).to(self.dtype)
        return 2 * side**3 / best_seconds(lambda: X @ X, self.repeats, self.device)
