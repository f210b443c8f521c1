"""What only a GPU shows: its dtypes, waiting for it, AMP's gradient scaler, compiled training. Skipped without one."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer

from hf_schatten import SchattenP, SchattenTrainer, create_schatten_optimizer
from hf_schatten.linalg import accelerated
from hf_schatten.linalg.spectral_power import spectral_power

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DEVICE = "cuda"
ADAPTIVE = "p=adaptive,p_interval=4,p_first_step=2"


@contextmanager
def without_waiting():
    """Let every operation that waits for the device raise an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def differentiate(model, rows):
    model(input_ids=rows, labels=rows).loss.backward()


def token_rows(count=8, device=DEVICE):
    torch.manual_seed(1)
    return torch.randint(64, (count, 16), device=device)


@pytest.mark.parametrize("shape", [(96, 96), (64, 160), (160, 64)])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, -5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_direction_is_that_of_a_cpu_in_float64(shape, p, dtype):
    """The same iteration in another arithmetic: what remains is rounding."""
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    exponents = torch.full((3,), p)
    expected = spectral_power(matrices.double(), exponents.double())
    found = spectral_power(matrices.to(DEVICE), exponents.to(DEVICE), compute_dtype=dtype).double().cpu()
    assert (found - expected).norm() <= (1e-4 if dtype == torch.float32 else 0.05) * expected.norm()


def test_the_kernels_run_here():
    assert accelerated.kernels_of(torch.device(DEVICE, 0)) is not None


@pytest.mark.parametrize(
    ("parameter_dtype", "compute_dtype", "limit"),
    [(torch.float32, "float32", 1e-3), (torch.float32, "bfloat16", 0.1), (torch.bfloat16, "bfloat16", 0.1)],
)
def test_a_step_with_kernels_is_that_of_torchs_operations(parameter_dtype, compute_dtype, limit, monkeypatch):
    """Wide, tall, square, a part of a fused projection, odd sides, and a gradient that is not finite.

    What differs is rounding: of products, and of weights where they are in half precision.
    """
    shapes = [(96, 96), (64, 160), (160, 64), (45, 70), (192, 64)]
    changes = {}
    for kernels in (True, False):
        if not kernels:
            for module in ("many_matrices", "symmetric_product", "iteration_numbers"):
                monkeypatch.setattr(f"hf_schatten.linalg.{module}.kernels_of", lambda device: None)
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(s, device=DEVICE, dtype=parameter_dtype)) for s in shapes]
        before = [parameter.detach().clone() for parameter in parameters]
        groups = [{"params": parameters[:4]}, {"params": parameters[4:], "parts": [("a", 64), ("b", 128)]}]
        optimizer = SchattenP(groups, lr=0.1, p=-5.0, compute_dtype=compute_dtype)
        for step in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            if step == 1:
                parameters[0].grad[3, 4] = math.nan
            optimizer.step()
        changes[kernels] = [(after - start).float() for after, start in zip(parameters, before, strict=True)]
    for with_kernels, without in zip(changes[True], changes[False], strict=True):
        assert (with_kernels - without).norm() <= limit * without.norm()


