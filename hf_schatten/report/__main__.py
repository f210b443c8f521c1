"""Commands on what a run has left: ``python -m hf_schatten.report COMMAND``."""

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Call the command."""
    options = vars(_parser().parse_args(arguments))
    options.pop("command")(**options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hf_schatten.report", description=__doc__)
    parser.add_subparsers(required=True, metavar="COMMAND")  # each sets `command` to a function of its options
    return parser


if __name__ == "__main__":
    main()
