"""PipelineTeam: a team of which each process has some of the model's stages, and each pipeline rows of its own.

    processes = pp x data; the process with place d among those of its stage belongs to pipeline d

What a stage's data processes share among them they share as a Team does: experts, and the state that ZeRO-1 cuts. What is new
is between stages. A batch's losses are told by the last stage and its load by all of them, sums over all processes make them
whole. The gradient's norm is that of all stages. Weights are put together stage by stage.

A step of the trainer has one micro-batch then, all of a pipeline's rows, and the pipeline cuts it itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import Replicate

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.parallel.checkpoint import load_pieces
from dsv3_mini.parallel.layout import Layout, layouts, on_cpu
from dsv3_mini.parallel.mesh import Mesh
from dsv3_mini.parallel.pipeline import Pipeline, choose_microbatches, stage_ranks
from dsv3_mini.parallel.plan import ParallelPlan
from dsv3_mini.parallel.stages import Weighing, stage_parts
from dsv3_mini.parallel.team import Team
from dsv3_mini.train.checkpoint import Checkpoint
from dsv3_mini.train.losses import Losses, kept_targets

EMBEDDING = "embed_tokens.weight"


def join(plan: ParallelPlan, cfg: ModelConfig, device: str = "cpu") -> Team:
    """This process's place in the plan, once the processes have met; all of them call this together.

    Raises:
        ConfigError: the plan does not fit the model or the number of processes, or is not one for training.
    """
    plan.check_training()
    return (PipelineTeam if plan.pp > 1 else Team).join(plan, cfg, device)


@dataclass(frozen=True, kw_only=True)
class PipelineTeam(Team):
    """See above. `held`: for each process of a pipeline, the names of the weights that it has a part in."""

    held: Sequence[frozenset[str]]
    ends: DeviceMesh | None  # (end, dp_replicate, dp_shard) where the first and the last stage each have an embedding

    @classmethod
    def join(cls, plan: ParallelPlan, cfg: ModelConfig, device: str = "cpu") -> PipelineTeam:
        mesh = Mesh.join(plan, cfg, device)
        where = layouts(cfg, mesh)
        parts, rank_of = stage_parts(cfg, plan.stages), stage_ranks(plan.schedule, plan.pp)
        prefixes = [tuple(f"{part}." for n, own in enumerate(parts) if rank_of[n] == r for part in own)
                    for r in range(plan.pp)]  # fmt: skip
        held = [frozenset(name for name in where if name.startswith(own)) for own in prefixes]
        ends, first, last = None, rank_of[0], rank_of[-1]
        if first != last and EMBEDDING in held[last]:
            ranks = torch.arange(plan.processes).view(plan.pp, plan.dp_replicate, plan.dp_shard)
            ends = DeviceMesh(device, ranks[[first, last]], mesh_dim_names=("end", "dp_replicate", "dp_shard"))
            if ends.get_coordinate() is not None:
                one = where[EMBEDDING]
                where[EMBEDDING] = Layout(one.shape, on_cpu(ends), (Replicate(), *one.placements))
        return cls(rank=dist.get_rank(), count=plan.processes, mesh=mesh, layouts=where, held=held, ends=ends)

    @property
    def stage_rank(self) -> int:
        """This process's place in its pipeline."""
        return self.mesh.dense.get_local_rank("pp")

    def check_batch(self, fewest: int) -> None:
        plan = self.mesh.plan
        try:
            choose_microbatches(plan.schedule, plan.pp, 1, fewest // plan.data)
        except ConfigError as error:
            raise ConfigError(
                f"batch_size = {fewest} leaves each of {plan.data} pipelines {fewest // plan.data} rows, too few: {error}; "
                "give larger batches, or another schedule or pp"
            ) from None

    # ---- a step ----------------------------------------------------------------------------------------------------

    def divide(
        self, model: DeepSeekV3, dtype: torch.dtype, micro_batch: int = 1
    ) -> tuple[DeepSeekV3, dict[str, Tensor]]:
        plan = self.mesh.plan
        pipeline = Pipeline(model, plan.schedule, self.mesh.dense.get_group("pp"), dtype)
        model, start = super().divide(model, dtype)
        register_fsdp_forward_method(model, "run")
        for weight in model.parameters():
            weight.grad_dtype = torch.float32  # added up over all micro-batches before the optimizer sees it
        model.pipeline, model.micro_batch = pipeline, micro_batch
        return model, start

    def own_rows(self, rows: Shaped[Tensor, "b s"]) -> Shaped[Tensor, "own s"]:
        return rows[dist.get_rank(self.mesh.data) :: self.mesh.plan.data]

    def own_parts(self, rows: Shaped[Tensor, "b s"], micro_batch: int) -> Sequence[Shaped[Tensor, "own s"]]:
        return [self.own_rows(rows)]

    def before_micro_batch(self, model: DeepSeekV3, last: bool) -> None:
        super().before_micro_batch(model, last=False)  # gradients are summed behind the last of the pipeline's own

    def losses(
        self, model: DeepSeekV3, tokens: Int[Tensor, "b s"], targets: Int[Tensor, "b s"], mtp_weight: float,
        balance_weight: float, batch_targets: Int[Tensor, "B s"],
    ) -> Losses:  # fmt: skip
        """The losses of a pipeline's rows. Their gradients are there already: a schedule goes forward and back in turn.

        So `total` is a number that nothing lies behind, and its backward has nothing left to do.
        """
        plan, batch = self.mesh.plan, len(batch_targets)
        fewest, most = batch // plan.data, -(-batch // plan.data)
        microbatches = choose_microbatches(plan.schedule, plan.pp, -(-most // model.micro_batch), fewest)
        depths = range(1 + model.cfg.num_nextn_predict_layers)
        counts = tuple(int(kept_targets(batch_targets[:, depth:])) for depth in depths)
        weighing = Weighing(counts, batch, mtp_weight, balance_weight)
        losses = model.pipeline.step(tokens, targets, weighing, microbatches)
        if plan.dp_shard > 1:
            # What torch does behind the last micro-batch of a stage that is FSDP's; here FSDP's is the model of all stages.
            PipelineStage.perform_reduce_grad(SimpleNamespace(submod=model), 1)
        losses.total.requires_grad_()
        return losses

    def sum_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        super().sum_gradients(gradients)
        if self.ends is not None and EMBEDDING in gradients:  # last: two numbers have one sum, whatever the order
            self.add_up([gradients[EMBEDDING]], self.ends.get_group("end"))

    # ---- putting together and taking apart -------------------------------------------------------------------------

    def whole(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found, pipeline = super().whole(own), self.mesh.dense.get_group("pp")
        if dist.get_rank(self.mesh.data) > 0:
            return {}
        for place, names in enumerate(self.held):
            for name in sorted(names - self.held[0]):
                if self.stage_rank == place:
                    dist.send(found[name].contiguous(), group=pipeline, group_dst=0)
                elif self.stage_rank == 0:
                    found[name] = torch.empty(self.layouts[name].shape)
                    dist.recv(found[name], group=pipeline, group_src=place)
        return found

    def load(self, folder: Path) -> Checkpoint:
        return load_pieces(folder, self.layouts, elsewhere=self.layouts.keys() - self.held[self.stage_rank])
