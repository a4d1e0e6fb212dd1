"""Processes that share weights, experts and batches, against one process that has it all: the same five steps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from ranks import together
from team_runs import (
    BATCH,
    RECIPE,
    STEPS,
    assert_same_in_bf16,
    assert_same_run,
    keep,
    last,
    planned,
    reports,
    shape,
    trainer,
)  # fmt: skip

from dsv3_mini.course.shared_training import Exchanges
from dsv3_mini.parallel.sharding import units
from dsv3_mini.parallel.team import Team
from dsv3_mini.train.trainer import Trainer

CFG = shape(2)
IN_BF16 = RECIPE.replace(precision="bf16")

PLANS: dict[int, dict[str, dict[str, int]]] = {
    4: {
        "DP": dict(dp_replicate=4),
        "EP": dict(dp_replicate=4, ep=2),
        "EP on two nodes": dict(dp_replicate=4, ep=4, ep_nodes=2),
        "ZeRO-1": dict(dp_shard=4, zero=1),
        "ZeRO-2": dict(dp_shard=4, zero=2),
        "ZeRO-3": dict(dp_shard=4, zero=3),
        "EP, ZeRO-3": dict(dp_shard=4, ep=2, zero=3, recompute=True),
        "EP, ZeRO-2, two copies": dict(dp_replicate=2, dp_shard=2, ep=2, zero=2),
    },
    2: {
        "DP": dict(dp_replicate=2),
        "EP": dict(dp_replicate=2, ep=2, recompute=True),
        "ZeRO-1": dict(dp_shard=2, zero=1),
        "ZeRO-2": dict(dp_shard=2, zero=2),
        "ZeRO-3": dict(dp_shard=2, zero=3),
        "EP, ZeRO-2": dict(dp_shard=2, ep=2, zero=2),
    },
}
BF16 = ("EP", "ZeRO-1", "EP, ZeRO-2")
# One run that goes on in another layout, on 4, 2 and 1 processes: plans and steps, by how many plans there are.
CHANGING = {len(PLANS[4]): [("EP, ZeRO-3", 2), ("EP on two nodes", 1)], len(PLANS[2]): [("EP, ZeRO-2", 1)]}
CASES = [(count, name) for count, plans in PLANS.items() for name in plans]


def train(run: Trainer, count: int = STEPS) -> None:
    """Some steps and a checkpoint, and what the steps reported beside it, with the exchanges of the last."""
    found = [run.train_step().to_log() for _ in range(count - 1)]
    with Exchanges() as messages:
        found.append(run.train_step().to_log())
    found[-1]["units"] = len(units(run.model))
    found[-1]["gathers"] = messages.calls["c10d::_allgather_base_"]
    found[-1]["scatters"] = messages.calls["c10d::_reduce_scatter_base_"]
    keep(run, found)


def train_all(rank: int, folder: Path, plans: dict[str, dict[str, int]]) -> None:
    for name, plan in plans.items():
        train(planned(folder / name, CFG, plan))
    for name, count in CHANGING[len(plans)]:
        train(planned(folder.parent / "changing", CFG, plans[name]), count)
    for name in BF16 if len(plans) == len(PLANS[2]) else ():
        train(planned(folder / f"{name} BF16", CFG, plans[name], IN_BF16))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, in folders: one/, and 2/NAME, 4/NAME."""
    root = tmp_path_factory.mktemp("runs")
    for recipe in (RECIPE, IN_BF16):
        torch.manual_seed(0)
        train(trainer(root / f"one {recipe.precision}", CFG, recipe=recipe))
    for count, plans in PLANS.items():
        (root / str(count)).mkdir()
        together(count, train_all, root / str(count), plans)
    train(trainer(root / "changing", CFG), 1)
    return root


@pytest.mark.parametrize(("count", "name"), [*CASES, (".", "changing")])
def test_many_processes_take_the_steps_of_one(runs: Path, count: int | str, name: str) -> None:
    assert_same_run(runs / str(count) / name, runs / "one fp32")


@pytest.mark.parametrize("count", PLANS)
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_each_zero_form_sends_what_it_says(runs: Path, count: int, zero: int) -> None:
    """Gradients are summed once a step or once a micro-batch; weights gathered once a step, or forward and backward."""
    last = reports(runs / str(count) / f"ZeRO-{zero}")[-1]
    # Embedding, norm and head; two blocks; MTP's module and its block; experts of the sparse block and of MTP's.
    assert last["units"] == 7
    parts = math.ceil(math.ceil(BATCH / count) / 2)
    assert last["scatters"] == last["units"] * (1 if zero == 1 else parts)
    once, twice = last["units"], parts * (2 * last["units"] - 1)  # the head's unit stays from forward to backward
    # torch gathers the next unit ahead of its turn, and now and then one that is done.
    assert last["gathers"] - (twice if zero == 3 else once) in (0, 1)


def test_the_steps_are_large_beside_the_tolerance(runs: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = trainer(tmp_path / "run", CFG).optimizer.masters
    end = last(runs / "one fp32").tensors
    for name, weight in start.items():
        assert (end[f"master.{name}"] - weight).abs().max() > 20 * 1e-5, name


@pytest.mark.parametrize(("count", "name"), [(4, "EP on two nodes"), (2, "ZeRO-3")])
def test_one_process_goes_on_where_many_stopped(runs: Path, count: int, name: str) -> None:
    many, one = trainer(runs / str(count) / name, CFG), trainer(runs / "one fp32", CFG)
    assert many.step == one.step == STEPS
    assert many.train_step().loss == pytest.approx(one.train_step().loss, abs=1e-5)


@pytest.mark.parametrize("name", BF16)
def test_bf16_is_that_of_one_process(runs: Path, name: str) -> None:
    assert_same_in_bf16(runs / "2" / f"{name} BF16", runs / "one bf16", alike=0.99)


def test_micro_batches_are_as_many_in_every_process() -> None:
    for batch in range(4, 40):
        for micro in range(1, 9):
            rows = torch.arange(batch)[:, None]
            parts = [Team(rank=r, count=4, mesh=None, layouts={}).own_parts(rows, micro) for r in range(4)]
            assert len({len(own) for own in parts}) == 1
            assert all(len(part) for own in parts for part in own)
            assert sorted(int(row) for own in parts for part in own for row in part) == list(range(batch))
            assert max(len(part) for own in parts for part in own) <= micro + 1
