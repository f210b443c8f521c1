"""The step rules ball and regularized, alone and coupled, against the exact oracles of one and several blocks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from exact_oracles import multi_block_ball_oracle, multi_block_regularized_oracle
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hf_schatten
from hf_schatten import SchattenP
from hf_schatten.linalg import ball_oracle, regularized_oracle, spectral_power_svd

LR, DECAY = 0.3, 0.2
SECTIONS = (("q", 12), ("k", 4), ("v", 4))
# One parameter is fused, one stored (in, out), one is of experts, and the gradient of one is zero.
SHAPES = {
    "square": (16, 16),
    "wide": (8, 20),
    "tall": (20, 8),
    "fused": (20, 14),
    "experts": (2, 8, 8),
    "zero": (6, 6),
}
GROUPS = {"fused": {"parts": SECTIONS}}
ORDERS = [1, 2, math.inf]


class ExactSchattenP(SchattenP):
    """SchattenP with the spectral power by a float64 SVD, so that only rounding is left."""

    def direction(self, momenta, p):
        return spectral_power_svd(momenta, p).to(momenta.dtype)


def parts(name, tensor):
    """Return the matrices of a parameter, written out by hand."""
    return {"fused": [tensor[:12], tensor[12:16], tensor[16:]], "experts": list(tensor)}.get(name, [tensor])


def matrix(shape, scale):
    """Return a matrix of condition 3 or less, whose spectral power five steps compute well."""
    G = torch.randn(shape)
    U, sigma, Vh = torch.linalg.svd(G, full_matrices=False)
    return scale * (U * torch.linspace(1, 3, sigma.shape[-1])) @ Vh


def one_step(cls, dtype, p, **options):
    """Take one step and return its gradients and updates per unit of learning rate, matrix by matrix."""
    torch.manual_seed(0)
    parameters, gradients = {}, {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        parameters[name] = nn.Parameter(torch.randn(shape, dtype=dtype))
        pieces = [
            matrix(piece.shape, 2.0**number * (1 + 0.1 * i)) for i, piece in enumerate(parts(name, parameters[name]))
        ]
        stacked = torch.stack(pieces) if len(shape) == 3 else torch.cat(pieces)
        gradients[name] = (stacked * (name != "zero")).to(dtype)
    groups = [{"params": [(name, W)], **GROUPS.get(name, {})} for name, W in parameters.items()]
    optimizer = cls(groups, lr=LR, p=p, weight_decay=DECAY, **options)
    before = {name: W.detach().clone() for name, W in parameters.items()}
    for name, W in parameters.items():
        W.grad = gradients[name].clone()
    optimizer.step()
    updates = {name: (W.detach() - (1 - LR * DECAY) * before[name]) / LR for name, W in parameters.items()}
    return (
        [piece for name, G in gradients.items() for piece in parts(name, G)],
        [piece for name, T in updates.items() for piece in parts(name, T)],
        optimizer,
    )


def distance(updates, oracle):
    """Return the distance of all matrices together, relative to the oracle's length."""
    differences = torch.stack([(T.double() - X).norm() for T, X in zip(updates, oracle, strict=True)])
    return differences.norm() / torch.stack([X.norm() for X in oracle]).norm()


# The accuracy of the spectral power by p: exact, and by five Newton-Schulz steps on these matrices.
ACCURACY = [
    (ExactSchattenP, torch.float64, dict.fromkeys([1, 2, math.inf], 1e-9)),
    (SchattenP, torch.float32, {1: 1e-5, 2: 0.02, math.inf: 0.13}),
]


