"""What lesson 15 measures with FP8 numbers: tensors of a trained model, an outlier's reach, and the error of adding up.

The operands of a linear layer's three GEMMs are three matrices: what it reads, its weights, and the gradient of the loss with
respect to what it puts out. `operands_of` takes all three from a model, so that a lesson asks what FP8 does to numbers that
occur, and not to normal ones only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3_mini.fp8.backends.hopper import Hopper
from dsv3_mini.fp8.formats import FloatFormat
from dsv3_mini.fp8.quantize import TILE, quantize
from dsv3_mini.model import DeepSeekV3

OUTPUTS = 64  # rows and columns of the products whose sums are looked at: 4,096 sums
WHOLE = (2**30, 2**30)  # a tile larger than any matrix: one scale for all of it
WAYS: dict[str, tuple[int, int]] = {"one scale for all": WHOLE, "a scale per 1x128 tile": (1, TILE)}
OPERANDS = {"normal": "normal, both signs", "positive": "the same without signs"}

# ---- the operands of a model -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operands:
    """The three matrices of one linear layer, T tokens: what it reads, its weight, the gradient of what it puts out."""

    activation: Float[Tensor, "T i"]
    weight: Float[Tensor, "o i"]
    gradient: Float[Tensor, "T o"]


def operands_of(
    model: DeepSeekV3, tokens: Int[Tensor, "b s"], targets: Int[Tensor, "b s"], ignored: int = -100
) -> dict[str, Operands]:
    """The operands of every `nn.Linear` in the main layers (attention, dense and shared feed-forwards), by its name.

    The loss is the mean over all tokens of predicting the next; no `.grad` of the model is touched. Its parameters must
    require gradients.
    """
    read: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}
    linears = {name: module for name, module in model.layers.named_modules() if isinstance(module, nn.Linear)}

    def keep(name: str, x: Tensor, y: Tensor) -> None:
        read[name], written[name] = x.detach(), y

    hooks = [
        module.register_forward_hook(lambda _, inputs, y, name=name: keep(name, inputs[0], y))
        for name, module in linears.items()
    ]
    try:
        with torch.enable_grad():
            logits = model.lm_head(model.main_states(tokens)[0])
            loss = F.cross_entropy(
                rearrange(logits, "b s v -> (b s) v"), rearrange(targets, "b s -> (b s)"), ignore_index=ignored
            )
            gradients = torch.autograd.grad(loss, list(written.values()))
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: Operands(read[name].flatten(0, -2), linears[name].weight.detach(), gradient.flatten(0, -2))
        for name, gradient in zip(written, gradients, strict=True)
    }


# ---- the error of a scale ----------------------------------------------------------------------------------------------


def relative_error(x: Float[Tensor, "*shape"], approximation: Float[Tensor, "*shape"]) -> float:
    """The length of the error, divided by the length of x: 0 is exact, and all zeros for an approximation have 1."""
    return float((approximation - x).norm() / x.norm())


def zeroed(x: Float[Tensor, "*shape"], approximation: Float[Tensor, "*shape"]) -> float:
    """The share of x's numbers that became zero and were not."""
    there = x != 0
    return float((approximation[there] == 0).float().mean())


def with_outlier(size: float, row: int, column: int, rows: int = 8, columns: int = 512) -> Float[Tensor, "r c"]:
    """Normal numbers, always the same, with one of another size."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    x[row, column] = size
    return x


def integers(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """For comparison: x in 8-bit whole numbers, 127 equal steps to each side, under one scale."""
    scale = x.abs().max() / 127
    return torch.round(x / scale) * scale


def outlier_reach(sizes: Sequence[float], fmt: FloatFormat) -> dict[str, list[float]]:
    """The relative error of all numbers *but* the outlier, for outliers of these sizes and each way to scale."""
    curves: dict[str, list[float]] = {name: [] for name in (*WAYS, "whole numbers, one scale")}
    others = torch.ones(8, 512, dtype=torch.bool)
    others[3, 200] = False
    for size in sizes:
        x = with_outlier(size, 3, 200)
        made = {name: quantize(x, tile, fmt).dequantize() for name, tile in WAYS.items()}
        made["whole numbers, one scale"] = integers(x)
        for name, approximation in made.items():
            curves[name].append(relative_error(x[others], approximation[others]))
    return curves


# ---- the error of adding up --------------------------------------------------------------------------------------------


def sum_errors(inner: int, promote_every: int | None, bits: int = 14, operands: str = "normal") -> Float[Tensor, "m n"]:
    """How far sums of `inner` products are off on an emulated tensor core, each divided by the size that such sums have.

    Two matrices of random numbers [64 inner], in E4M3 with the report's tiles, are multiplied by the emulation and exactly
    (in FP64, the same FP8 numbers). The error of each of the 4,096 sums is divided by the root mean square of all sums: a
    single sum may happen to be next to zero, and its own size would then be no measure.

    Args:
        promote_every: N_C, None for never. bits: of the running sum. operands: a name in `OPERANDS`.
    """
    random = torch.Generator().manual_seed(inner)
    a, b = torch.randn(2, OUTPUTS, inner, generator=random)
    if operands == "positive":
        a, b = a.abs(), b.abs()
    left, right = quantize(a, (1, TILE)), quantize(b, (TILE, TILE))
    exact = left.dequantize(torch.float64) @ right.dequantize(torch.float64).T
    added = Hopper(promote_every, bits).gemm(left, right, torch.float32)
    return ((added - exact).abs() / exact.square().mean().sqrt()).float()


def error_curves(
    inners: Sequence[int], every: Mapping[str, int | None], bits: int = 14, operands: str = "normal"
) -> dict[str, dict[int, float]]:
    """For each way to promote (name -> N_C) and each K: the largest of `sum_errors`."""
    return {
        name: {inner: float(sum_errors(inner, each, bits, operands).max()) for inner in inners}
        for name, each in every.items()
    }
