"""Writes the tables of README and docs that come from code or results: ``python docs/write_tables.py``.

Each table stands between two comments that name it, and ``tests/test_documentation.py`` compares it with what this
script makes.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from benchmarks.comparison.compare_optimizers import CANDIDATES, standing
from benchmarks.comparison.outcomes import NAME, Outcome, load
from benchmarks.comparison.regimes import REGIMES, SMALL
from benchmarks.comparison.report import BASE, paired, with_error, word
from benchmarks.comparison.runs import FOLDER
from hf_schatten import SchattenOptions
from hf_schatten.exponent import exponent_of, p_label
from hf_schatten.linalg import Coefficients
from hf_schatten.linalg.coefficient_table import interpolate

ROOT = Path(__file__).resolve().parents[1]
OUTCOMES = FOLDER / NAME
PAGES = "benchmarks/comparison/results"
COMPARED = ("AdamW", "SOAP", "Muon", "NorMuon", "p = ∞", "p = -4", "adaptive")
STEPS = 5  # of the spectral power, the default
SHOWN = (1, 1.5, 2, 4, 10, math.inf, -10, -4)
LOWEST = 1e-3  # of the singular values, relative to the norm


def comparison() -> str:
    """Return the losses of the optimizers that one would choose from: a row for each training.

    Bold are the best mean, and those that are within two standard errors of it, of the differences by seed.
    """
    outcomes = load(OUTCOMES)
    rows: list[tuple[str, ...]] = [("validation loss", *COMPARED)]
    for regime in REGIMES:
        losses = {name: losses_of(regime, name, outcomes) for name in COMPARED}
        means = {name: fmean(by_seed.values()) for name, by_seed in losses.items() if by_seed}
        if not means:
            continue
        best = min(means, key=means.__getitem__)
        cells = [with_error([*by_seed.values()], digits=3) if by_seed else "–" for by_seed in losses.values()]
        equal = [name for name in means if name == best or _is_level(losses[name], losses[best])]
        cells = [f"**{cell}**" if name in equal else cell for name, cell in zip(COMPARED, cells, strict=True)]
        rows.append((f"[{regime}]({PAGES}/{word(regime)}.md)", *cells))
    return markdown(rows)


def losses_of(regime: str, name: str, outcomes: Sequence[Outcome]) -> dict[int, float]:
    """Return the losses of an optimizer by seed; of AdamW, those with the better of its two second betas."""
    names = ("AdamW", "AdamW, β₂ = 0.999") if name == "AdamW" else (name,)
    found = [losses for each in names if (losses := standing(regime, each, outcomes).losses)]
    return min(found, key=lambda losses: fmean(losses.values()), default={})


def _is_level(losses: Mapping[int, float], best: Mapping[int, float]) -> bool:
    """Return whether two means differ by at most two standard errors of the difference, paired by seed."""
    differences = [losses[seed] - best[seed] for seed in losses.keys() & best.keys()]
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return False
    return fmean(differences) <= 2 * stdev(differences) / len(differences) ** 0.5


def controls() -> str:
    """Return the paired differences to the default of all other optimizers in the small trainings."""
    outcomes = load(OUTCOMES)
    rows: list[tuple[str, ...]] = [(f"loss - loss of {BASE}", *SMALL)]
    for name in CANDIDATES:
        if name not in COMPARED or name == "adaptive":
            standings = [(standing(regime, name, outcomes), standing(regime, BASE, outcomes)) for regime in SMALL]
            rows.append((name, *(paired(each, base, digits=3) or "–" for each, base in standings)))
    return markdown(rows)


def options() -> str:
    """Return the options, their defaults, and what their docstring says of them."""
    text = inspect.getdoc(SchattenOptions) or ""
    arguments = text.partition("Args:\n")[2].partition("\n\n")[0]
    meanings = dict(re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", arguments, flags=re.MULTILINE | re.DOTALL))
    rows = [("option", "default", "meaning")]
    for field in dataclasses.fields(SchattenOptions):
        rows.append((f"`{field.name}`", default_text(field.default), _plain(meanings[field.name])))
    return markdown(rows)


def default_text(value: Any) -> str:
    """Return a default as the table of options writes it."""
    if value in (None, ()):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{value}`" if isinstance(value, str) or math.isinf(value) else f"{value:g}"


def _plain(meaning: str) -> str:
    """Return a docstring's text as Markdown, without the default, which has a column of its own."""
    text = " ".join(meaning.split())
    text = re.sub(r" Default (``[^`]+``|[\w.]+)\.(?= |$)", "", text)
    text = re.sub(r"[;,]? see :\w+:`[^`]+`| See :\w+:`[^`]+`\.", "", text)
    return text.replace("``", "`").replace(" (default)", "").replace("|", r"\|")


def errors() -> str:
    """Return the largest errors of the spectral power, by p."""
    rows = [["p", *map(p_label, SHOWN)]]
    for lowest in (0.01, LOWEST):
        found = [f"{largest_error(p, lowest):.3f}" for p in SHOWN]
        rows.append([f"largest error, singular values from {lowest:g} to 1", *found])
    return markdown(rows)


def coefficients(p: float) -> Coefficients:
    """Return the five steps that the optimizer takes for p."""
    row = interpolate(torch.tensor([exponent_of(p)], dtype=torch.float64), STEPS)[0]
    return Coefficients.from_row(row.tolist())


def largest_error(p: float, lowest: float) -> float:
    """Return the largest |f(x) - x^{1/p}| on [lowest, 1]."""
    x = np.geomspace(lowest, 1, 4000)
    return float(np.abs(coefficients(p).transfer(x) - x ** exponent_of(p)).max())


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, of which the first row is the header."""
    header, *others = rows
    lines = [header, ["---"] * len(header), *others]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "comparison": ("README.md", comparison),
    "controls": ("docs/negative_results.md", controls),
    "options": ("docs/options.md", options),
    "errors": ("docs/how_it_works.md", errors),
}


def split_at(text: str, name: str) -> tuple[str, str, str]:
    """Return what a page has before, between and after a table's two comments, which stay with the outer parts.

    Raises:
        ValueError: when the page has not exactly one such place.
    """
    begin, end = f"<!-- {name}: written by docs/write_tables.py -->\n", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"A page must have {begin.strip()!r} and then {end!r} once, each on a line of its own.")
    before, _, rest = text.partition(begin)
    table, _, after = rest.partition(end)
    return before + begin, table, end + after


def main(arguments: Sequence[str] | None = None) -> None:
    """Write all tables."""
    argparse.ArgumentParser(description=main.__doc__).parse_args(arguments)
    for name, (file, make) in TABLES.items():
        page = ROOT / file
        before, _, after = split_at(page.read_text("utf-8"), name)
        page.write_text(before + make() + after, "utf-8")


if __name__ == "__main__":
    main()
