"""Weight erasure: how far each optimizer takes a small GPT-2 from its initial weights; a picture and a page.

Usage:
    python benchmarks/geometry/erasure.py          # minutes on two cores
    python benchmarks/geometry/erasure.py --quick  # a model of toy size: does it run?

Sources: J. Bernstein 2024, "Weight erasure"; F. L. Cesista 2025, "Steepest Descent Under Schatten-p Norms", section
"Faster feature learning".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.geometry import command_line
from benchmarks.geometry.layer_geometry import matrix_views
from benchmarks.geometry.text import STDLIB_NAME, byte_blocks, read_text
from hf_schatten.integration.factory import create_schatten_optimizer
from hf_schatten.matrices.routing import Route, route_parameters

SUBSPACE = 8  # the top singular subspaces have a dimension of the shorter side over this

_BYTES = 256
_SEED = 0


@dataclass(frozen=True)
class Setup:
    """The model and its training, in tokens that are bytes.

    Attributes:
        layers: of the GPT-2.
        width: of its residual stream.
        length: bytes of a sequence.
        batch: sequences of a step.
        learning_rate: the same for all optimizers, constant after a warm-up of a tenth of the steps.
        measurements: after how many steps the weights are looked at, besides step 0; evenly spaced.
    """

    layers: int = 4
    width: int = 256
    length: int = 128
    batch: int = 8
    learning_rate: float = 2e-3
    measurements: int = 10


FULL = Setup()
QUICK = Setup(layers=1, width=32, length=32, batch=4, measurements=2)


@dataclass
class Trajectory:
    """What one optimizer did; a list of (matrices,) tensors has one for each measured step.

    Attributes:
        steps: measured, the first is 0.
        losses: of every training step, in nats per byte.
        distance: ‖W_t − W_0‖_F / ‖W_0‖_F.
        cosine: ⟨W_t, W_0⟩ / (‖W_t‖_F ‖W_0‖_F).
        overlap: mean squared cosine of the angles between the top singular subspaces of W_t and W_0, left and right.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    distance: list[Tensor] = field(default_factory=list)
    cosine: list[Tensor] = field(default_factory=list)
    overlap: list[Tensor] = field(default_factory=list)

    @property
    def final_loss(self) -> float:
        """Mean of the last tenth of the steps."""
        return float(np.mean(self.losses[-max(1, len(self.losses) // 10) :]))


def _adamw(model: nn.Module, lr: float) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)


def _schatten(model: nn.Module, lr: float, *, p: float) -> Optimizer:
    return create_schatten_optimizer(model, lr, p=p, weight_decay=0.0, verbose=False)


OPTIMIZERS: dict[str, Callable[[nn.Module, float], Optimizer]] = {
    "AdamW": _adamw,
    "p = 1": partial(_schatten, p=1.0),
    "p = 2": partial(_schatten, p=2.0),
    "p = 4": partial(_schatten, p=4.0),
    "p = ∞": partial(_schatten, p=math.inf),
}


def write_erasure(folder: Path, data: Path | None = None, *, steps: int = 100, quick: bool = False) -> Path:
    """Train from the same weights on the same batches with every optimizer; write ``erasure.png`` and ``erasure.md``.

    Args:
        folder: is made.
        data: UTF-8 text. Default: the Python standard library's source.
        steps: of each training. Default 100: minutes on two cores.
        quick: a model of toy size. Default False.

    Returns:
        The page.

    Raises:
        GeometryError: when there is too little text, or it cannot be read.
    """
    setup = QUICK if quick else FULL
    blocks = byte_blocks(read_text(data), setup.length)
    trajectories = {}
    for name, make in OPTIMIZERS.items():
        trajectories[name] = train(make, setup, blocks, steps)
        print(f"{name}: training loss {trajectories[name].final_loss:.3f} after {steps} steps", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    _draw(trajectories, setup, folder / "erasure.png")
    page = folder / "erasure.md"
    page.write_text(_page(trajectories, setup, data.name if data else STDLIB_NAME), "utf-8")
    return page


def train(make: Callable[[nn.Module, float], Optimizer], setup: Setup, blocks: Tensor, steps: int) -> Trajectory:
    """Train a model from seeded weights on seeded batches, and compare its matrices with those weights.

    Args:
        make: the optimizer from model and learning rate.
        setup: model and training.
        blocks: bytes (blocks, length).
        steps: of training.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = _model(setup)
    order = torch.Generator().manual_seed(_SEED)
    optimizer = make(model, setup.learning_rate)
    warmup = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) * 10 / steps))
    routes = route_parameters(model).to("schatten_p")
    initial = [W.clone() for W in _weights(routes)]
    trajectory, due = Trajectory(), _due_steps(steps, setup.measurements)
    _measure(trajectory, 0, initial, initial)
    for step in range(1, steps + 1):
        batch = blocks[torch.randint(len(blocks), (setup.batch,), generator=order)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        trajectory.losses.append(loss.item())
        if step in due:
            _measure(trajectory, step, _weights(routes), initial)
    return trajectory


def _model(setup: Setup) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=_BYTES,
        n_positions=setup.length,
        n_layer=setup.layers,
        n_embd=setup.width,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def _due_steps(steps: int, measurements: int) -> set[int]:
    return {max(1, steps * number // measurements) for number in range(1, measurements + 1)}


def _weights(routes: Sequence[Route]) -> list[Tensor]:
    return list(matrix_views(routes, lambda parameter: parameter.detach()).values())


def _measure(trajectory: Trajectory, step: int, weights: Sequence[Tensor], initial: Sequence[Tensor]) -> None:
    pairs = list(zip(weights, initial, strict=True))
    trajectory.steps.append(step)
    trajectory.distance.append(torch.stack([(W - W0).norm() / W0.norm() for W, W0 in pairs]))
    trajectory.cosine.append(torch.stack([(W * W0).sum() / (W.norm() * W0.norm()) for W, W0 in pairs]))
    trajectory.overlap.append(torch.stack([subspace_overlap(W, W0) for W, W0 in pairs]))


def subspace_overlap(W: Tensor, reference: Tensor) -> Tensor:
    """Return how much of the top singular subspaces of two matrices (m, n) is the same, a scalar.

    With k = min(m, n) / 8 singular vectors, the mean of ``‖U_kᵀ U'_k‖_F² / k`` and the same of V: 1 for equal
    subspaces, in the mean ``(k/m + k/n) / 2`` for random ones.
    """
    k = max(1, min(W.shape) // SUBSPACE)
    (U, _, Vh), (U0, _, Vh0) = (torch.linalg.svd(matrix, full_matrices=False) for matrix in (W, reference))
    left = (U[:, :k].mT @ U0[:, :k]).square().sum()
    right = (Vh[:k] @ Vh0[:k].mT).square().sum()
    return (left + right) / (2 * k)


# Title and formula.
_QUANTITIES = {
    "distance": ("distance from the initial weights", "‖W_t − W_0‖_F / ‖W_0‖_F"),
    "cosine": ("cosine with the initial weights", "⟨W_t, W_0⟩ / (‖W_t‖_F ‖W_0‖_F)"),
    "overlap": ("overlap of the top singular subspaces", "(‖U_tᵀ U_0‖²_F + ‖V_tᵀ V_0‖²_F) / 2k"),
}


def _draw(trajectories: dict[str, Trajectory], setup: Setup, path: Path) -> None:
    figure = Figure(figsize=(16, 5), dpi=120, layout="constrained")
    for axes, quantity in zip(figure.subplots(1, len(_QUANTITIES)), _QUANTITIES, strict=True):
        _draw_quantity(axes, trajectories, quantity)
    figure.suptitle(f"Weight erasure: GPT-2 of width {setup.width}, median and quartiles over its matrices")
    figure.savefig(path)


def _draw_quantity(axes: Axes, trajectories: dict[str, Trajectory], quantity: str) -> None:
    for name, trajectory in trajectories.items():
        values = torch.stack(getattr(trajectory, quantity)).numpy()  # (measurements, matrices)
        low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=1)
        (line,) = axes.plot(trajectory.steps, middle, marker="o", markersize=3, label=name)
        axes.fill_between(trajectory.steps, low, high, color=line.get_color(), alpha=0.12)
    title, formula = _QUANTITIES[quantity]
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel(f"{formula}, no unit")
    axes.grid(alpha=0.3)
    axes.legend()


def _page(trajectories: dict[str, Trajectory], setup: Setup, source: str) -> str:
    some = next(iter(trajectories.values()))
    rows = [
        f"| {name} | {trajectory.final_loss:.3f} | "
        + " | ".join(f"{np.median(getattr(trajectory, quantity)[-1].numpy()):.4g}" for quantity in _QUANTITIES)
        + " |"
        for name, trajectory in trajectories.items()
    ]
    return "\n".join(
        [
            "# Weight erasure",
            "",
            f"A GPT-2 of {setup.layers} layer(s) and width {setup.width} reads {source}, byte by byte: "
            f"{some.steps[-1]} steps of {setup.batch} × {setup.length} bytes with each optimizer, from the same "
            f"weights on the same batches, at the learning rate {setup.learning_rate:g} after a warm-up of a tenth of "
            "the steps, without weight decay. Every p has updates of the same Frobenius norm, so that a larger "
            "distance is one of steps that agree more with each other; those of AdamW have its own norm, which is "
            f"larger in the first steps. The subspaces have 1/{SUBSPACE} of the shorter side's dimensions; of two "
            f"random ones the overlap is at most {1 / SUBSPACE:g} in the mean. Values are medians over "
            f"{len(some.distance[0])} matrices after the last step; losses are means of the last tenth of the steps.",
            "",
            "![Distance from the initial weights, cosine and overlap of subspaces over steps](erasure.png)",
            "",
            "| optimizer | training loss, nats per byte | "
            + " | ".join(title for title, _ in _QUANTITIES.values())
            + " |",
            "|---|---:|" + "---:|" * len(_QUANTITIES),
            *rows,
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw how far optimizers take a small GPT-2 from its initial weights, and write a page beside it."""
    parser = command_line.parser("erasure", main.__doc__)
    parser.add_argument("--steps", type=command_line.positive, default=100, help="of each training (default 100)")
    parser.add_argument("--quick", action="store_true", help="a model of toy size, for a trial in seconds")
    command_line.run(write_erasure, parser, arguments)


if __name__ == "__main__":
    main()
