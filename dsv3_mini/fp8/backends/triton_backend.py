"""This package's own kernels, on an NVIDIA GPU with FP8, or in Triton's interpreter on a CPU.

Importing this file needs no triton. The kernels, in dsv3_mini/fp8/kernels, are imported when they are first asked for,
because they do need it, and because a machine must be able to say that it has none.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_mini.fp8.gemm import Backend
from dsv3_mini.fp8.quantize import Quantized

FIRST_WITH_FP8 = (8, 9)  # compute capability: Ada. Hopper is 9.0


class Triton(Backend):
    name = "triton"

    def missing(self) -> str | None:
        if find_spec("triton") is None:
            return "triton is not installed: `pip install triton` (it is made for Linux), or use 'exact'"
        if interpreted():
            return None
        if torch.version.hip or not torch.cuda.is_available():
            return "torch finds no CUDA device here: use 'exact', or TRITON_INTERPRET=1 to run the kernels step by step"
        capability = torch.cuda.get_device_capability()
        if capability < FIRST_WITH_FP8:
            return f"this GPU's compute capability is {capability}, and FP8 begins with {FIRST_WITH_FP8}: use 'exact'"
        return None

    def misplaced(self, a: Quantized, b: Quantized) -> str | None:
        return None if interpreted() else super().misplaced(a, b)

    def gemm(self, a: Quantized, b: Quantized, out_dtype: torch.dtype) -> Float[Tensor, "m n"]:
        from dsv3_mini.fp8.kernels.gemm import gemm

        return gemm(a, b, out_dtype)

    def grouped_gemm(
        self, a: Quantized, b: Quantized, ends: Int[Tensor, " e"], out_dtype: torch.dtype
    ) -> Float[Tensor, "T n"]:
        from dsv3_mini.fp8.kernels.grouped_gemm import grouped_gemm

        return grouped_gemm(a, b, ends, out_dtype)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter. Triton asks the environment once, when it is first imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
