"""Pictures that tests do not look at are not rendered: it takes longer than the training runs that save them."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_EMPTY = base64.b64decode(  # a PNG of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
)
_render = Figure.savefig
rendered = True


def _save(figure: Figure, path: Any, **options: Any) -> None:
    """Render the figure, or write a picture of one pixel in its place; it is composed in either case."""
    if rendered:
        _render(figure, path, **options)
    else:
        Path(path).write_bytes(_EMPTY)


def install() -> None:
    """Let ``rendered`` decide in this process."""
    Figure.savefig = _save  # type: ignore[method-assign]
