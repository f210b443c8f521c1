"""The table of docs/support.md is what the tests beside this file declare, and every row of it has a test."""

from __future__ import annotations

import importlib
import inspect

import pytest
import support_table
from support_table import BEGIN, END, FOLDER, PAGE, Outcomes, declared_rows, split_at_table, table


def test_the_page_has_the_table_that_the_tests_declare():
    _, written, _ = split_at_table(PAGE.read_text())
    assert written == table(declared_rows()), "run python tests/support/support_table.py"


def test_every_row_has_a_test_of_its_own_that_pytest_collects():
    rows = declared_rows()
    assert len(rows) > 25
    assert len({row.what for row in rows}) == len({row.test for row in rows}) == len(rows)
    assert [row.test for row in rows if not row.test.partition("::")[2].startswith("test_")] == []


def test_every_test_of_the_folder_is_a_row():
    declared = {row.test for row in declared_rows()}
    for path in sorted(FOLDER.glob("test_support_*.py")):
        if path.stem == __name__:
            continue
        for name, function in inspect.getmembers(importlib.import_module(path.stem), inspect.isfunction):
            if name.startswith("test_") and function.__module__ == path.stem:
                assert f"{path.stem}::{name}" in declared


class Report:
    def __init__(self, case, outcome):
        self.nodeid, self.outcome = f"tests/support/test_support_x.py::{case}", outcome


def test_a_row_counts_when_all_its_cases_have_passed():
    outcomes = Outcomes()
    cases = [("test_a[1]", "passed"), ("test_a[2]", "passed"), ("test_b[1]", "passed"), ("test_b[2]", "failed")]
    for case, outcome in [*cases, ("test_c", "skipped")]:
        outcomes.pytest_runtest_logreport(Report(case, outcome))
    passed = {test.partition("::")[2]: whether for test, whether in outcomes.passed.items()}
    assert passed == {"test_a": True, "test_b": False, "test_c": False}


@pytest.mark.parametrize("old", ["", "| old |\n"])
def test_the_table_is_written_between_its_comments_when_all_rows_pass_and_else_not(old, tmp_path, monkeypatch, capsys):
    page = tmp_path / "support.md"
    around = "# Title\n\n" + BEGIN + "\n{}" + END + "\n\nrest\n"
    page.write_text(around.format(old))
    monkeypatch.setattr(support_table, "PAGE", page)
    rows = declared_rows()

    def run(missing):
        def passing(arguments, plugins):
            plugins[0].passed = {row.test: row.test != missing for row in rows}

        monkeypatch.setattr(support_table.pytest, "main", passing)
        return support_table.main()

    assert run(missing=rows[3].test) == 1
    assert rows[3].test in capsys.readouterr().out
    assert page.read_text() == around.format(old)
    assert run(missing=None) == 0
    assert page.read_text() == around.format(table(rows))


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", 2 * f"{BEGIN}\n{END}\n"])
def test_a_page_without_one_place_for_the_table_is_refused(text):
    with pytest.raises(ValueError, match=r"The page must have .* once"):
        split_at_table(text)
