"""The house: imports point downhill, close no circle, and files stay small enough to read."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hf_schatten

PACKAGE = Path(hf_schatten.__file__).parent

# From the ground up: a module imports from its own floor and those before it.
FLOORS = [
    "private_api",
    "exponent",
    "option_names",
    "option_text",
    "options",
    "linalg",
    "matrices",
    "distributed",
    "optim",
    "adaptive",
    "report",
    "integration",
    "run",
]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
MOST_LINES, MOST_LINES_OF_A_CLASS = 350, 300


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int:
    return FLOORS.index(module.split(".")[1])


NAMES = {name_of(path) for path in MODULES}


def imports_of(path: Path) -> set[str]:
    """Return the modules of the package that a file imports anywhere in it, also for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & NAMES or {str(node.module)}
    return {name for name in found if name.split(".")[0] == "hf_schatten"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_downhill(path):
    module = name_of(path)
    for imported in imports_of(path):
        assert imported != "hf_schatten", f"{module} imports the whole package"
        assert floor_of(imported) <= floor_of(module), f"{module} imports {imported}, which stands above it"


def test_no_imports_close_a_circle():
    graph = {name_of(path): imports_of(path) - {name_of(path)} for path in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_integration_knows_the_trainer(path):
    trainer = {
        alias.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("transformers")
        for alias in node.names
        if "Trainer" in alias.name and "Callback" not in alias.name
    }
    assert not trainer or floor_of(name_of(path)) >= FLOORS.index("integration"), trainer


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_and_classes_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert (node.end_lineno or 0) - node.lineno < MOST_LINES_OF_A_CLASS, node.name
