"""Models, options and actions drawn at random, against a plain reference in float64 that decomposes every matrix."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_schatten import SchattenP, create_schatten_optimizer


class ExactSchattenP(SchattenP):
    """Takes the directions of singular value decompositions, so that all else can be compared closely."""

    def direction(self, momenta: Tensor, p: Tensor) -> Tensor:
        return torch.stack([spectral_power(M.double(), 1 / float(q)) for M, q in zip(momenta, p, strict=True)]).to(
            momenta
        )


def spectral_power(M: Tensor, s: float) -> Tensor:
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ torch.diag(torch.where(sigma > 0, sigma**s, 0.0)) @ Vh


@dataclass
class Moments:
    """What the reference knows of a parameter."""

    first: Tensor
    second: Tensor
    absence: list[float]  # of each matrix
    taken: int = 0


@dataclass
class Directed:
    """A matrix of a step of the reference."""

    weight: Tensor  # a view of the reference's weights
    direction: Tensor
    sum_of_powers: float  # Σ σ^{1+s} of what the spectral power took
    s: float
    presence: float
    group: dict[str, Any]
    finite: bool


class Reference:
    """SchattenP and AdamW in float64, matrix by matrix; weights are rounded after each step."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.order = options.get("coupling_order")
        self.weights: dict[nn.Parameter, Tensor] = {}
        self.moments: dict[nn.Parameter, Moments] = {}

    def step(self, groups: list[dict[str, Any]]) -> None:
        directed = []
        for group in groups:
            having = [each for each in group["params"] if each.grad is not None and each.numel()]
            for each in having:
                self.weights.setdefault(each, each.detach().double().clone())
            if group["spectral"]:
                directed += [matrix for each in having for matrix in self.directed(group, each)]
            elif all(each.grad.isfinite().all() for each in having):
                for each in having:
                    self.adamw(group, each)
        for matrix, factor in zip(directed, self.factors(directed), strict=True):
            rate = matrix.group["lr"] * matrix.group["lr_ratio"]
            if matrix.finite:
                sign = -1 if matrix.group["maximize"] else 1
                matrix.weight.mul_(1 - rate * matrix.group["weight_decay"])
                matrix.weight.sub_(sign * rate * factor * matrix.direction)
        for parameter, weight in self.weights.items():
            weight.copy_(weight.to(parameter.dtype))

    def adamw(self, group: dict[str, Any], parameter: nn.Parameter) -> None:
        W, G, (beta1, beta2) = self.weights[parameter], parameter.grad.double(), group["betas"]
        G = -G if group["maximize"] else G
        known = self.moments.setdefault(parameter, Moments(torch.zeros_like(W), torch.zeros_like(W), []))
        known.taken += 1
        known.first = beta1 * known.first + (1 - beta1) * G
        known.second = beta2 * known.second + (1 - beta2) * G**2
        first, second = known.first / (1 - beta1**known.taken), known.second / (1 - beta2**known.taken)
        W.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * first / (second.sqrt() + group["eps"]))

    def directed(self, group: dict[str, Any], parameter: nn.Parameter) -> list[Directed]:
        W, G, beta, beta2 = self.weights[parameter], parameter.grad.double(), group["momentum"], group["betas"][1]
        cut = cutter(group, parameter)
        count = len(cut(W))
        known = self.moments.setdefault(parameter, Moments(torch.zeros_like(W), torch.zeros_like(W), [0.0] * count))
        finite = bool(G.isfinite().all())
        look, absences = known.first, known.absence
        if finite:
            known.taken += 1
            known.first = beta * known.first + (1 - beta) * G
            known.second = beta2 * known.second + (1 - beta2) * G**2
            empty = [float(not piece.any()) for piece in cut(G, whole_experts=True)]
            known.absence = [beta * old + (1 - beta) * zero for old, zero in zip(known.absence, empty, strict=True)]
            look, absences = known.first, known.absence
            if group["nesterov"]:
                look = beta * look + (1 - beta) * G
                absences = [beta * old + (1 - beta) * zero for old, zero in zip(absences, empty, strict=True)]
        weight = 1 - beta ** max(1, known.taken + group["nesterov"])
        second = known.second / (1 - beta2 ** max(1, known.taken))
        p = group["p"]
        s = 0.0 if math.isinf(p) else 1 / p
        power = {"none": 0.0, "adam": -max(s, 0.0) / (1 + max(s, 0.0)), "muadam": -0.5}[group["precondition"]]
        D = (second.sqrt() + group["eps"]) ** power
        found = []
        for M, scale, view, absence in zip(cut(look / weight), cut(D), cut(W), absences, strict=True):
            taken = scale * M
            sums = float((torch.linalg.svdvals(taken) ** (1 + s)).sum())
            direction = scale * spectral_power(taken, s)
            found.append(Directed(view, direction, sums, s, max(0.0, 1 - absence / weight), group, finite))
        return found

    def factors(self, matrices: list[Directed]) -> list[float]:
        duals = [matrix.sum_of_powers ** (1 / (1 + matrix.s)) for matrix in matrices]
        coupled = [1.0] * len(matrices)
        if self.order is not None and math.isfinite(self.order) and any(duals):
            q = self.order / (self.order - 1)
            total = sum(dual**q for dual in duals)
            coupled = [dual ** (q - 1) / total ** ((q - 1) / q) for dual in duals]
        whole = sum(dual * c for dual, c in zip(duals, coupled, strict=True))
        return [
            self.factor(matrix, dual, c, whole if self.order is not None else dual)
            for matrix, dual, c in zip(matrices, duals, coupled, strict=True)
        ]

    def factor(self, matrix: Directed, dual: float, coupled: float, whole: float) -> float:
        own, s, group = float(matrix.direction.norm()), matrix.s, matrix.group
        if not own:
            return 0.0
        rows, columns = matrix.direction.shape
        m, n = (columns, rows) if group["transposed"] else (rows, columns)
        if group["step_rule"] == "ball":
            return coupled * dual**-s * matrix.presence
        if group["step_rule"] == "regularized":
            return coupled * whole * dual**-s
        largest = 0.2 * math.sqrt(m * n)
        if group["scale"] == "none":
            return matrix.presence ** (1 - s)
        if group["scale"] == "muon":
            norm = math.sqrt(min(m, n) * max(1.0, m / n))
        elif group["scale"] == "interpolate":
            beta1 = group["betas"][0]
            kappa = math.sqrt((1 - beta1) / (1 + beta1)) * math.sqrt(max(m, n)) / group["lr_ratio"]
            norm = math.sqrt(min(m, n)) * kappa**s
        elif group["scale"] == "schatten" and s > 0 and group["precondition"] == "none":
            norm = min(largest, 0.2 * math.sqrt(max(m, n)) * own / dual**s)
        else:
            norm = largest
        return norm / own * matrix.presence


