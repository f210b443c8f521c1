"""Trainings by the hundred: workers that each take runs from a queue, and a file that has one line for each outcome."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing, nn

from benchmarks.comparison.torch_muon import MuonAndAdamW
from benchmarks.regimes.regimes import REGIMES, Regime, rate_factor
from hf_schatten import SchattenP, create_schatten_optimizer
from hf_schatten.adaptive.adaptation import Adaptation
from hf_schatten.exponent import exponent_of, p_of
from hf_schatten.optim.policy import Optimized, Policy

@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        regime: by name.
        candidate: ``adamw``, ``muon``, ``random``, options of the optimizer such as ``p=-5``, the same after
            ``shuffled:``, or ``p=-5@query=inf``: one kind of layer has another p.
        rate: learning rate.
        seed: of the model, the adapter and the order of the data.
    """

    regime: str
    candidate: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Outcome(Run):
    """The end of a run: the validation loss, the mean training loss, its time, and p of every matrix at every estimate."""

    loss: float
    training_loss: float
    seconds: float
    exponents: dict[str, dict[str, float]] = field(default_factory=dict)  # s by matrix, by step


class _Assigned(Policy):
    """Gives every matrix the p that a function of step and name returns."""

    def __init__(self, names: Iterable[str], s_of: Any) -> None:
        super().__init__(list(names))
        self._s_of = s_of

    def before_update(self, optimizer: Optimized) -> None:
        step = optimizer.steps_taken()
        for matrix in optimizer.matrices():
            matrix.p.fill_(p_of(self._s_of(step, matrix.name)))


class _Shuffled(Policy):
    """Has another policy estimate, and gives each matrix the p of another one; one permutation a run."""

    def __init__(self, inner: Policy, seed: int) -> None:
        super().__init__(inner.matrices)
        self._inner, self._seed = inner, seed
        self._own: list[Any] = []

    def before_update(self, optimizer: Optimized) -> None:
        before = self._inner.estimates
        matrices = list(optimizer.matrices())
        if self._own:
            for matrix, p in zip(matrices, self._own, strict=True):
                matrix.p.copy_(p)
        self._inner.before_update(optimizer)
        if self._inner.estimates != before or self._own:
            self._own = [matrix.p.clone() for matrix in matrices]
            order = torch.randperm(len(matrices), generator=torch.Generator().manual_seed(self._seed)).tolist()
            for matrix, number in zip(matrices, order, strict=True):
                matrix.p.copy_(self._own[number])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def observe(self, *arguments: Any) -> None:
        self._inner.observe(*arguments)

    def after_update(self, optimizer: Optimized) -> None:
        self._inner.after_update(optimizer)


