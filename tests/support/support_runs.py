"""What the rows of the table of support ask of every run: learning, an estimated p everywhere, an exact resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_schatten import SchattenP, SchattenTrainer
from hf_schatten.adaptive.probe import Probe
from hf_schatten.integration.callback import unwrap_optimizer
from hf_schatten.options import LARGEST_P
from hf_schatten.report.log import LAYER_PREFIX

FIRST_P = 33.0  # none that an estimate would give
ADAPTIVE = f"p=adaptive,p_init={FIRST_P},p_first_step=2,p_interval=6"
STEPS, DUE = 12, [2, 6, 12]

RUN = {
    "optim_args": ADAPTIVE,
    "max_steps": STEPS,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "save_strategy": "steps",
    "save_steps": STEPS // 2,
}

State = dict[str, Tensor]


def optimizer_of(trainer: Trainer) -> SchattenP:
    optimizer = unwrap_optimizer(trainer.optimizer)
    assert optimizer is not None
    return optimizer


def statistics_of(trainer: Trainer) -> Tensor:
    """Return a copy of what p is chosen from, (matrices, curves, nodes)."""
    return torch.stack([matrix.statistics for matrix in optimizer_of(trainer).matrices()])


def estimates(trainer: Trainer) -> dict[int, dict[str, float]]:
    """Return what was logged of the matrices' p, by step and layer."""
    return {
        entry["step"]: {
            name.removeprefix(LAYER_PREFIX): p for name, p in entry.items() if name.startswith(LAYER_PREFIX)
        }
        for entry in trainer.state.log_history
        if "schatten_p_median" in entry
    }


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model: nn.Module) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def routed(trainer: Trainer) -> set[str]:
    return {matrix.parameter_name for matrix in optimizer_of(trainer).matrices()}


def check_estimates(trainer: Trainer, due: Sequence[int] = DUE, *, unestimated: Collection[str] = ()) -> None:
    """Check that p was logged on due steps and estimated for all matrices but those, and that losses are finite."""
    learned = optimizer_of(trainer).learned_p()
    logged = estimates(trainer)
    assert list(logged) == list(due)
    for entry in logged.values():
        assert set(entry) == {name.replace(".weight", "") for name in learned}
    assert {name for name, p in learned.items() if p == FIRST_P} == set(unestimated)
    assert all(1 / LARGEST_P - 1e-6 <= 1 / p <= 1.0 for p in learned.values())
    assert losses(trainer)
    assert all(math.isfinite(loss) for loss in losses(trainer))


def check_state_is_fp32(trainer: Trainer) -> None:
    """Check the dtype of what the updates keep, whatever the parameters' is."""
    moments = [
        value
        for state in optimizer_of(trainer).state.values()
        for key, value in state.items()
        if key in ("momentum", "exp_avg", "exp_avg_sq", "p")
    ]
    assert moments
    assert {value.dtype for value in moments} == {torch.float32}


def check_run(
    make_model: Callable[[], nn.Module],
    dataset: Any,
    arguments: TrainingArguments,
    matrices: Iterable[str],
    trainer_class: type[Trainer] = SchattenTrainer,
    *,
    unestimated: Collection[str] = (),
    **options: Any,
) -> Trainer:
    """Train from new weights, check the run, and check that its checkpoint continues it bitwise.

    Args:
        make_model: makes the model anew, with other weights each time.
        dataset: for training and evaluation.
        arguments: must save a checkpoint half-way.
        matrices: names of the parameters that the Schatten-p update should get.
        trainer_class: of the run.
        unestimated: names of the matrices that keep their first p.
        options: other arguments of the trainer.

    Returns:
        The trainer of the uninterrupted run.
    """
    trainer = trainer_class(model=make_model(), args=arguments, train_dataset=dataset, eval_dataset=dataset, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert routed(trainer) == set(matrices)
    check_estimates(trainer, unestimated=unestimated)
    check_state_is_fp32(trainer)

    checkpoint = Path(arguments.output_dir) / f"checkpoint-{STEPS // 2}"
    resumed = trainer_class(model=make_model(), args=arguments, train_dataset=dataset, eval_dataset=dataset, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    check_equal(weights(trainer.model), weights(resumed.model))
    assert estimates(trainer) == estimates(resumed)
    return trainer


def check_equal(expected: State, found: State) -> None:
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def check_close(expected: State, found: State, *, atol: float, rtol: float) -> None:
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, atol=atol, rtol=rtol, msg=lambda text, name=name: f"{name}: {text}"
        )


def record_samples(monkeypatch) -> list[dict[str, int]]:
    """Return a list that gets, for each due step, how many input rows each matrix was sampled from."""
    samples: list[dict[str, int]] = []
    take = Probe.take

    def recorded(probe: Probe) -> dict[str, Tensor]:
        seen = {name: sample.seen for name, sample in probe._samples.items() if sample.seen}
        if seen:
            samples.append(seen)
        return take(probe)

    monkeypatch.setattr(Probe, "take", recorded)
    return samples


# trl sets it under the name that transformers is about to drop.
trl_is_behind = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


class AtStep(TrainerCallback):
    """Calls a function before the update of each step, with the step's number."""

    def __init__(self, function: Callable[[int], Any]) -> None:
        self._function = function

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._function(state.global_step + 1)
