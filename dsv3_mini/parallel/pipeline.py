"""A model cut into stages that lie on different ranks, trained in torch's own schedules (report sections 3.2.1 and 3.2.3).

A stage is a run of layers; the first one also has the embedding, the last one the final norm, the head and the MTP
modules. MTP reads the embedding, too. Where the stages lie in a V (DualPipeV, ZBVZeroBubble) the first and the last are on
one rank, so that the embedding is there once, as in the report; elsewhere the last stage has a copy, and the two add up
their gradients.

From stage to stage travel the hidden states and one number, the balance losses of the layers so far. The last stage adds
them to the cross-entropies: so each loss has its gradient where its layer lies, and its value where the loss is told. What
the routers count stays on their ranks, for a router's bias follows its own load only.

Weights have the names that they have in the whole model, so that checkpoints do not know of stages.

Simplifications: the ranks of a pipeline hold no other parallelism here, and each reads the whole batch (its tokens are
small; embedding them is the first stage's).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.rope import rotations
from dsv3_mini.parallel.schedules.from_torch import ONE_STAGE, TORCH_SCHEDULES, V_SHAPED, placement
from dsv3_mini.train.balance import LoadCounter, update_biases
from dsv3_mini.train.losses import cross_entropy, kept_targets, sequence_balance_loss


def split_layers(cfg: ModelConfig, n_stages: int) -> tuple[range, ...]:
    """The main layers of each stage, as even as may be; an MTP module counts as a layer of the last stage.

    Raises:
        ConfigError: there are fewer layers than stages.
    """
    if not 1 <= n_stages <= cfg.num_hidden_layers:
        raise ConfigError(
            f"{n_stages} stages of {cfg.num_hidden_layers} layers: each stage needs a layer, and there is at least one stage"
        )
    blocks = cfg.num_hidden_layers + cfg.num_nextn_predict_layers
    small, larger = divmod(blocks, n_stages)
    sizes = [small + (stage < larger) for stage in range(n_stages)]
    sizes[-1] -= cfg.num_nextn_predict_layers
    while sizes[-1] < 1:  # more MTP modules than a stage's share: the largest stage gives the last one a layer
        sizes[sizes.index(max(sizes))] -= 1
        sizes[-1] += 1
    ends = [sum(sizes[: stage + 1]) for stage in range(n_stages)]
    return tuple(range(end - size, end) for end, size in zip(ends, sizes, strict=True))


@dataclass(frozen=True)
class Weighing:
    """What turns a micro-batch's sums into its part of the batch's loss. Worked out once for a batch, on every rank.

    Args:
        counts: targets of the whole batch, for the next token and for each MTP depth.
        rows: of the whole batch. mtp, balance: the report's lambda and alpha.
    """

    counts: tuple[int, ...]
    rows: int
    mtp: float
    balance: float


class Stage(nn.Module):
    """A part of a model, under the model's own names. Takes it out of `model`: what others hold is never touched."""

    def __init__(self, model: DeepSeekV3, layers: range, first: bool, last: bool) -> None:
        super().__init__()
        self.cfg, self.first, self.last = model.cfg, first, last
        self.layers = nn.ModuleDict({str(layer): model.layers[layer] for layer in layers})
        if first or (last and len(model.mtp)):
            self.embed_tokens = model.embed_tokens
        if last:
            self.norm, self.lm_head, self.mtp = model.norm, model.lm_head, model.mtp
        self.counter = LoadCounter()

    def forward(
        self,
        x: Tensor,
        balance: Float[Tensor, " 1"] | None = None,
        *,
        tokens: Int[Tensor, "b s"],
        targets: Int[Tensor, "b s"],
        weighing: Weighing,
    ) -> tuple[Float[Tensor, "b s d"], Float[Tensor, " 1"]] | Float[Tensor, " 1"]:
        """Hidden states and balance losses for the next stage; of the last stage, this micro-batch's part of the loss.

        Args:
            x: of the first stage the tokens again, of the others hidden states.
        """
        turn = rotations(self.cfg, torch.arange(tokens.shape[1], device=tokens.device))
        share = len(tokens) / weighing.rows
        if self.first:
            x, balance = self.embed_tokens(x), torch.zeros(1, device=tokens.device)
        routings = []
        for block in self.layers.values():
            x, routing = block(x, turn)
            routings += [] if routing is None else [routing]
        ahead = []
        if self.last:
            x = self.norm(x)
            ahead = self._ahead(x, tokens, routings) if weighing.mtp else []
        self.counter.add([routing.detach() for routing in routings])
        balance = balance + share * sum(sequence_balance_loss(r.scores, r.chosen.shape[-1]) for r in routings)
        if not self.last:
            return x, balance
        head, counts = self.lm_head.weight, torch.tensor(weighing.counts, device=tokens.device)
        depths = [cross_entropy(h, head, targets[:, j:], counts[j]) for j, h in enumerate(ahead, start=1)]
        mtp = torch.stack(depths).mean() if depths else 0.0
        return cross_entropy(x, head, targets, counts[0]) + weighing.mtp * mtp + weighing.balance * balance

    def _ahead(self, hidden: Tensor, tokens: Tensor, routings: list) -> list[Tensor]:
        """The states of each MTP depth, as DeepSeekV3.hidden_states has them; adds their routings."""
        embedding, states = self.embed_tokens(tokens), []
        for depth, module in enumerate(self.mtp, start=1):
            length = tokens.shape[1] - depth
            if length < 1:
                break
            turn = rotations(self.cfg, torch.arange(length, device=tokens.device))
            hidden, routing = module(embedding[:, depth:], hidden[:, :length], turn)
            states.append(hidden)
            routings += [] if routing is None else [routing]
        return states


