"""Pictures of a run, ``python -m hf_schatten.report figures RUN``, and pages on a model's geometry."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_schatten.matrices.routing import RoutingError
from hf_schatten.report.erasure import write_erasure
from hf_schatten.report.figures import SPECTRA, UPDATES, draw_log
from hf_schatten.report.geometry import write_geometry
from hf_schatten.report.log import LogError, read_log_history
from hf_schatten.report.text import ReportError


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw pictures of a run, or of a model with a page beside it."""
    options = vars(_parser().parse_args(arguments))
    command = options.pop("write")
    try:
        written = command(**options)
    except (LogError, ReportError, RoutingError) as error:
        sys.exit(f"python -m hf_schatten.report: error: {error}")
    print(written if isinstance(written, str) else f"{written} and {written.with_suffix('.png').name} are written.")


def draw_figures(run: Path) -> str:
    """Draw what a run's log holds into its folder ``figures``; return what was drawn, and what was not and why.

    Raises:
        LogError: when there is no log, or p of no layer in it.
    """
    source, log_history = read_log_history(run)
    drawn = draw_log(log_history, run)
    if not drawn:
        raise LogError(
            f"{source} has no p by layer: the run had another optimizer, a fixed p, no estimate yet, or the option "
            "report=summary or report=none."
        )
    names = " and ".join(str(run / picture) for picture in drawn)
    text = f"{names} {'are' if len(drawn) > 1 else 'is'} drawn from {source}."
    if UPDATES not in drawn:
        text += f"\nNot {UPDATES.name}: the log holds no sizes of updates, which p=adaptive measures."
    return text + f"\nNot {SPECTRA.name}: the log holds no spectra; a training draws it at its end."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hf_schatten.report", description=main.__doc__)
    commands = parser.add_subparsers(required=True, metavar="figures | geometry | erasure")
    figures = commands.add_parser("figures", help="p and updates by layer, from the log of a run")
    figures.set_defaults(write=draw_figures)
    figures.add_argument("run", type=Path, help="output folder of a run, or one of its checkpoints")
    geometry = commands.add_parser("geometry", help="a checkpoint's gradients under every Schatten norm")
    geometry.set_defaults(write=write_geometry)
    geometry.add_argument("checkpoint", type=Path, help="folder of a causal language model saved by Trainer")
    geometry.add_argument("--batches", type=_positive, default=4, help="batches of 8 sequences (default 4)")
    geometry.add_argument("--device", default="cpu", help="torch device (default cpu)")
    erasure = commands.add_parser("erasure", help="how far optimizers take a small GPT-2 from its initial weights")
    erasure.set_defaults(write=write_erasure)
    erasure.add_argument("--steps", type=_positive, default=100, help="of each training (default 100)")
    erasure.add_argument("--quick", action="store_true", help="a model of toy size, for a trial in seconds")
    for name, command in (("geometry", geometry), ("erasure", erasure)):
        folder = Path("outputs") / name
        command.add_argument("--data", type=Path, help="UTF-8 text (default: the Python standard library's source)")
        command.add_argument(
            "--output",
            dest="folder",
            type=Path,
            default=folder,
            help=f"folder for picture and page (default {folder})",
        )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


if __name__ == "__main__":
    main()
