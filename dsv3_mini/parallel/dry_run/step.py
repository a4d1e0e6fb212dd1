"""A whole step put together from its measured stages: the memory of every rank over the schedule, and what it sends.

Stages with the same layers are alike, so each kind is measured once. A rank's memory follows its slots: its stages' state is
always there; each micro-batch between its forward and its backward adds what it keeps; the pass that runs adds what it needs at
its peak. Of a pair that overlaps (F&B) both peaks are counted at one time.

Simplification: what a backward for the input alone would free is freed with the weights' part, as in the schedules' own count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.ledger import count_parameters
from dsv3_mini.parallel.dry_run.exchanges import Exchange
from dsv3_mini.parallel.dry_run.measure import StageMeasure, measure_stage
from dsv3_mini.parallel.plan import ParallelPlan
from dsv3_mini.parallel.schedule_ir import Op, Phase, Schedule
from dsv3_mini.parallel.schedules import SCHEDULES, make_schedule
from dsv3_mini.parallel.stages import split_layers

PRECISIONS = ("fp8", "bf16", "fp32")


@dataclass(frozen=True)
class Job:
    """What is to run: a model on a plan, and its batch.

    Args:
        schedule: a name of `schedules.SCHEDULES`. batch: sequences in a step. micro_batch: sequences in a micro-batch.
        length: tokens in a sequence.

    Raises:
        ConfigError: the numbers do not fit together; the message names the field and the rule.
    """

    cfg: ModelConfig
    plan: ParallelPlan
    schedule: str = "DualPipeV"
    precision: str = "fp8"
    batch: int = 15360
    micro_batch: int = 1
    length: int = 4096

    def __post_init__(self) -> None:
        self.plan.check(self.cfg, self.plan.processes)
        for name in ("batch", "micro_batch", "length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} = {value!r} must be a whole number of at least 1")
        if self.plan.tp > 1:
            raise ConfigError(
                f"tp = {self.plan.tp} is for inference: a dry run trains with pp, dp_replicate, dp_shard and ep"
            )
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule = {self.schedule!r} is not known here: choose one of {', '.join(SCHEDULES)}")
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"precision = {self.precision!r} is not known here: choose one of {', '.join(PRECISIONS)}"
            )
        if self.length > self.cfg.max_position_embeddings:
            raise ConfigError(
                f"length = {self.length} is more than max_position_embeddings ({self.cfg.max_position_embeddings}): "
                "shorten the sequences"
            )
        share = self.plan.data * self.micro_batch
        if self.batch % share:
            raise ConfigError(
                f"batch = {self.batch} must be a multiple of {share}: {self.plan.data} data ranks take micro-batches of {self.micro_batch}"
            )

    @property
    def microbatches(self) -> int:
        """Of a rank, in a step."""
        return self.batch // (self.plan.data * self.micro_batch)

    @property
    def tokens(self) -> int:
        """In a step."""
        return self.batch * self.length

    @cached_property
    def order(self) -> Schedule:
        """Of the pipeline. Alone, a stage takes its micro-batches one after the other.

        Raises:
            ScheduleError: there is no such schedule of so many ranks and micro-batches.
            ConfigError: it has more stages than the model has layers.
        """
        order = make_schedule("1F1B" if self.plan.pp == 1 else self.schedule, self.plan.pp, self.microbatches)
        split_layers(self.cfg, order.n_stages)  # says so where there are too few
        return order


@dataclass(frozen=True)
class RankMemory:
    """Bytes on each GPU of one pipeline rank at the moment when most of them are taken.

    `state`, `activations`: by kind. `passing`: what the running pass needs. `moment`: when it is, in words.
    """

    rank: int
    stages: tuple[int, ...]
    state: dict[str, int]
    activations: dict[str, int]
    passing: int
    moment: str

    @property
    def peak(self) -> int:
        return sum(self.state.values()) + sum(self.activations.values()) + self.passing


@dataclass(frozen=True)
class DryRun:
    """Everything about a step of `job`, of one GPU of each pipeline rank (the one with the largest pieces)."""

    job: Job
    stages: Mapping[int, StageMeasure]

    @cached_property
    def ranks(self) -> tuple[RankMemory, ...]:
        return tuple(rank_memory(self.job.order, rank, self.stages) for rank in range(self.job.plan.pp))

    @property
    def fullest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.peak)

    @property
    def parameters(self) -> int:
        """Summed over all ranks, from where each piece of each weight lies; what data ranks hold twice counts once."""
        order = self.job.order
        return sum(self.stages[stage].all_ranks for direction in order.rank_of for stage in range(len(direction)))

    @property
    def expected_parameters(self) -> int:
        """The ledger's: for each direction of the schedule, and the embedding again where the last stage needs its own."""
        counted = count_parameters(self.job.cfg)
        copies = self.job.order.directions
        extra = counted.embedding.total if own_embedding(self.job) else 0
        return copies * (counted.live_trainable + extra)

    def exchanges(self, rank: int) -> list[tuple[Exchange, int]]:
        """What a GPU of a pipeline rank sends in a step, each with how often; messages between stages are left out."""
        many = self.job.microbatches // self.job.order.directions
        found = []
        for stage, _ in self.job.order.stages_on(rank):
            times = self.stages[stage].phases(many)
            found += [(exchange, count) for phase, count in times for exchange in phase.exchanges if count]
        return found

    def between_stages(self, rank: int) -> int:
        """Bytes that a GPU sends to its neighbours in the pipeline: hidden states on, gradients back."""
        order, sent = self.job.order, 0
        many = self.job.microbatches // order.directions
        for stage, direction in order.stages_on(rank):
            holders = order.rank_of[direction]
            if stage + 1 < order.n_stages and holders[stage + 1] != rank:
                sent += many * self.stages[stage].sends
            if stage and holders[stage - 1] != rank:
                sent += many * self.stages[stage - 1].sends
        return sent


