"""In which dtype a processor multiplies matrices: the exact enough one, and the fast one."""

import torch
from torch import Tensor

# AVX-512 BF16, which every CPU with AMX has too. `auto` of a CPU without takes float32: several times faster there.
_capabilities = getattr(torch.cpu, "get_capabilities", None)  # not in every version of torch that is supported
CPU_MULTIPLIES_BFLOAT16 = _capabilities is not None and bool(_capabilities().get("avx512_bf16", False))
# Of min(m, n): there, spectral_power in bfloat16 takes 0.5 to 0.8 of its time in float32 from 128 on, about the same
# at 64, and twice as long at 32 and below.
_SMALLEST_SIDE = 128


def default_compute_dtype(X: Tensor) -> torch.dtype:
    """Return the dtype for X (..., m, n): float64 for float64, else float32 on a CPU, bfloat16 on an accelerator."""
    if X.dtype == torch.float64:
        return torch.float64
    return torch.float32 if X.device.type == "cpu" else torch.bfloat16


def chosen_compute_dtype(choice: str, X: Tensor) -> torch.dtype:
    """Return the dtype for training: what is chosen by its name, or with ``auto`` a fast one.

    That is bfloat16 also for large X on a CPU that has instructions for it, and for X in bfloat16.
    """
    if choice != "auto":
        return getattr(torch, choice)
    default = default_compute_dtype(X)
    fast = CPU_MULTIPLIES_BFLOAT16 and default == torch.float32 and min(X.shape[-2:]) >= _SMALLEST_SIDE
    return torch.bfloat16 if fast or X.dtype == torch.bfloat16 else default
