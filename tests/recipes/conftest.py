"""What the tests of recipes share."""

from pathlib import Path

import datasets
import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe() -> Path:
    return RECIPES / "pretrain_clm"


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep cached data sets of one test from another, and from the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
