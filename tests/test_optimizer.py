"""SchattenP against independent references: the SVD in float64, torch.optim.AdamW, and the definition."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hf_schatten
from hf_schatten import SchattenP, UnsupportedEngineError
from hf_schatten.linalg import compute_dtype, spectral_power
from hf_schatten.optim import stack
from hf_schatten.optim.state import expected_state

SHAPES = [(24, 24), (16, 40), (40, 16)]
SHAPES_OF_ONE_BATCH = [(128, 256), (256, 128), (256, 128)]


def reference_updates(gradients, *, p, momentum, nesterov, norm):
    """Return the update of each step in float64: EMA, bias correction, look-ahead, SVD, pinned norm."""
    average, updates = torch.zeros_like(gradients[0], dtype=torch.float64), []
    for step, gradient in enumerate((g.double() for g in gradients), start=1):
        average = momentum * average + (1 - momentum) * gradient
        ahead = momentum * average + (1 - momentum) * gradient if nesterov else average
        corrected = ahead / (1 - momentum ** (step + 1 if nesterov else step))
        U, sigma, Vh = torch.linalg.svd(corrected, full_matrices=False)
        update = U @ torch.diag(sigma ** (1 / p)) @ Vh
        updates.append(norm * update / update.norm())
    return updates


def norm_of(scale, m, n):
    return {"match_rms_adamw": 0.2 * math.sqrt(m * n), "muon": math.sqrt(min(m, n) * max(1, m / n))}[scale]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("p", "nesterov", "scale", "rtol"),
    # The tolerance is the accuracy of five Newton-Schulz steps, which at p = 1 is rounding.
    [
        (1.0, True, "match_rms_adamw", 1e-5),
        (1.0, False, "muon", 1e-5),
        (2.0, True, "muon", 0.03),
        (math.inf, True, "muon", 0.13),
        (math.inf, False, "match_rms_adamw", 0.13),
    ],
)
def test_steps_equal_the_svd_reference(shape, transposed, p, nesterov, scale, rtol):
    torch.manual_seed(0)
    m, n = shape
    W = torch.randn(m, n)
    gradients = [torch.randn(m, n) for _ in range(3)]
    lr, decay, momentum = 0.1, 0.2, 0.9
    stored = nn.Parameter((W.mT if transposed else W).clone())
    optimizer = SchattenP(
        [{"params": [("w", stored)], "transposed": transposed}],
        lr=lr,
        p=p,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=decay,
        scale=scale,
    )
    expected = W.double()
    updates = reference_updates(gradients, p=p, momentum=momentum, nesterov=nesterov, norm=norm_of(scale, m, n))
    for gradient, update in zip(gradients, updates, strict=True):
        before = stored.detach().clone()
        stored.grad = (gradient.mT if transposed else gradient).clone()
        optimizer.step()
        taken = (1 - lr * decay) * before - stored.detach()
        taken = (taken.mT if transposed else taken).double() / lr
        assert (taken - update).norm() <= rtol * update.norm()
        expected = (1 - lr * decay) * expected - lr * update
    assert optimizer.steps_taken() == 3
    assert (stored.detach().norm() - expected.norm()).abs() <= rtol * expected.norm()


def test_at_p_infinity_with_scale_muon_the_update_is_the_polar_factor():
    torch.manual_seed(0)
    W = nn.Parameter(torch.zeros(64, 64))
    optimizer = SchattenP([W], lr=1.0, p=math.inf, scale="muon", weight_decay=0.0)
    W.grad = torch.randn(64, 64)
    U, _, Vh = torch.linalg.svd(W.grad.double())
    optimizer.step()
    relative_error = (-W.detach().double() - U @ Vh).norm() / 8
    assert relative_error <= 0.13


def test_the_direction_is_torch_muons_where_its_own_iteration_has_converged():
    """On an orthogonal gradient both are the gradient itself, so that momentum and decay are compared exactly."""
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(32, 32)).Q
    ours, theirs = nn.Parameter(torch.eye(32)), nn.Parameter(torch.eye(32))
    schatten = SchattenP([ours], lr=0.1, p=math.inf, scale="muon", weight_decay=0.1)
    muon = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="original")
    for parameter, optimizer in ((ours, schatten), (theirs, muon)):
        parameter.grad = Q.clone()
        optimizer.step()
    # Muon's update is a multiple of Q between 0.7 and 1.2; ours is Q.
    update = (0.99 * torch.eye(32) - theirs.detach()) / 0.1
    assert (update / update.norm() - Q / Q.norm()).norm() < 3e-2  # torch computes in bf16
    torch.testing.assert_close((0.99 * torch.eye(32) - ours.detach()) / 0.1, Q, atol=1e-4, rtol=1e-4)


def test_adamw_groups_equal_torch_adamw(gpt2):
    torch.manual_seed(0)
    twin = copy.deepcopy(gpt2)
    ours = hf_schatten.create_schatten_optimizer(gpt2, lr=1e-3, weight_decay=0.1, p=2, verbose=False)
    routing = hf_schatten.route_parameters(gpt2)
    of_twin = dict(twin.named_parameters())
    decay = [of_twin[route.name] for route in routing.to("adamw") if route.decay]
    rest = [of_twin[route.name] for route in routing.to("adamw") if not route.decay]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-3)
    pairs = [(route.parameter, of_twin[route.name]) for route in routing.to("adamw")]
    for _ in range(3):
        for mine, their in pairs:
            mine.grad = torch.randn_like(mine)
            their.grad = mine.grad.clone()
        ours.step()
        theirs.step()
    for mine, their in pairs:
        torch.testing.assert_close(mine, their, atol=0.0, rtol=0.0)


def test_each_matrix_of_a_batch_has_its_own_p():
    torch.manual_seed(0)
    gradient = torch.randn(16, 16)
    alone = {}
    for p in (1.0, 3.0, math.inf):
        W = nn.Parameter(torch.zeros(16, 16))
        optimizer = SchattenP([W], p=p)
        W.grad = gradient.clone()
        optimizer.step()
        alone[p] = W.detach()
    together = {p: nn.Parameter(torch.zeros(16, 16)) for p in alone}
    optimizer = SchattenP(list(together.values()))
    optimizer.create_state()
    for p, W in together.items():
        optimizer.state[W]["p"].fill_(p)
        W.grad = gradient.clone()
    optimizer.step()
    for p, W in together.items():
        torch.testing.assert_close(W.detach(), alone[p], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(("workspace", "calls"), [(512 << 20, 1), (300 << 10, 6)])
def test_equal_shapes_and_their_transposes_share_a_stack_within_the_workspace(workspace, calls, monkeypatch):
    """Momentum and direction of a 128 × 256 matrix take 256 KiB in fp32, so that 300 KiB hold one at a time."""

    class Counting(SchattenP):
        batches = ()

        def direction(self, momenta, p):
            self.batches += (tuple(momenta.shape),)
            return super().direction(momenta, p)

    monkeypatch.setattr(stack, "MEMORY", workspace)
    monkeypatch.setattr(stack, "SHARE_OF_MOMENTA", 0.0)
    torch.manual_seed(0)
    wide, tall, conv1d = ([nn.Parameter(torch.zeros(shape)) for _ in range(2)] for shape in SHAPES_OF_ONE_BATCH)
    groups = [{"params": wide + tall}, {"params": conv1d, "transposed": True}]
    optimizer = Counting(groups, p=3.0, scale="muon")
    alone = SchattenP([{"params": [nn.Parameter(torch.zeros_like(tall[1]))]}], p=3.0, scale="muon")
    for parameter in (*wide, *tall, *conv1d):
        parameter.grad = torch.randn_like(parameter)
    alone.param_groups[0]["params"][0].grad = tall[1].grad.clone()
    optimizer.step()
    alone.step()
    assert optimizer.batches == ((6 // calls, 128, 256),) * calls
    torch.testing.assert_close(tall[1], alone.param_groups[0]["params"][0], atol=1e-7, rtol=1e-4)


def parts_of(layout: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the matrices (out, in) of a parameter, written out by hand."""
    if layout == "parts":
        return [tensor[:6], tensor[6:8], tensor[8:]]
    if layout == "transposed sections":
        return [tensor[:, :6].mT, tensor[:, 6:8].mT, tensor[:, 8:].mT]
    if layout == "experts":
        return [tensor[0, :4], tensor[0, 4:], tensor[1, :4], tensor[1, 4:]]
    return [tensor.flatten(1)]


