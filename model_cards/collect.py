"""Copy the model card that a run has written into this folder, with its pictures.

Usage:
    python model_cards/collect.py outputs/pretrain_clm           # becomes pretrain_clm.md
    python model_cards/collect.py outputs/my_run --name example  # becomes example.md
"""

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

CARDS = Path(__file__).resolve().parent
PICTURE = re.compile(r"(!\[[^\]]*\]\()(figures/[^)\s]+)(\))")  # of the run's own folder


def collect(run: Path, name: str, cards: Path = CARDS) -> Path:
    """Copy the card of a run's output folder, and the pictures that it shows.

    Args:
        run: The output folder, with `README.md` and `figures`.
        name: The card becomes `{name}.md`, and `figures/x.png` becomes `figures/{name}_x.png`.
        cards: The folder to copy to.

    Returns:
        The copied card.

    Raises:
        FileNotFoundError: The card, or a picture that it shows, is missing.
    """
    text = (run / "README.md").read_text(encoding="utf-8")
    (cards / "figures").mkdir(parents=True, exist_ok=True)
    for picture in dict.fromkeys(found[2] for found in PICTURE.finditer(text)):
        shutil.copyfile(run / picture, cards / "figures" / f"{name}_{Path(picture).name}")
    card = cards / f"{name}.md"
    card.write_text(_with_pictures_of(name, text), encoding="utf-8")
    return card


def _with_pictures_of(name: str, text: str) -> str:
    return PICTURE.sub(lambda found: f"{found[1]}figures/{name}_{Path(found[2]).name}{found[3]}", text)


def main(argv: Sequence[str]) -> None:
    """Copy the card that the command line names."""
    parser = argparse.ArgumentParser(description="Copy the model card of a run, with its pictures, into model_cards.")
    parser.add_argument("run", type=Path, help="output folder of the run")
    parser.add_argument("--name", help="name of the card; default: that of the folder")
    arguments = parser.parse_args(argv)
    try:
        print(collect(arguments.run, arguments.name or arguments.run.resolve().name))
    except FileNotFoundError as error:
        parser.error(f"{error.filename} is missing: give the output folder of a finished run.")


if __name__ == "__main__":
    main(sys.argv[1:])
