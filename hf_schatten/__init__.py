"""Adaptive Schatten-p optimization for Hugging Face Transformers and Accelerate.

Importing the package makes ``TrainingArguments(optim="schatten_p")`` valid.
"""

from . import linalg
from .callback import SchattenCallback
from .checkpoint import CheckpointError, load_learned_p
from .distributed import UnsupportedEngineError
from .factory import create_schatten_optimizer
from .optimizer import SchattenP
from .options import OptionError, SchattenOptions
from .registration import register
from .routing import RoutingError, route_parameters
from .trainer import SchattenTrainer, SchattenTrainerMixin

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
