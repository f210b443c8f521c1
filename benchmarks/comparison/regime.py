"""A kind of training in which optimizers are compared, and its loop."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.comparison.candidates import make_optimizer
from benchmarks.comparison.outcomes import Outcome, Run
from hf_schatten import SchattenP

Batch = Callable[[int], tuple[Tensor, ...]]  # of a step


@dataclass(frozen=True)
class Training:
    """One training, ready to begin.

    Attributes:
        model: what is trained.
        batch: the data of a step, counted from 0.
        loss: of the model on such data, a scalar.
        validation: data of the same form, one tuple for each forward.
    """

    model: nn.Module
    batch: Batch
    loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor]
    validation: tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class Regime:
    """A kind of training.

    Every batch is a function of seed and step alone: two optimizers with one seed see the same data, and begin with
    the same weights. The rate warms up for a tenth of the steps, then falls as a cosine. Gradients are clipped to 1.

    Attributes:
        make: from a seed to the training.
        steps: of a run.
        weight_decay: of matrices and embeddings.
        rates: learning rates that a sweep of the Schatten-p update begins with, increasing.
        adamw_rates: those of AdamW.
        kinds: of layers, by pattern of the names of matrices.
        interval: steps between two estimates of p.
        heads: patterns of output heads, which use AdamW.
        summary: what is trained on what, in a line.
        tokens: of a run, 0 where there are none to count.
        has_matrices: whether there are two-dimensional weights that are routed: torch.optim.Muon takes no others.
        evaluations: on the validation data, evenly spaced, the last one at the end.
        on_gpu: whether it is made for one: the model is compiled, and computes in bfloat16 by autocast.
    """

    make: Callable[[int], Training]
    steps: int
    weight_decay: float
    rates: tuple[float, ...]
    adamw_rates: tuple[float, ...]
    kinds: Mapping[str, str]
    interval: int = 25
    heads: tuple[str, ...] = ()
    summary: str = ""
    tokens: int = 0
    has_matrices: bool = True
    evaluations: int = 1
    on_gpu: bool = False

    def can(self, candidate: str) -> bool:
        """Return whether a regime has what a candidate trains: its kinds of layers, and parameters for Muon."""
        kinds = {each.partition("=")[0] for each in candidate.split("@")[1:]}
        return kinds <= self.kinds.keys() and (candidate != "muon" or self.has_matrices)

    def train(self, run: Run, device: torch.device) -> Outcome:
        """Train, and return what became of it."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.set_float32_matmul_precision("high")  # of what autocast leaves
        training = self.make(run.seed)
        model = training.model.to(device).train()
        forward: Any = torch.compile(model, dynamic=False) if self.on_gpu and device.type == "cuda" else model
        if self.on_gpu:
            self._warm_up(training, forward, device)  # before an optimizer that measures sees the model
        optimizer = make_optimizer(run.candidate, self, model, run.rate, run.seed)
        exponents: dict[str, dict[str, float]] = {}
        total = torch.zeros((), dtype=torch.float64, device=device)  # a list would keep the allocator's blocks apart
        curve: list[list[float]] = []
        seconds, start = 0.0, now(device)
        for step in range(self.steps):
            for group in optimizer.param_groups:
                group["lr"] = run.rate * rate_factor(step, self.steps)
            loss = self._loss(training, forward, training.batch(step), device)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
            done = step + 1
            if "adaptive" in run.candidate and isinstance(optimizer, SchattenP) and done % self.interval == 0:
                exponents[str(done)] = {name: round(1 / p, 4) for name, p in optimizer.learned_p().items()}
            if done * self.evaluations // self.steps > step * self.evaluations // self.steps:
                seconds += now(device) - start
                curve.append([done, round(seconds, 3), self._evaluate(training, forward, device)])
                if not math.isfinite(curve[-1][2]):
                    break
                start = now(device)
        training_loss = finite(total.item() / done)  # of one step that is no number, none
        return Outcome(
            **asdict(run),
            loss=curve[-1][2] if math.isfinite(training_loss) else math.inf,
            training_loss=training_loss,
            seconds=seconds,
            exponents=exponents,
            curve=curve if self.evaluations > 1 else [],
            state=bytes_of_state(optimizer),
            memory=peak_memory(device),
            machine=machine(device),
            date=date.today().isoformat(),
        )

    def _warm_up(self, training: Training, model: nn.Module, device: torch.device) -> None:
        """Run forward, backward and an evaluation once: a worker's first run compiles them, outside its seconds."""
        self._loss(training, model, training.batch(0), device).backward()
        model.zero_grad()
        self._evaluate(training, model, device)

    def _loss(self, training: Training, model: nn.Module, batch: tuple[Tensor, ...], device: torch.device) -> Tensor:
        on_device = tuple(each.to(device, non_blocking=True) for each in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.on_gpu):
            return training.loss(model, on_device)

    @torch.no_grad()
    def _evaluate(self, training: Training, model: nn.Module, device: torch.device) -> float:
        """Return the mean of the validation data's losses, infinite where it is no number."""
        model.eval()
        losses = [self._loss(training, model, batch, device).item() for batch in training.validation]
        model.train()
        return finite(mean(losses))


def rate_factor(step: int, steps: int) -> float:
    """Return the learning rate of a step, from 0, relative to the largest: a tenth warms up, then cosine."""
    warm_up = max(1, steps // 10)
    decay = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
    return min(1.0, (step + 1) / warm_up) * decay


def peak_memory(device: torch.device) -> int:
    """Return the largest number of bytes that were allocated on a GPU; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def machine(device: torch.device) -> str:
    """Return a device by name, and the version of torch."""
    return f"{torch.cuda.get_device_name() if device.type == 'cuda' else _processor()}, torch {torch.__version__}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux on x86
        return platform.processor() or platform.machine()


def finite(loss: float | None) -> float:
    """Return a loss, infinite where it is no number: NaN would compare with nothing."""
    return loss if loss is not None and math.isfinite(loss) else math.inf


def now(device: torch.device) -> float:
    """Return a time in seconds: on a CPU that of this process alone, for other runs share the machine."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def bytes_of_state(optimizer: torch.optim.Optimizer) -> int:
    """Return the size of the tensors that an optimizer keeps, and those inside it."""
    return sum(_bytes_of(each.state) for each in getattr(optimizer, "optimizers", [optimizer]))


def _bytes_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return sum(map(_bytes_of, value))
