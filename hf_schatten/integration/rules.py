"""What the user says of single parameters: weight decay and learning rate, by groups of a Trainer and by patterns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_schatten.matrices.layout import matches
from hf_schatten.matrices.routing import Route, Routing, RoutingError, require_matches
from hf_schatten.optim.matrix import Group
from hf_schatten.options import SchattenOptions

_OF_GROUPS = "weight_decay", "lr"  # what counts of the caller's groups


@dataclass(frozen=True)
class Rules:
    """The groups of the caller, and the factors of learning rates; ``str()`` says what ``lr_ratios`` does.

    The optimizer's groups follow the caller's, and not the values in them or any option: so their number, on which the
    state of a schedule depends, is the same at a resume with other values.

    Attributes:
        groups: what counts of the caller's groups.
        number: of the caller's group, by the name of each parameter that trains.
        factors: of the learning rates, by pattern; the first that matches counts.
    """

    groups: list[Group]
    number: Mapping[str, int]
    factors: Mapping[str, float]

    @classmethod
    def of(
        cls,
        options: SchattenOptions,
        routing: Routing,
        weight_decay: float,
        param_groups: Iterable[Mapping[str, Any]] | None,
    ) -> Rules:
        """Read the rules from options and groups.

        Args:
            options: have the factors.
            routing: of the model.
            weight_decay: of what decays, where there are no groups.
            param_groups: as of :func:`hf_schatten.create_schatten_optimizer`.

        Raises:
            RoutingError: when a pattern matches nothing, or groups have parameters of another model.
        """
        routes = [route for route in routing.routes if route.destination != "frozen"]
        if param_groups is None:
            given: list[Mapping[str, Any]] = [
                {"weight_decay": decay, "params": [route.parameter for route in routes if route.decay == decays]}
                for decays, decay in ((True, weight_decay), (False, 0.0))
            ]
        else:
            given = [{"weight_decay": 0.0, **group, "params": list(group["params"])} for group in param_groups]
        number_of = {id(parameter): number for number, group in enumerate(given) for parameter in group["params"]}
        number = {route.name: number_of[id(route.parameter)] for route in routes if id(route.parameter) in number_of}
        _require_own(routing, given)
        require_matches("lr_ratios", options.rate_factors, list(number))
        return cls(
            [{key: float(group[key]) for key in _OF_GROUPS if key in group} for group in given],
            number,
            options.rate_factors,
        )

    def trained(self, routes: Iterable[Route]) -> list[Route]:
        """Return those of the routes whose parameters are in a group."""
        return [route for route in routes if route.name in self.number]

    def group(self, route: Route, *, spectral: bool) -> Group:
        """Return a group of the optimizer for this parameter and its like, still empty."""
        own = {"params": [], "lr_ratio_by_parameter": {}, "spectral": spectral}
        return own | self.groups[self.number[route.name]]

    def add(self, route: Route, group: Group) -> None:
        """Add a parameter to a group of the optimizer."""
        group["params"].append((route.name, route.parameter))
        pattern = self._pattern(route.name)
        if pattern is not None:
            group["lr_ratio_by_parameter"][route.name] = self.factors[pattern]

    def _pattern(self, name: str) -> str | None:
        return next((pattern for pattern in self.factors if matches(pattern, name)), None)

    def __str__(self) -> str:
        patterns = [self._pattern(name) for name in self.number]
        lines = [
            f"  {pattern}: {patterns.count(pattern):,} tensors at {factor:g} times the learning rate"
            for pattern, factor in self.factors.items()
        ]
        return "\n".join(["lr_ratios, of which the first that matches counts:", *lines])


def _require_own(routing: Routing, groups: Iterable[Mapping[str, Any]]) -> None:
    own = {id(route.parameter) for route in routing.routes}
    foreign = [each for group in groups for each in group["params"] if each.requires_grad and id(each) not in own]
    if foreign:
        shapes = ", ".join(str(tuple(parameter.shape)) for parameter in foreign[:3])
        raise RoutingError(
            f"The parameter groups have {len(foreign)} parameters that are not the model's, of shapes {shapes}: give "
            "the module that has them all, such as the loss that has the model."
        )
