"""Speed and accuracy of `spectral_power` and `SchattenP.step`, beside Muon's and the published alternatives.

Prints its tables and writes them to ``spectral_power.json``, with a picture of error against time beside it.
Times are ratios of calls that ran alternately in this process; nothing here asserts one.

Usage:
    python benchmarks/spectral_power/spectral_power.py                                  # on a CPU in float32
    python benchmarks/spectral_power/spectral_power.py --sections speed peers           # without the optimizers
    python benchmarks/spectral_power/spectral_power.py --device cuda --dtype bfloat16   # with the compiled variants
    python benchmarks/spectral_power/spectral_power.py --quick                          # tiny matrices: does it run?
"""

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.spectral_power.accuracy import measure_methods
from benchmarks.spectral_power.bench import GPT2_SMALL, QUICK, Bench
from benchmarks.spectral_power.speed import measure_calls, measure_optimizers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SECTIONS: dict[str, Callable[[Bench, Path], Any]] = {
    "speed": lambda bench, output: measure_calls(bench),
    "optimizer": lambda bench, output: measure_optimizers(bench),
    "peers": measure_methods,
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    sizes = QUICK if options.quick else GPT2_SMALL
    device = torch.device(options.device)
    compiled = device.type == "cuda" if options.compile is None else options.compile
    bench = Bench(device, DTYPES[options.dtype], sizes, options.repeats, compiled)
    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": describe_machine(bench)}
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()))
    for section in options.sections:
        print(f"\n## {section}\n")
        results[section] = SECTIONS[section](bench, options.output)
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    (options.output / "spectral_power.json").write_text(text + "\n", "utf-8")
    print(f"\nWritten to {options.output}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the matrix products (default float32)")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each side of a ratio (default 7)")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="time torch.compile'd variants too (default: on a GPU)",
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="tables (default all)")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"), help="folder (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny matrices, only to check that everything runs")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: this PyTorch sees no GPU")
    return options


def describe_machine(bench: Bench) -> dict[str, Any]:
    on_gpu = bench.device.type == "cuda"
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": torch.cuda.get_device_name(bench.device) if on_gpu else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": bench.dtype_name,
        "matmul peak, TFLOP/s": round(bench.matmul_peak() / 1e12, 3),
        "repeats": bench.repeats,
    }


if __name__ == "__main__":
    main()
