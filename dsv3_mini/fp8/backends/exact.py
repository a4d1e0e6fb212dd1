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
    fp32 = True

    def refuses(self, a: Quantized, b: Quantized) -> str | None:
        return None

    def gemm(self, a: Quantized, b: Quantized, out_dtype: torch.dtype) -> Float[Tensor, "m n"]:
        return (a.dequantize() @ b.dequantize().T).to(out_dtype)

    def grouped_gemm(
        self, a: Quantized, b: Quantized, ends: Int[Tensor, " e"], out_dtype: torch.dtype
    ) -> Float[Tensor, "T n"]:
        # Of weights of one byte each, one expert at a time is dequantised, and none that nobody visits: so small they stay.
        rows, weights = a.dequantize(), b.dequantize() if b.in_fp32 else None
        out = rows.new_zeros(len(rows), b.shape[-2])
        for expert, start, end in groups(ends):
            weight = b.matrix(expert).dequantize() if weights is None else weights[expert]
            torch.mm(rows[start:end], weight.T, out=out[start:end])
        return out.to(out_dtype)

    def grouped_wgrad(
        self, a: Quantized, b: Quantized, ends: Int[Tensor, " e"], out_dtype: torch.dtype
    ) -> Float[Tensor, "e m n"]:
        left, right = a.dequantize(), b.dequantize().T
        out = left.new_zeros(len(ends), len(left), right.shape[-1])
        for expert, start, end in groups(ends):
            torch.mm(left[:, start:end], right[start:end], out=out[expert])
        return out.to(out_dtype)
