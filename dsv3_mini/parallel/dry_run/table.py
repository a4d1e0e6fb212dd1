"""A dry run on the page, and as plain numbers for JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from dsv3_mini.ledger import REPORT_RUN
from dsv3_mini.parallel.dry_run.roofline import Estimate, Machine, step_wires
from dsv3_mini.parallel.dry_run.scaling import ScalingRow
from dsv3_mini.parallel.dry_run.step import DryRun, RankMemory
from dsv3_mini.parallel.dry_run.sweep import Candidate, fits

GB = 1e9
WIDTH = 100


def text(run: DryRun, machine: Machine) -> str:
    """What `dsv3 dry-run` prints."""
    job, plan, full = run.job, run.job.plan, run.fullest
    parts = [
        _paragraph(
            f"{plan.processes:,} GPUs: pp {plan.pp} x dp_replicate {plan.dp_replicate} x dp_shard {plan.dp_shard}; experts over "
            f"{plan.ep} ranks of {plan.ep_nodes} nodes; ZeRO-{plan.zero}; {job.precision}; {job.order.name}, "
            f"{job.order.n_stages} stages; {job.batch:,} sequences of {job.length:,} tokens, {job.microbatches} micro-batches a rank."
        ),
        _parameters(run),
        _memory(run, machine),
        _work(run, full),
        _wires(run, full, machine),
        _time(run, machine),
    ]
    return "\n\n".join(parts)


def to_dict(run: DryRun, machine: Machine) -> dict[str, Any]:
    """The same, unrounded, in bytes and seconds."""
    estimates = {"fused": Estimate(run, machine, True), "as_written": Estimate(run, machine, False)}
    return {
        "gpus": run.job.plan.processes,
        "parameters": run.parameters,
        "expected_parameters": run.expected_parameters,
        "fits": fits(run, machine),
        "fullest_rank": run.fullest.rank,
        "ranks": [
            {"rank": r.rank, "stages": r.stages, "peak": r.peak, "state": r.state, "activations": r.activations,
             "passing": r.passing, "moment": r.moment}
            for r in run.ranks
        ],
        "wires": {kind: wires._asdict() for kind, wires in step_wires(run, run.fullest.rank, machine.node).items()},
        "time": {
            name: {"seconds": e.seconds, "tokens_per_second": e.tokens_per_second, "mfu": e.mfu, "bubble": e.bubble,
                   "hours_per_trillion": e.hours_per_trillion}
            for name, e in estimates.items()
        },
    }  # fmt: skip


def why(run: DryRun, machine: Machine) -> str:
    """Whether it fits, and what decides it, in a sentence or two."""
    full = run.fullest
    state, held = sum(full.state.values()), sum(full.activations.values())
    room = machine.memory - machine.reserve - full.peak
    verdict = (
        f"fits, with {room / GB:.1f} GB to spare" if room >= 0 else f"does not fit: {-room / GB:.1f} GB are missing"
    )
    kind, most = max(full.activations.items(), key=lambda item: item[1], default=("none", 0))
    return (
        f"Rank {full.rank} is the fullest and {verdict} ({machine.memory / GB:.0f} GB, of which {machine.reserve / GB:.0f} are "
        f"reserved). Its stages' state takes {state / GB:.1f} GB; activations of the micro-batches in flight {held / GB:.1f} GB, "
        f"of which {most / GB:.1f} GB are from: {kind}; the pass that runs {full.passing / GB:.1f} GB."
    )


def scaling_text(rows: Sequence[ScalingRow], machine: Machine) -> str:
    head = f"{'GPUs':>7}{'pp':>4}{'ep':>4}{'batch':>8}{'parts':>6}{'GB':>7}{'NVLink TB':>10}{'IB TB':>8}{'step s':>8}{'MFU':>6}{'wires':>6}{'uneven':>7}{'bubble':>7}  what breaks"
    lines = [head]
    for r in rows:
        start = f"{r.gpus:>7,}{r.pp:>4}{r.ep:>4}{r.batch:>8,}{r.microbatches:>6}{r.peak / GB:>7,.0f}"
        if r.measured:
            start += f"{r.inside / 1e12:>10.2f}{r.network / 1e12:>8.2f}{r.seconds:>8.1f}{r.mfu:>6.0%}{r.wires:>6.0%}{r.uneven:>7.0%}{r.bubble:>7.0%}"
        else:
            start += f"{'-':>10}{'-':>8}{'-':>8}{'-':>6}{'-':>6}{'-':>7}{'-':>7}"
        lines.append(f"{start}  {r.limit}")
    lines.append(
        f"GB: of the fullest GPU, of {machine.memory / GB:.0f}. TB: what it sends in a step. MFU: a bound, passes fused. Of the time, "
        "wires: bytes on them;\nuneven: waiting for the rank that has the most to do; bubble: the rest of the pipeline's idle time."
    )
    return "\n".join(lines)


def sweep_text(rows: Sequence[Candidate], machine: Machine) -> str:
    lines = [
        f"{'pp':>4}{'dp':>6}{'ep':>5}{'nodes':>6}{'GB':>8}{'fits':>6}{'step s':>9}{'h / T tokens':>14}{'MFU':>6}{'bubble':>8}"
    ]
    for row in rows:
        plan = f"{row.plan.pp:>4}{row.plan.dp_shard:>6}{row.plan.ep:>5}{row.plan.ep_nodes:>6}"
        if row.run is None or row.estimate is None:
            lines.append(f"{plan}  {row.refused}")
            continue
        fit = "yes" if fits(row.run, machine) else "no"
        e = row.estimate
        lines.append(
            f"{plan}{row.run.fullest.peak / GB:>8.1f}{fit:>6}{e.seconds:>9.1f}{e.hours_per_trillion:>14,.0f}{e.mfu:>6.0%}{e.bubble:>8.0%}"
        )
    return "\n".join(lines)


def _parameters(run: DryRun) -> str:
    same = "equal" if run.parameters == run.expected_parameters else "NOT equal"
    return f"Parameters over all ranks: {run.parameters:,} ({4 * run.parameters:,} bytes of FP32), {same} to the ledger's {run.expected_parameters:,}."


def _memory(run: DryRun, machine: Machine) -> str:
    full = run.fullest
    lines = [
        "Memory, GB a GPU at its fullest moment",
        f"{'rank':>6}  {'stages':<10}{'state':>8}{'held':>8}{'pass':>8}{'peak':>8}",
    ]
    for rank in run.ranks:
        lines.append(
            f"{rank.rank:>6}  {','.join(map(str, rank.stages)):<10}{sum(rank.state.values()) / GB:>8.1f}"
            f"{sum(rank.activations.values()) / GB:>8.1f}{rank.passing / GB:>8.1f}{rank.peak / GB:>8.1f}"
        )
    lines += [_paragraph(why(run, machine)), f"  the moment: {full.moment}"]
    lines += _column("  state", full.state) + _column("  held", full.activations)
    return "\n".join(lines)


def _work(run: DryRun, full: RankMemory) -> str:
    lines = [
        f"Work of rank {full.rank}'s stages for a micro-batch, TFLOP of products and GB of passes, forward and backward"
    ]
    for stage in full.stages:
        for name in ("forward", "backward"):
            works = getattr(run.stages[stage], name).work
            flops = {kind: sum(w.flops[kind] for w in works.values()) for kind in ("fp8", "bf16", "fp32")}
            passes = sum(w.pass_bytes for w in works.values())
            shown = ", ".join(f"{kind} {count / 1e12:.2f}" for kind, count in flops.items() if count)
            lines.append(f"  stage {stage:<4}{name:<10}{shown:<40}passes {passes / GB:.0f} GB")
    return "\n".join(lines)


def _wires(run: DryRun, full: RankMemory, machine: Machine) -> str:
    lines = [f"What a GPU of rank {full.rank} sends in a step, GB", f"  {'':<16}{'NVLink':>12}{'InfiniBand':>12}"]
    for kind, wires in step_wires(run, full.rank, machine.node).items():
        lines.append(f"  {kind:<16}{wires.inside / GB:>12,.1f}{wires.network / GB:>12,.1f}")
    return "\n".join(lines)


def _time(run: DryRun, machine: Machine) -> str:
    lines = [f"Time by the roofline{'':<12}{'step s':>9}{'tokens/s':>13}{'h / T tokens':>14}{'MFU':>7}{'bubble':>8}"]
    for name, fused in (("passes fused away", True), ("as written, pass by pass", False)):
        e = Estimate(run, machine, fused)
        lines.append(
            f"  {name:<30}{e.seconds:>9.1f}{e.tokens_per_second:>13,.0f}{e.hours_per_trillion:>14,.0f}{e.mfu:>7.1%}{e.bubble:>8.1%}"
        )
    lines.append(f"  {'the report, measured':<30}{'':>9}{'':>13}{REPORT_RUN.hours_per_trillion:>14,}")
    return "\n".join(lines)


def _column(title: str, sizes: dict[str, int]) -> list[str]:
    rows = sorted(sizes.items(), key=lambda item: -item[1])
    return [f"{title:<8}{kind:<28}{size / GB:>8.2f}" for kind, size in rows if size >= 0.005 * GB]


def _paragraph(words: str) -> str:
    return textwrap.fill(words, WIDTH)
