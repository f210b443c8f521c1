"""Docstrings of the public API read as one hand, as far as a program can tell: sections, parameters, defaults, errors.

What is exported has its parameters and their defaults documented. Everything public in the package names its errors.
"""

import ast
import inspect
import re
from pathlib import Path

import pytest

import hf_schatten
from hf_schatten import linalg

ROOT = Path(hf_schatten.__file__).parent
SECTIONS = ["Args", "Attributes", "Returns", "Yields", "Raises", "Source"]
HEADING = re.compile(r"^(\w+):\n(?=    \S)", flags=re.MULTILINE)
ENTRY = re.compile(r"^    \*{0,2}(\w+): (.*(?:\n {8}.*)*)", flags=re.MULTILINE)

EXPORTED = [
    *(getattr(hf_schatten, name) for name in hf_schatten.__all__ if name != "linalg"),
    *(getattr(linalg, name) for name in linalg.__all__),
]


def sections_of(docstring):
    """Return the sections of a docstring by their headings."""
    _, *found = HEADING.split(docstring)
    return dict(zip(found[::2], found[1::2], strict=True))


def entries_of(docstring, *sections):
    found = sections_of(docstring)
    return {name: text for section in sections for name, text in ENTRY.findall(found.get(section, ""))}


# Everything that is public


def definitions(node, prefix=""):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from definitions(child, f"{prefix}{child.name}.")


def raised_by(node):
    """Yield the names of the exceptions that a function raises itself, as ``raise X(…)``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
            yield ast.unparse(child.exc.func)
        yield from raised_by(child)


MODULES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=[path.relative_to(ROOT).as_posix() for path in MODULES])
def test_sections_have_one_order_and_name_the_errors(path):
    for name, node in definitions(ast.parse(path.read_text(encoding="utf-8"))):
        docstring = ast.get_docstring(node)
        if docstring is None:  # of a method that overrides another one
            continue
        assert docstring.partition("\n")[0].endswith("."), name
        found = list(sections_of(docstring))
        assert found == sorted(found, key=SECTIONS.index), name
        if isinstance(node, ast.FunctionDef):
            assert set(raised_by(node)) <= set(entries_of(docstring, "Raises")), name


# What is exported


def exported():
    for subject in EXPORTED:
        if not inspect.isclass(subject) or subject.__init__ in (vars(subject).get("__init__"), object.__init__):
            yield subject.__name__, subject  # else, it takes what its base takes
        if inspect.isclass(subject):
            for name, method in inspect.getmembers(subject, inspect.isroutine):
                own = name in vars(subject) and not name.startswith("_")
                if own and not any(hasattr(base, name) for base in subject.__bases__):  # else, documented there
                    yield f"{subject.__name__}.{name}", method


@pytest.mark.parametrize("subject", [pytest.param(subject, id=name) for name, subject in exported()])
def test_every_parameter_is_documented_with_its_default(subject):
    docstring = inspect.cleandoc(subject.__doc__)
    parameters = dict(inspect.signature(subject).parameters)
    for passed_on in ("self", "args", "kwargs"):
        parameters.pop(passed_on, None)
    described = entries_of(docstring, "Attributes", "Args")
    for name, parameter in parameters.items():
        if name in described:
            default = parameter.default is not parameter.empty
            assert not default or re.search(r"\bdefault\b", described[name], flags=re.IGNORECASE), name
        else:  # a small method says it in a sentence
            assert f"``{name}``" in docstring, name
    named = [name for name in entries_of(docstring, "Args") if name in parameters]
    assert named == sorted(named, key=list(parameters).index)


# The first page of help()


def test_help_begins_with_the_readmes_program_and_every_name():
    docstring = hf_schatten.__doc__
    readme = (ROOT.parent / "README.md").read_text(encoding="utf-8")
    program = re.search(r"^```python\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)[1]
    assert "\n".join(f"    {line}".rstrip() for line in program.splitlines()) in docstring
    listed = re.findall(r"^\* (.*?): ", docstring, flags=re.MULTILINE)
    assert {name for line in listed for name in re.findall(r"``(\w+)``", line)} == set(hf_schatten.__all__)
    assert len(docstring.splitlines()) <= 50  # a page