def dry_run(job: Job) -> DryRun:
    """Measure every kind of stage of `job` on paper, one after the other."""
    order, plan = job.order, job.plan
    layers = split_layers(job.cfg, order.n_stages)
    last = order.n_stages - 1
    lends = order.n_stages > 1 and not own_embedding(job)
    measured: dict[tuple[object, ...], StageMeasure] = {}
    stages = {}
    for stage, part in enumerate(layers):
        sparse = sum(job.cfg.is_moe_layer(layer) for layer in part)
        kind = (len(part), sparse, stage == 0, stage == last)
        if kind not in measured:
            rank = order.rank_of[0][stage] * plan.data
            measured[kind] = measure_stage(
                job.cfg, plan, rank, stage, order.n_stages, job.micro_batch, job.length, job.microbatches, job.precision,
                lends=lends and stage == last,
            )  # fmt: skip
        stages[stage] = measured[kind]
    return DryRun(job, stages)


def own_embedding(job: Job) -> bool:
    """Whether the last stage has an embedding of its own, for MTP: where the first one lies on another rank."""
    order = job.order
    apart = any(holders[0] != holders[-1] for holders in order.rank_of)
    return job.cfg.num_nextn_predict_layers > 0 and order.n_stages > 1 and apart


def rank_memory(order: Schedule, rank: int, stages: Mapping[int, StageMeasure]) -> RankMemory:
    """Follow a rank's slots to the fullest moment."""
    own = [stage for stage, _ in order.stages_on(rank)]
    state: Counter[str] = Counter()
    for stage in own:
        state.update(stages[stage].state)
    passing = sum(stages[stage].update.peak for stage in own)
    fullest, most = RankMemory(rank, tuple(own), dict(state), {}, passing, "optimizer step"), passing
    kept = {stage: sum(stages[stage].kept.values()) for stage in own}
    held: Counter[int] = Counter()
    left = Counter({stage: 0 for stage in own})
    for slot in order.order[rank]:
        for op in slot.ops:
            left[op.stage] += op.phase in (Phase.BACKWARD, Phase.WEIGHT)
    for place, slot in enumerate(order.order[rank]):
        for op in slot.ops:
            held[op.stage] -= op.phase != Phase.FORWARD  # its own is in the pass's need
            left[op.stage] -= op.phase in (Phase.BACKWARD, Phase.WEIGHT)
        needs = sum(_need(op, stages[op.stage], left[op.stage] == 0) for op in slot.ops)
        if needs + sum(held[stage] * kept[stage] for stage in own) > most:
            most = needs + sum(held[stage] * kept[stage] for stage in own)
            activations: Counter[str] = Counter()
            for stage in own:
                activations.update({kind: held[stage] * size for kind, size in stages[stage].kept.items()})
            moment = f"slot {place} of {len(order.order[rank])} ({slot}), {sum(held.values())} micro-batches held"
            fullest = RankMemory(rank, tuple(own), dict(state), dict(activations), needs, moment)
        for op in slot.ops:
            held[op.stage] += op.phase in (Phase.FORWARD, Phase.INPUT)
    return fullest


def _need(op: Op, stage: StageMeasure, last: bool) -> int:
    if op.phase == Phase.FORWARD:
        return stage.forward.peak
    return max(stage.backward.peak, stage.last.peak if last else 0)