class Pipeline:
    """One rank's stages, and torch's schedule that runs them.

    Args:
        model: the whole model, equal on all ranks; this rank keeps its own stages of it.
        schedule: a name of TORCH_SCHEDULES. stages_per_rank: None is 1 for GPipe and 1F1B, and 2 for the others.
        rows, length: of every batch; rows are cut into `microbatches` equal parts.

    Raises:
        ConfigError: the sizes do not fit each other; the message names the rule.
    """

    def __init__(
        self, model: DeepSeekV3, schedule: str, microbatches: int, rows: int, length: int,
        stages_per_rank: int | None = None, group: dist.ProcessGroup | None = None,
    ) -> None:  # fmt: skip
        if schedule not in TORCH_SCHEDULES:
            raise ConfigError(f"schedule = {schedule!r} is none of torch's: choose one of {', '.join(TORCH_SCHEDULES)}")
        if microbatches < 1 or rows % microbatches:
            raise ConfigError(f"{rows} rows cannot be cut into {microbatches} equal micro-batches")
        ranks, rank, cfg = dist.get_world_size(group), dist.get_rank(group), model.cfg
        levels = stages_per_rank or (1 if schedule in ONE_STAGE else 2)
        self.rank_of = placement(ranks, levels, schedule in V_SHAPED)
        layers, last = split_layers(cfg, len(self.rank_of)), len(self.rank_of) - 1
        own = [stage for stage, holder in enumerate(self.rank_of) if holder == rank]
        self.stages = {n: Stage(model, layers[n], first=n == 0, last=n == last) for n in own}
        # Where a message's pattern wants no gradient, torch sends none back.
        hidden = torch.empty(rows // microbatches, length, cfg.hidden_size, device="meta", requires_grad=True)
        between = (hidden, torch.empty(1, device="meta", requires_grad=True))
        tokens = torch.empty(rows // microbatches, length, dtype=torch.long, device="meta")
        device = next(model.parameters()).device
        parts = [
            PipelineStage(
                stage, n, len(self.rank_of), device, group=group,
                input_args=(tokens,) if n == 0 else between,
                output_args=between if n < last else between[1],
            )
            for n, stage in self.stages.items()
        ]  # fmt: skip
        kind = get_schedule_class(schedule)
        several = issubclass(kind, PipelineScheduleMulti)
        try:
            self.schedule = kind(
                parts if several else parts[0], microbatches, loss_fn=lambda loss, _: loss.sum(), scale_grads=False
            )
        except ValueError as error:
            raise ConfigError(f"torch makes no {schedule} of {ranks} ranks: {' '.join(str(error).split())}") from error
        self.group, self.mtp_depths = group, cfg.num_nextn_predict_layers
        self.tied = self._tie() if cfg.num_nextn_predict_layers else None

    def _tie(self) -> dist.ProcessGroup | None:
        """The group of the two ranks that each have an embedding; None where one rank has the first and the last stage."""
        first, last = self.rank_of[0], self.rank_of[-1]
        if first == last:
            return None
        both = [dist.get_global_rank(self.group, r) if self.group is not None else r for r in (first, last)]
        pair = dist.new_group(both)  # all ranks take part in making it
        return pair if dist.get_rank() in both else None

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        """This rank's weights by their names in the whole model; one that two stages share stands once."""
        return {name: weight for stage in self.stages.values() for name, weight in stage.named_parameters()}

    def step(
        self, tokens: Int[Tensor, "b s"], targets: Int[Tensor, "b s"], mtp_weight: float, balance_weight: float
    ) -> Float[Tensor, ""]:
        """Forward and backward of a batch, the same on every rank. Clear the gradients before.

        Returns:
            The batch's loss, on every rank.
        """
        counts = tuple(int(kept_targets(targets[:, depth:])) for depth in range(1 + self.mtp_depths))
        weighing = Weighing(counts, len(tokens), mtp_weight, balance_weight)
        for stage in self.stages.values():
            stage.counter = LoadCounter()
        losses: list[Tensor] = []
        first, last = 0 in self.stages, len(self.rank_of) - 1 in self.stages
        self.schedule.step(
            *((tokens,) if first else ()), target=targets if last else None, losses=losses if last else None,
            return_outputs=False, tokens=tokens, targets=targets, weighing=weighing,
        )  # fmt: skip
        if self.tied is not None:
            embedding = self.named_parameters()["embed_tokens.weight"]
            if embedding.grad is None:  # of the last stage, where MTP did not run: it still follows the first's
                embedding.grad = torch.zeros_like(embedding)
            dist.all_reduce(embedding.grad, group=self.tied)
        total = torch.stack([loss.detach() for loss in losses]).sum() if last else torch.zeros((), device=tokens.device)
        dist.all_reduce(total, group=self.group)
        return total

    def update_biases(self, gamma: float) -> None:
        """Each router on this rank, from what it counted in the last step."""
        for stage in self.stages.values():
            update_biases(stage, stage.counter.load, gamma)
