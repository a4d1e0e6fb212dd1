"""One process's stages of a model, trained in torch's own schedules (report sections 3.2.1 and 3.2.3).

A batch is cut into micro-batches, which follow each other through the stages (parallel/stages.py). Torch sends what lies
between two stages, and runs forwards and backwards in the order of a schedule. All processes of a pipeline read the same
rows: tokens are small, and embedding them is the first stage's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from dsv3_mini.errors import ConfigError
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.parallel.schedule_ir import ScheduleError
from dsv3_mini.parallel.schedules.from_torch import from_torch, placement
from dsv3_mini.parallel.stages import Weighing, take_stages
from dsv3_mini.parallel.torch_schedules import V_SHAPED, stages_each
from dsv3_mini.train.balance import routers
from dsv3_mini.train.losses import Losses


@dataclass(frozen=True)
class Counted:
    """How many choices fell on each expert of a layer."""

    layer: int
    load: Int[Tensor, " e"]


class Pipeline:
    """A process's stages, and torch's schedule that runs them.

    Args:
        model: the whole model, equal in all processes of `group`; of it stays here what this process's stages need.
        schedule: a name of TORCH_SCHEDULES.
        dtype: of the hidden states.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        schedule: str,
        group: dist.ProcessGroup | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.group, self.dtype = model, group, dtype
        self.kind = schedule
        self.rank_of = stage_ranks(schedule, dist.get_world_size(group))
        own = tuple(n for n, holder in enumerate(self.rank_of) if holder == dist.get_rank(group))
        self.stages = take_stages(model, len(self.rank_of), own)
        self._made: tuple[tuple[int, ...], Callable[..., None]] | None = None

    def step(
        self, tokens: Int[Tensor, "b s"], targets: Int[Tensor, "b s"], weighing: Weighing, microbatches: int
    ) -> Losses:
        """Forward and backward of a batch, the same in every process; adds to the gradients.

        Returns:
            The batch's losses: `total` in every process, the others and the load where they were computed, else zeros.

        Raises:
            ConfigError: torch makes no schedule of so many micro-batches; its own words say why.
        """
        last = len(self.rank_of) - 1 in self.stages
        rows = -(-len(tokens) // microbatches)
        for stage in self.stages.values():
            stage.begin()
        self._schedule(microbatches, rows, tokens.shape[1])(
            target=targets if last else None, return_outputs=False,
            tokens=tokens, targets=targets, weighing=weighing, rows=rows,
        )  # fmt: skip
        told = [sums for stage in self.stages.values() for sums in stage.told]
        sums = torch.stack(told).sum(dim=0) if told else torch.zeros(3, device=tokens.device)
        main, mtp, balance = sums
        total = main + weighing.mtp * mtp + weighing.balance * balance
        dist.all_reduce(total, group=self.group)
        return Losses(total, main, mtp, balance, self._counted(tokens.shape[1], bool(weighing.mtp)))

    def _counted(self, length: int, mtp: bool) -> list[Counted]:
        """The load of every layer that has run, in every process: zeros for those that lie elsewhere."""
        load = {layer: found for stage in self.stages.values() for layer, found in stage.counter.load.items()}
        main, experts = self.model.cfg.num_hidden_layers, self.model.cfg.n_routed_experts
        # A row must be longer than an MTP module looks ahead.
        ran = [r.layer for r in routers(self.model) if r.layer < main + (length - 1 if mtp else 0)]
        device = next(self.model.parameters()).device
        zeros = torch.zeros(experts, dtype=torch.long, device=device)
        return [Counted(layer, load.get(layer, zeros)) for layer in ran]

    def _schedule(self, microbatches: int, rows: int, length: int) -> Callable[..., None]:
        """Torch's schedule for batches of this shape; its stages keep room for messages, so that one is kept at a time."""
        shape = (microbatches, rows, length)
        if self._made is None or self._made[0] != shape:
            self._made = shape, self._make(*shape)
        return self._made[1]

    def _make(self, microbatches: int, rows: int, length: int) -> Callable[..., None]:
        # Where a message's pattern wants no gradient, torch sends none back.
        hidden = torch.empty(
            rows, length, self.model.cfg.hidden_size, device="meta", dtype=self.dtype, requires_grad=True
        )
        between = (hidden, torch.empty(1, device="meta", requires_grad=True))
        last, device = len(self.rank_of) - 1, next(self.model.parameters()).device
        parts = [
            PipelineStage(
                stage, n, len(self.rank_of), device, group=self.group,
                input_args=() if n == 0 else between, output_args=between if n < last else between[1],
            )
            for n, stage in self.stages.items()
        ]  # fmt: skip
        kind = get_schedule_class(self.kind)
        several = issubclass(kind, PipelineScheduleMulti)
        try:
            made = kind(
                parts if several else parts[0], microbatches, loss_fn=lambda loss, _: loss.sum(), scale_grads=False
            )
        except ValueError as error:
            words = " ".join(str(error).split())
            raise ConfigError(
                f"torch makes no {self.kind} of {dist.get_world_size(self.group)} ranks: {words}"
            ) from error
        return made.step


def stage_ranks(schedule: str, ranks: int) -> tuple[int, ...]:
    """Which of a pipeline's processes has each stage."""
    return placement(ranks, stages_each(schedule), schedule in V_SHAPED)


def choose_microbatches(schedule: str, ranks: int, wanted: int, most: int) -> int:
    """How many micro-batches a batch is cut into: the first number that torch takes, upwards from `wanted`, then downwards.

    Raises:
        ConfigError: it takes none of up to `most`, the rows that there are; its own words say why.
    """
    said = ""
    for count in (*range(min(wanted, most), most + 1), *range(min(wanted, most) - 1, 0, -1)):
        said = _refusal(schedule, ranks, count)
        if not said:
            return count
    raise ConfigError(f"{most} rows are too few for a pipeline: {_refusal(schedule, ranks, most)}")


@cache
def _refusal(schedule: str, ranks: int, microbatches: int) -> str:
    """What torch says against a schedule of this size; nothing if it makes it."""
    try:
        from_torch(schedule, ranks, microbatches)
    except ScheduleError as error:
        return str(error)
    return ""
