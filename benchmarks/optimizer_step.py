"""What ``optimizer.step()`` costs, against torch's Muon and torch's fused AdamW, without forward and backward.

**Counted**, on tensors without memory (the device ``meta``), is a step that is not the first: the operations that
torch's dispatcher sees, the kernels that an accelerator would run, and the bytes that they move, over the least
possible: each gradient is read once; each weight, momentum, and moment of AdamW is read once and written once. Here
``advance_averages`` and ``add_updates`` are one kernel each, ``inner_products`` two, and ``spectral_iteration`` is the
operations that it consists of. Products of matrices move no bytes: they are bound by arithmetic.

**Timed**, on a real device, are steps in turn, in one process, on random gradients: ours (p = -5); `torch_muon.py`,
which is ``torch.optim.Muon`` on the matrices that we would route and AdamW for the rest; ``torch.optim.AdamW`` with
``fused=True``; and ``dion.Muon`` where the package ``dion`` is installed. All update the same weights. Nothing here
asserts a time.

Usage:
    python benchmarks/optimizer_step.py                # counts, then times 111 M parameters on a CPU: ten minutes
    python benchmarks/optimizer_step.py --count        # counts only: seconds
    python benchmarks/optimizer_step.py --device cuda  # times all models
    python benchmarks/optimizer_step.py --quick        # tiny models: does it run?
"""

import argparse
import importlib
import importlib.util
import io
import json
import math
import platform
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.optim import AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from benchmarks.comparison.torch_muon import MuonAndAdamW
from benchmarks.tables import print_table
from hf_schatten import SchattenP, create_schatten_optimizer, route_parameters
from hf_schatten.linalg.spectral_power import iterate_in_turns
from hf_schatten.options import OPTION_VALUES

OURS, MUON, ADAMW, DION = "schatten_p, p = -5", "torch.optim.Muon and AdamW", "torch.optim.AdamW, fused", "dion.Muon"
_RATES: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.1}
_ITERATION = "hf_schatten::spectral_iteration"
_KERNELS = {"hf_schatten::inner_products": 2}  # the others are one each
_PRODUCTS = frozenset(f"aten::{name}" for name in ("mm", "bmm", "addmm", "baddbmm"))
_OVERWRITING = frozenset({"aten::copy_", "aten::fill_", "aten::zero_"})


def gpt2(layers: int, width: int, vocabulary: int = 32_768) -> GPT2Config:
    """Return a GPT-2 with heads of 64."""
    heads = max(1, width // 64)
    return GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0
    )


def llama(layers: int, hidden: int, inner: int, heads: int, vocabulary: int, **settings: Any) -> LlamaConfig:
    """Return a Llama; its query, key and value heads are as many unless told otherwise."""
    shape = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner}
    return LlamaConfig(**shape, num_attention_heads=heads, vocab_size=vocabulary, **settings)


MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2-small": lambda: gpt2(12, 768),
    "12x1024": lambda: gpt2(12, 1024),
    "llama-554m": lambda: llama(8, 2048, 8192, 16, 8192, tie_word_embeddings=True),
    "llama-8b": lambda: llama(32, 4096, 14_336, 32, 128_256, num_key_value_heads=8),
    "tiny-gpt2": lambda: gpt2(2, 16, 40),
    "tiny-llama": lambda: llama(2, 16, 32, 2, 40),
}
TIMED = ("gpt2-small", "12x1024", "llama-554m")
COUNTED = (("gpt2-small", "float32"), ("llama-554m", "float32"), ("llama-8b", "float32"), ("llama-8b", "bfloat16"))
_COUNTED_WITH_MUON = ("gpt2-small", "llama-554m", "tiny-gpt2")


def model_of(config: PretrainedConfig, device: str, dtype: str = "float32") -> nn.Module:
    """Return a model with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    return model


# Counting


class StepCounter(TorchDispatchMode):
    """Counts the operations on tensors without memory, and the bytes of those that are no products of matrices.

    Attributes:
        names: how often the dispatcher sees each operation; of `spectral_iteration` not what it consists of.
        on_device: how many of them work on the device: no views, no allocations.
        kernels: the same with what `spectral_iteration` consists of in its place.
        passes: bytes read and written outside `spectral_iteration`.
        iterates: bytes read and written inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.on_device = self.kernels = self.passes = self.iterates = 0
        self._inside = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if not self._inside:
            self.names[name] += 1
        if name == _ITERATION:
            self.on_device += 1
            self._inside = True
            with self:
                result = iterate_in_turns(*args, **kwargs)
            self._inside = False
            return result
        result = func(*args, **kwargs)
        allocates = re.fullmatch(r"aten::(new_)?empty\w*", name)
        if func.is_view or name == "aten::_unsafe_view" or allocates or not _bytes((args, kwargs, result)):
            return result
        self.kernels += _KERNELS.get(name, 1)
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        moved = 0 if name in _PRODUCTS else _moved(func._schema, given, result)
        if self._inside:
            self.iterates += moved
        else:
            self.on_device += 1
            self.passes += moved
        return result


