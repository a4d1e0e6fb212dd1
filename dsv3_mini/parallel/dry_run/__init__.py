"""A training step of any rank of any cluster, on a laptop: memory, work, traffic and time before a GPU is rented.

paper       torch's real operations on tensors without memory; ranks that are alike
exchanges   what travels, by kind and by wire          memory   what lives, by kind, and the most that ever did
parts       whose work it is                           work     FLOPs of products, bytes of passes
stage_run   a rank's step with the package's own classes; measure: the same on paper, pass by pass
step        all ranks over the schedule                roofline the time on stated rates
sweep       layouts of so many GPUs                    scaling  one model on 8 to 16,384 GPUs
"""

from __future__ import annotations

from dsv3_mini.parallel.dry_run import scaling, sweep, table
from dsv3_mini.parallel.dry_run.measure import StageMeasure, measure_stage
from dsv3_mini.parallel.dry_run.roofline import Estimate, Machine, step_wires
from dsv3_mini.parallel.dry_run.stage_run import StageRun, build_stage, materialise
from dsv3_mini.parallel.dry_run.step import DryRun, Job, RankMemory, dry_run, rank_memory

__all__ = [
    "DryRun", "Estimate", "Job", "Machine", "RankMemory", "StageMeasure", "StageRun", "build_stage", "dry_run", "materialise",
    "measure_stage", "rank_memory", "scaling", "step_wires", "sweep", "table",
]  # fmt: skip
