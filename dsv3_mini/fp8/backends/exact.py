"""FP8 operands multiplied in FP32: no error but that of the FP8 numbers themselves. What the other backends are measured by.

It takes every tile and every format, on every device.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_mini.fp8.gemm import Backend, groups
from dsv3_mini.fp8.quantize import Quantized


class Exact(Backend):
    name = "exact"

    def refuses(self, a: Quantized, b: Quantized) -> str | None:
        return None

    def gemm(self, a: Quantized, b: Quantized, out_dtype: torch.dtype) -> Float[Tensor, "m n"]:
        return (a.dequantize() @ b.dequantize().T).to(out_dtype)

    def grouped_gemm(
        self, a: Quantized, b: Quantized, ends: Int[Tensor, " e"], out_dtype: torch.dtype
    ) -> Float[Tensor, "T n"]:
        # One expert at a time is dequantised, and none that nobody visits: the weights stay one byte each.
        rows = a.dequantize()
        out = rows.new_zeros(len(rows), b.shape[-2], dtype=out_dtype)
        for expert, start, end in groups(ends):
            out[start:end] = rows[start:end] @ b.matrix(expert).dequantize().T
        return out
