"""Work, counted while a step runs on paper: products in FLOPs, and passes over memory in bytes.

    product    a matrix product, or attention's kernel. FLOPs by what the numbers are: fp8, bf16 or fp32
    pass       everything else that reads and writes numbers: norms, activations, sorting, adding up, quantising, AdamW

A causal attention kernel computes half of the scores, and its FLOPs are counted so (the ledger's convention). A view moves nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from dsv3_mini.parallel.dry_run.exchanges import tensors_in

DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
FREE = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "lift_fresh",
        "_unsafe_view", "_local_scalar_dense")  # fmt: skip


@dataclass
class Work:
    """FLOPs of products by number format, bytes that the products read and write, and bytes of all passes."""

    flops: Counter[str] = field(default_factory=Counter)
    product_bytes: int = 0
    pass_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops, self.product_bytes + other.product_bytes, self.pass_bytes + other.pass_bytes
        )

    @property
    def total(self) -> int:
        return sum(self.flops.values())


class WorkCounter:
    """A watcher that keeps the work of each part. `part`: says which one runs."""

    def __init__(self, part: Callable[[], str]) -> None:
        self._part = part
        self.parts: dict[str, Work] = {}

    def saw(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        if func.namespace != "aten" or func.is_view or func._opname in FREE:
            return
        tensors = list(tensors_in(args, *kwargs.values(), result))
        moved = sum(tensor.nbytes for tensor in tensors)
        work = self.parts.setdefault(self._part(), Work())
        count = flop_registry.get(func.overloadpacket)
        if count is None:
            work.pass_bytes += moved
            return
        flops = count(*args, **kwargs, out_val=result)
        if "attention" in func._opname:
            flops //= 2
        work.flops[DTYPES.get(tensors[0].dtype, "bf16")] += flops
        work.product_bytes += moved

    def product(self, format: str, flops: int, moved: int) -> None:
        """Note a product that torch's operations do not show."""
        work = self.parts.setdefault(self._part(), Work())
        work.flops[format] += flops
        work.product_bytes += moved

    def take(self) -> dict[str, Work]:
        """The work since it was asked last."""
        parts, self.parts = self.parts, {}
        return parts