@pytest.mark.parametrize(
    ("layout", "shape", "group"),
    [
        ("parts", (10, 7), {"parts": (("q", 6), ("k", 2), ("v", 2))}),
        ("transposed sections", (7, 10), {"transposed": True, "parts": (("q", 6), ("k", 2), ("v", 2))}),
        ("experts", (2, 8, 5), {"parts": (("gate", 4), ("up", 4))}),
        ("filters", (6, 4, 3, 3), {}),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "rule",
    [
        {"scale": "muon"},
        {"precondition": "adam"},
        {"precondition": "muadam", "scale": "none"},
        {"precondition": "muadam", "step_rule": "regularized"},
        {"step_rule": "ball", "coupling_order": 2, "coupling_weights": "sqrt_n_over_m"},
    ],
    ids=str,
)
def test_each_matrix_of_a_parameter_is_updated_as_if_it_were_alone(layout, shape, group, memory_format, rule):
    torch.manual_seed(0)
    if memory_format == torch.channels_last and layout != "filters":
        pytest.skip("only filters have it")
    W, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(2)]
    whole = nn.Parameter(W.clone(memory_format=memory_format))
    count = len(parts_of(layout, W))
    options = {"lr": 0.1, "weight_decay": 0.2, **rule}
    p = [(2.0, math.inf, 4.0, 1.5)[index] for index in range(count)]
    optimizer = SchattenP([{"params": [("w", whole)], "p": p, **group}], **options)
    alone = [nn.Parameter(part.clone()) for part in parts_of(layout, W)]
    separate = SchattenP([{"params": [part], "p": value} for part, value in zip(alone, p, strict=True)], **options)
    for gradient in gradients:
        whole.grad = gradient.clone()
        for part, piece in zip(alone, parts_of(layout, gradient), strict=True):
            part.grad = piece.clone()
        optimizer.step()
        separate.step()
    for part, piece in zip(alone, parts_of(layout, whole.detach()), strict=True):
        torch.testing.assert_close(piece, part.detach(), atol=1e-6, rtol=1e-5)
    names = [matrix.name for matrix in optimizer.matrices()]
    assert names == {
        "experts": ["w.0.gate", "w.0.up", "w.1.gate", "w.1.up"],
        "filters": ["w"],
    }.get(layout, ["w.q", "w.k", "w.v"])
    assert [matrix.input_name for matrix in optimizer.matrices()] == (
        ["w.0", "w.0", "w.1", "w.1"] if layout == "experts" else ["w"] * count
    )
    assert list(optimizer.learned_p().values()) == p


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"parts": (("q", 3), ("k", 3))}, r"'w' has 4 outputs, and its parts \{'q': 3, 'k': 3\} have 6"),
        ({"p": (2.0, 3.0)}, r"p=\[2.0, 3.0\] has 2 values for a parameter of 1 matrices"),
        ({"p": (0.5,)}, r"p=0.5 is not allowed"),
    ],
)
def test_a_group_that_does_not_fit_its_parameters_is_refused(group, message):
    with pytest.raises(ValueError, match=message):
        SchattenP([{"params": [("w", nn.Parameter(torch.ones(4, 4)))], **group}])


