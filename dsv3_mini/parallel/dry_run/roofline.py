"""The time of a step from what it computes and sends, on a machine that is nothing but its rates. The model, stated:

    products   FLOPs / the rate of their numbers, or their bytes / the memory's rate: whichever takes longer
    passes     bytes / the memory's rate, one kernel after the other as torch runs them; or left out (`fused`), as if every one
               of them were part of a product's kernel
    dispatch   a micro-batch's bytes on each wire / its rate; the two wires work at one time, so the slower one counts
    overlap    in F&B computing and communicating go on at one time (report's Figure 4, `schedule_costs.py`); elsewhere not
    pipeline   every slot of the schedule takes its stage's time, and waits for what it needs (`schedule_simulator.py`)
    step       the pipeline's span on its own, and after it what follows the last micro-batch: gradients summed, weights
               gathered, the optimizer

    MFU        the model's FLOPs by the ledger, MTP's left out, of what the GPUs could do in that time in BF16

Nothing is ever late, no kernel falls short of its rate, and no expert gets more tokens than another: a run takes longer. How much
longer than `fused` a good one takes is what kernels, imbalance and the network cost; how far `as written` lies above that is
what this package leaves to be gained by fusing.

The backward of a part for the weights takes as long as the part's forward, as its products do; the rest is for the input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from dsv3_mini.errors import ConfigError
from dsv3_mini.ledger import H800_PEAK, REPORT_RUN, flops_per_token
from dsv3_mini.parallel.dry_run.exchanges import NOTHING, Exchange, Wires, all_wires
from dsv3_mini.parallel.dry_run.measure import Phase, StageMeasure
from dsv3_mini.parallel.dry_run.step import DryRun
from dsv3_mini.parallel.dry_run.work import Work
from dsv3_mini.parallel.schedule_costs import ChunkCosts, Part, PhaseCosts
from dsv3_mini.parallel.schedule_ir import Schedule, Slot
from dsv3_mini.parallel.schedule_simulator import Timeline, simulate
from dsv3_mini.parallel.traffic import INSIDE_SPEED, NETWORK_SPEED

ATTENTION = ("attention", "norms", "residual stream")  # the rest is the feed-forward's side


@dataclass(frozen=True)
class Machine:
    """A GPU of a cluster: FLOP/s by number format, bytes a second, bytes of memory. The defaults are the report's H800.

    NVLink and InfiniBand are what the report reaches on them (section 3.2.2); FP8 is twice BF16, as the data sheet has it;
    FP32 is without tensor cores. `reserve` is memory that no tensor can have: CUDA's and NCCL's own, and gaps.

    Raises:
        ConfigError: a rate or a size is no number above 0.
    """

    fp8: float = 2 * H800_PEAK
    bf16: float = H800_PEAK
    fp32: float = 67e12
    hbm: float = 3.35e12
    nvlink: float = INSIDE_SPEED
    ib: float = NETWORK_SPEED
    memory: float = 80e9
    reserve: float = 4e9
    node: int = 8

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "reserve" else 1
            if not isinstance(value, (int, float)) or not least <= value < float("inf"):
                raise ConfigError(f"{field.name} = {value!r} must be a number of at least {least}")

    def computing(self, work: Work, fused: bool) -> float:
        """Seconds."""
        products = sum(flops / getattr(self, kind) for kind, flops in work.flops.items())
        return max(products, work.product_bytes / self.hbm) + (0 if fused else work.pass_bytes / self.hbm)

    def sending(self, wires: Wires) -> float:
        """Seconds."""
        return max(wires.inside / self.nvlink, wires.network / self.ib)


@dataclass(frozen=True)
class StageTime:
    """Seconds of a stage for one micro-batch, and of what follows its last one."""

    costs: PhaseCosts
    after: float


@dataclass(frozen=True)
class Estimate:
    """A step's time on `machine`, `fused` or as written."""

    run: DryRun
    machine: Machine
    fused: bool

    @cached_property
    def stages(self) -> Mapping[int, StageTime]:
        known: dict[int, StageTime] = {}
        times = {}
        for number, measure in self.run.stages.items():
            if id(measure) not in known:
                known[id(measure)] = stage_time(measure, self.machine, self.fused)
            times[number] = known[id(measure)]
        return times

    @cached_property
    def timeline(self) -> Timeline:
        return simulate(_by_stage(self.run.job.order), _StageCosts(self.stages))

    @property
    def after(self) -> float:
        """Seconds behind the pipeline: of the rank whose stages take longest."""
        order = self.run.job.order
        return max(sum(self.stages[stage].after for stage, _ in order.stages_on(rank)) for rank in range(order.n_ranks))

    @property
    def seconds(self) -> float:
        return self.timeline.span + self.after

    @property
    def bubble(self) -> float:
        """Share of all ranks' time in the pipeline that is idle."""
        return self.timeline.bubble_share

    @property
    def tokens_per_second(self) -> float:
        return self.run.job.tokens / self.seconds

    @property
    def hours_per_trillion(self) -> float:
        """GPU hours for 10^12 tokens; the report's are REPORT_RUN.hours_per_trillion."""
        return 1e12 / self.tokens_per_second / 3600 * self.run.job.plan.processes

    @property
    def mfu(self) -> float:
        model = flops_per_token(self.run.job.cfg, self.run.job.length).train
        return model * self.tokens_per_second / self.run.job.plan.processes / self.machine.bf16

    @property
    def of_report(self) -> float:
        """This time as a share of the report's, for as many tokens."""
        return self.hours_per_trillion / REPORT_RUN.hours_per_trillion