def _moved(schema: Any, given: dict[str, Any], result: Any) -> int:
    """Return the bytes that an operation reads and writes, given its arguments by name."""
    if "places" in given:  # matrices in tensors, which may be parts of them; see `many_matrices.flat`
        places = given["places"]
        elements = [math.prod(places[start : start + 4]) for start in range(0, len(places), 9)]
        if "averages" in given:
            out = 0 if given["out"] is None else given["out"].itemsize
            pairs = zip(given["averages"], given["gradients"], strict=True)
            each = [2 * average.itemsize + gradient.itemsize + out for average, gradient in pairs]
        else:
            pairs = zip(given["weights"], given["updates"], strict=True)
            each = [2 * weights.itemsize + update.itemsize for weights, update in pairs]
        return sum(map(math.prod, zip(elements, each, strict=True)))
    moved = 0
    for argument in schema.arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        read = not (written and (argument.is_out or schema.name in _OVERWRITING))
        if schema.name == "aten::_fused_adamw_" and argument.name == "grads":
            written = False  # without a scale, by which it would divide them
        moved += (read + written) * _bytes(given.get(argument.name))
    return moved + (_bytes(result) if all(returned.alias_info is None for returned in schema.returns) else 0)


def _bytes(tree: Any) -> int:
    """Return the bytes of all tensors without memory, each without what an expansion repeats."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_meta]
    return sum(min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes()) for tensor in tensors)


@dataclass(frozen=True)
class Count:
    """What the dispatcher and the device have to do in a step.

    Attributes:
        optimizer: its name in tables.
        parameters: how many numbers the model has.
        operations: that the dispatcher sees, views and allocations included.
        on_device: of these, those that work on the device.
        kernels: the same, with what `spectral_iteration` consists of in its place.
        passes: bytes moved outside `spectral_iteration`, over the least possible; None where that is not ours.
        iterates: the same inside, without products of matrices.
        names: how often each operation is seen.
    """

    optimizer: str
    parameters: int
    operations: int
    on_device: int
    kernels: int
    passes: float | None
    iterates: float | None
    names: dict[str, int]


def count_ours(model: nn.Module, matrices_alone: bool = False) -> Count:
    """Count a step of ours; ``matrices_alone``: of the matrices, since nothing else has a gradient."""
    optimizer: SchattenP = create_schatten_optimizer(model, _RATES["lr"], p=-5, verbose=False)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter) if group["spectral"] or not matrices_alone else None
    counter = _count(optimizer)
    return _counted(OURS, model, counter, _least_bytes(optimizer))


def count_muon(model: nn.Module) -> Count:
    """Count a step of torch's Muon, and of AdamW as torch runs it on an accelerator."""
    optimizer = MuonAndAdamW(model, **_RATES, betas=(0.9, 0.999), eps=1e-8)
    for group in optimizer._groups():
        if "foreach" in group:
            group["foreach"] = True
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return _counted(MUON, model, _count(optimizer))


def _count(optimizer: Optimizer) -> StepCounter:
    for _ in range(2):
        optimizer.step()
    with StepCounter() as counter:
        optimizer.step()
    return counter


def _counted(optimizer: str, model: nn.Module, counter: StepCounter, least: int | None = None) -> Count:
    passes, iterates = (None if least is None else moved / least for moved in (counter.passes, counter.iterates))
    parameters, names = sum(parameter.numel() for parameter in model.parameters()), counter.names
    numbers = names.total(), counter.on_device, counter.kernels
    return Count(optimizer, parameters, *numbers, passes, iterates, dict(names.most_common()))


