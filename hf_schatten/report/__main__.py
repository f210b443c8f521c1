"""Pictures of a run: ``python -m hf_schatten.report figures RUN``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_schatten.report.figures import SPECTRA, UPDATES, draw_log
from hf_schatten.report.log import LogError, read_log_history


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw pictures of a run."""
    parser = argparse.ArgumentParser(prog="python -m hf_schatten.report", description=main.__doc__)
    commands = parser.add_subparsers(required=True, metavar="figures")
    figures = commands.add_parser("figures", help="p and updates by layer, from the log of a run")
    figures.add_argument("run", type=Path, help="output folder of a run, or one of its checkpoints")
    try:
        print(draw_figures(parser.parse_args(arguments).run))
    except LogError as error:
        sys.exit(f"python -m hf_schatten.report: error: {error}")


def draw_figures(run: Path) -> str:
    """Draw what a run's log holds into its folder ``figures``; say what was drawn, and what was not and why.

    Raises:
        LogError: when the log holds no p by layer, or there is none.
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


if __name__ == "__main__":
    main()