@pytest.mark.parametrize(("cls", "dtype", "rtol"), ACCURACY, ids=["exact", "real"])
@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("rule", ["ball", "regularized"])
def test_alone_every_matrix_takes_its_oracles_step(cls, dtype, rtol, p, rule):
    oracle = {"ball": ball_oracle, "regularized": regularized_oracle}[rule]
    gradients, updates, _ = one_step(cls, dtype, p, step_rule=rule)
    expected = [oracle(G.double(), p + 1) for G in gradients]
    for update, exact in zip(updates, expected, strict=True):
        assert (update - exact).norm() <= rtol[p] * exact.norm() + (1e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize(("cls", "dtype", "rtol"), ACCURACY, ids=["exact", "real"])
@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", ["ball", "regularized"])
@pytest.mark.parametrize(
    "weights", ["uniform", "sqrt_m_over_n", "sqrt_n_over_m", lambda name, shape: 1 + len(name) / shape[0]]
)
def test_coupled_all_matrices_together_take_one_step(cls, dtype, rtol, p, order, rule, weights):
    oracle = {"ball": multi_block_ball_oracle, "regularized": multi_block_regularized_oracle}[rule]
    gradients, updates, optimizer = one_step(
        cls, dtype, p, step_rule=rule, coupling_order=order, coupling_weights=weights
    )
    functions = {
        "uniform": lambda name, shape: 1.0,
        "sqrt_m_over_n": lambda name, shape: (shape[0] / shape[1]) ** 0.5,
        "sqrt_n_over_m": lambda name, shape: (shape[1] / shape[0]) ** 0.5,
    }
    weight_of = functions.get(weights, weights)
    w = [weight_of(matrix.name, matrix.shape) for matrix in optimizer.matrices()]
    expected = oracle([G.double() for G in gradients], p + 1, order, w)
    assert distance(updates, expected) <= rtol[p]
    assert updates[-1].norm() <= 1e-6  # of the zero gradient
    if order == 1:
        assert sum(T.norm() > 1e-5 for T in updates) == 1  # the block of the largest dual norm


@pytest.mark.parametrize("rule", ["ball", "regularized"])
def test_every_matrix_may_have_a_p_of_its_own(rule):
    torch.manual_seed(0)
    ps = [1, 2, 4, math.inf]
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in [(6, 6), (6, 6), (5, 9), (9, 5)]]
    groups = [{"params": [W], "p": p} for W, p in zip(parameters, ps, strict=True)]
    optimizer = ExactSchattenP(groups, lr=1.0, step_rule=rule, coupling_order=2)
    for W in parameters:
        W.grad = torch.randn_like(W)
    optimizer.step()
    oracle = {"ball": multi_block_ball_oracle, "regularized": multi_block_regularized_oracle}[rule]
    expected = oracle([W.grad for W in parameters], [p + 1 for p in ps], 2)
    for W, T in zip(parameters, expected, strict=True):
        torch.testing.assert_close(W.detach(), T, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, False), (0.9, True)])
def test_the_momentum_is_a_mean_of_the_gradients(momentum, nesterov):
    """p = 1 regularized takes the momentum itself: weights that sum to 1, the first step the first gradient."""
    torch.manual_seed(0)
    W = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    averages = {"momentum": momentum, "nesterov": nesterov}
    optimizer = SchattenP([W], lr=1.0, p=1, step_rule="regularized", weight_decay=0, **averages)
    gradients = torch.randn(5, 4, 4, dtype=torch.float64)
    for step, gradient in enumerate(gradients, start=1):
        before = W.detach().clone()
        W.grad = gradient.clone()
        optimizer.step()
        weights = momentum ** torch.arange(step - 1, -1, -1, dtype=torch.float64)
        if nesterov:
            weights = momentum * weights
            weights[-1] += 1
        mean = torch.tensordot(weights / weights.sum(), gradients[:step], dims=1)
        torch.testing.assert_close(before - W.detach(), mean, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rule", ["ball", "regularized"])
def test_preconditioned_it_is_the_oracle_of_the_preconditioned_norm(rule):
    """With T = D ∘ S, ⟨M, T⟩ = ⟨D ∘ M, S⟩ and the norm of T / D is that of S. At the first step √V = |G|."""
    torch.manual_seed(0)
    W = nn.Parameter(torch.zeros(6, 9, dtype=torch.float64))
    W.grad = torch.randn_like(W)
    optimizer = ExactSchattenP([W], lr=1.0, p=2, step_rule=rule, precondition="adam", eps=0.1)
    optimizer.step()
    D = (W.grad.abs() + 0.1) ** (-1 / 3)
    oracle = {"ball": ball_oracle, "regularized": regularized_oracle}[rule]
    torch.testing.assert_close(W.detach(), D * oracle(D * W.grad, 3), atol=1e-6, rtol=1e-6)


def test_matrices_without_a_gradient_stay_out_of_the_coupling():
    torch.manual_seed(0)
    W, idle = (nn.Parameter(torch.zeros(5, 5, dtype=torch.float64)) for _ in range(2))
    optimizer = ExactSchattenP([W, idle], lr=1.0, p=2, step_rule="ball", coupling_order=2)
    optimizer.step()  # no gradient at all
    W.grad = torch.randn_like(W)
    optimizer.step()
    torch.testing.assert_close(W.detach(), ball_oracle(W.grad, 3), atol=1e-9, rtol=1e-9)
    assert not idle.detach().any()


def test_a_step_reads_nothing_of_the_device():
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    def reads(**options):
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in [(6, 6), (4, 8), (8, 4)]]
        optimizer = SchattenP(parameters, p=3, **options)
        for W in parameters:
            W.grad = torch.randn_like(W)
        with Reads() as mode:
            optimizer.step()
        return mode.count

    assert reads() == 0
    for order in ORDERS:
        assert reads(step_rule="regularized", coupling_order=order) == 0


