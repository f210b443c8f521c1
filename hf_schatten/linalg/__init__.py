"""Pure functions of tensors: spectral powers of matrices and their coefficients, Schatten norms, exact oracles."""

from hf_schatten.linalg.coefficient_table import Coefficients
from hf_schatten.linalg.oracles import ball_oracle, coupling_factors, dualizer, regularized_oracle
from hf_schatten.linalg.schatten_norms import dual_order, relative_size, schatten_norm, stable_rank
from hf_schatten.linalg.spectral_power import spectral_function, spectral_power, spectral_power_svd
from hf_schatten.linalg.targets import FittedTarget, fit_target, top_k_direction, top_singular_direction

__all__ = [
    "Coefficients",
    "FittedTarget",
    "ball_oracle",
    "coupling_factors",
    "dual_order",
    "dualizer",
    "fit_target",
    "regularized_oracle",
    "relative_size",
    "schatten_norm",
    "spectral_function",
    "spectral_power",
    "spectral_power_svd",
    "stable_rank",
    "top_k_direction",
    "top_singular_direction",
]
