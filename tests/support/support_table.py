"""Runs the rows of docs/support.md and writes its table: ``python tests/support/support_table.py``.

A row is a test function with the marker ``supports(theme, what, note)``. The table is written when all of them pass,
the slow ones too; ``test_support_table.py`` fails when page and markers differ.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "support.md"
BEGIN = "<!-- support: written by tests/support/support_table.py -->"
END = "<!-- support: end -->"
THEMES = ("Trainers", "Architectures", "Adapters", "Precision", "Memory and speed", "Batches", "Checkpoints", "Runs")


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        theme: one of ``THEMES``.
        what: what is supported.
        note: what its test shows in particular; may be empty.
        test: the test that shows it, ``module::function``.
    """

    theme: str
    what: str
    note: str
    test: str


def declared_rows() -> list[Row]:
    """Return the rows that the test modules declare, in the table's order.

    Raises:
        ValueError: when a theme is unknown.
    """
    rows = [row for path in sorted(FOLDER.glob("test_support_*.py")) for row in _rows_of(path.stem)]
    for row in rows:
        if row.theme not in THEMES:
            raise ValueError(f"{row.test} has the theme {row.theme!r}: use one of {', '.join(THEMES)}, or add it.")
    return sorted(rows, key=lambda row: THEMES.index(row.theme))  # stable: the order of the files stays


def _rows_of(name: str) -> list[Row]:
    functions = [
        function
        for _, function in inspect.getmembers(importlib.import_module(name), inspect.isfunction)
        if function.__module__ == name
    ]
    functions.sort(key=lambda function: function.__code__.co_firstlineno)
    return [
        _row(f"{name}::{function.__name__}", *mark.args, **mark.kwargs)
        for function in functions
        for mark in getattr(function, "pytestmark", [])
        if mark.name == "supports"
    ]


def _row(test: str, theme: str, what: str, note: str = "") -> Row:
    return Row(theme, what, note, test)


def table(rows: list[Row]) -> str:
    """Return the table in Markdown; a theme is named once."""
    lines, theme = ["| | with | in particular |", "|---|---|---|"], ""
    for row in rows:
        lines.append(f"| {'' if row.theme == theme else row.theme} | {row.what} | {row.note} |")
        theme = row.theme
    return "\n".join(lines) + "\n"


def split_at_table(text: str) -> tuple[str, str, str]:
    """Return what the page has before, between and after the two comments, which stay with the outer parts.

    Raises:
        ValueError: when it has not exactly one such place.
    """
    match = re.fullmatch(f"(.*{re.escape(BEGIN)}\n)(.*?)({re.escape(END)}.*)", text, flags=re.DOTALL)
    if match is None or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"The page must have {BEGIN!r} and then {END!r} once, each on a line of its own.")
    return match[1], match[2], match[3]


class Outcomes:
    """A pytest plugin that notes which tests have passed in all their cases."""

    def __init__(self) -> None:
        self.passed: dict[str, bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the outcome of a phase of one case; a skipped one has shown nothing."""
        path, _, case = report.nodeid.partition("::")
        test = f"{Path(path).stem}::{case.partition('[')[0]}"
        self.passed[test] = self.passed.get(test, True) and report.outcome == "passed"


def main() -> int:
    """Run all rows and write the table if each has passed; return an exit status."""
    outcomes = Outcomes()
    tests = [str(path) for path in FOLDER.glob("test_support_*.py") if path.stem != "test_support_table"]
    pytest.main(["-q", "--show-capture=no", f"--rootdir={FOLDER.parents[1]}", *sorted(tests)], plugins=[outcomes])
    rows = declared_rows()
    failed = [row.test for row in rows if not outcomes.passed.get(row.test)]
    if failed:
        print(f"docs/support.md stays as it is, since these rows have not passed: {', '.join(failed)}.")
        return 1
    before, _, after = split_at_table(PAGE.read_text())
    PAGE.write_text(before + table(rows) + after)
    print(f"docs/support.md has the {len(rows)} rows.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
