"""What a package index shows of the package: a description without links and pictures that only a checkout has."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGET = re.compile(r"\]\(([^)]*)\)")


@pytest.fixture
def metadata(tmp_path):
    """Return a function that builds the metadata, given the repository's address."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "hf_schatten").mkdir()
    shutil.copy(ROOT / "hf_schatten" / "__init__.py", tmp_path / "hf_schatten")

    def build(repository):
        setup = tmp_path / "setup.py"
        assert setup.read_text().count('REPOSITORY = ""') == 1
        setup.write_text(setup.read_text().replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}"))
        command = "from setuptools import build_meta as b; print(b.prepare_metadata_for_build_wheel('built'))"
        (tmp_path / "built").mkdir()
        run = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
        built = PathDistribution(tmp_path / "built" / run.stdout.split()[-1]).metadata
        assert built["Description-Content-Type"] == "text/markdown"
        return built

    return build


def test_without_an_address_there_are_no_links_into_the_repository(metadata):
    built = metadata("")
    assert "Project-URL" not in built
    text = built.get_payload()
    assert all(target.startswith("https:") for target in TARGET.findall(text))
    assert "docs/quickstart.md" in text  # as text
    assert "docs/figures" not in text


def test_an_address_makes_all_links_absolute(metadata):
    address = "https://example.org/owner/hf_schatten"
    built = metadata(address)
    assert f"Repository, {address}" in built.get_all("Project-URL")
    text = built.get_payload()
    targets = TARGET.findall(text)
    assert all(target.startswith("https:") for target in targets)
    assert f"{address}/blob/main/docs/quickstart.md" in targets
    assert any(target.startswith(f"{address}/raw/main/docs/figures/") for target in targets)
    paths = [target.removeprefix(f"{address}/").split("/", 2)[2].partition("#")[0] for target in targets]
    assert all(path and (ROOT / path).exists() for path in paths)
