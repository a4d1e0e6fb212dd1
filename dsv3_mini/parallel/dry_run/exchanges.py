"""What travels between ranks, counted where torch hands it over: the same counter on real processes and in a dry run.

Every exchange that torch.distributed makes is an operation that a dispatch mode sees, with its tensors and its group. Of each
one is kept what *this* rank hands over:

    all-gather       its own piece          reduce-scatter   its sums for everybody
    all-reduce       the whole tensor       all-to-all       rows for each member, its own included
    send             the whole tensor

What of it leaves over which wire (`wires`) follows from who is in the group. NVLink joins the GPUs of a node, InfiniBand the
nodes. An all-to-all says how much goes to whom. A collective goes round a ring that enters each node once: a rank passes on
all but one piece of what is gathered, and what a node lacks comes over the network through all its members' cards together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
    "all_to_all_single": "all-to-all",
    "send": "send",
}


class Wires(NamedTuple):
    """Bytes that leave a rank: over NVLink, and over InfiniBand."""

    inside: float
    network: float

    def __add__(self, other: Wires) -> Wires:  # type: ignore[override]
        return Wires(self.inside + other.inside, self.network + other.network)


NOTHING = Wires(0.0, 0.0)


@dataclass(frozen=True)
class Exchange:
    """One exchange, as one of its ranks sees it.

    `bytes`: what the rank hands over. `shares`: of an all-to-all the bytes for each member, of a send for its one member.
    `part`: of the model, that asked for it.
    """

    kind: str
    ranks: tuple[int, ...]
    me: int
    bytes: int
    shares: tuple[int, ...] | None = None
    part: str = ""

    def wires(self, node: int) -> Wires:
        """What of it leaves this rank over each wire, where ranks are numbered node by node, `node` of them on each."""
        here = [rank // node == self.me // node for rank in self.ranks]
        if self.shares is not None:
            away = [
                (near, share)
                for rank, near, share in zip(self.ranks, here, self.shares, strict=True)
                if rank != self.me
            ]
            return Wires(sum(s for near, s in away if near), sum(s for near, s in away if not near))
        count, local = len(self.ranks), sum(here)
        nodes = len({rank // node for rank in self.ranks})
        whole = self.bytes * (count if self.kind == "all-gather" else 1) * (2 if self.kind == "all-reduce" else 1)
        network = whole * (1 - 1 / nodes) / local
        inside = whole * (1 - 1 / count) if local > 1 else 0.0
        return Wires(inside, network)


def tensors_in(*things: Any) -> Iterator[Tensor]:
    """All tensors of arguments or results, lists of lists included. Torch's own trees do the same, many times slower."""
    for thing in things:
        if isinstance(thing, Tensor):
            yield thing
        elif isinstance(thing, (list, tuple)):
            yield from tensors_in(*thing)


class Watching(TorchDispatchMode):
    """Shows every operation, with its result, to `watchers`; runs it as it is."""

    def __init__(self, *watchers: Any) -> None:
        super().__init__()
        self.watchers = watchers

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if any(kind not in (Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # a tensor of tensors takes itself apart first
        result = self.run(func, args, kwargs or {})
        for watcher in self.watchers:
            watcher.saw(func, args, kwargs or {}, result)
        return result

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


class ExchangeCounter:
    """A watcher that keeps every exchange, in their order."""

    def __init__(self) -> None:
        self.seen: list[Exchange] = []
        self.part = ""

    def saw(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        if func.namespace not in ("c10d", "_c10d_functional"):
            return
        kind = KINDS.get(func._opname)
        if kind is None:
            return
        group, me = group_of(func, args), dist.get_rank()
        ranks = tuple(dist.get_process_group_ranks(group))
        if func._opname == "all_to_all_single":
            sent = args[0]
            shares = _shares(sent, args[2])
        elif func._opname == "alltoall_base_":
            sent = args[1]
            shares = _shares(sent, args[4] or [len(sent) // len(ranks)] * len(ranks))
        elif func._opname == "send":
            sent = args[0][0]
            shares = tuple(sent.nbytes if place == args[2] else 0 for place in range(len(ranks)))
        else:
            sent, shares = args[0][0] if kind == "all-reduce" else args[1], None
        self.seen.append(Exchange(kind, ranks, me, sent.nbytes, shares, self.part))

    def take(self) -> tuple[Exchange, ...]:
        """What was seen since it was asked last."""
        seen, self.seen = tuple(self.seen), []
        return seen


def group_of(func: Any, args: Sequence[Any]) -> dist.ProcessGroup:
    """The group of an exchange's operation."""
    if func.namespace == "_c10d_functional":
        name = args[-1]
        return _resolve_process_group(name) if isinstance(name, str) else name
    holder = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
    return dist.ProcessGroup.unbox(holder)


def by_kind(exchanges: Iterable[Exchange]) -> dict[tuple[str, int], int]:
    """Bytes handed over, by kind and by the number of ranks in the group."""
    count: Counter[tuple[str, int]] = Counter()
    for exchange in exchanges:
        count[exchange.kind, len(exchange.ranks)] += exchange.bytes
    return dict(count)


def all_wires(exchanges: Iterable[Exchange], node: int) -> Wires:
    return sum((exchange.wires(node) for exchange in exchanges), start=NOTHING)


def _shares(rows: Tensor, splits: Sequence[int]) -> tuple[int, ...]:
    row = rows[0].nbytes if len(rows) else 0
    return tuple(row * count for count in splits)
