"""Replicas: the same model in several processes, each with its share of every batch (data parallelism).

Each process holds all weights, computes the gradients of its rows, and adds them up with the others'; then all take the same
step. On a machine of few cores, processes of one thread each wait for each other once a step, where the threads of one
process wait at every operation.

What the trainer asks of its processes stands here as methods; `parallel/team.py` answers them for processes that share
the weights and the experts too.

Simplification: nothing is sharded, and every process prepares the whole batch.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dsv3_mini.errors import ConfigError
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dsv3_mini.train.losses import Losses, training_losses
from dsv3_mini.train.optimizer import MasterAdamW

PATIENCE = datetime.timedelta(minutes=30)  # how long the others wait while the first one evaluates and saves


@dataclass(frozen=True)
class Replicas:
    """This process's place among `count`; the one with rank 0 logs, evaluates and saves. Alone by default."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def check_batch(self, fewest: int) -> None:
        """Raises ConfigError if batches of so few rows cannot be shared."""
        if fewest < self.count:
            raise ConfigError(
                f"batch_size = {fewest} cannot be shared among {self.count} processes: start at most {fewest}"
            )

    def divide(
        self, model: DeepSeekV3, dtype: torch.dtype, micro_batch: int = 1
    ) -> tuple[DeepSeekV3, dict[str, Tensor]]:
        """The model as this process trains it, from the whole one in FP32; and the FP32 weights that were rounded for it.

        Args:
            dtype: to compute in. micro_batch: rows at a time, at most, for a model that cuts its batches itself.
        """
        start = {name: parameter.detach() for name, parameter in model.named_parameters()}
        return model.to(dtype), start

    def own_rows(self, rows: Shaped[Tensor, "b s"]) -> Shaped[Tensor, "own s"]:
        """This process's rows of a batch."""
        return rows[self.rank :: self.count]

    def own_parts(self, rows: Shaped[Tensor, "b s"], micro_batch: int) -> Sequence[Shaped[Tensor, "part s"]]:
        """Its micro-batches of a batch."""
        return self.own_rows(rows).split(micro_batch)

    def before_micro_batch(self, model: DeepSeekV3, last: bool) -> None:
        """Called before each micro-batch of a step."""

    def losses(
        self, model: DeepSeekV3, tokens: Int[Tensor, "b s"], targets: Int[Tensor, "b s"], mtp_weight: float,
        balance_weight: float, batch_targets: Int[Tensor, "B s"],
    ) -> Losses:  # fmt: skip
        """The losses of a micro-batch, as `training_losses` has them."""
        return training_losses(model, tokens, targets, mtp_weight, balance_weight, batch_targets=batch_targets)

    def sum_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Replace the gradients, by name, by their sums over the whole batch."""
        self.add_up(list(gradients.values()))

    def clip_gradients(self, optimizer: MasterAdamW, clip_norm: float) -> Float[Tensor, ""]:
        """Scale the whole model's gradient down to a norm of at most `clip_norm`; returns the norm before."""
        return optimizer.clip_gradients(clip_norm)

    def whole(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights, or what belongs to them, by name, put together in the first process. All call this together."""
        return dict(own)

    def save(self, run: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint of what all processes hold, or begin to: `settle` waits. All call this together."""
        if self.first:
            save_checkpoint(run, step, tensors, state)

    def settle(self) -> None:
        """Wait until the last checkpoint is written. Raises what kept it from being written."""

    def load(self, folder: Path) -> Checkpoint:
        """A checkpoint, as much of it as this process holds. All call this together."""
        return load_checkpoint(folder)

    def add_up(self, tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
        """Replace tensors of one dtype by their sums over a group, by default all processes, in one message."""
        message = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(message, group=group)
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
