"""Which part of a model an operation belongs to, forward and backward.

Forward, modules say when they begin and end. Backward runs no modules, but autograd's nodes, and torch numbers these in the
order in which forward made them: so the number of a node tells which part had made it.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dsv3_mini.model.attention import MultiHeadLatentAttention
from dsv3_mini.model.block import Block
from dsv3_mini.model.experts import GroupedExperts
from dsv3_mini.model.feed_forward import SwiGLU
from dsv3_mini.model.norm import RMSNorm
from dsv3_mini.model.router import Router

PARTS: dict[type[nn.Module], str] = {
    RMSNorm: "norms",
    MultiHeadLatentAttention: "attention",
    Router: "router",
    SwiGLU: "feed-forward",
    GroupedExperts: "experts",
    Block: "residual stream",
    nn.Embedding: "embedding",
}
OUTSIDE = "head and loss"  # all that is no block's: final norm's products, MTP's joining, logits, losses


class Parts:
    """The part that runs now, of a model whose modules were `marked`. One that lies inside another comes first."""

    def __init__(self) -> None:
        self._running: list[str] = []
        self._numbers: list[int] = []  # of autograd's nodes: from each one on, nodes were made by the part beside it
        self._made_by: list[str] = []
        self._node: Any = None  # the one that made something again, when a module began last

    def mark(self, model: nn.Module) -> None:
        for module in model.modules():
            part = next((part for kind, part in PARTS.items() if isinstance(module, kind)), None)
            if part is not None:
                # First in, last out: what FSDP's own hooks do for a module belongs to it.
                module.register_forward_pre_hook(self._begin(part), prepend=True)
                module.register_forward_hook(self._end)

    @property
    def now(self) -> str:
        node = self._clear()
        if node is not None and not self._running:
            place = bisect.bisect_right(self._numbers, node._sequence_nr()) - 1
            # Beyond all that forward made stand the nodes that add gradients up: theirs is the part that came before.
            return self._made_by[place] if place >= 0 else OUTSIDE
        return self._running[-1] if self._running else OUTSIDE

    def _begin(self, part: str) -> Callable[..., None]:
        def begin(*_: Any) -> None:
            self._node = self._clear()
            self._running.append(part)
            self._note()

        return begin

    def _clear(self) -> Any:
        """What is made again in backward ends where enough was made, and then no module says that it ends."""
        node = torch._C._current_autograd_node()
        if node is not self._node:
            self._running, self._node = ([] if self._node is not None else self._running), None
        return node

    def _end(self, *_: Any) -> None:
        del self._running[-1:]
        self._note()

    def _note(self) -> None:
        if torch._C._current_autograd_node() is None:  # not where backward makes something again
            self._numbers.append(torch.autograd._get_sequence_nr())
            self._made_by.append(self._running[-1] if self._running else OUTSIDE)
