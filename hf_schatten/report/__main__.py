"""Pages on a model's geometry: ``python -m hf_schatten.report geometry CHECKPOINT`` and ``… erasure``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_schatten.matrices.routing import RoutingError
from hf_schatten.report.erasure import write_erasure
from hf_schatten.report.geometry import write_geometry
from hf_schatten.report.text import ReportError


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw a picture and write a page beside it."""
    options = vars(_parser().parse_args(arguments))
    command = options.pop("write")
    try:
        page = command(**options)
    except (ReportError, RoutingError) as error:
        sys.exit(f"python -m hf_schatten.report: error: {error}")
    print(f"{page} and {page.with_suffix('.png').name} are written.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hf_schatten.report", description=main.__doc__)
    commands = parser.add_subparsers(required=True, metavar="geometry | erasure")
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
