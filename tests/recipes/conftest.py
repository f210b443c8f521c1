"""Makes the modules of the recipe importable, as they are when its script runs."""

import sys
from pathlib import Path

import datasets
import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain_clm"
sys.path.insert(0, str(RECIPE))


@pytest.fixture
def recipe() -> Path:
    return RECIPE


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep cached data sets of one test from another, and from the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