def stage_time(measure: StageMeasure, machine: Machine, fused: bool) -> StageTime:
    """Times of a stage's passes, from its measures."""

    def part(names: bool, phase: Phase) -> float:
        chosen = [work for name, work in phase.work.items() if (name in ATTENTION) == names]
        return sum(machine.computing(work, fused) for work in chosen)

    def wires(phase: Phase, among: bool) -> float:
        """Seconds of the exchanges among experts, or of all others."""
        chosen = [exchange for exchange in phase.exchanges if (exchange.kind == "all-to-all") == among]
        return machine.sending(all_wires(chosen, machine.node))

    layers = measure.layers
    attention, mlp = (
        _split(part(names, measure.forward) / layers, part(names, measure.backward) / layers) for names in (True, False)
    )
    travel = wires(measure.forward, True) / layers / 2  # dispatch and combine carry as much
    chunk = ChunkCosts(attention, mlp, travel, travel, layers)
    gathering = wires(measure.forward, False) + wires(measure.backward, False)  # ZeRO-2 and 3, with every micro-batch
    phases = chunk.phases()
    costs = PhaseCosts(
        phases.forward + gathering / 2, phases.input + gathering / 2, phases.weight, phases.overlapped + gathering
    )
    once = max(0.0, wires(measure.first, False) - wires(measure.forward, False))
    once += max(0.0, wires(measure.last, False) - wires(measure.backward, False)) + wires(measure.update, False)
    # The optimizer is passes over memory, fused or not: AdamW reads and writes what it holds.
    step = sum(work.pass_bytes for work in measure.update.work.values()) / machine.hbm
    return StageTime(costs, once + step)


def step_wires(run: DryRun, rank: int, node: int) -> dict[str, Wires]:
    """Bytes that a GPU of a pipeline rank sends in a step, by the kind of exchange. Between stages: over the network."""
    sent: dict[str, Wires] = {}
    known: dict[Exchange, Wires] = {}
    for exchange, count in run.exchanges(rank):
        wires = known.setdefault(exchange, exchange.wires(node))
        sent[exchange.kind] = sent.get(exchange.kind, NOTHING) + Wires(count * wires.inside, count * wires.network)
    if between := run.between_stages(rank):
        far = run.job.plan.data >= node
        sent["send"] = Wires(0.0, between) if far else Wires(between, 0.0)
    return sent


def _split(forward: float, backward: float) -> Part:
    weight = min(forward, backward / 2)
    return Part(forward, backward - weight, weight)


class _StageSlot(Slot):
    """A slot whose kind says the stages too: "3F&28B"."""

    @property
    def kind(self) -> str:
        return "&".join(f"{op.stage}{op.phase}" for op in self.ops)


@dataclass(frozen=True)
class _StageCosts:
    """What simulate asks of costs, for stages that differ. A pair takes the mean of its two stages' pairs, at least its B."""

    stages: Mapping[int, StageTime]

    def of(self, kind: str) -> float:
        ops = [(self.stages[int(op[:-1])].costs, op[-1]) for op in kind.split("&")]
        if len(ops) == 1:
            return ops[0][0].of(ops[0][1])
        # The longer of the two passes sets the least: nothing makes it shorter.
        return max(sum(costs.both for costs, _ in ops) / 2, max(costs.of(phase) for costs, phase in ops))


def _by_stage(order: Schedule) -> Schedule:
    slots = tuple(tuple(_StageSlot(slot.ops) for slot in slots) for slots in order.order)
    return dataclasses.replace(order, order=slots)