def optimizer_of(run: Run, regime: Regime, model: nn.Module) -> torch.optim.Optimizer:
    """Make a run's optimizer."""
    decay, betas = regime.weight_decay, (0.9, 0.95)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if run.candidate == "adamw":
        groups = [
            {"params": [each for each in trained if each.ndim >= 2], "weight_decay": decay},
            {"params": [each for each in trained if each.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], run.rate, betas=betas)
    if run.candidate == "muon":
        return MuonAndAdamW(model, lr=run.rate, weight_decay=decay, betas=betas, eps=1e-8)
    shuffled, text = run.candidate.startswith("shuffled:"), run.candidate.removeprefix("shuffled:")
    text, *kinds = text.split("@")
    options: dict[str, Any] = dict(pair.split("=") for pair in ("p=-4" if text == "random" else text).split(","))
    if options["p"] == "schedule":
        options["p_schedule"] += f":{regime.steps}"
    if options["p"] == "adaptive":
        options |= {"p_interval": str(regime.interval)}
    if run.regime == "convolutions":
        options["exclude"] = "classifier.weight"
    optimizer = create_schatten_optimizer(model, run.rate, weight_decay=decay, betas=betas, verbose=False, **options)
    names = [matrix.name for matrix in optimizer.matrices()]
    if text == "random":
        generator = torch.Generator().manual_seed(run.seed)
        drawn = dict(zip(names, (torch.rand(len(names), generator=generator) * 0.45 - 0.25).tolist(), strict=True))
        optimizer.follow(_Assigned(names, lambda step, name: drawn[name]))
    elif kinds:
        p = {regime.kinds[kind]: float(value) for kind, value in (each.split("=") for each in kinds)}
        base = float(options["p"])

        def s_of(step: int, name: str) -> float:
            return exponent_of(next((value for pattern, value in p.items() if fnmatch(name, pattern)), base))

        optimizer.follow(_Assigned(names, s_of))
    elif shuffled:
        assert optimizer.policy is not None
        optimizer.policy = _Shuffled(optimizer.policy, run.seed)
    return optimizer


def train(run: Run) -> Outcome:
    """Train, and return what became of it."""
    regime = REGIMES[run.regime]
    training = regime.make(run.seed)
    model, steps = training.model.train(), regime.steps
    optimizer = optimizer_of(run, regime, model)
    exponents: dict[str, dict[str, float]] = {}
    start, losses = time.perf_counter(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = run.rate * rate_factor(step, steps)
        loss = training.loss(model, training.batch(step))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return Outcome(**asdict(run), loss=math.inf, training_loss=math.inf, seconds=0.0)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(optimizer, SchattenP) and isinstance(optimizer.policy, Adaptation | _Shuffled) and (step + 1 in (1, 10) or (step + 1) % regime.interval == 0):
            exponents[str(step + 1)] = {m.name: round(1 / float(m.p), 4) for m in optimizer.matrices()}
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        loss = sum(training.loss(model, batch).item() for batch in training.validation) / len(training.validation)
    return Outcome(**asdict(run), loss=loss, training_loss=sum(losses) / steps, seconds=seconds, exponents=exponents)


def load(path: Path) -> list[Outcome]:
    """Return the outcomes in a file."""
    return [Outcome(**json.loads(line)) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def _work(jobs: Any, outcomes: Any) -> None:
    torch.set_num_threads(1)
    import importlib
    for extra in filter(None, os.environ.get("REGIME_PLUGINS", "").split(",")):
        importlib.import_module(extra)
    if os.environ.get("REGIME_NICE"):
        number = int(multiprocessing.current_process().name.rpartition("-")[2])
        os.nice(int(os.environ["REGIME_NICE"].split(",")[(number - 1) % 2]))
    while (run := jobs.get()) is not None:
        try:
            outcomes.put((run, train(run)))
        except Exception as error:  # told to the parent
            outcomes.put((run, repr(error)))


def run_all(
    path: Path, wanted: Callable[[list[Outcome]], list[Run]], *, workers: int, deadline: float = math.inf
) -> Iterator[Outcome]:
    """Run what is wanted, given what a file holds, and add it there, until nothing is; yield outcomes as they come.

    After ``deadline`` seconds no run begins. One more call goes on.

    Raises:
        RuntimeError: when a run fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    jobs: Any = context.Queue()
    outcomes: Any = context.Queue()
    processes = [context.Process(target=_work, args=(jobs, outcomes), daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    done, under_way = load(path), set[Run]()
    with path.open("a", encoding="utf-8") as file:
        while True:
            waiting = [run for run in wanted(done) if run not in under_way]
            while waiting and len(under_way) < workers and time.monotonic() - start < deadline:
                under_way.add(waiting[0])
                jobs.put(waiting.pop(0))
            if not under_way:
                break
            run, outcome = outcomes.get()
            if isinstance(outcome, str):
                raise RuntimeError(f"{run} failed: {outcome}")
            under_way.remove(run)
            done.append(outcome)
            file.write(json.dumps(asdict(outcome)) + "\n")
            file.flush()
            yield outcome
    for _ in processes:
        jobs.put(None)
    for process in processes:
        process.join(10)