def _least_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of gradients, and twice those of weights and moments."""
    least = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                moments = [each for each in optimizer.state[parameter].values() if each.shape == parameter.shape]
                least += _bytes(parameter.grad) + 2 * _bytes([parameter, *moments])
    return least


# Timing


@dataclass(frozen=True)
class Timing:
    """What the steps of an optimizer took; numbers of an accelerator are None on a CPU.

    Attributes:
        seconds: median wall time of a step.
        ratio: median of the times of ours over its own, of neighbouring steps.
        device_seconds: median between two events on the device.
        kernel_seconds: sum over the kernels of one step.
        launches: how many kernels and copies those are.
        peak: bytes in a step where it is the only optimizer: weights, gradients, state and temporaries.
        temporary: the last of these.
    """

    seconds: float
    ratio: float
    device_seconds: float | None
    kernel_seconds: float | None
    launches: int | None
    peak: int | None
    temporary: int | None


def optimizers_of(model: nn.Module, compute_dtype: str) -> dict[str, Callable[[], Optimizer]]:
    """Return what makes each optimizer, in the order of their steps: ours between those that it is compared with."""
    routed = {id(route.parameter) for route in route_parameters(model).to("schatten_p")}
    matrices = [parameter for parameter in model.parameters() if id(parameter) in routed]
    others = [parameter for parameter in model.parameters() if id(parameter) not in routed]
    groups = [{"params": matrices}, {"params": others, "algorithm": "adamw"}]
    ours = {"p": -5, "compute_dtype": compute_dtype, "verbose": False}
    makers: dict[str, Callable[[], Optimizer]] = {
        MUON: lambda: MuonAndAdamW(model, **_RATES, betas=(0.9, 0.999), eps=1e-8),
        OURS: lambda: create_schatten_optimizer(model, **_RATES, **ours),
        ADAMW: lambda: AdamW(model.parameters(), **_RATES, fused=True),
        DION: lambda: importlib.import_module("dion").Muon(groups, **_RATES, nesterov=True, adjust_lr="rms_norm"),
    }
    return {name: make for name, make in makers.items() if name != DION or importlib.util.find_spec("dion")}


def measure(config: PretrainedConfig, device: str, compute_dtype: str, repeats: int) -> dict[str, Timing]:
    """Let all optimizers take steps in turn on one model."""
    on_gpu = device.startswith("cuda")
    model = model_of(config, device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    held = torch.cuda.memory_allocated(device) if on_gpu else 0
    optimizers, states = {}, {}
    for name, make in optimizers_of(model, compute_dtype).items():
        before = torch.cuda.memory_allocated(device) if on_gpu else 0
        optimizers[name] = make()
        for _ in range(2):
            optimizers[name].step()
        states[name] = torch.cuda.memory_allocated(device) - before if on_gpu else 0
    rounds = [{name: _timed(each.step, device) for name, each in optimizers.items()} for _ in range(repeats)]
    timings = {}
    for name, optimizer in optimizers.items():
        seconds, on_device, temporary = zip(*(each[name] for each in rounds), strict=True)
        ratio = statistics.median(each[OURS][0] / each[name][0] for each in rounds)
        numbers: tuple[Any, ...] = (None,) * 5
        if on_gpu:
            most = max(temporary)
            numbers = statistics.median(on_device), *_kernels(optimizer.step), held + states[name] + most, most
        timings[name] = Timing(statistics.median(seconds), ratio, *numbers)
    return timings


def _timed(step: Callable[[], object], device: str) -> tuple[float, float, int]:
    """Return wall time, time between events on an accelerator, and bytes that a step takes there for itself."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        step()
        return time.perf_counter() - start, 0.0, 0
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held, start = torch.cuda.memory_allocated(device), time.perf_counter()
    before.record()
    step()
    after.record()
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, before.elapsed_time(after) / 1000, torch.cuda.max_memory_allocated(device) - held