def test_the_schedule_drives_both_updates_and_the_ratio_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    optimizer = hf_schatten.create_schatten_optimizer(
        model,
        lr=0.5,
        weight_decay=0.0,
        p=2,
        scale="match_rms_adamw",
        schatten_lr_ratio=0.1,
        exclude=["1.*"],
        verbose=False,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.25)
    before = copy.deepcopy(model)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    scheduler.step()
    matrix_step = (model[0].weight - before[0].weight).norm()
    torch.testing.assert_close(matrix_step.item(), 0.5 * 0.25 * 0.1 * 0.2 * 8, atol=1e-6, rtol=1e-4)
    bias_step = (model[0].bias - before[0].bias).abs()
    torch.testing.assert_close(bias_step, torch.full((8,), 0.5 * 0.25), atol=1e-6, rtol=1e-4)


def test_a_zero_gradient_moves_nothing_but_the_decay():
    W = nn.Parameter(torch.ones(4, 4))
    optimizer = SchattenP([W], lr=0.1, weight_decay=0.5, p=2)
    W.grad = torch.zeros(4, 4)
    optimizer.step()
    torch.testing.assert_close(W.detach(), torch.full((4, 4), 0.95), atol=1e-7, rtol=1e-7)


def test_all_state_is_tensors_and_created_at_the_first_step(llama):
    optimizer = hf_schatten.create_schatten_optimizer(llama, p="adaptive", verbose=False)
    assert not optimizer.state_dict()["state"]
    tokens = torch.randint(0, 64, (2, 16))
    keys = []
    for _ in range(11):  # over the first estimate of p
        llama(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        state = optimizer.state_dict()["state"]
        keys.append({index: set(entry) for index, entry in state.items()})
        assert all(isinstance(value, torch.Tensor) for entry in state.values() for value in entry.values())
    assert all(later == keys[0] for later in keys)
    expected = expected_state(optimizer.param_groups)
    for matrix in optimizer.matrices():
        found = {key: (value.shape, value.dtype) for key, value in matrix.state.items()}
        assert found == {key: (value.shape, value.dtype) for key, value in expected[matrix.parameter_name].items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_keep_fp32_state_through_load_state_dict(dtype):
    torch.manual_seed(0)
    W, b = nn.Parameter(torch.randn(8, 8, dtype=dtype)), nn.Parameter(torch.randn(8, dtype=dtype))
    groups = lambda: [{"params": [("w", W)]}, {"params": [("b", b)], "spectral": False}]  # noqa: E731
    optimizer = SchattenP(groups(), p=3.0)
    for _ in range(300):  # 300 is no bf16 number
        W.grad, b.grad = torch.randn_like(W), torch.randn_like(b)
        optimizer.step()
    again = SchattenP(groups())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter in (W, b):
        for key, value in optimizer.state[parameter].items():
            loaded = again.state[parameter][key]
            assert loaded.dtype == value.dtype != dtype
            assert torch.equal(loaded, value)
            assert loaded.data_ptr() != value.data_ptr()


def test_a_closure_is_called_with_gradients_enabled():
    W = nn.Parameter(torch.ones(2, 2))
    optimizer = SchattenP([W])

    def closure():
        optimizer.zero_grad()
        loss = W.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0


def test_a_spectral_group_refuses_a_vector_by_name():
    pairs = [("w", nn.Parameter(torch.ones(2, 2))), ("b", nn.Parameter(torch.ones(2)))]
    with pytest.raises(ValueError, match=r"'b' of shape \(2,\) is not a matrix.*create_schatten_optimizer"):
        SchattenP(pairs)


def test_p_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"p=0.5 is not allowed"):
        SchattenP([nn.Parameter(torch.ones(2, 2))], p=0.5)


def test_a_flattened_matrix_is_refused():
    W = nn.Parameter(torch.ones(2, 2))
    optimizer = SchattenP([W])
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(4))
    with pytest.raises(UnsupportedEngineError, match="has replaced the matrices by flat tensors"):
        optimizer.step()