def cutter(group: dict[str, Any], parameter: nn.Parameter) -> Callable[..., list[Tensor]]:
    """Return what cuts a tensor of the parameter's shape into its matrices, views as stored."""

    def cut(tensor: Tensor, whole_experts: bool = False) -> list[Tensor]:
        pieces = list(tensor) if tensor.ndim == 3 else [tensor.flatten(1)]
        sizes = [size for _, size in group["parts"]]
        if not sizes:
            return pieces
        if whole_experts:
            return [piece for piece in pieces for _ in sizes]
        return [part for piece in pieces for part in piece.split(sizes, 1 if group["transposed"] else 0)]

    return cut


dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
side = st.integers(1, 6)


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 99)))
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["linear", "linear", "convolution", "norm", "embedding", "tied"]))
        if kind == "linear":
            layers.append(nn.Linear(draw(side), draw(side), bias=draw(st.booleans())))
        elif kind == "convolution":
            layers.append(nn.Conv2d(draw(side), draw(side), draw(st.sampled_from([1, 2, (1, 3)]))))
        elif kind == "norm":
            layers.append(nn.LayerNorm(draw(side)))
        elif kind == "embedding":
            layers.append(nn.Embedding(draw(side), draw(side)))
        elif layers:
            layers.append(layers[-1])
    layers.append(nn.Linear(3, 4))  # at least one matrix that can be routed
    model = nn.Sequential(*layers).to(draw(dtypes))
    for parameter in list(model.parameters())[:-2]:
        parameter.requires_grad_(draw(st.integers(0, 4)) > 0)
    return model


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "p": draw(st.sampled_from([1.0, 2.5, 4.0, math.inf, -5.0])),
        "momentum": draw(st.sampled_from([0.0, 0.5, 0.9])),
        "nesterov": draw(st.booleans()),
        "schatten_lr_ratio": draw(st.sampled_from([1.0, 0.3])),
        "precondition": draw(st.sampled_from(["none", "none", "adam", "muadam"])),
    }
    rule = draw(st.sampled_from(["pinned", "pinned", "ball", "regularized"]))
    if rule == "pinned" or chosen["p"] < 1:
        chosen["scale"] = draw(st.sampled_from(["schatten", "match_rms_adamw", "muon", "interpolate", "none"]))
    else:
        chosen |= {"step_rule": rule, "coupling_order": draw(st.sampled_from([None, 2.0, 3.0, math.inf]))}
    return chosen


