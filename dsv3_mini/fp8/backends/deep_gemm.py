"""DeepSeek's own FP8 kernels, https://github.com/deepseek-ai/DeepGEMM, where the package `deep_gemm` is installed.

It brings its scales into the layout that the hardware wants by itself. It asks for tiles 1x128 by 128x128 (Fprop and Dgrad;
Wgrad goes to `scaled_mm`), and for grouped GEMMs that every expert's rows begin at a multiple of its block height, 128:

    rows of      expert 0    expert 1 (none)    expert 2
    ours         a b c                          d e
    DeepGEMM's   a b c 0 ... 0                  d e 0 ... 0       |- each expert filled up to whole blocks -|
    its group    0 0 0 . ... .                  2 2 . ... .       which expert's weight; -1 for a row of nobody

Where each row goes is computed on the GPU, from `ends`; the CPU, which does not know the load, only provides the room that
suffices for any load.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_mini.fp8.backends.scaled_mm import no_hopper, up
from dsv3_mini.fp8.formats import E4M3
from dsv3_mini.fp8.gemm import Backend
from dsv3_mini.fp8.quantize import TILE, Quantized

NEEDS = ("fp8_gemm_nt", "m_grouped_fp8_gemm_nt_contiguous", "get_mk_alignment_for_contiguous_layout")


class DeepGemm(Backend):
    name = "deep_gemm"

    def missing(self) -> str | None:
        if reason := no_hopper():
            return f"{reason}: use 'exact'"
        if importlib.util.find_spec("deep_gemm") is None:
            return "the package deep_gemm is not installed: use 'scaled_mm', or install github.com/deepseek-ai/DeepGEMM"
        if absent := [name for name in NEEDS if not hasattr(_package(), name)]:
            return f"the installed deep_gemm has no {absent[0]}: install its newest version, or use 'scaled_mm'"
        return None

    def refuses(self, a: Quantized, b: Quantized) -> str | None:
        n, k = b.shape[-2:]
        if b.tile != (TILE, TILE) or a.fmt != E4M3 or b.fmt != E4M3:
            return (
                f"it multiplies E4M3 by blocks ({TILE}, {TILE}) of E4M3, not {a.fmt.name} by {b.tile} of {b.fmt.name}"
            )
        if k % TILE or n % 64:
            return f"it takes k in multiples of {TILE} and n in multiples of 64, not {k} and {n}"
        return super().refuses(a, b)

    def gemm(self, a: Quantized, b: Quantized, out_dtype: torch.dtype) -> Float[Tensor, "m n"]:
        out = a.scale.new_empty(a.shape[0], b.shape[0], dtype=_written(out_dtype))
        _package().fp8_gemm_nt((a.q.contiguous(), a.scale), (b.q.contiguous(), b.scale.contiguous()), out)
        return out.to(out_dtype)

    def grouped_gemm(
        self, a: Quantized, b: Quantized, ends: Int[Tensor, " e"], out_dtype: torch.dtype
    ) -> Float[Tensor, "T n"]:
        tokens, experts = a.shape[0], b.shape[0]
        block = _package().get_mk_alignment_for_contiguous_layout()
        room = up(tokens + experts * (block - 1), block)
        group, place = spread_out(ends, tokens, block)
        # Moved as bytes, for not every indexing of torch knows FP8.
        numbers = a.q.view(torch.uint8).new_zeros(room, a.columns).index_copy_(0, place, a.q.view(torch.uint8))
        scale = a.scale.new_zeros(room, a.scale.shape[1]).index_copy_(0, place, a.scale)
        owner = torch.full((room,), -1, dtype=torch.int32, device=a.q.device).index_copy_(0, place, group)
        out = a.scale.new_empty(room, b.shape[1], dtype=torch.bfloat16)
        _package().m_grouped_fp8_gemm_nt_contiguous(
            (numbers.view(a.q.dtype), scale), (b.q.contiguous(), b.scale.contiguous()), out, owner
        )
        return out.index_select(0, place).to(out_dtype)


def spread_out(ends: Int[Tensor, " e"], tokens: int, block: int) -> tuple[Int[Tensor, " T"], Int[Tensor, " T"]]:
    """Each row's expert, and its place when every expert's rows begin at a multiple of `block`."""
    starts = torch.nn.functional.pad(ends, (1, 0))[:-1]
    blocks_before = ((ends - starts + block - 1) // block).cumsum(0) * block
    new_starts = torch.nn.functional.pad(blocks_before, (1, 0))[:-1]
    row = torch.arange(tokens, device=ends.device)
    # The first expert whose rows end behind this one: it skips those without rows.
    group = torch.searchsorted(ends.long(), row, right=True)
    return group.int(), row - starts.long()[group] + new_starts[group]


def _written(out_dtype: torch.dtype) -> torch.dtype:
    """DeepGEMM writes BF16 and FP32."""
    return out_dtype if out_dtype in (torch.bfloat16, torch.float32) else torch.float32


@functools.cache
def _package() -> ModuleType:
    return importlib.import_module("deep_gemm")
