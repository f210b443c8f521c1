"""The package `recipes`, for a script that Python starts in this folder; the package says why."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "recipes")]