def test_a_method_that_overrides_direction_needs_nothing_else():
    class SignDescent(SchattenP):
        def direction(self, momenta, p):
            return momenta.sign()

    W = nn.Parameter(torch.zeros(2, 2))
    optimizer = SignDescent([W], lr=1.0, weight_decay=0.0)
    W.grad = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    optimizer.step()
    torch.testing.assert_close(W.detach(), -0.2 * W.grad.sign(), atol=1e-6, rtol=1e-6)


def test_a_copy_takes_the_same_steps():
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(8, 8))
    optimizer = SchattenP([W], p=3.0, ns_steps=7)
    W.grad = torch.randn(8, 8)
    optimizer.step()
    copied = copy.deepcopy(optimizer)
    copied.param_groups[0]["params"][0].grad = W.grad.clone()
    optimizer.step()
    copied.step()
    assert torch.equal(copied.param_groups[0]["params"][0], W)


def test_the_default_target_is_the_spectral_power_bitwise():
    momenta, p = torch.randn(3, 8, 12), torch.tensor([1.0, 2.5, math.inf])
    optimizer = SchattenP([nn.Parameter(torch.zeros(8, 12))])
    expected = hf_schatten.linalg.spectral_power(momenta, p, steps=5)
    torch.testing.assert_close(optimizer.direction(momenta, p), expected, rtol=0, atol=0)


