"""Compiles the Triton kernels for a GPU that need not be there, and prints a line for each; see the test beside it."""

from __future__ import annotations

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_schatten.linalg import triton_kernels as kernels
from hf_schatten.linalg import triton_numbers as numbers
from hf_schatten.linalg import triton_placed as placed

HALF, SINGLE, DOUBLE, TABLE, NUMBER = "*bf16", "*fp32", "*fp64", "*i64", "i32"
SYMMETRIC = dict.fromkeys(("X", "Y", "A", "out"), HALF) | dict.fromkeys("abc", SINGLE)
SYMMETRIC |= dict.fromkeys(("m", "k", "matrix_stride", "row_stride"), NUMBER)
SUM = {"first": HALF, "others": HALF, "weights": SINGLE, "diagonal": SINGLE, "out": HALF, "partial": SINGLE}
SUM |= dict.fromkeys(("size", "n", "stride"), NUMBER)
ADVANCE = {"averages": TABLE, "gradients": TABLE} | dict.fromkeys(("rates", "ahead", "keep", "divisors"), DOUBLE)
ADD = {"weights": TABLE, "updates": TABLE, "factors": DOUBLE, "decays": DOUBLE}

NUMBERS = {"s": SINGLE, "nodes": SINGLE, "table": SINGLE, "norms": HALF, "m": NUMBER, "rows": NUMBER}
NUMBERS |= dict.fromkeys(("largest", "squared_units", "columns", "inner", "outer"), SINGLE)
NUMBERS |= dict.fromkeys(("safety", "smallest_norm", "largest_weight"), "fp32")
OF_NUMBERS = {"STEPS": 5, "FROM_START": False, "ROWS": 64, "BLOCK": 1024}

CASES = [
    (kernels._symmetric_kernel, SYMMETRIC, {"POLYNOMIAL": False, "PRECISION": "tf32x3", "BLOCK": 128, "DEPTH": 64}),
    (kernels._symmetric_kernel, SYMMETRIC, {"POLYNOMIAL": True, "PRECISION": "tf32x3", "BLOCK": 128, "DEPTH": 64}),
    (
        kernels._symmetric_kernel,
        SYMMETRIC | dict.fromkeys(("X", "Y", "A", "out"), SINGLE),
        {"POLYNOMIAL": True, "PRECISION": "tf32x3", "BLOCK": 128, "DEPTH": 32},
    ),
    (
        kernels._symmetric_kernel,
        SYMMETRIC | dict.fromkeys(("X", "Y", "A"), "*fp16") | {"out": SINGLE},
        {"POLYNOMIAL": False, "PRECISION": "tf32x3", "BLOCK": 16, "DEPTH": 64},
    ),
    (kernels._weighted_sum_kernel, SUM, {"COUNT": 5, "DIAGONAL": False, "PRODUCTS": True, "BLOCK": 4096}),
    (kernels._weighted_sum_kernel, SUM, {"COUNT": 1, "DIAGONAL": True, "PRODUCTS": False, "BLOCK": 4096}),
    (kernels._inner_products_kernel, {"A": HALF, "B": HALF, "partial": SINGLE, "size": NUMBER}, {"BLOCK": 4096}),
    (numbers._squared_units_kernel, {"gram": HALF, "found": SINGLE, "m": NUMBER}, {"BLOCK": 1024}),
    (numbers._iteration_numbers_kernel, NUMBERS, OF_NUMBERS | {"POWER": True, "DIRECT": 2}),
    (numbers._iteration_numbers_kernel, NUMBERS, OF_NUMBERS | {"POWER": False, "DIRECT": 4}),
    (
        placed._magnitude_kernel,
        dict.fromkeys(("addresses", "sizes", "tensors", "starts"), TABLE) | {"found": SINGLE},
        {"TYPE": tl.bfloat16, "ALIGNED": True, "BLOCK": 8192},
    ),
    (placed._largest_kernel, {"magnitudes": SINGLE, "ends": TABLE, "found": SINGLE}, {"BLOCK": 1024}),
    (
        placed._advance_kernel,
        ADVANCE | {"out": HALF},
        {"AVERAGE": tl.float32, "GRADIENT": tl.bfloat16, "WRITES": True, "ALIGNED": True, "TILE": 64},
    ),
    (
        placed._advance_kernel,
        ADVANCE | {"out": DOUBLE},
        {"AVERAGE": tl.float32, "GRADIENT": tl.float32, "WRITES": False, "ALIGNED": False, "TILE": 64},
    ),
    (
        placed._add_kernel,
        ADD,
        {"WEIGHT": tl.float32, "UPDATE": tl.bfloat16, "WORK": tl.float32, "ALIGNED": True, "TILE": 64},
    ),
    (
        placed._add_kernel,
        ADD,
        {"WEIGHT": tl.bfloat16, "UPDATE": tl.bfloat16, "WORK": tl.float32, "ALIGNED": False, "TILE": 64},
    ),
]


def main(capability: int) -> None:
    """Compile every case for a compute capability (90: H100), for sizes and addresses that are multiples of 16."""
    for kernel, types, constants in CASES:
        names = kernel.arg_names
        source = ASTSource(
            fn=kernel,
            signature={name: types.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in types if types[name] != "fp32"},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
        wgmma = "wgmma" if "wgmma" in compiled.asm["ptx"] else "-"
        print(kernel.__name__, compiled.metadata.shared, len(compiled.asm["cubin"]), wgmma)


if __name__ == "__main__":
    main(int(sys.argv[1]))
