"""Compile the kernels for Hopper on a machine that has no GPU, and say what came out.

    python -m dsv3_mini.fp8.kernels.compile FOLDER     writes gemm.ptx, gemm.cubin and the others there

Triton needs a GPU to run a kernel, not to compile one: it is told the target, and what it would otherwise see in the
arguments: their types, and that pointers and row lengths are multiples of 16 (bytes are then fetched 16 at a time).
What comes out is PTX, NVIDIA's assembly, and from it the cubin that a GPU loads, made by the ptxas that Triton brings.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsv3_mini.fp8.formats import E4M3
from dsv3_mini.fp8.kernels.act_quant import ROWS, act_quant_kernel
from dsv3_mini.fp8.kernels.gemm import BLOCKS, LAUNCH, gemm_kernel
from dsv3_mini.fp8.kernels.grouped_gemm import grouped_gemm_kernel
from dsv3_mini.fp8.kernels.ptx import tensor_core_sums
from dsv3_mini.fp8.kernels.weight_dequant import weight_dequant_kernel
from dsv3_mini.fp8.quantize import TILE, TINY

HOPPER = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Kernel:
    """A kernel with all that a launch would tell the compiler: its arguments' types, its constants, its options."""

    function: triton.JITFunction
    arguments: dict[str, str]
    constants: dict[str, object]
    options: dict[str, int]

    def compile(self) -> dict[str, str | bytes]:
        """Every stage of the way: "ttir", "ttgir", "llir", "ptx" as text, "cubin" as bytes."""
        signature = self.arguments | dict.fromkeys(self.constants, "constexpr")
        # Counts of rows and of experts may be any number.
        aligned = [i for i, name in enumerate(self.arguments) if name not in ("m", "r", "experts")]
        attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
        source = ASTSource(self.function, signature, constexprs=self.constants, attrs=attributes)
        return triton.compile(source, target=HOPPER, options=self.options).asm


OPERANDS = {"a": "*fp8e4nv", "scale_a": "*fp32", "b": "*fp8e4nv", "scale_b": "*fp32", "c": "*bf16"}
GEMM = OPERANDS | {"m": "i32", "n": "i32", "k": "i32"}
GROUPED = OPERANDS | {"ends": "*i32", "tile_ends": "*i32", "n": "i32", "k": "i32", "experts": "i32"}

KERNELS = {
    "act_quant": Kernel(
        act_quant_kernel,
        {"x": "*bf16", "q": "*fp8e4nv", "scale": "*fp32", "m": "i32", "k": "i32"},
        {"power_of_two": True, "LARGEST": E4M3.largest, "TINY": TINY, "ROWS": ROWS, "TILE": TILE},
        {},
    ),
    "weight_dequant": Kernel(
        weight_dequant_kernel,
        {"q": "*fp8e4nv", "scale": "*fp32", "w": "*bf16", "r": "i32", "c": "i32"},
        {"TILE": TILE},
        {"num_warps": 8},
    ),
    "gemm": Kernel(gemm_kernel, GEMM, {"B_ROWS": TILE, **BLOCKS, "TILE": TILE}, LAUNCH),
    "gemm_of_tiles": Kernel(gemm_kernel, GEMM, {"B_ROWS": 1, **BLOCKS, "TILE": TILE}, LAUNCH),
    "grouped_gemm": Kernel(
        grouped_gemm_kernel, GROUPED, {"BLOCK_E": 256, "B_ROWS": TILE, **BLOCKS, "TILE": TILE}, LAUNCH
    ),
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, kernel in KERNELS.items():
        compiled = kernel.compile()
        (folder / f"{name}.ptx").write_text(compiled["ptx"])
        (folder / f"{name}.cubin").write_bytes(compiled["cubin"])
        print(f"{name}: {len(compiled['cubin'])} bytes for Hopper", *tensor_core_sums(compiled["ptx"]), sep="\n    ")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