def test_a_step_launches_few_kernels_however_many_matrices_there_are():
    def launches(layers):
        shapes = [(256, 256), (256, 1024), (1024, 256)] * layers
        parameters = [nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
        optimizer = SchattenP(parameters, p=-5.0)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as profiled:
            optimizer.step()
            torch.cuda.synchronize()
        return sum(event.device_type == DeviceType.CUDA for event in profiled.events())

    assert launches(12) <= launches(2) + 10  # torch's operations on lists take some dozens of tensors a launch
    assert launches(12) <= 170


def test_products_are_in_bfloat16_by_default():
    torch.manual_seed(0)
    gradient = torch.randn(64, 64, device=DEVICE)
    weights = {}
    for dtype in ("auto", "bfloat16", "float32"):
        weights[dtype] = nn.Parameter(torch.zeros(64, 64, device=DEVICE))
        optimizer = SchattenP([weights[dtype]], p=math.inf, compute_dtype=dtype)
        weights[dtype].grad = gradient.clone()
        optimizer.step()
    assert torch.equal(weights["auto"], weights["bfloat16"])
    assert not torch.equal(weights["auto"], weights["float32"])


# Products of `iterates` are in float16 on a GPU.
@pytest.mark.parametrize(("estimator", "tolerance"), [("lanczos", 1e-3), ("iterates", 3e-3)])
def test_p_is_that_of_the_same_training_on_a_cpu(estimator, tolerance, gpt2):
    learned = {}
    for device in ("cpu", DEVICE):
        model = copy.deepcopy(gpt2).to(device)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # differs between devices
        options = {"p": "adaptive", "p_interval": 3, "p_estimator": estimator, "compute_dtype": "float32"}
        optimizer = create_schatten_optimizer(model, 1e-3, verbose=False, **options)
        for _ in range(7):
            differentiate(model, token_rows(device="cpu").to(device))
            optimizer.step()
            optimizer.zero_grad()
        learned[device] = optimizer.learned_p()
    assert learned["cpu"].keys() == learned[DEVICE].keys()
    assert any(p != math.inf for p in learned["cpu"].values())
    for name, p in learned["cpu"].items():
        assert 1 / learned[DEVICE][name] == pytest.approx(1 / p, abs=tolerance, rel=1e-3), name


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize(("precondition", "interval"), [("none", 100), ("adam", 100), ("none", 1)])
def test_a_step_does_not_wait_for_the_device(precondition, interval, gpt2):
    model = gpt2.to(DEVICE)
    options = {"p": "adaptive", "p_interval": interval, "p_first_step": 2, "precondition": precondition}
    optimizer = create_schatten_optimizer(model, 1e-3, verbose=False, **options)
    rows = token_rows()
    for _ in range(3):
        differentiate(model, rows)
        optimizer.step()
    for _ in range(3):
        differentiate(model, rows)
        with without_waiting():
            optimizer.step()
    assert optimizer.steps_taken() == 6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_matrix_with_a_gradient_that_is_not_finite_skips_the_step(bad, gpt2):
    model = gpt2.to(DEVICE)
    optimizer = create_schatten_optimizer(model, 1e-3, p=-5, verbose=False)
    names = [f"transformer.h.0.{name}.weight" for name in ("attn.c_proj", "mlp.c_fc")]
    spoiled, other = (model.get_parameter(name) for name in names)
    differentiate(model, token_rows())
    spoiled.grad[3, 5] = bad
    before = spoiled.detach().clone(), other.detach().clone()
    optimizer.step()
    assert torch.equal(spoiled, before[0])
    assert not torch.equal(other, before[1])
    assert optimizer.skipped_steps() == {names[0]: 1}


@pytest.mark.parametrize("trainer_class", [Trainer, SchattenTrainer])
def test_a_resumed_training_goes_on_with_the_same_p(trainer_class, gpt2, token_dataset, training_arguments):
    initial = copy.deepcopy(gpt2.state_dict())
    settings = {"optim_args": ADAPTIVE, "use_cpu": False, "save_strategy": "steps", "save_steps": 5}
    arguments = training_arguments(**settings)

    def train(resume=None):
        gpt2.load_state_dict(initial)
        trainer = trainer_class(model=gpt2, args=arguments, train_dataset=token_dataset)
        trainer.train(resume_from_checkpoint=resume)
        assert next(gpt2.parameters()).is_cuda
        return {name: value.clone() for name, value in gpt2.state_dict().items()}, trainer.state.log_history

    weights, log = train()
    resumed, resumed_log = train(f"{arguments.output_dir}/checkpoint-5")
    for name, value in weights.items():
        decided, found = value, resumed[name]
        if name.endswith("attn.c_attn.bias"):  # that of keys moves no attention: its gradient is rounding alone
            decided, found = (torch.cat([bias.chunk(3)[part] for part in (0, 2)]) for bias in (value, found))
        torch.testing.assert_close(found, decided, atol=1e-5, rtol=1e-4)  # atomic additions of the embedding
    for expected, found in zip(log, resumed_log, strict=True):
        for key, value in expected.items():
            if key.startswith("schatten_p"):
                assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # the compiler's
@pytest.mark.parametrize(("precision", "compiled"), [("fp16", False), ("bf16", False), ("bf16", True)])
def test_mixed_precision_learns(precision, compiled, gpt2, token_dataset, training_arguments):
    """The gradient scaler of fp16 begins with a factor that overflows: those steps are skipped as a whole."""
    settings = {"optim_args": ADAPTIVE, "use_cpu": False, "max_steps": 40, "learning_rate": 1e-2, precision: True}
    arguments = training_arguments(**settings, torch_compile=compiled)
    trainer = SchattenTrainer(model=gpt2, args=arguments, train_dataset=token_dataset, eval_dataset=token_dataset)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.75 * before
    assert trainer.optimizer.optimizer.skipped_steps() == {}
    assert any("schatten_p_median" in entry for entry in trainer.state.log_history)
