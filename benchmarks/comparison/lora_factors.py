"""Which of LoRA's factors should use the Schatten-p update: both, one, or none? A small GPT-2 on bytes, some minutes.

Usage:
    python benchmarks/comparison/lora_factors.py          # two cores, about ten minutes
    python benchmarks/comparison/lora_factors.py --quick  # toy size: does it run?

A GPT-2 is trained on the Python standard library with AdamW. Then LoRA takes it to the headers of PyTorch, in four
ways that differ in the option ``exclude`` alone, each at every learning rate and with every seed, which is that of the
adapter and of the order of the data. All start from the same model.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from statistics import mean, stdev

import peft
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.geometry.text import byte_blocks, read_text
from benchmarks.tables import print_table
from hf_schatten import create_schatten_optimizer

FOLDER = Path(__file__).parent / "results"
_BYTES = 256
_HELD_OUT = 16  # every so many blocks are for validation
_ADAPTED = ["c_attn", "c_proj", "c_fc"]

# What of a pair of factors uses the Schatten-p update, and the patterns of what does not; None for AdamW alone.
WAYS: dict[str, tuple[str, ...] | None] = {
    "A and B": (),
    "B": ("*.lora_A.*",),
    "A": ("*.lora_B.*",),
    "none (AdamW)": None,
}


@dataclass(frozen=True)
class Setup:
    """The model and its trainings.

    Attributes:
        layers: of the GPT-2.
        width: of its residual stream.
        length: bytes of a sequence.
        batch: sequences of a step.
        pretraining: steps on the first text.
        steps: of an adapter's training.
        rank: of the adapters.
        rates: learning rates; the first tenth of the steps warms up, and cosine decay follows.
        seeds: of the adapters and of the order of the data.
    """

    layers: int = 2
    width: int = 96
    length: int = 128
    batch: int = 8
    pretraining: int = 600
    steps: int = 150
    rank: int = 8
    rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    seeds: tuple[int, ...] = (0, 1, 2)


QUICK = Setup(layers=1, width=16, length=16, batch=4, pretraining=4, steps=4, rank=2, rates=(1e-3, 1e-2), seeds=(0, 1))


@dataclass(frozen=True)
class Run:
    """One training of an adapter."""

    way: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Outcome(Run):
    """The end of a run: the validation loss, in nats per byte."""

    loss: float


def headers() -> str:
    """Return the text of PyTorch's own C++ headers."""
    folder = Path(torch.__file__).parent / "include" / "ATen"
    return "\n".join(path.read_text("utf-8", errors="replace") for path in sorted(folder.glob("*.h")))


def split(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return blocks to train on and blocks for validation."""
    held_out = torch.arange(len(blocks)) % _HELD_OUT == 0
    return blocks[~held_out], blocks[held_out]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterable[Tensor], steps: int) -> None:
    """Train for a number of steps on batches."""
    warm_up = max(1, steps // 10)

    def rate(step: int) -> float:
        decay = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
        return min(1.0, (step + 1) / warm_up) * decay

    schedule = LambdaLR(optimizer, rate)
    model.train()
    for tokens in islice(data, steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def batches(blocks: Tensor, setup: Setup, seed: int) -> Iterator[Tensor]:
    """Yield batches of blocks in an order of the seed's, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield blocks[torch.randint(len(blocks), (setup.batch,), generator=generator)]


@torch.no_grad()
def loss_of(model: nn.Module, blocks: Tensor) -> float:
    """Return the mean loss over blocks."""
    model.eval()
    return mean(model(input_ids=each, labels=each).loss.item() for each in blocks[:256].split(64))


def pretrained(setup: Setup) -> GPT2LMHeadModel:
    """Return a model of the first text."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=setup.layers,
        n_embd=setup.width,
        n_head=max(1, setup.width // 32),
        n_positions=setup.length,
        vocab_size=_BYTES,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    blocks = byte_blocks(read_text(None), setup.length)
    train(model, torch.optim.AdamW(model.parameters(), 2e-3), batches(blocks, setup, 0), setup.pretraining)
    return model


def adapt(base: GPT2LMHeadModel, run: Run, setup: Setup, blocks: Tensor) -> nn.Module:
    """Return the model after an adapter's training on the second text."""
    torch.manual_seed(run.seed)
    lora = peft.LoraConfig(r=setup.rank, target_modules=_ADAPTED, fan_in_fan_out=True)
    model = peft.get_peft_model(copy.deepcopy(base), lora)
    exclude = WAYS[run.way]
    if exclude is None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, run.rate, weight_decay=0.0)
    else:
        optimizer = create_schatten_optimizer(
            model, run.rate, weight_decay=0.0, exclude=exclude, p_interval=50, verbose=False
        )
    train(model, optimizer, batches(blocks, setup, run.seed), setup.steps)
    return model


def compare(setup: Setup) -> tuple[float, list[Outcome]]:
    """Return the loss before any adapter's training, and the outcome of each."""
    base = pretrained(setup)
    blocks, held_out = split(byte_blocks(headers(), setup.length))
    before, outcomes = loss_of(base, held_out), []
    for way in WAYS:
        for rate in setup.rates:
            for seed in setup.seeds:
                run = Run(way, rate, seed)
                loss = loss_of(adapt(base, run, setup, blocks), held_out)
                outcomes.append(Outcome(**asdict(run), loss=loss))
                print(f"{way}, rate {rate:g}, seed {seed}: {loss:.4f}", flush=True)
    return before, outcomes


def rows_of(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Return a row for each way: its best rate, mean and standard deviation there, and the mean at every rate."""
    rows = []
    for way in WAYS:
        of_rate: dict[float, list[float]] = {}
        for outcome in outcomes:
            if outcome.way == way:
                of_rate.setdefault(outcome.rate, []).append(outcome.loss)
        best = min(of_rate, key=lambda rate: mean(of_rate[rate]))
        at_best = f"{mean(of_rate[best]):.4f} ± {stdev(of_rate[best]):.4f}"
        rows.append((way, f"{best:g}", at_best, *(f"{mean(losses):.4f}" for losses in of_rate.values())))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, print the table and write the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a model of toy size")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder (default %(default)s)")
    options = parser.parse_args(arguments)
    setup = QUICK if options.quick else Setup()
    before, outcomes = compare(setup)
    print(f"\nLoss before: {before:.4f}. Mean over {len(setup.seeds)} seeds, standard deviation at the best rate:\n")
    header = ("Schatten-p for", "best rate", "loss there", *(f"{rate:g}" for rate in setup.rates))
    print_table(header, rows_of(outcomes))
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "lora_factors.json"
    machine = {"date": str(date.today()), "machine": platform.machine(), "threads": torch.get_num_threads()}
    written = {**machine, "torch": torch.__version__, "setup": asdict(setup), "before": before}
    written["outcomes"] = [asdict(outcome) for outcome in outcomes]
    file.write_text(json.dumps(written, indent=1) + "\n", "utf-8")
    print(f"\nWritten to {file}")


if __name__ == "__main__":
    main()
