"""What a training step costs with this optimizer over what it costs with torch's Muon, by model size.

GPT-2s with random weights and tokens take steps with both optimizers in turn, in one process: forward, backward,
update; on a GPU with ``bf16`` autocast. The baseline is `torch_muon.py`: ``torch.optim.Muon`` on the matrices that
``schatten_p`` would route, unsplit and in bfloat16 as it computes, and AdamW for the rest; ``--compute-dtype
bfloat16`` lets this optimizer do so too. Products are counted as well. Nothing here asserts a time. What the
estimates of p add: `adaptation_overhead.py`.

Usage:
    python benchmarks/comparison/step_overhead.py                    # widths 128 to 768, ten minutes
    python benchmarks/comparison/step_overhead.py --widths 256 --layers 4 --sequences 8
    python benchmarks/comparison/step_overhead.py --device cuda --widths 768 1024 --layers 12 --length 1024
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.comparison.torch_muon import MuonAndAdamW
from benchmarks.interleaved_timing import Ratio, time_ratio
from benchmarks.random_gpt2 import Setting, loss_of, random_gpt2
from benchmarks.tables import print_table
from hf_schatten import create_schatten_optimizer
from hf_schatten.option_names import OPTION_VALUES


class Training:
    """A model and an optimizer that take steps on one random batch.

    Args:
        setting: The training.
        make_optimizer: From the model.
    """

    def __init__(self, setting: Setting, make_optimizer: Callable[[torch.nn.Module], Optimizer]) -> None:
        self.model, self._tokens = random_gpt2(setting)
        self.optimizer = make_optimizer(self.model)

    def differentiate(self) -> None:
        """Compute the gradients."""
        self.optimizer.zero_grad()
        loss_of(self.model, self._tokens).backward()

    def step(self) -> None:
        """Take a whole step."""
        self.differentiate()
        self.optimizer.step()


@dataclass(frozen=True)
class Row:
    """What one size costs.

    Attributes:
        setting: The training.
        parameters: Of the model.
        step: Time of a whole step over that with Muon.
        products: Operations of the optimizer's matrix products, relative to forward and backward.
        muon_products: The same of Muon.
    """

    setting: Setting
    parameters: int
    step: Ratio
    products: float
    muon_products: float


def measure(setting: Setting, compute_dtype: str, repeats: int) -> Row:
    """Time and count both optimizers on one size."""
    ours = Training(
        setting,
        lambda model: create_schatten_optimizer(model, 1e-4, p=-5, compute_dtype=compute_dtype, verbose=False),
    )
    muon = Training(
        setting, lambda model: MuonAndAdamW(model, lr=1e-4, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)
    )
    ratio = time_ratio(ours.step, muon.step, repeats, torch.device(setting.device))
    training = products_of(ours.differentiate)
    return Row(
        setting,
        ours.model.num_parameters(),
        ratio,
        products=products_of(ours.optimizer.step) / training,
        muon_products=products_of(muon.optimizer.step) / training,
    )


def products_of(call: Callable[[], object]) -> float:
    """Return the floating-point operations of the matrix products of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    rows = []
    for width in options.widths:
        setting = Setting(
            *(options.device, options.layers, width, options.sequences, options.length, options.vocabulary)
        )
        rows.append(measure(setting, options.compute_dtype, options.repeats))
        print(f"width {width}: {rows[-1].step.median:.3f}")
    print()
    print_table(
        ("width", "parameters", "step over Muon's (quartiles)", "a step", "products, over training", "Muon's"),
        [
            (
                f"{row.setting.width}",
                f"{row.parameters / 1e6:.1f} M",
                f"{row.step.median:.3f} ({row.step.low:.3f} to {row.step.high:.3f})",
                f"{row.step.seconds:.2f} s",
                f"{100 * row.products:.1f} %",
                f"{100 * row.muon_products:.1f} %",
            )
            for row in rows
        ],
    )
    options.output.mkdir(parents=True, exist_ok=True)
    written: dict[str, Any] = {"torch": torch.__version__, "compute_dtype": options.compute_dtype}
    written["rows"] = [asdict(row) for row in rows]
    file = options.output / f"step_overhead_{options.compute_dtype}.json"
    file.write_text(json.dumps(written, indent=1) + "\n", "utf-8")
    print(f"\nWritten to {file}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 768], help="default 128 256 512 768")
    parser.add_argument(
        "--compute-dtype",
        choices=OPTION_VALUES["compute_dtype"],
        default="auto",
        help="of this optimizer's products (default %(default)s)",
    )
    parser.add_argument("--layers", type=int, default=4, help="default %(default)s")
    parser.add_argument("--sequences", type=int, default=8, help="in a step (default %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence (default %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=4096, help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="steps of each (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"), help="folder (default %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("layers", "sequences", "length", "vocabulary", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if min(options.widths) < 1:
        parser.error("--widths must be at least 1")
    return options


if __name__ == "__main__":
    main()
