"""What ``optimizer.step()`` costs, against torch's Muon and torch's fused AdamW, without forward and backward.

**Counted**, on tensors without memory (the device ``meta``), is a step that is not the first: the operations that
torch's dispatcher sees, the kernels that an accelerator would run, and the bytes that they move, over the least
possible: each gradient is read once; each weight, momentum, and moment of AdamW is read once and written once. Here
``advance_averages`` and ``add_updates`` are one kernel each, ``inner_products`` two, and ``spectral_iteration`` is the
operations that it consists of. Products of matrices move no bytes: they are bound by arithmetic.

**Timed**, on a real device, are steps in turn, in one process, on random gradients: ours (p = -5); `torch_muon.py`,
which is ``torch.optim.Muon`` on the matrices that we would route and AdamW for the rest; ``torch.optim.AdamW`` with
``fused=True``; and ``dion.Muon`` where the package ``dion`` is installed. All update the same weights. **Whole
training steps** (``--tokens``) take turns in the same way: forward, backward and update, on a GPU with autocast to
bfloat16. There the host runs ahead of the device, and temporaries of an update take the place of activations. Nothing
here asserts a time.

Usage:
    python benchmarks/optimizer_step.py                # counts, then times 111 M parameters on a CPU: ten minutes
    python benchmarks/optimizer_step.py --count        # counts only: seconds
    python benchmarks/optimizer_step.py --device cuda --tokens 16384   # times all models, and training with them
    python benchmarks/optimizer_step.py --quick        # tiny models: does it run?
"""

import argparse
import gc
import importlib.util
import io
import json
import math
import platform
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from datetime import UTC, datetime
from functools import partial
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
from benchmarks.random_gpt2 import loss_of
from benchmarks.tables import print_table
from hf_schatten import create_schatten_optimizer, route_parameters
from hf_schatten.linalg.spectral_power import iterate_in_turns
from hf_schatten.option_names import OPTION_VALUES

OURS, MUON, ADAMW, DION = "schatten_p, p = -5", "torch.optim.Muon and AdamW", "torch.optim.AdamW, fused", "dion.Muon"
_RATES: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.1}
_ITERATION = "hf_schatten::spectral_iteration"
_LENGTH = 1024  # tokens of a sequence
_KERNELS = {"hf_schatten::inner_products": 2}  # all others are one each
_PRODUCTS = frozenset(f"aten::{name}" for name in ("mm", "bmm", "addmm", "baddbmm"))
_OVERWRITING = frozenset({"aten::copy_", "aten::fill_", "aten::zero_", "hf_schatten::weighted_sum"})


def gpt2(layers: int, width: int, vocabulary: int = 32_768) -> GPT2Config:
    """Return a GPT-2 with heads of 64."""
    tokens: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2Config(n_layer=layers, n_embd=width, n_head=max(1, width // 64), **tokens)


def llama(layers: int, hidden: int, inner: int, heads: int, vocabulary: int, **settings: Any) -> LlamaConfig:
    """Return a Llama, with as many heads of keys and values as of queries unless told otherwise."""
    shape: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner}
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
        return AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))


class StepCounter(TorchDispatchMode):
    """Counts the operations on tensors without memory, and the bytes of those that are no products of matrices.

    Attributes:
        names: how often the dispatcher sees each operation; of `spectral_iteration` not what it consists of.
        on_device: how many of them work on the device: no views, no allocations.
        kernels: the same with what `spectral_iteration` consists of in its place.
        passes: bytes read and written by each operation outside `spectral_iteration`.
        iterates: bytes read and written inside.
        least: bytes of gradients, and twice those of weights and moments; 0 where the state is not ours.
        parameters: of the model.
    """

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.passes: Counter[str] = Counter()
        self.on_device = self.kernels = self.iterates = self.least = 0
        self.parameters = parameters
        self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
            self.passes[name] += moved
        return result

    def numbers(self) -> dict[str, Any]:
        """Return what is counted; bytes over the least possible, where that is known."""
        counts = {"operations": self.names.total(), "on_device": self.on_device, "kernels": self.kernels}
        moved = {"passes": self.passes.total(), "iterates": self.iterates}
        ratios = {name: number / self.least if self.least else None for name, number in moved.items()}
        return {"parameters": self.parameters, **counts, **ratios}

    def table(self) -> list[tuple[str, str, str]]:
        """Return name, number and bytes over the least of each operation, the most frequent first."""
        passes = {name: f"{moved / self.least:.3f}" if self.least else "–" for name, moved in self.passes.items()}
        return [(f"`{name}`", f"{number}", passes.get(name, "")) for name, number in self.names.most_common()]


