"""In which dtype a processor multiplies matrices: the exact enough one, and the fast one."""

import torch
from torch import Tensor

# AVX-512 BF16, which every CPU with AMX has too. `auto` of a CPU without takes float32: several times faster there.
_capabilities = getattr(torch.cpu, "get_capabilities", None)  # not in every version of torch that is supported
CPU_MULTIPLIES_BFLOAT16 = _capabilities is not None and bool(_capabilities().get("avx512_bf16", False))
# On a CPU with the instructions, spectral_power in bfloat16 takes 0.5 to 0.8 of its time in float32 on matrices whose
# shorter side is 128 or more, about the same on 64, and twice as long on 32 and below.
_SMALLEST_SIDE = 128


def default_compute_dtype(X: Tensor) -> torch.dtype:
    """Return the dtype for functions that promise float32's accuracy on a CPU.

    Args:
        X: Matrices, shape (..., m, n).

    Returns:
        float64 for float64 X, else float32 on a CPU and bfloat16 on an accelerator.
    """
    if X.dtype == torch.float64:
        return torch.float64
    return torch.float32 if X.device.type == "cpu" else torch.bfloat16


def fast_compute_dtype(X: Tensor) -> torch.dtype:
    """Return the dtype for training, where time counts for more than the last digits.

    Args:
        X: Matrices, shape (..., m, n).

    Returns:
        bfloat16 on a CPU that has instructions for it if ``min(m, n) >= 128``, else `default_compute_dtype`.
    """
    default = default_compute_dtype(X)
    fast = CPU_MULTIPLIES_BFLOAT16 and default == torch.float32 and min(X.shape[-2:]) >= _SMALLEST_SIDE
    return torch.bfloat16 if fast else default
