"""What the scripts of this folder take alike, and how they say what went wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.geometry.text import GeometryError
from hf_schatten.matrices.routing import RoutingError


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every script.

    Args:
        name: of the script, and of the folder below ``outputs`` that it writes to.
        description: for ``--help``.
    """
    made, folder = argparse.ArgumentParser(description=description), Path("outputs") / name
    made.add_argument("--data", type=Path, help="UTF-8 text (default: the Python standard library's source)")
    made.add_argument(
        "--output", dest="folder", type=Path, default=folder, help=f"folder for picture and page (default {folder})"
    )
    return made


def positive(text: str) -> int:
    """Read a number of at least 1.

    Raises:
        argparse.ArgumentTypeError: when it is below.
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def run(write: Callable[..., Path], parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> None:
    """Call a function that writes a page with what its parser makes of the arguments."""
    try:
        page = write(**vars(parser.parse_args(arguments)))
    except (GeometryError, RoutingError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    print(f"{page} and {page.with_suffix('.png').name} are written.")
