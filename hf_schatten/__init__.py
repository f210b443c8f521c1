"""Adaptive Schatten-p optimization for Hugging Face Transformers and Accelerate.

Importing the package makes ``TrainingArguments(optim="schatten_p")`` valid.
"""

from hf_schatten import linalg
from hf_schatten.integration.callback import SchattenCallback
from hf_schatten.integration.checkpoint import CheckpointError, load_learned_p
from hf_schatten.integration.factory import create_schatten_optimizer
from hf_schatten.integration.registration import register
from hf_schatten.integration.trainer import SchattenTrainer, SchattenTrainerMixin
from hf_schatten.matrices.engines import UnsupportedEngineError
from hf_schatten.matrices.routing import RoutingError, route_parameters
from hf_schatten.optim.schatten_p import SchattenP
from hf_schatten.option_names import OptionError
from hf_schatten.options import SchattenOptions

__version__ = "0.1.0"  # read by pyproject.toml

__all__ = [
    "CheckpointError",
    "OptionError",
    "RoutingError",
    "SchattenCallback",
    "SchattenOptions",
    "SchattenP",
    "SchattenTrainer",
    "SchattenTrainerMixin",
    "UnsupportedEngineError",
    "create_schatten_optimizer",
    "linalg",
    "load_learned_p",
    "route_parameters",
]

register()
