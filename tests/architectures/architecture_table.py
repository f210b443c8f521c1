"""Writes docs/architectures.md, how every architecture of transformers is routed: run it as a script.

``python tests/architectures/architecture_table.py`` makes a model of each type without weights, routes it, and writes
a row. ``test_architectures.py`` fails where the page and the package differ.
"""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import transformers
from swept_models import UNAVAILABLE, architectures, make_first

from hf_schatten import RoutingError, route_parameters
from hf_schatten.matrices.layout import layer_kind
from hf_schatten.matrices.routing import Route

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
_SHORT = {  # of the reasons for AdamW
    "embedding, or tied to one": "embeddings",
    "part of an embedding": "embeddings",
    "outside the backbone (task head)": "head",
    "head: writes labels, scores or boxes": "head",
    "router of experts": "router",
    "bias of positions or experts": "bias",
    "part of a norm": "norm",
    "a side of length 1": "side of 1",
    "convolution before or between the layers (stem)": "stem",
    "convolution of an image's channels": "stem",
}
_INTRODUCTION = """\
# Architectures

How `hf_schatten.route_parameters` routes one model of each type in transformers {version}, made from its default
configuration with few layers. `python tests/architectures/architecture_table.py` writes this page.

- **matrices**: kinds of parameters that train with the Schatten-p update. A kind differs in layer numbers alone.
- **AdamW**: kinds with two dimensions or more that train with AdamW, and why. Vectors and scalars always do.
- **parts**: fused projections, and the parts that each is cut into; layers in groups, a matrix for each.
- **experts**: stacks in which each expert is a matrix, with the number of experts of the default configuration.
- **not understood**: parameters that no rule knows. They train with AdamW, and training warns of them.

| type | class | matrices | AdamW | parts | experts | not understood |
|---|---|---:|---|---|---|---|
"""


def row(model_type: str) -> str:
    """Return the row of a type."""
    class_name, model = make_first(model_type)
    try:
        routing = route_parameters(model)
    except RoutingError:
        return f"| {model_type} | `{class_name}` | 0 | all | | | |"
    kinds = {layer_kind(route.name): route for route in routing.routes if route.parameter.ndim > 1}
    spectral = [route for route in kinds.values() if route.destination == "schatten_p"]
    others = Counter(_why(route) for route in kinds.values() if route.destination == "adamw")
    why = ", ".join(f"{reason} {count}" for reason, count in sorted(others.items()))
    parts = sorted({_parts(route) for route in spectral if route.layout.parts and not _one_under_the_other(route)})
    experts = sorted({_experts(route) for route in spectral if _stacks(route)})
    doubts = sorted({text.partition(":")[0].rpartition(".")[2] for text in routing.warnings})
    cells = (model_type, f"`{class_name}`", str(len(spectral)), why, *map(", ".join, (parts, experts, doubts)))
    return f"| {' | '.join(cells)} |"


def _why(route: Route) -> str:
    return _SHORT.get(route.reason, "norm computes it" if "norm computes" in route.reason else _other(route.reason))


def _other(reason: str) -> str:
    return "depthwise" if "depthwise" in reason else "recurrent" if reason.startswith("recurrent") else "no matrix"


def _leaf(route: Route) -> str:
    return route.name.removesuffix(".weight").rpartition(".")[2]


def _parts(route: Route) -> str:
    parts = [name for name, _ in route.layout.parts]
    return f"`{_leaf(route)}` {f'{len(parts)} groups' if parts[0] == '0' else '/'.join(parts)}"


def _stacks(route: Route) -> bool:
    return route.layout.has_experts(route.parameter.shape) or _one_under_the_other(route)


def _one_under_the_other(route: Route) -> bool:
    return "Expert" in type(route.module).__name__ and route.parameter.ndim == 2


def _experts(route: Route) -> str:
    stacked = route.layout.has_experts(route.parameter.shape)
    return f"`{_leaf(route)}` {len(route.parameter) if stacked else len(route.layout.parts)}"


def page() -> str:
    """Return the page."""
    rows = [row(model_type) for model_type in architectures() if model_type not in UNAVAILABLE]
    missing = [f"- `{model_type}`: {reason}." for model_type, reason in sorted(UNAVAILABLE.items())]
    left_out = ("", "## Left out", "", "These cannot be made from a default configuration here:", "")
    return _INTRODUCTION.format(version=transformers.__version__) + "\n".join((*rows, *left_out, *missing, ""))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE} has {len(architectures()) - len(UNAVAILABLE)} rows.")