@st.composite
def groups(draw: st.DrawFn, number: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return a group with a layout that no layer of the models has."""
    kind = draw(st.sampled_from(["experts", "parts", "experts of parts", "transposed", "vectors"]))
    shape: tuple[int, ...] = (draw(side), draw(side))
    group: dict[str, Any] = {"spectral": kind != "vectors"}
    if "parts" in kind:
        first, second = draw(side), draw(side)
        shape, group["parts"] = (first + second, shape[1]), (("a", first), ("b", second))
    if kind == "transposed":
        shape, group["transposed"] = shape[::-1], True
    if "experts" in kind:
        shape = (draw(st.integers(1, 3)), *shape)
    if kind == "vectors":
        shape = shape[:1]
    return group | {"params": [(f"added{number}", nn.Parameter(torch.randn(shape).to(dtype)))]}


ACTIONS = ["step", "step", "step", "step", "zero", "save and load", "copy", "add a group", "learning rate", "freeze"]


def set_gradients(draw: Callable[..., Any], optimizer: SchattenP, generator: torch.Generator) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            kind = draw(st.sampled_from(["dense", "dense", "dense", "dense", "none", "zeros", "an expert", "nan"]))
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if kind == "zeros":
                gradient.zero_()
            elif kind == "an expert":
                gradient[0] = 0 if gradient.ndim == 3 else gradient[0]
            elif kind == "nan":
                gradient.view(-1)[-1] = math.nan
            parameter.grad = None if kind == "none" or not parameter.requires_grad else gradient


def run(data: st.DataObject) -> None:
    """Draw a model, options and actions, and compare the weights after each step."""
    draw = data.draw
    model, chosen = draw(models()), draw(options())
    numbers = {"lr": draw(st.sampled_from([0.1, 0.01])), "weight_decay": draw(st.sampled_from([0.0, 0.1]))}
    made = create_schatten_optimizer(model, **numbers, verbose=False, **chosen)
    maximize = draw(st.booleans())
    given_groups = [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        | {"params": list(zip(group["param_names"], group["params"], strict=True)), "maximize": maximize}
        for group in made.param_groups
    ]
    optimizer = ExactSchattenP(given_groups, made.options, **numbers)
    reference = Reference(chosen)
    dtype, generator = next(model.parameters()).dtype, torch.Generator().manual_seed(draw(st.integers(0, 99)))
    steps = 0
    for number, action in enumerate(draw(st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=12))):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if action == "step":
            set_gradients(draw, optimizer, generator)
            reference.step(optimizer.param_groups)
            optimizer.step()
            steps += 1
            compare(optimizer, reference, steps)
        elif action == "zero":
            optimizer.zero_grad(set_to_none=draw(st.booleans()))
        elif action == "save and load":
            memory = io.BytesIO()
            torch.save(optimizer.state_dict(), memory)
            memory.seek(0)
            saved = torch.load(memory, weights_only=True)
            optimizer = ExactSchattenP(regrouped(optimizer), made.options, **numbers)
            optimizer.load_state_dict(saved)
        elif action == "copy":
            copy = deepcopy(optimizer)
            own = [parameter for group in copy.param_groups for parameter in group["params"]]
            for new, old in zip(own, parameters, strict=True):
                if old in reference.weights:
                    reference.weights[new] = reference.weights.pop(old)
                if old in reference.moments:
                    reference.moments[new] = reference.moments.pop(old)
            optimizer = copy
        elif action == "add a group":
            optimizer.add_param_group(draw(groups(number, dtype)))
        elif action == "learning rate":
            for group in optimizer.param_groups:
                group["lr"] = draw(st.sampled_from([0.0, 0.02, 0.2]))
        elif action == "freeze":
            parameters[draw(st.integers(0, len(parameters) - 1))].requires_grad_(False)


def regrouped(optimizer: SchattenP) -> list[dict[str, Any]]:
    """Return the groups as they are given to a new optimizer, without the values that a state brings."""
    structure = "spectral", "transposed", "parts", "blocks", "weight_decay", "maximize"
    return [
        {key: group[key] for key in structure}
        | {"params": list(zip(group["param_names"], group["params"], strict=True))}
        for group in optimizer.param_groups
    ]


def compare(optimizer: SchattenP, reference: Reference, steps: int) -> None:
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if parameter in reference.weights:
                rounding = torch.finfo(parameter.dtype).eps * steps
                torch.testing.assert_close(
                    parameter.detach().double(),
                    reference.weights[parameter],
                    rtol=max(1e-5, 4 * rounding),
                    atol=max(1e-5, rounding / 4),
                    msg=lambda text, name=name: f"{name}: {text}",
                )


@given(st.data())
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_300_runs_are_those_of_the_reference(data):
    run(data)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
def test_5000_runs_are_those_of_the_reference(data):
    run(data)
