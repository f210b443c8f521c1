"""What averages that began at zero are divided by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_schatten.optim.matrix import SKIPPED, STEP, Matrix


def bias_corrections(matrices: Sequence[Matrix], averages: Sequence[tuple[float, bool]]) -> Tensor:
    """Return the sums of the weights in averages of gradients, (B, 1, 1) float64. Nothing waits for the device.

    Args:
        matrices: B of them, on one device.
        averages: decay of each average, and whether it has seen one gradient more than steps were taken.
    """
    steps = [matrix.state[STEP].item() + ahead for matrix, (_, ahead) in zip(matrices, averages, strict=True)]
    skipped = torch.stack([matrix.state[SKIPPED] for matrix in matrices])  # (B,) float64
    taken = torch.tensor(steps, dtype=torch.float64).to(skipped.device, non_blocking=True) - skipped
    decays = torch.tensor([decay for decay, _ in averages], dtype=torch.float64).to(skipped.device, non_blocking=True)
    return (1 - decays ** taken.clamp_min(1))[:, None, None]
