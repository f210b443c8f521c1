"""The package `benchmarks`, for a script that Python starts in this folder; the package `recipes` says why."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1] / "benchmarks")]
