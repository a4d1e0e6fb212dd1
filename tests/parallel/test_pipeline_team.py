"""Processes that have stages of the model, against one process that has it all: the same five steps, in every schedule."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import together
from team_runs import (
    LENGTH,
    RECIPE,
    STEPS,
    assert_same_in_bf16,
    assert_same_run,
    assert_same_step,
    keep,
    planned,
    reports,
    shape,
    trainer,
)  # fmt: skip

from dsv3_mini.errors import ConfigError
from dsv3_mini.parallel.pipeline_team import PipelineTeam
from dsv3_mini.parallel.plan import ParallelPlan
from dsv3_mini.parallel.torch_schedules import TORCH_SCHEDULES
from dsv3_mini.train.schedules import constant, steps
from dsv3_mini.train.trainer import Trainer

CFG = shape(4)  # two processes have two stages each
IN_BF16 = RECIPE.replace(precision="bf16")
# Eight layers, for two stages in each of four processes. Through so many the order of sums tells more: it is one process's,
# eight micro-batches of a row. The smaller alpha is for the gate: at 1e-2 two experts of a token come within a rounding of
# each other in step 3.
DEEP = shape(8)
FOR_DEEP = RECIPE.replace(
    batch_size=constant("batch_size", 8), micro_batch=1, alpha=1e-3,
    mtp_lambda=steps("mtp_lambda", 0.0, (8 * LENGTH, 0.3)),
)  # fmt: skip

Plans = dict[str, dict[str, Any]]
PLANS: dict[int, Plans] = {
    4: {
        "PP": dict(pp=4),
        "EP": dict(pp=2, dp_replicate=2, ep=2, recompute=True),
        "EP, interleaved": dict(pp=2, dp_replicate=2, ep=2, schedule="Interleaved1F1B"),
        "EP, zero bubble": dict(pp=2, dp_replicate=2, ep=2, schedule="InterleavedZeroBubble"),
        "EP, DualPipeV": dict(pp=2, dp_replicate=2, ep=2, schedule="DualPipeV"),
        "ZeRO-1, zero bubble in a V": dict(pp=2, dp_shard=2, zero=1, schedule="ZBVZeroBubble"),
        "EP, ZeRO-1, DualPipeV": dict(pp=2, dp_shard=2, ep=2, zero=1, schedule="DualPipeV"),
    },
    2: {name: dict(pp=2, schedule=name) for name in TORCH_SCHEDULES},
}
EIGHT_STAGES = dict(pp=4, schedule="DualPipeV")
BF16 = ("EP, zero bubble", "EP, ZeRO-1, DualPipeV")
# Where the checkpoint of four processes, two stages by two that share experts, goes on.
RESUMING: dict[int, Plans] = {
    4: {"ZeRO-1, DualPipeV": dict(pp=2, dp_shard=2, zero=1, schedule="DualPipeV"), "EP": dict(dp_shard=4, ep=4)},
    2: {"EP": dict(dp_replicate=2, ep=2)},
}


def train(run: Trainer, count: int = STEPS) -> None:
    keep(run, [run.train_step().to_log() for _ in range(count)])


def train_all(rank: int, folder: Path, count: int) -> None:
    for name, plan in PLANS[count].items():
        train(planned(folder / name, CFG, plan))
    if count == 4:
        train(planned(folder / "deep", DEEP, EIGHT_STAGES, FOR_DEEP))
        for name in BF16:
            train(planned(folder / f"{name} BF16", CFG, PLANS[4][name], IN_BF16))
    for name, plan in RESUMING[count].items():
        copy = folder / f"resumed {name}"
        if rank == 0:
            shutil.copytree(folder.parent / "4" / "EP", copy)
        dist.barrier()
        train(planned(copy, CFG, plan), 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, in folders: "one", "one BF16", "one deep", and PROCESSES/NAME."""
    root = tmp_path_factory.mktemp("runs")
    for name, cfg, recipe in (("one", CFG, RECIPE), ("one BF16", CFG, IN_BF16), ("one deep", DEEP, FOR_DEEP)):
        torch.manual_seed(0)
        train(trainer(root / name, cfg, recipe=recipe))
    for count in (4, 2):
        (root / str(count)).mkdir()
        together(count, train_all, root / str(count), count)
    return root


@pytest.mark.parametrize(("count", "name"), [(count, name) for count, plans in PLANS.items() for name in plans])
def test_stages_take_the_steps_of_one_process(runs: Path, count: int, name: str) -> None:
    assert_same_run(runs / str(count) / name, runs / "one")


def test_eight_stages_take_the_steps_of_one_process(runs: Path) -> None:
    assert_same_run(runs / "4" / "deep", runs / "one deep")


@pytest.mark.parametrize("name", BF16)
def test_stages_in_bf16_take_the_steps_of_one_process(runs: Path, name: str) -> None:
    one, many = runs / "one BF16", runs / "4" / f"{name} BF16"
    # In step 3 a rounding sends some tokens to other experts, whose moments are of few tokens.
    assert_same_in_bf16(many, one, alike=0.9)
    # Until then nothing but the order of sums differs.
    assert reports(many)[0]["grad_norm"] == pytest.approx(reports(one)[0]["grad_norm"], rel=2e-4)


def test_what_stages_and_experts_wrote_goes_on_anywhere(runs: Path) -> None:
    """What 4 processes wrote (EP 2 x PP 2), on 1, 2 and 4 in another layout: the step that one process would take next."""
    expected = trainer(runs / "one", CFG).train_step()
    assert expected.step == STEPS + 1
    alone = trainer(shutil.copytree(runs / "4" / "EP", runs / "resumed alone"), CFG).train_step()
    folders = [runs / str(count) / f"resumed {name}" for count, plans in RESUMING.items() for name in plans]
    for found in [alone.to_log(), *(reports(folder)[-1] for folder in folders)]:
        found["load"] = {int(layer): load for layer, load in found["load"].items()}
        assert_same_step(found, expected.to_log())


def test_batches_too_small_for_the_pipelines_are_refused_at_the_start() -> None:
    plan = ParallelPlan(pp=2, dp_replicate=2, schedule="DualPipeV")
    team = PipelineTeam(rank=0, count=4, mesh=SimpleNamespace(plan=plan), layouts={}, held=(), ends=None)
    team.check_batch(8)
    with pytest.raises(
        ConfigError, match="^batch_size = 7 leaves each of 2 pipelines 3 rows, too few: .*DualPipeV"
    ) as caught:
        team.check_batch(7)
    assert "\n" not in str(caught.value)