def _kernels(step: Callable[[], object]) -> tuple[float, int]:
    """Return the seconds of all kernels of a step, and their number."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    events = profiled.events() or []
    own = [each for each in events if each.device_type == DeviceType.CUDA and not each.is_user_annotation]
    return sum(each.time_range.elapsed_us() for each in own) / 1e6, len(own)


# Report


def machine(device: str) -> str:
    """Name the machine, what it runs, and the date."""
    information = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.M) if information.is_file() else None
    processor = found[1].strip() if found else platform.processor() or platform.machine()
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.startswith("cuda") else ""
    threads = f"{torch.get_num_threads()} threads"
    return f"{gpu}{processor}, {threads}, torch {torch.__version__}, {datetime.now(UTC).date()}"


def print_counts(counts: Iterable[tuple[str, Count]]) -> None:
    counts = list(counts)
    print("## Counted\n\nBytes are over the least possible; iterates are those inside `spectral_iteration`.\n")
    header = ("model", "parameters", "optimizer", "operations", "on the device", "kernels", "passes", "iterates")
    rows = []
    for name, count in counts:
        numbers = [f"{number:,}" for number in (count.operations, count.on_device, count.kernels)]
        ratios = ["–" if ratio is None else f"{ratio:.3f}" for ratio in (count.passes, count.iterates)]
        rows.append([name, f"{count.parameters:,}", count.optimizer, *numbers, *ratios])
    print_table(header, rows)
    print("\nOperations of ours by name:\n")
    ours = [(name, count.names) for name, count in counts if count.optimizer == OURS]
    seen = sorted({each for _, names in ours for each in names}, key=lambda each: -ours[-1][1].get(each, 0))
    print_table(
        ("operation", *(name for name, _ in ours)),
        [(f"`{each}`", *(f"{names.get(each, 0)}" for _, names in ours)) for each in seen],
    )


def print_timings(timings: dict[str, dict[str, Timing]]) -> None:
    print("\n## Timed")
    header = (
        "optimizer",
        "a step, ms",
        "ours over it",
        "device, ms",
        "kernels, ms",
        "launches",
        "peak, MiB",
        "of it own",
    )
    for model, rows in timings.items():
        print(f"\n{model}:\n")
        table = []
        for name, row in rows.items():
            times = [_text(each, 1e-3, 2) for each in (row.device_seconds, row.kernel_seconds)]
            memory = [_text(each, 1 << 20, 0) for each in (row.peak, row.temporary)]
            own = _text(row.seconds, 1e-3, 2), f"{row.ratio:.3f}"
            table.append((name, *own, *times, _text(row.launches, 1, 0), *memory))
        print_table(header, table)
    if not importlib.util.find_spec("dion"):
        print("\nThe package `dion` is not installed: its Muon is left out.")


def _text(number: float | None, unit: float, digits: int) -> str:
    return "–" if number is None else f"{number / unit:,.{digits}f}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    counts: list[tuple[str, Count]] = []
    for name, dtype in (("tiny-gpt2", "float32"), ("tiny-llama", "bfloat16")) if options.quick else COUNTED:
        model = model_of(MODELS[name](), "meta", dtype)
        counts.append((f"{name}, {dtype}", count_ours(model)))
        if name in _COUNTED_WITH_MUON:
            counts.append((f"{name}, {dtype}", count_muon(model)))
    timings = {}
    for name in [] if options.count else options.models:
        timings[name] = measure(MODELS[name](), options.device, options.compute_dtype, options.repeats)
    page, place = io.StringIO(), machine(options.device)
    with redirect_stdout(page):
        print(f"# A step of the optimizer\n\n{place}; products of ours in `{options.compute_dtype}`.\n")
        print_counts(counts)
        if timings:
            print_timings(timings)
    print(page.getvalue())
    written: dict[str, Any] = {"machine": place, "compute_dtype": options.compute_dtype, "repeats": options.repeats}
    written["counts"] = [{"model": name, **asdict(count)} for name, count in counts]
    written["timings"] = {model: {name: asdict(row) for name, row in rows.items()} for model, rows in timings.items()}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "optimizer_step.json").write_text(json.dumps(written, indent=1) + "\n", "utf-8")
    (options.output / "optimizer_step.md").write_text(page.getvalue(), "utf-8")
    print(f"Written to {options.output / 'optimizer_step.md'}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", action="store_true", help="count only")
    parser.add_argument("--device", default="cpu", help="of what is timed (default %(default)s)")
    parser.add_argument("--models", nargs="+", choices=TIMED, help="to time (default gpt2-small; on a GPU all)")
    choices = [choice for choice in OPTION_VALUES["compute_dtype"] if choice != "float64"]
    parser.add_argument("--compute-dtype", choices=choices, default="auto", help="of our products when timed")
    parser.add_argument("--repeats", type=int, default=12, help="steps of each (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"), help="folder (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny models, only to check that everything runs")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: this PyTorch sees no GPU")
    if options.quick:
        options.models = ["tiny-gpt2", "tiny-llama"]
    elif options.models is None:
        options.models = list(TIMED if options.device.startswith("cuda") else TIMED[:1])
    return options


if __name__ == "__main__":
    main()
