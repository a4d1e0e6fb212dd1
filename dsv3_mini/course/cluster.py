"""What lesson 21 plays back: the scaling table, layouts of the report's 2,048 GPUs, what a micro-batch leaves behind.

    python -m dsv3_mini.course.cluster            # measures all on paper, and writes data/cluster/paper.json

Each row is a dry run of a step of the 671B model. Together they take minutes; the lesson runs one of them anew.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from dsv3_mini.config import ModelConfig
from dsv3_mini.course.recording import write_recording
from dsv3_mini.data.shipped import shipped
from dsv3_mini.parallel.dry_run.roofline import Machine
from dsv3_mini.parallel.dry_run.scaling import SIZES, ScalingRow, row_of, scaling_table
from dsv3_mini.parallel.dry_run.sketch import Kept, lay_out
from dsv3_mini.parallel.dry_run.step import DryRun, Job, dry_run
from dsv3_mini.parallel.dry_run.sweep import sweep
from dsv3_mini.parallel.plan import ParallelPlan

RECORDED = "cluster/paper.json"
GPUS = 2048
KEPT = {"671b": (GPUS, 16, 64), "16b": (8, 1, 8)}  # the layouts that it is measured in: GPUs, pp, ep


def report_run() -> DryRun:
    """The dry run of the report's own layout and batch, all 2,048 GPUs of it."""
    return dry_run(Job(ModelConfig.preset("671b"), ParallelPlan.preset("report")))


def left_behind(preset: str, run: DryRun | None = None) -> Kept:
    cfg = ModelConfig.preset(preset)
    gpus, pp, ep = KEPT[preset]
    plan = lay_out(cfg, gpus, pp, ep)
    return Kept.of(run or dry_run(Job(cfg, plan, batch=2 * plan.pp * plan.data)))


def record() -> dict[str, Any]:
    """All measurements, as plain JSON."""
    cfg, machine, report = ModelConfig.preset("671b"), Machine(), report_run()
    others = scaling_table(cfg, machine, tuple(size for size in SIZES if size != GPUS))
    rows = sorted([*others, row_of(report, machine)], key=lambda row: row.gpus)
    layouts = sweep(cfg, GPUS, machine, schedule="DualPipeV", precision="fp8", micro_batch=1, length=4096)
    kept = {"671b": left_behind("671b", report), "16b": left_behind("16b")}
    return {
        "scaling": [asdict(row) for row in rows],
        "layouts": [layout.to_dict() for layout in layouts],
        "kept": {name: asdict(value) for name, value in kept.items()},
    }


def recorded() -> dict[str, Any]:
    """What data/cluster holds: rows of `scaling`, dicts of `layouts`, and `kept` by preset."""
    values = json.loads(shipped(RECORDED).read_text(encoding="utf-8"))
    return {
        "scaling": [ScalingRow(**row) for row in values["scaling"]],
        "layouts": values["layouts"],
        "kept": {name: Kept(**value) for name, value in values["kept"].items()},
    }


if __name__ == "__main__":
    write_recording(RECORDED, record, "Clusters on paper, measured for lesson 21. Minutes of a core.")