def test_a_model_is_coupled_across_all_routed_matrices(gpt2):
    """The mixed norm of the step is the learning rate."""
    order, p = 2, 3
    shapes = {}

    def weight_of(name, shape):
        shapes[name] = shape
        return 1 + shape[0] / shape[1]

    optimizer = hf_schatten.create_schatten_optimizer(
        gpt2,
        LR,
        weight_decay=0,
        p=p,
        step_rule="ball",
        coupling_order=order,
        coupling_weights=weight_of,
        verbose=False,
    )
    optimizer.__class__ = ExactSchattenP
    twin = copy.deepcopy(gpt2)
    tokens = torch.randint(0, 64, (2, 16))
    gpt2(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    of_twin = dict(twin.named_parameters())
    total = 0.0
    for matrix_ in optimizer.matrices():
        update = matrix_.parameter.detach() - of_twin[matrix_.parameter_name].detach()
        norm = hf_schatten.linalg.schatten_norm(matrix_.layout.part(update, matrix_.index).double(), p + 1)
        total += (weight_of(matrix_.name, matrix_.shape) * norm) ** order
    assert len(shapes) == len(list(optimizer.matrices()))
    torch.testing.assert_close(total ** (1 / order), torch.tensor(LR).double(), atol=1e-4, rtol=1e-3)


def test_a_copy_stays_coupled():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
    optimizer = SchattenP(parameters, p=2, step_rule="ball", coupling_order=2, coupling_weights="sqrt_n_over_m")
    copied = copy.deepcopy(optimizer)
    for each in (optimizer, copied):
        for number, W in enumerate(each.param_groups[0]["params"], start=1):
            W.grad = torch.full((4, 4), float(number)).fill_diagonal_(5.0)
        each.step()
    for mine, other in zip(parameters, copied.param_groups[0]["params"], strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": -10, "step_rule": "ball"}, "p=-10.0 is not allowed with step_rule=ball: the order p \\+ 1 of its norm"),
        ({"coupling_order": 2}, "coupling_order=2 is not allowed: step_rule=pinned fixes the norm .* step_rule=ball"),
        ({"coupling_order": 0.5, "step_rule": "ball"}, "coupling_order=0.5 is not allowed: 1 or more, or none"),
        ({"step_rule": "cube"}, "step_rule='cube' is not allowed: one of pinned, ball, regularized"),
        (
            {"coupling_weights": "sqrt_n_over_m"},
            "coupling_weights='sqrt_n_over_m' is not allowed: it is for coupled matrices; set coupling_",
        ),
        (
            {"coupling_weights": "heavy"},
            "coupling_weights='heavy' is not allowed: one of uniform, sqrt_m_over_n, sqrt_n_over_m",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SchattenP([nn.Parameter(torch.ones(2, 2))], **options)


def test_two_step_rules_cannot_be_coupled():
    groups = [{"params": [nn.Parameter(torch.ones(2, 2))], "step_rule": rule} for rule in ("ball", "regularized")]
    with pytest.raises(ValueError, match=r"step_rule='regularized' of a group .* the optimizer's is 'ball'"):
        SchattenP(groups, step_rule="ball", coupling_order=2)


def test_a_weight_that_is_not_positive_is_refused_by_the_matrixs_name():
    W = nn.Parameter(torch.ones(2, 2))
    optimizer = SchattenP([("w", W)], step_rule="ball", coupling_order=2, coupling_weights=lambda name, shape: 0.0)
    W.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="coupling_weights gives 'w' the weight 0\\.0: return a number above 0"):
        optimizer.step()
