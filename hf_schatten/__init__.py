"""Schatten-p optimization for Hugging Face Transformers and Accelerate.

Weight matrices are updated with U Σ^(1/p) Vᵀ of their momentum U Σ Vᵀ: p = 1 is like SGD, p = inf is Muon, and the
default, p = -4, lies beyond Muon, where small singular values become larger than large ones. All other parameters use
AdamW.

With a Trainer::

    import hf_schatten  # makes optim="schatten_p" valid
    from transformers import AutoModelForCausalLM, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained("gpt2")
    arguments = TrainingArguments("run", learning_rate=4e-3, optim="schatten_p")
    trainer = hf_schatten.SchattenTrainer(model, arguments, train_dataset=dataset)
    trainer.train()
    trainer.create_model_card()

In a loop of your own::

    optimizer = hf_schatten.create_schatten_optimizer(model, lr=4e-3)

With a script that you cannot edit::

    python -m hf_schatten.run train.py --output_dir run --optim schatten_p --learning_rate 4e-3

What there is; ``help(hf_schatten.SchattenOptions)`` and so on show the rest:

* ``SchattenTrainer``: a Trainer with exact resume, safetensors checkpoints and a section of the model card.
* ``SchattenTrainerMixin``: the same for other Trainers, such as trl's.
* ``SchattenCallback``: logs and pictures of p; every Trainer has it already.
* ``create_schatten_optimizer``: the optimizer of a model, for any loop.
* ``SchattenP``: its class, a ``torch.optim.Optimizer``.
* ``SchattenOptions``: all options, with their defaults; ``optim_args`` of a Trainer takes them as text.
* ``route_parameters``: which parameters use which update, and why.
* ``load_learned_p``: p of every matrix in a checkpoint.
* ``linalg``: spectral powers, Schatten norms and steepest descent in them, for batches of matrices.
* ``OptionError``, ``RoutingError``, ``CheckpointError``, ``UnsupportedEngineError``: what is raised, with the fix.
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
