"""Pure functions of tensors: spectral powers of matrices and their coefficients."""

from hf_schatten.linalg.spectral_power import (
    spectral_power,
    spectral_power_from_exponent,
    spectral_power_svd,
)

__all__ = ["spectral_power", "spectral_power_from_exponent", "spectral_power_svd"]
