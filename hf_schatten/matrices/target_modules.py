"""The modules that a user lists for the Schatten-p update, in the way of ``optim_target_modules`` of transformers."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.trainer_utils import check_target_module_exists


class TargetModules:
    """A list of modules: parts of their names, or regular expressions; a single text is a regular expression.

    Args:
        listed: the list; None and ``"all-linear"`` leave it to the package's rules.
    """

    def __init__(self, listed: str | Sequence[str] | None) -> None:
        self._entries: list[str | list[str]] = []
        if isinstance(listed, str):
            self._entries = [] if listed.replace("_", "-") == "all-linear" else [listed]
        elif listed is not None:
            self._entries = [[entry] for entry in listed]

    @property
    def given(self) -> bool:
        """Whether the list decides."""
        return bool(self._entries)

    def has(self, name: str) -> bool:
        """Return whether the module that has a parameter of this name is listed."""
        return any(_lists(entry, name) for entry in self._entries)

    def unused(self, names: Sequence[str]) -> list[str]:
        """Return the entries that list the module of none of these parameters."""
        left = [entry for entry in self._entries if not any(_lists(entry, name) for name in names)]
        return [entry if isinstance(entry, str) else entry[0] for entry in left]


def _lists(entry: str | list[str], name: str) -> bool:
    return bool(check_target_module_exists(entry, name.rpartition(".")[0]))
