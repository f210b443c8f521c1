"""The learned p of another run, as the start of this one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_schatten.exponent import clamp
from hf_schatten.optim.saved_state import CheckpointError
from hf_schatten.options import SchattenOptions

_SHOWN = 3  # names of a list that are printed


@dataclass(frozen=True)
class Transfer:
    """Which matrices start from the p that a checkpoint holds, by name; ``str()`` is the report."""

    source: str  # the checkpoint's folder
    p: dict[str, float]  # of the matrices that are in both, within the range of the present options
    moved: tuple[str, ...]  # those whose p was out of that range and is now at its end
    unmatched: tuple[str, ...]  # that only this model has; they start from `otherwise`
    unused: tuple[str, ...]  # that only the checkpoint has
    otherwise: float

    @classmethod
    def of(
        cls, options: SchattenOptions, names: Sequence[str], load: Callable[[str], Mapping[str, float]]
    ) -> Transfer:
        """Match the checkpoint that ``p_init`` names, as ``load`` reads it, with the names of a model's matrices.

        Raises:
            CheckpointError: when the checkpoint cannot be read, or no name is in both.
        """
        source = str(options.p_init)
        if not Path(source).is_dir():
            raise CheckpointError(
                f"p_init={source!r} is not a folder: give that of a checkpoint, or a number. A run that is resumed "
                "has its own p: leave p_init out there."
            )
        learned = load(source)
        matched = {name: learned[name] for name in names if name in learned}
        if not matched:
            raise CheckpointError(
                f"p_init={source!r} has p of {_listed(learned)}, and none of this model's matrices, which are "
                f"{_listed(names)}: give a checkpoint of a model with the same parameter names, or a number."
            )
        within = {name: clamp(p, options.p_min, options.largest_p) for name, p in matched.items()}
        return cls(
            source,
            within,
            moved=tuple(name for name, p in matched.items() if p != within[name]),
            unmatched=tuple(name for name in names if name not in learned),
            unused=tuple(name for name in learned if name not in set(names)),
            otherwise=options.initial_p,
        )

    def __str__(self) -> str:
        lines = [f"p_init: {len(self.p)} matrices start from the p of {self.source}."]
        if self.moved:
            lines.append(f"  {len(self.moved)} of them were out of the range p_min to p_max: {_listed(self.moved)}.")
        if self.unmatched:
            lines.append(
                f"  {len(self.unmatched)} are not in it and start from {self.otherwise:g}: {_listed(self.unmatched)}."
            )
        if self.unused:
            lines.append(f"  {len(self.unused)} of it are not in this model: {_listed(self.unused)}.")
        return "\n".join(lines)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
