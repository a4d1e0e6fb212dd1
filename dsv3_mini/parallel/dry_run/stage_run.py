"""One rank's part of a training step, with the package's own classes: on paper in a dry run, on real processes in its test.

    model      a Stage of the pipeline, built on meta: layers of other stages and experts of other ranks never have memory.
               Without a pipeline, the model as the trainer has it
    weights    cut among the data ranks by FSDP2 in the plan's ZeRO form, experts among those of the expert-parallel group
    tokens     dispatched and combined by ParallelExperts, on one leg or two
    optimizer  MasterAdamW, with the Team's summing and clipping, and the routers' biases

`materialise` gives a stage that was built so its numbers, where it is to train: each rank draws its own pieces alone.

Simplifications: a stage is given its input and its output's gradient here; what stands between stages is a message of known
size. Choices are written down (`EvenRouter`), so that a dry run and real processes send the same.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3_mini.config import ModelConfig
from dsv3_mini.fp8.attention import FP8Attention
from dsv3_mini.fp8.convert import to_fp8
from dsv3_mini.fp8.recipe import Fp8Recipe
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.attention import MultiHeadLatentAttention
from dsv3_mini.model.norm import RMSNorm
from dsv3_mini.parallel.dry_run.paper import route_evenly
from dsv3_mini.parallel.expert_parallel import spread_experts
from dsv3_mini.parallel.layout import layouts
from dsv3_mini.parallel.mesh import Mesh
from dsv3_mini.parallel.plan import ParallelPlan
from dsv3_mini.parallel.recompute import recompute
from dsv3_mini.parallel.sharding import shard
from dsv3_mini.parallel.stages import Stage, Weighing, split_layers
from dsv3_mini.parallel.team import Team
from dsv3_mini.train.balance import LoadCounter, update_biases
from dsv3_mini.train.losses import training_losses
from dsv3_mini.train.optimizer import MasterAdamW, own_piece
from dsv3_mini.train.recipe import DTYPES

# The report's lambda, alpha, gamma and clip norm: no size hangs on them.
MTP, BALANCE, GAMMA, CLIP = 0.3, 1e-4, 1e-3, 1.0


def build_stage(
    cfg: ModelConfig, team: Team, layers: range, first: bool, last: bool, precision: str, recipe: Fp8Recipe | None = None,
    lends: bool = False,
) -> tuple[Stage | DeepSeekV3, dict[str, Tensor]]:  # fmt: skip
    """A stage on meta, cut as the team's plan says; and, where FSDP does not hold them, the FP32 weights it was rounded from.

    `lends`: MTP's embedding is that of the first stage, which lies on the same rank, and no weight of this one.
    """
    mesh, plan = team.mesh, team.mesh.plan
    with torch.device("meta"):
        model = DeepSeekV3(cfg)
        stage = model if first and last else Stage(model, layers, first, last, Stage.compute)
        if lends and hasattr(stage, "embed_tokens"):
            del stage.embed_tokens
            borrowed = nn.Embedding(cfg.vocab_size, cfg.hidden_size, dtype=DTYPES[precision])
            object.__setattr__(stage, "embed_tokens", borrowed)  # seen, not owned
    route_evenly(stage)
    if precision == "fp8":
        to_fp8(stage, recipe or Fp8Recipe())
    if plan.recompute:
        for module in stage.modules():
            if isinstance(module, FP8Attention):  # the block makes again what this would
                module.__class__ = MultiHeadLatentAttention
        recompute(stage)
    if plan.ep > 1:
        spread_experts(stage, mesh.way(cfg.n_routed_experts))
    if plan.dp_shard > 1:
        shard(stage, mesh, DTYPES[precision])
        return stage, {}
    start = {name: weight.detach() for name, weight in stage.named_parameters()}
    return stage.to(DTYPES[precision]), start


@torch.no_grad()
def materialise(stage: Stage | DeepSeekV3, device: str = "cpu") -> None:
    """Give a stage on meta its memory and its first numbers: those of its own pieces, and no others'.

    Every rank draws for itself, so the numbers are not those of a model that was drawn in one piece.
    """
    stage.to_empty(device=device)
    for module in stage.modules():
        for weight in module.parameters(recurse=False):
            if isinstance(module, RMSNorm):
                own_piece(weight).fill_(1.0)
            else:
                own_piece(weight).normal_(0.0, stage.cfg.initializer_range)
        for buffer in module.buffers(recurse=False):
            buffer.zero_()


class StageRun:
    """A stage of this rank, its optimizer, and the parts of a step.

    Args:
        stage, stages: which one of how many; they lie in the order of `split_layers`.
        rows, length: of a micro-batch. parts: micro-batches in a step.
        lends: the first stage, on the same rank, lends its embedding. real: give it memory and numbers.
        moments: what Adam's moments are kept in.
    """

    def __init__(
        self, cfg: ModelConfig, plan: ParallelPlan, stage: int, stages: int, rows: int, length: int, parts: int,
        precision: str = "bf16", recipe: Fp8Recipe | None = None, lends: bool = False, real: bool = False,
    ) -> None:  # fmt: skip
        self.cfg, self.rows, self.length = cfg, rows, length
        self.mesh = Mesh.join(plan, cfg)
        self.team = Team(rank=dist.get_rank(), count=plan.data, mesh=self.mesh, layouts=layouts(cfg, self.mesh))
        layers = split_layers(cfg, stages)[stage]
        self.first, self.last = stage == 0, stage == stages - 1
        self.dtype = DTYPES[precision]
        self.stage, self.start = build_stage(cfg, self.team, layers, self.first, self.last, precision, recipe, lends)
        if real:
            materialise(self.stage)
            self.start = (
                {name: weight.detach().float() for name, weight in self.stage.named_parameters()} if self.start else {}
            )
        embedding = vars(self.stage).get("embed_tokens")
        self.borrowed = None if embedding is None else embedding.weight
        self.moments = torch.bfloat16 if precision == "fp8" else torch.float32
        self.counter = LoadCounter()
        self.batch_rows = rows * parts * plan.data
        counts = tuple(self.batch_rows * (length - depth) for depth in range(1 + cfg.num_nextn_predict_layers))
        self.weighing = Weighing(counts, self.batch_rows, MTP, BALANCE)
        self.optimizer: MasterAdamW | None = None

    def start_optimizer(self) -> None:
        """The average of the weights is left out: it lies in the host's memory."""
        self.optimizer = MasterAdamW(self.stage, (0.9, 0.95), 0.1, 0.0, self.start, self.moments)

    def batch(self) -> Int[Tensor, "rows length"]:
        """Token ids; which ones makes no difference."""
        return torch.arange(self.rows * self.length).view(self.rows, self.length) % self.cfg.vocab_size

    def received(self) -> tuple[Float[Tensor, "rows length d"], Float[Tensor, " 1"]]:
        """What the stage before would send."""
        hidden = torch.empty(self.rows, self.length, self.cfg.hidden_size, dtype=self.dtype).zero_()
        return hidden.requires_grad_(), torch.empty(1).zero_().requires_grad_()

    def forward(self, last: bool = False) -> tuple[Tensor, ...]:
        """A micro-batch; `last` of the step. Returns what goes to the next stage, or the loss."""
        self.team.before_micro_batch(self.stage, last)
        tokens = self.batch()
        if isinstance(self.stage, DeepSeekV3):
            whole = tokens[:1].expand(self.batch_rows, -1)
            losses = training_losses(self.stage, tokens, tokens, MTP, BALANCE, batch_targets=whole)
            self.counter.add(losses.routing)
            return (losses.total,)
        given = () if self.first else self.received()
        out = self.stage(*given, tokens=tokens, targets=tokens, weighing=self.weighing, rows=self.rows)
        return out if isinstance(out, tuple) else (out,)

    def backward(self, out: tuple[Tensor, ...]) -> None:
        out = tuple(part for part in out if part.requires_grad)  # dense layers have no balance loss
        torch.autograd.backward(out, [torch.empty_like(part).fill_(1.0) for part in out])
        if self.borrowed is not None:
            self.borrowed.grad = None  # it is added to the first stage's
        self.optimizer.collect_gradients()

    def update(self) -> None:
        """What follows the last micro-batch: sums that FSDP did not make, the norm, AdamW, the routers' biases."""
        counter = self.counter if isinstance(self.stage, DeepSeekV3) else self.stage.counter
        team, load = self.team, counter.load
        if team.count > 1:
            team.sum_gradients(self.optimizer.gradients())
            if self.last:
                team.add_up([torch.zeros(3)], self.mesh.data)  # the losses, to be told
            if load:
                team.add_up(list(load.values()), self.mesh.data)
        team.clip_gradients(self.optimizer, CLIP)
        self.optimizer.step(1e-4)
        update_biases(self.stage, load, GAMMA)
        counter.load = {}
