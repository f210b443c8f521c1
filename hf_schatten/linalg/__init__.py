"""Pure functions of tensors: spectral powers of matrices and their coefficients."""

from hf_schatten.linalg.coefficient_table import Coefficients
from hf_schatten.linalg.spectral_power import (
    spectral_function,
    spectral_power,
    spectral_power_from_exponent,
    spectral_power_svd,
)
from hf_schatten.linalg.top_singular import top_singular_direction

__all__ = [
    "Coefficients",
    "spectral_function",
    "spectral_power",
    "spectral_power_from_exponent",
    "spectral_power_svd",
    "top_singular_direction",
]
