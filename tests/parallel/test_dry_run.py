"""A dry run against what it stands for: real ranks over gloo, the ledger, a step run slot by slot, and counting by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nano_runs import nano_recipe, small_tokenizer
from ranks import together
from team_runs import Rows

from dsv3_mini.config import ModelConfig
from dsv3_mini.ledger import count_parameters
from dsv3_mini.model.router import Router
from dsv3_mini.parallel.dry_run.exchanges import Exchange, ExchangeCounter, Watching
from dsv3_mini.parallel.dry_run.measure import PaperGemm, StageMeasure, measure_stage
from dsv3_mini.parallel.dry_run.memory import MemoryCounter
from dsv3_mini.parallel.dry_run.paper import as_rank, even_choice, on_paper, route_evenly
from dsv3_mini.parallel.dry_run.stage_run import StageRun
from dsv3_mini.parallel.dry_run.step import Job, dry_run
from dsv3_mini.parallel.dry_run.work import WorkCounter
from dsv3_mini.parallel.plan import ParallelPlan
from dsv3_mini.parallel.schedule_ir import Phase
from dsv3_mini.parallel.team import Team
from dsv3_mini.train.trainer import Trainer

CFG = ModelConfig.preset("nano", vocab_size=512, num_hidden_layers=2)
LENGTH, MICRO, PARTS, RANKS = 12, 2, 3, 4
PLANS: dict[str, dict[str, Any]] = {
    "ZeRO-1, EP on two nodes": dict(dp_shard=4, ep=4, ep_nodes=2, zero=1),
    "ZeRO-3, EP, recompute": dict(dp_shard=4, ep=2, zero=3, recompute=True),
    "copies, EP": dict(dp_replicate=4, ep=2),
}
STAGES = ParallelPlan(pp=2, dp_shard=2, ep=2, zero=1)
Told = Counter[tuple[Any, ...]]


def told(exchanges: Any) -> Told:
    """Which exchanges there were, and how often, in whatever order torch made them."""
    return Counter((e.kind, e.ranks, e.bytes, e.shares) for e in exchanges)


def save(path: Path, counts: Told) -> None:
    path.write_text(
        json.dumps([[kind, list(ranks), size, shares, n] for (kind, ranks, size, shares), n in counts.items()])
    )


def read(path: Path) -> Told:
    rows = json.loads(path.read_text())
    return Counter({(k, tuple(r), b, None if s is None else tuple(s)): n for k, r, b, s, n in rows})


def one_rank(rank: int, folder: Path) -> None:
    """A real step of the trainer under each plan; then one of a stage that was built without the others."""
    recipe = nano_recipe(steps=1, batch=RANKS * MICRO * PARTS, seq_len=LENGTH, micro_batch=MICRO)
    for name, plan in PLANS.items():
        team = Team.join(ParallelPlan(**plan), CFG)
        trainer = Trainer(folder / name, CFG, recipe, small_tokenizer(), Rows, replicas=team)
        route_evenly(trainer.model)
        counter = ExchangeCounter()
        with Watching(counter):
            trainer.train_step()
        save(folder / f"{name}-{rank}.json", told(counter.seen))
    stage = rank // 2
    run = StageRun(CFG, STAGES, stage, 2, MICRO, LENGTH, PARTS, "fp32", real=True)
    run.start_optimizer()
    before = {name: weight.clone() for name, weight in run.optimizer.masters.items()}
    counter = ExchangeCounter()
    with Watching(counter):
        for part in range(PARTS):
            run.backward(run.forward(last=part == PARTS - 1))
        run.update()
    assert all(
        (weight - before[name]).abs().max() > 0 for name, weight in run.optimizer.masters.items() if weight.ndim > 1
    )
    save(folder / f"stage-{rank}.json", told(counter.seen))
    dist.barrier()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    together(RANKS, one_rank, folder)
    return folder


def predicted(measure: StageMeasure) -> Told:
    return sum((told(phase.exchanges * count) for phase, count in measure.phases(PARTS)), start=Counter())


@pytest.mark.parametrize("name", PLANS)
def test_real_ranks_exchange_what_was_predicted(real: Path, name: str) -> None:
    for rank in range(RANKS):
        foreseen = predicted(measure_stage(CFG, ParallelPlan(**PLANS[name]), rank, 0, 1, MICRO, LENGTH, PARTS, "fp32"))
        counted = read(real / f"{name}-{rank}.json")
        assert foreseen == counted, f"rank {rank}"
        # Both sides count with the same counter: what it overlooks has to be named here.
        shared = {"all-gather", "reduce-scatter"} if "dp_shard" in PLANS[name] else set()
        assert {kind for kind, *_ in counted} == {"all-to-all", "all-reduce"} | shared


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_stage_built_alone_exchanges_what_was_predicted(real: Path, rank: int) -> None:
    measure = measure_stage(CFG, STAGES, rank, rank // 2, 2, MICRO, LENGTH, PARTS, "fp32")
    assert predicted(measure) == read(real / f"stage-{rank}.json")


@pytest.mark.parametrize(
    ("schedule", "plan", "layers"),
    [
        ("1F1B", dict(pp=2, dp_shard=6, ep=2), 4),  # pieces that do not come out even, an embedding twice
        ("DualPipeV", dict(pp=2, dp_shard=4, ep=4, zero=2), 5),
        ("DualPipe", dict(pp=2, dp_shard=2, ep=2, zero=3), 4),
        ("1F1B", dict(pp=1, dp_replicate=4, ep=2), 2),
    ],
)
def test_parameters_over_all_ranks_are_the_ledgers(schedule: str, plan: dict[str, int], layers: int) -> None:
    cfg = CFG.replace(num_hidden_layers=layers, n_routed_experts=12)
    layout = ParallelPlan(**plan)
    run = dry_run(Job(cfg, layout, schedule, "bf16", batch=4 * layout.data, length=8))
    ledger = count_parameters(cfg).live_trainable
    extra = count_parameters(cfg).embedding.total
    assert run.parameters == run.expected_parameters
    assert (
        run.parameters
        == {"1F1B": ledger + extra * (layout.pp > 1), "DualPipeV": ledger, "DualPipe": 2 * (ledger + extra)}[schedule]
    )
    # Rank 0 of each stage was run: what it held is what the layout says, and no other rank of the stage holds more.
    for measure in run.stages.values():
        assert measure.state["own weights, FP32"] >= 4 * measure.own
        assert measure.own * layout.data >= measure.all_ranks


def test_a_stage_followed_slot_by_slot_takes_the_memory_that_was_put_together() -> None:
    """The same slots as the schedule has them, run one after the other on paper: several micro-batches really are held."""
    job = Job(CFG, ParallelPlan(pp=2, dp_shard=2, ep=2, zero=1), "1F1B", "bf16", batch=16, length=64)
    run = dry_run(job)
    with as_rank(0, 4):
        stage = StageRun(CFG, job.plan, 0, 2, 1, 64, job.microbatches, "bf16")
        memory = MemoryCounter(lambda: "")
        with on_paper(memory), memory.watching_sizes():
            stage.start_optimizer()
            memory.named(stage.optimizer.masters.values(), "")
            memory.named(stage.stage.buffers(), "")
            held = {}
            for step in range(2):  # the moments are there from the second on
                for slot in job.order.order[0]:
                    (op,) = slot.ops
                    last = op.microbatch == job.microbatches - 1
                    if op.phase == Phase.FORWARD:
                        held[op.microbatch] = stage.forward(last)
                    else:
                        stage.team.before_micro_batch(stage.stage, last)
                        stage.backward(held.pop(op.microbatch))
                stage.update()
                if step == 0:
                    memory.start_peak()
    assert job.order.peak_activations[0] == 2
    kept = sum(run.stages[0].kept.values())
    assert kept > 0.1 * run.ranks[0].peak  # a micro-batch too many or too few would be seen
    assert run.ranks[0].peak == pytest.approx(memory.peak, rel=0.03)


def test_products_are_the_ledgers() -> None:
    cfg = CFG.replace(num_nextn_predict_layers=0)
    length = 64
    measure = measure_stage(cfg, ParallelPlan(dp_shard=4, ep=4, ep_nodes=2, zero=1), 0, 0, 1, 1, length, 2, "bf16")
    counted = sum(work.total for part, work in measure.forward.work.items() if part != "head and loss")
    counted_parameters = count_parameters(cfg)
    linear = 2 * length * (counted_parameters.multiplied - counted_parameters.head.multiplied)
    # A causal kernel computes half of the pairs, and values are padded to the width of keys.
    core = (
        2 * cfg.num_hidden_layers * cfg.num_attention_heads * 2 * max(cfg.qk_head_dim, cfg.v_head_dim) * length**2 // 2
    )
    assert counted == linear + core
    eight = measure_stage(cfg, ParallelPlan(dp_shard=4, ep=4, ep_nodes=2, zero=1), 0, 0, 1, 1, length, 2, "fp8")
    count = Counter()
    for part, work in eight.forward.work.items():
        count.update(work.flops if part != "head and loss" else {})
    gates = 2 * length * counted_parameters.moe_layers * counted_parameters.gate["gate"]
    assert dict(count) == {"fp8": linear - gates, "bf16": core, "fp32": gates}
    assert sum(eight.kept.values()) < sum(measure.kept.values())


@pytest.mark.parametrize(("preset", "tokens"), [("671b", 1024), ("nano", 64), ("16b", 128)])
def test_written_choices_are_what_the_router_could_have_made_and_even(preset: str, tokens: int) -> None:
    cfg = ModelConfig.preset(preset)
    with torch.device("meta"):
        router = Router(cfg, 5)
    chosen = even_choice(router, tokens, cfg.n_routed_experts)
    k, experts = cfg.num_experts_per_tok, cfg.n_routed_experts
    assert chosen.shape == (tokens, k)
    assert all(len(set(row)) == k for row in chosen.tolist())
    groups = chosen // cfg.experts_per_group
    assert all(len(set(row)) <= cfg.topk_group for row in groups.tolist())
    assert chosen.flatten().bincount(minlength=experts).tolist() == [tokens * k // experts] * experts


def test_memory_is_counted_once_and_until_the_last_view_is_gone() -> None:
    memory = MemoryCounter(lambda: "made")
    with Watching(memory), memory.watching_sizes():
        a = torch.zeros(100)
        view = a[10:].view(9, 10)
        assert memory.total == 400
        del a
        assert memory.total == 400
        b = view + 1
        assert memory.named([b], "sum") == 360
        assert memory.by_kind() == {"made": 400, "sum": 360}
        del view
        assert (memory.total, memory.peak) == (360, 760)
        b.untyped_storage().resize_(0)
        assert memory.total == 0
        b.untyped_storage().resize_(360)
        assert memory.total == 360
    del b
    assert memory.total == 0


def test_wires_by_hand() -> None:
    eight = tuple(range(8))
    one_node = Exchange("all-gather", eight, 0, 100)
    assert one_node.wires(8) == (700, 0)  # seven pieces passed on
    two_nodes = Exchange("all-gather", eight, 0, 100)
    # 400 bytes of the other node's come in through four cards.
    assert two_nodes.wires(4) == (700, 100)
    apart = Exchange("reduce-scatter", (0, 8), 8, 600)
    assert apart.wires(8) == (0, 300)
    everything = Exchange("all-reduce", (0, 8), 0, 600)
    assert everything.wires(8) == (0, 600)
    sent = Exchange("all-to-all", (0, 1, 8, 9), 1, 100, (10, 20, 30, 40))
    assert sent.wires(8) == (10, 70)


def test_a_product_on_paper_has_the_shape_of_the_real_one() -> None:
    from dsv3_mini.fp8.quantize import quantize

    work = WorkCounter(lambda: "here")
    a, b = quantize(torch.randn(5, 256)), quantize(torch.randn(3, 7, 256), (128, 128))
    out = PaperGemm(work).grouped_gemm(a, b, torch.tensor([1, 5, 5], dtype=torch.int32), torch.bfloat16)
    assert (out.shape, out.dtype) == ((5, 7), torch.bfloat16)
    assert work.parts["here"].flops == {"fp8": 2 * 5 * 256 * 7}
