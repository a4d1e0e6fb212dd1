"""DeepSeek's own kernels for dispatch and combine, https://github.com/deepseek-ai/DeepEP, where the package `deep_ep` is installed.

The same trip as two legs of `Fp8Hop`, in one call: once to each node over InfiniBand, handed on over NVLink, tokens in E4M3 with
power-of-two scales, sums home in BF16. What differs is who does it: a few of a GPU's own multiprocessors, which forward and add
up as data comes in, where we make one exchange after the other.

    DeepEP's call                    ours forward          ours backward
    dispatch(x, topk_idx, ...)       carry
    combine(x, handle, weights)                            of carry: gradients of tokens, and of their gates
    combine(x, handle)               back
    dispatch(x, handle=...)                                of back: the way is known, so that only vectors travel

Three things are different in its hands. Scales are FP32, 4 bytes for 128 numbers. An expert that lies elsewhere is -1 in what
arrives, and one that lies here is counted from the process's first. A width must be a multiple of 128.

Simplification: each call waits for its end; the streams and events with which DeepEP overlaps calls are left alone.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3_mini.errors import ConfigError
from dsv3_mini.fp8.backends.scaled_mm import no_hopper
from dsv3_mini.fp8.formats import E4M3
from dsv3_mini.fp8.quantize import TILE, Quantized, quantize

NEEDS = ("get_dispatch_layout", "dispatch", "combine", "get_dispatch_config", "get_combine_config")


def missing() -> str | None:
    """Why this machine cannot run it, in one line that also says what to use; None where it can."""
    if reason := no_hopper():
        return f"{reason}: use 'fp8'"
    if importlib.util.find_spec("deep_ep") is None:
        return "the package deep_ep is not installed: use 'fp8', or install github.com/deepseek-ai/DeepEP"
    buffer = getattr(_package(), "Buffer", None)
    if absent := [name for name in NEEDS if not hasattr(buffer, name)]:
        return f"the installed deep_ep has no Buffer.{absent[0]}: install a release that has, or use 'fp8'"
    return None


class DeepEpLeg:
    """The whole way in one leg, between all members of an expert-parallel group.

    Args:
        experts: of a layer, in all. group: the processes that share them, node by node.
    """

    def __init__(self, experts: int, group: dist.ProcessGroup) -> None:
        self.experts, self.group = experts, group
        self.block, self.first = experts // group.size(), 0
        self._buffer: Any = None

    def depart(self, chosen: Int[Tensor, "T k"]) -> DeepEpTrip:
        return DeepEpTrip(self)

    def buffer(self, width: int) -> Any:
        """DeepEP's buffer for vectors of `width` numbers; made at its first use, by all members together, and then kept."""
        if width % TILE:
            raise ConfigError(
                f"hidden_size = {width} must be a multiple of {TILE} for DeepEP: use dispatch 'fp8', which takes any"
            )
        if self._buffer is None:
            kind, members = _package().Buffer, self.group.size()
            configs = kind.get_dispatch_config(members), kind.get_combine_config(members)
            row = 2 * width  # bytes in BF16, the larger of the two
            inside = max(config.get_nvl_buffer_size_hint(row, members) for config in configs)
            network = max(config.get_rdma_buffer_size_hint(row, members) for config in configs)
            self._buffer = kind(self.group, inside, network)
        return self._buffer


class DeepEpTrip:
    """One dispatch with its combine."""

    def __init__(self, leg: DeepEpLeg) -> None:
        self.leg = leg
        self.handle: Any = None
        self.buffer: Any = None

    def carry(
        self, x: Float[Tensor, "T d"], chosen: Int[Tensor, "T k"], gates: Float[Tensor, "T k"]
    ) -> tuple[Float[Tensor, "arrived d"], Int[Tensor, "arrived k"], Float[Tensor, "arrived k"]]:
        self.buffer = self.leg.buffer(x.shape[1])
        rows, gates, local = _Dispatch.apply(x, gates, chosen, self)
        first = self.leg.group.rank() * self.leg.block
        return rows, torch.where(local < 0, -1, local + first), gates

    def back(self, results: Float[Tensor, "arrived d"]) -> Float[Tensor, "T d"]:
        return _Combine.apply(results, self)


class _Dispatch(torch.autograd.Function):
    """Tokens and gates there, in FP8 and FP32; their gradients home, in BF16 and FP32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, chosen: Tensor, trip: DeepEpTrip) -> tuple[Tensor, Tensor, Tensor]:
        ctx.trip = trip
        per_rank, per_node, per_expert, is_in_rank, _ = trip.buffer.get_dispatch_layout(chosen, trip.leg.experts)
        rows, local, weights, _, trip.handle, _ = trip.buffer.dispatch(
            _small(x),
            topk_idx=chosen,
            topk_weights=gates.float(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
        )
        ctx.mark_non_differentiable(local)
        return _large(rows, x.dtype), weights.to(gates.dtype), local

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_gates: Tensor, _: None) -> tuple[Tensor, Tensor, None, None]:
        trip = ctx.trip
        dx, d_gates, _ = trip.buffer.combine(
            grad.bfloat16().contiguous(), trip.handle, topk_weights=grad_gates.float().contiguous()
        )
        return dx.to(grad.dtype), d_gates.to(grad_gates.dtype), None, None


class _Combine(torch.autograd.Function):
    """Results home and added up, in BF16; their gradients there, in FP8, by the way that the tokens took."""

    @staticmethod
    def forward(ctx: Any, results: Tensor, trip: DeepEpTrip) -> Tensor:
        ctx.trip = trip
        total, _, _ = trip.buffer.combine(results.bfloat16().contiguous(), trip.handle)
        return total.to(results.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows, *_ = ctx.trip.buffer.dispatch(_small(grad), handle=ctx.trip.handle)
        return _large(rows, grad.dtype), None


def _small(x: Float[Tensor, "T d"]) -> tuple[Tensor, Float[Tensor, "T tiles"]]:
    """Numbers in E4M3 and their power-of-two scales, as DeepEP takes them."""
    small = quantize(x.contiguous(), (1, TILE), power_of_two=True)
    return small.q, small.scale


def _large(rows: tuple[Tensor, Tensor], dtype: torch.dtype) -> Float[Tensor, "T d"]:
    numbers, scale = rows
    return Quantized(numbers, scale, (1, TILE), E4M3, numbers.shape[1]).dequantize(dtype)


@functools.cache
def _package() -> ModuleType:
    return importlib.import_module("deep_ep")