@pytest.mark.parametrize("target", ["power", "soft_step:0.1"])
@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_products_are_computed_in_the_dtype_that_is_asked_for_also_by_a_copy(name, dtype, target, gpt2):
    optimizer = hf_schatten.create_schatten_optimizer(
        gpt2, p=math.inf, target=target, compute_dtype=name, verbose=False
    )
    momenta = torch.randn(3, 8, 9)
    seen = products_of(lambda: optimizer.direction(momenta, torch.full((3,), math.inf)))
    assert seen == {dtype}
    assert products_of(lambda: copy.deepcopy(optimizer).direction(momenta, torch.full((3,), math.inf))) == {dtype}


@pytest.mark.parametrize("instructions", [True, False])
def test_auto_is_bfloat16_where_the_cpu_multiplies_it_fast(instructions, gpt2, monkeypatch):
    monkeypatch.setattr(compute_dtype, "CPU_MULTIPLIES_BFLOAT16", instructions)
    optimizer = hf_schatten.create_schatten_optimizer(gpt2, p=math.inf, verbose=False)

    def dtypes(*shape, dtype=torch.float32):
        return products_of(lambda: optimizer.direction(torch.randn(2, *shape, dtype=dtype), torch.full((2,), 2.0)))

    assert dtypes(128, 130) == {torch.bfloat16 if instructions else torch.float32}
    assert dtypes(127, 500) == {torch.float32}  # small matrices are faster in float32 on any CPU
    assert dtypes(128, 130, dtype=torch.float64) == {torch.float64}
    X = torch.randn(128, 130)
    assert products_of(lambda: spectral_power(X, 2)) == {torch.float32}  # the function keeps its accuracy


def test_training_in_bfloat16_is_close_to_training_in_float32(monkeypatch):
    monkeypatch.setattr(compute_dtype, "CPU_MULTIPLIES_BFLOAT16", True)
    start, weights = torch.randn(160, 128), {}
    for name in ("auto", "float32"):
        torch.manual_seed(0)
        weights[name] = nn.Parameter(start.clone())
        optimizer = SchattenP([weights[name]], lr=0.02, compute_dtype=name)
        for _ in range(5):
            weights[name].grad = torch.randn(160, 128)
            optimizer.step()
    moved, difference = (weights["float32"] - start).norm(), (weights["auto"] - weights["float32"]).norm()
    assert 0 < difference < 0.01 * moved  # another dtype, and one point of error at most


