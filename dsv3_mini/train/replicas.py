"""Replicas: the same model in several processes, each with its share of every batch (data parallelism).

Each process holds all weights, computes the gradients of its rows, and adds them up with the others'; then all take the same
step. On a machine of few cores, processes of one thread each wait for each other once a step, where the threads of one
process wait at every operation.

Simplification: nothing is sharded, and every process prepares the whole batch.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

PATIENCE = datetime.timedelta(minutes=30)  # how long the others wait while the first one evaluates and saves


@dataclass(frozen=True)
class Replicas:
    """This process's place among `count`; the one with rank 0 logs, evaluates and saves. Alone by default."""

    rank: int = 0
    count: int = 1

    @classmethod
    def from_environment(cls) -> Replicas:
        """Join the others if torchrun started this process, else be alone."""
        if not dist.is_torchelastic_launched():
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size())

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def own_rows(self, rows: Shaped[Tensor, "b s"]) -> Shaped[Tensor, "own s"]:
        """This process's rows of a batch."""
        return rows[self.rank :: self.count]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their sums over all processes, in one message."""
        message = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(message)
        for tensor, total in zip(tensors, message.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def anyone(self, flag: bool) -> bool:
        """Whether it holds in any process, so that all stop after the same step."""
        if self.count == 1:
            return flag
        raised = torch.tensor(int(flag))
        dist.all_reduce(raised)
        return bool(raised)


ALONE = Replicas()
