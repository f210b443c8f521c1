"""Schatten-p optimization for Hugging Face Transformers and Accelerate.

Weight matrices are updated with U Σ^(1/p) Vᵀ of their momentum U Σ Vᵀ: p = 1 is like SGD, p = inf is Muon, and the
default, p = -4, lies beyond Muon, where small singular values become larger than large ones. All other parameters use
AdamW.

Importing the package makes ``optim="schatten_p"`` valid::

    arguments = TrainingArguments("run", learning_rate=4e-3, optim="schatten_p", optim_args="exclude=*.mlp.*")
    trainer = hf_schatten.SchattenTrainer(model, arguments, train_dataset=dataset)
    trainer.train()

Without a Trainer::

    optimizer = hf_schatten.create_schatten_optimizer(model, lr=4e-3)

What there is:

* ``SchattenTrainer``, and ``SchattenTrainerMixin`` for other Trainers: exact resume, a section of the model card.
* ``create_schatten_optimizer``: the optimizer of a model, for any loop; ``SchattenP`` is its class.
* ``SchattenOptions``: all options, with their defaults.
* ``route_parameters``: which parameters use which update, and why.
* ``load_learned_p``: p of every matrix in a checkpoint.
* ``linalg``: spectral powers and Schatten norms of tensors.

``python -m hf_schatten.run script.py …`` trains with scripts that do not import the package.
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