def products_of(call):
    """Return the dtypes of the matrix products of a call."""
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket is torch.ops.hf_schatten.spectral_iteration:
                seen.add(args[-1])
            return function(*args, **(kwargs or {}))

    with Watch():
        call()
    return seen


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_a_step_of_another_target_equals_the_svd(shape):
    torch.manual_seed(0)
    W, gradient = nn.Parameter(torch.zeros(shape)), torch.randn(shape)
    optimizer = SchattenP([W], lr=1.0, target="top_k:3", scale="none", weight_decay=0.0, nesterov=False)
    U, sigma, Vh = torch.linalg.svd(gradient, full_matrices=False)
    sigma[3:] *= 0.5  # a gap
    W.grad = U @ torch.diag(sigma) @ Vh
    optimizer.step()
    torch.testing.assert_close(-W.detach(), U[:, :3] @ Vh[:3], rtol=1e-4, atol=1e-5)


def squared(x):
    return x**2


def test_a_function_is_a_target_and_its_name_is_kept(gpt2, tmp_path, capsys):
    optimizer = hf_schatten.create_schatten_optimizer(gpt2, p=math.inf, target=squared)
    assert "schatten_p's target function:squared: largest error" in capsys.readouterr().out
    assert optimizer.options.target is squared
    assert optimizer.options.as_json()["target"] == "function:squared"
    for parameter in gpt2.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    hf_schatten.integration.checkpoint.save_optimizer(optimizer, tmp_path)
    saved = json.loads((tmp_path / "optimizer_config.json").read_text())
    assert saved["options"]["target"] == "function:squared"
    assert copy.deepcopy(optimizer).target.f is squared
    again = hf_schatten.create_schatten_optimizer(gpt2, p=math.inf, target=squared, verbose=False)
    hf_schatten.integration.checkpoint.load_optimizer(again, tmp_path)
    assert again.steps_taken() == 1
    with pytest.raises(ValueError, match=r"target='function:squared' is not allowed: .* Pass the function itself"):
        hf_schatten.create_schatten_optimizer(gpt2, p=math.inf, target="function:squared", verbose=False)


def test_a_target_that_the_step_rule_cannot_measure_is_refused():
    with pytest.raises(ValueError, match=r"target='top_k:2' .*: the norm of step_rule=ball .* step_rule=pinned"):
        SchattenP([nn.Parameter(torch.zeros(4, 4))], p=2, target="top_k:2", step_rule="ball")
    with pytest.raises(hf_schatten.OptionError, match=r"p=adaptive .* set p to a number"):
        hf_schatten.create_schatten_optimizer(nn.Linear(4, 4), p="adaptive", target=squared)


@pytest.mark.parametrize("kind", ["gradient contiguous", "both channels last", "slice of a larger tensor"])
def test_strides_of_gradient_and_weight_do_not_matter(kind):
    torch.manual_seed(0)
    shape = (6, 4) if kind.startswith("slice") else (6, 4, 3, 2)
    initial, gradient = torch.randn(shape), torch.randn(shape)
    plain = nn.Parameter(initial.clone())
    plain.grad = gradient.clone()
    if kind.startswith("slice"):
        other = nn.Parameter(torch.zeros(6, 9)[:, 2:6].copy_(initial))
        other.grad = gradient.clone()
    else:
        other = nn.Parameter(initial.clone(memory_format=torch.channels_last))
        last = torch.channels_last if kind == "both channels last" else torch.contiguous_format
        other.grad = gradient.clone(memory_format=last)
    for W in (plain, other):
        optimizer = SchattenP([W], lr=0.1, p=3.0)
        for _ in range(2):
            optimizer.step()
    torch.testing.assert_close(other.detach(), plain.detach(), atol=1e-6, rtol=1e-5)
    assert not torch.equal(plain.detach(), initial)


def test_adamw_is_torchs_in_every_bit():
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in [(7,), (300, 50), (33, 3), (1000,)]]
    ours, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    settings = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    optimizers = SchattenP([{"params": ours, "spectral": False}], **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(20):
        for own, other in zip(ours, theirs, strict=True):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(own, other) for own, other in zip(ours, theirs, strict=True))