def _moved(schema: Any, given: dict[str, Any], result: Any) -> int:
    """Return the bytes that an operation reads and writes, given its arguments by name."""
    if "places" in given:  # matrices in tensors, which may be parts of them; see `many_matrices.flat`
        places = given["places"]
        elements = [math.prod(places[start : start + 4]) for start in range(0, len(places), 9)]
        averages = "averages" in given
        written, read = (given[name] for name in (("averages", "gradients") if averages else ("weights", "updates")))
        out = given["out"].itemsize if averages and given["out"] is not None else 0
        all_three = zip(elements, written, read, strict=True)
        return sum(count * (2 * own.itemsize + other.itemsize + out) for count, own, other in all_three)
    moved = 0
    for argument in schema.arguments:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        reads = not (writes and (argument.is_out or schema.name in _OVERWRITING))
        if schema.name == "aten::_fused_adamw_" and argument.name == "grads":
            writes = False  # without a scale, by which it would divide them
        moved += (reads + writes) * _bytes(given.get(argument.name))
    return moved + (_bytes(result) if all(returned.alias_info is None for returned in schema.returns) else 0)


def _bytes(tree: Any) -> int:
    """Return the bytes of all tensors without memory, each without what an expansion repeats."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_meta]
    return sum(min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes()) for tensor in tensors)


def count_step(model: nn.Module, name: str = OURS, matrices_alone: bool = False) -> StepCounter:
    """Count the third step of an optimizer; ``matrices_alone``: of ours, where nothing else has a gradient."""
    optimizer: Any = optimizers_of(model, "auto")[name]()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None if matrices_alone and not group["spectral"] else torch.zeros_like(parameter)
    for group in optimizer._groups() if name == MUON else ():
        if "foreach" in group:
            group["foreach"] = True  # as AdamW is on an accelerator
    for _ in range(2):
        optimizer.step()
    with StepCounter(sum(parameter.numel() for parameter in model.parameters())) as counter:
        optimizer.step()
    for parameter, state in optimizer.state.items():
        if parameter.grad is not None:
            moments = [tensor for tensor in state.values() if tensor.shape == parameter.shape]
            counter.least += _bytes(parameter.grad) + 2 * _bytes([parameter, *moments])
    return counter


def optimizers_of(model: nn.Module, compute_dtype: str) -> dict[str, Callable[[], Optimizer]]:
    """Return what makes each optimizer, in the order of their steps: ours between those that it is compared with."""
    routed = {id(route.parameter) for route in route_parameters(model).to("schatten_p")}
    of_dion: list[dict[str, Any]] = [{"params": []}, {"params": [], "algorithm": "adamw"}]
    for parameter in model.parameters():
        of_dion[id(parameter) not in routed]["params"].append(parameter)
    ours: dict[str, Any] = {"p": -5, "compute_dtype": compute_dtype, "verbose": False}
    makers: dict[str, Callable[[], Optimizer]] = {
        MUON: lambda: MuonAndAdamW(model, **_RATES, betas=(0.9, 0.999), eps=1e-8),
        OURS: lambda: create_schatten_optimizer(model, **_RATES, **ours),
        ADAMW: lambda: AdamW(model.parameters(), **_RATES, fused=True),
        DION: lambda: importlib.import_module("dion").Muon(of_dion, **_RATES, nesterov=True, adjust_lr="rms_norm"),
    }
    return {name: make for name, make in makers.items() if name != DION or importlib.util.find_spec("dion")}


def measure(
    config: PretrainedConfig, device: str, compute_dtype: str, repeats: int, tokens: int
) -> dict[str, dict[str, Any]]:
    """Let all optimizers take steps in turn on one model, and return numbers of each; those of a GPU only there."""
    gc.collect()  # of the model before, whose optimizers are in circles
    model = model_of(config, device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    first, optimizers, states = torch.cuda.memory_allocated(), {}, {}  # 0 on a CPU
    for name, make in optimizers_of(model, compute_dtype).items():
        before = torch.cuda.memory_allocated()
        optimizers[name] = make()
        for _ in range(2):
            optimizers[name].step()
        states[name] = torch.cuda.memory_allocated() - before
    rounds = [{name: _timed(each.step, device) for name, each in optimizers.items()} for _ in range(repeats)]
    timings = {}
    for name, optimizer in optimizers.items():
        seconds, on_device, temporary = zip(*(each[name] for each in rounds), strict=True)
        ratio = statistics.median(each[OURS][0] / each[name][0] for each in rounds)
        timings[name] = {"a step, ms": 1e3 * statistics.median(seconds), "ours over it": ratio}
        if device != "cpu":
            timings[name] |= {"on the device, ms": 1e3 * statistics.median(on_device), **_kernels(optimizer.step)}
            timings[name]["peak with it alone, MiB"] = (first + states[name] + max(temporary)) / (1 << 20)
            timings[name]["of it temporary, MiB"] = max(temporary) / (1 << 20)
    if tokens:
        _add_training(timings, model, optimizers, states, tokens=tokens, repeats=repeats)
    return timings


def _add_training(
    timings: dict[str, dict[str, Any]],
    model: nn.Module,
    optimizers: dict[str, Optimizer],
    states: dict[str, int],
    *,
    tokens: int,
    repeats: int,
) -> None:
    """Add numbers of whole training steps, with a peak of memory that has none of the other optimizers' states."""
    device = next(model.parameters()).device
    vocabulary: Any = model.config.vocab_size  # type: ignore[union-attr]
    rows = torch.randint(vocabulary, (max(1, tokens // _LENGTH), min(tokens, _LENGTH)), device=device)

    def train(optimizer: Optimizer) -> None:
        model.zero_grad()
        loss_of(model, rows).backward()  # type: ignore[arg-type]
        optimizer.step()

    calls = {name: partial(train, optimizer) for name, optimizer in optimizers.items()}
    for call in calls.values():
        call()
    rounds = [{name: _timed(call, device.type) for name, call in calls.items()} for _ in range(repeats)]
    for name, row in timings.items():
        seconds = [each[name][0] for each in rounds]
        row["training, ms"] = 1e3 * statistics.median(seconds)
        row["ours over it there"] = statistics.median(each[OURS][0] / each[name][0] for each in rounds)
        if device.type != "cpu":
            peak = max(each[name][2] for each in rounds) + torch.cuda.memory_allocated()
            row["peak there, MiB"] = (peak - sum(states.values()) + states[name]) / (1 << 20)


def _timed(step: Callable[[], object], device: str) -> tuple[float, float, int]:
    """Return wall time, time between events on a GPU, and bytes that a step takes there for itself."""
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start, 0.0, 0
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held, start = torch.cuda.memory_allocated(), time.perf_counter()
    before.record()
    step()
    after.record()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, before.elapsed_time(after) / 1000, torch.cuda.max_memory_allocated() - held


def _kernels(step: Callable[[], object]) -> dict[str, float]:
    """Return the time of all kernels and copies of a step, and their number."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        step()
        torch.cuda.synchronize()
    events = [event for event in profiled.events() or [] if event.device_type == DeviceType.CUDA]
    own = [event.time_range.elapsed_us() / 1e3 for event in events if not event.is_user_annotation]
    return {"in kernels, ms": sum(own), "launches": len(own)}


def machine(device: str) -> str:
    """Name the machine, what it runs, and the date."""
    information = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.M) if information.is_file() else None
    processor = found[1].strip() if found else platform.processor() or platform.machine()
    gpu = "" if device == "cpu" else f"{torch.cuda.get_device_name(device)}, "
    software = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    return f"{gpu}{processor}, {software}, {datetime.now(UTC).date()}"


def print_page(place: str, counts: Sequence[tuple[str, str, StepCounter]], timings: dict[str, Any]) -> None:
    print(f"# A step of the optimizer\n\n{place}.\n\n## Counted\n")
    print("Bytes are over the least possible: passes outside `spectral_iteration`, iterates inside.\n")
    header = ("model", "optimizer", "parameters", "operations", "on the device", "kernels", "passes", "iterates")
    print_table(header, [(*names, *map(_text, count.numbers().values())) for *names, count in counts])
    for model, optimizer, count in counts:
        print(f"\nOperations of {optimizer} on {model}:\n")
        print_table(("operation", "times", "passes"), count.table())
    print("\n## Timed" if timings else "")
    for model, rows in timings.items():
        print(f"\n{model}:\n")
        print_table(("optimizer", *rows[OURS]), [(name, *map(_text, row.values())) for name, row in rows.items()])
    if timings and not importlib.util.find_spec("dion"):
        print("\nThe package `dion` is not installed: its Muon is left out.")


def _text(number: float | None) -> str:
    return "–" if number is None else f"{number:,}" if isinstance(number, int) else f"{number:,.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    counts = []
    for name, dtype in (("tiny-gpt2", "float32"), ("tiny-llama", "bfloat16")) if options.quick else COUNTED:
        model = model_of(MODELS[name](), "meta", dtype)
        for optimizer in (OURS, MUON) if name in _COUNTED_WITH_MUON else (OURS,):
            counts.append((f"{name}, {dtype}", optimizer, count_step(model, optimizer)))
    timings = {
        name: measure(MODELS[name](), options.device, options.compute_dtype, options.repeats, options.tokens)
        for name in ([] if options.count else options.models)
    }
    page, place = io.StringIO(), machine(options.device)
    with redirect_stdout(page):
        print_page(place, counts, timings)
    print(page.getvalue())
    written: dict[str, Any] = {"machine": place, "compute_dtype": options.compute_dtype, "repeats": options.repeats}
    written |= {"counts": [], "timings": timings}
    for name, optimizer, count in counts:
        own = {"model": name, "optimizer": optimizer, **count.numbers(), "names": count.names, "bytes": count.passes}
        written["counts"].append(own)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "optimizer_step.json").write_text(json.dumps(written, indent=1) + "\n", "utf-8")
    (options.output / "optimizer_step.md").write_text(page.getvalue(), "utf-8")
    print(f"Written to {options.output / 'optimizer_step.md'}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", action="store_true", help="count only")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of what is timed (default cpu)")
    parser.add_argument("--models", nargs="+", choices=TIMED, help="to time (default gpt2-small; on a GPU all)")
    parser.add_argument(
        "--compute-dtype", choices=OPTION_VALUES["compute_dtype"], default="auto", help="of our products"
    )
    parser.add_argument("--tokens", type=int, default=0, help="of training steps that are timed too (default none)")
    parser.add_argument("--repeats", type=int, default=12, help="steps of each (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"), help="folder (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny models, only to check that everything runs")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no GPU")
    if options.quick:
        options.models = ["tiny-gpt2", "tiny-llama"]
    elif options.models is None:
        options.models = list(TIMED if options.device == "cuda" else TIMED[:1])
    return options


if __name__ == "__main__":
    main()
