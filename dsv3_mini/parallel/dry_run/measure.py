"""A stage measured on paper: what it holds, what a micro-batch leaves behind, what the passes need, send and compute.

Three micro-batches run. The first gathers the weights, the second is as all others are, the last has the gradients summed
among the ranks; then the optimizer takes its step. What each pass needs at its peak is counted from what lies there between
micro-batches, without this one's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.fp8.gemm import Backend
from dsv3_mini.fp8.quantize import Quantized
from dsv3_mini.fp8.recipe import Fp8Recipe
from dsv3_mini.parallel.dry_run.exchanges import Exchange, ExchangeCounter
from dsv3_mini.parallel.dry_run.memory import MemoryCounter
from dsv3_mini.parallel.dry_run.paper import as_rank, on_paper
from dsv3_mini.parallel.dry_run.parts import Parts
from dsv3_mini.parallel.dry_run.stage_run import StageRun
from dsv3_mini.parallel.dry_run.work import Work, WorkCounter
from dsv3_mini.parallel.plan import ParallelPlan
from dsv3_mini.train.optimizer import own_piece

OWN, GATHERED, GRADIENTS, MOMENTS = "own weights, FP32", "gathered weights", "gradients", "Adam's moments"
LENT = "the first stage's embedding"


@dataclass(frozen=True)
class Phase:
    """A pass: `peak` bytes above what lies there between micro-batches, work by part, exchanges in their order."""

    peak: int
    work: dict[str, Work]
    exchanges: tuple[Exchange, ...]


@dataclass(frozen=True)
class StageMeasure:
    """`state`: bytes between micro-batches, by kind. `kept`: bytes of a micro-batch between its passes, by the part that made them.

    `own`: parameters that lie on this rank, and `all_ranks`: on all data ranks of the stage together, copies counted once.
    `sends`: bytes to the next stage, and as many back.
    """

    stage: int
    layers: int
    own: int
    all_ranks: int
    state: dict[str, int]
    kept: dict[str, int]
    first: Phase
    first_backward: Phase
    forward: Phase
    backward: Phase
    last_forward: Phase
    last: Phase
    update: Phase
    sends: int

    def phases(self, microbatches: int) -> tuple[tuple[Phase, int], ...]:
        """The passes of a step, each with how often it runs. A micro-batch that is the first and the last counts as both do."""
        if microbatches == 1:
            return (self.first, 1), (self.last, 1), (self.update, 1)
        between = microbatches - 2
        once = (self.first, self.first_backward, self.last_forward, self.last, self.update)
        return (*((phase, 1) for phase in once), (self.forward, between), (self.backward, between))


class PaperGemm(Backend):
    """An FP8 product on paper: the shape of its result, and its FLOPs told to a counter."""

    name = "paper"

    def __init__(self, work: WorkCounter) -> None:
        self.work = work

    def refuses(self, a: Quantized, b: Quantized) -> str | None:
        return None

    def gemm(self, a: Quantized, b: Quantized, out_dtype: torch.dtype) -> Float[Tensor, "m n"]:
        out = a.scale.new_empty(a.shape[0], b.shape[-2], dtype=out_dtype)
        self.work.product("fp8", 2 * a.shape[0] * a.shape[1] * b.shape[-2], a.nbytes + b.nbytes + out.nbytes)
        return out

    def grouped_gemm(
        self, a: Quantized, b: Quantized, ends: Int[Tensor, " e"], out_dtype: torch.dtype
    ) -> Float[Tensor, "T n"]:
        return self.gemm(a, b, out_dtype)


def measure_stage(
    cfg: ModelConfig, plan: ParallelPlan, rank: int, stage: int, stages: int, rows: int, length: int, parts: int, precision: str,
    lends: bool = False,
) -> StageMeasure:  # fmt: skip
    """Stage number `stage` as `rank` runs it, in a step of `parts` micro-batches of `rows` rows."""
    with as_rank(rank, plan.processes):
        names, exchanges, kind = Parts(), ExchangeCounter(), [""]
        work = WorkCounter(lambda: names.now)
        memory = MemoryCounter(lambda: kind[0] or names.now)
        run = StageRun(
            cfg, plan, stage, stages, rows, length, parts, precision, Fp8Recipe(backend=PaperGemm(work)), lends
        )
        names.mark(run.stage)
        with on_paper(exchanges, memory, work), memory.watching_sizes():
            run.start_optimizer()
            memory.named(run.stage.buffers(), OWN)
            if run.borrowed is not None:
                memory.named([run.borrowed], LENT)
            sharded = plan.dp_shard > 1
            memory.named(run.optimizer.masters.values(), OWN)
            if not sharded:
                memory.named((w for w in run.stage.parameters() if w.dtype != torch.float32), GATHERED)

            def phase(base: int) -> Phase:
                return Phase(memory.peak - base, work.take(), exchanges.take())

            def passes(last: bool) -> tuple[Phase, dict[str, int], Phase]:
                """Forward, what is kept, backward."""
                base, there = memory.start_peak(), memory.by_kind()
                out = run.forward(last)
                forward, behind = phase(base), memory.by_kind()
                if sharded:
                    weights = [weight for weight in run.stage.parameters() if not hasattr(weight, "to_local")]
                    memory.named(weights, GATHERED)
                kept = {kind: behind[kind] - there.get(kind, 0) for kind in behind if behind[kind] > there.get(kind, 0)}
                before = memory.start_peak() - sum(kept.values())
                kind[0] = GRADIENTS
                run.backward(out)
                del out
                kind[0] = ""
                return forward, kept, phase(before)

            first, _, first_backward = passes(last=False)
            forward, kept, backward = passes(last=False)
            between = memory.by_kind()
            last_forward, _, last = passes(last=True)
            base = memory.start_peak()
            kind[0] = MOMENTS
            run.update()
            kind[0] = ""
            update = phase(base)
            moments = (state[key] for state in run.optimizer.adamw.state.values() for key in ("exp_avg", "exp_avg_sq"))
            state = {**between, MOMENTS: memory.named(moments, MOMENTS)}
            state.pop(LENT, None)
        own = sum(own_piece(weight).numel() for weight in run.stage.parameters())
        layers = len(run.stage.layers) + (cfg.num_nextn_predict_layers if run.last else 0)
        sends = 0 if run.last else rows * length * cfg.hidden_size * run.dtype.itemsize + 4
        return StageMeasure(stage, layers, own, _on_all_ranks(run), state, kept, first, first_backward, forward, backward,
                            last_forward, last, update, sends)  # fmt: skip


def _on_all_ranks(run: StageRun) -> int:
    """Numbers on all of the stage's data ranks together, from the layout of each weight; what several hold counts once."""
    total = 0
    for name, _ in run.stage.named_parameters():
        layout = run.team.layouts[name]
        held = sum(_size(layout.piece(rank)) for rank in layout.mesh.mesh.flatten().tolist())
        assert held % layout.copies == 0
        total += held // layout.copies
    return total


def _size(piece: tuple[slice, ...]) -> int:
    size = 1
    for part in piece:
        size *= part.stop - part.start
    return size
