"""Processes that share weights, experts and batches, against one process that has it all: the same five steps.

The batch does not come out even (11 rows over 4 processes, micro-batches of 2), some rows are mostly padding, and MTP
rests in the first step: what is averaged where it should be added up, or counted twice, shows.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Int
from nano_runs import nano_recipe, small_tokenizer
from ranks import together
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.parallel.plan import ParallelPlan
from dsv3_mini.parallel.sharding import units
from dsv3_mini.parallel.team import Team
from dsv3_mini.train.checkpoint import Checkpoint, checkpoints, load_checkpoint
from dsv3_mini.train.replicas import ALONE, Replicas
from dsv3_mini.train.schedules import constant, steps
from dsv3_mini.train.trainer import Trainer

STEPS, BATCH, LENGTH = 5, 11, 12
CFG = ModelConfig.preset("nano", vocab_size=512, num_hidden_layers=2)
RECIPE = nano_recipe(
    steps=STEPS, batch=BATCH, seq_len=LENGTH, micro_batch=2,
    # The report's learning rate. Adam divides each gradient by its own size, so that a weight whose gradient nearly cancels
    # follows the order of sums: by a hundredth of a step, here 2e-6. That gradients themselves agree is asked of the moments.
    learning_rate=constant("learning_rate", 2.2e-4),
    mtp_lambda=steps("mtp_lambda", 0.0, (BATCH * LENGTH, 0.3)),
    alpha=1e-2,
)  # fmt: skip

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
BF16 = ("EP", "EP, ZeRO-2")
# One run that goes on in another layout, on 4, 2 and 1 processes: plans and steps, by how many plans there are.
CHANGING = {len(PLANS[4]): [("EP, ZeRO-3", 2), ("EP on two nodes", 1)], len(PLANS[2]): [("EP, ZeRO-2", 1)]}
CASES = [(count, name) for count, plans in PLANS.items() for name in plans]


class Rows:
    """Random rows of fixed numbers; every third is padding from its middle on."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len, self.read = seq_len, 0

    def next_batch(self, batch_size: int) -> Int[Tensor, "b s1"]:
        draw = torch.Generator().manual_seed(self.read)
        rows = torch.randint(0, 500, (batch_size, self.seq_len + 1), generator=draw)
        rows[::3, self.seq_len // 2 :] = small_tokenizer().pad_id
        self.read += 1
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.read = state["read"]

    def close(self) -> None: ...


def trainer(folder: Path, replicas: Replicas = ALONE, precision: str = "fp32") -> Trainer:
    return Trainer(folder, CFG, RECIPE.replace(precision=precision), small_tokenizer(), Rows, replicas=replicas)


class Messages(TorchDispatchMode):
    """Counts what torch does, exchanges included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def train(run: Trainer, count: int = STEPS) -> None:
    """Some steps and a checkpoint, and what the steps reported beside it, with the exchanges of the last."""
    reports = [run.train_step().to_log() for _ in range(count - 1)]
    with Messages() as messages:
        reports.append(run.train_step().to_log())
    reports[-1]["units"] = len(units(run.model))
    reports[-1]["gathers"] = messages.calls["c10d::_allgather_base_"]
    reports[-1]["scatters"] = messages.calls["c10d::_reduce_scatter_base_"]
    run.save()
    if run.replicas.first:
        with (run.folder / "reports.jsonl").open("a") as file:
            file.writelines(json.dumps(report) + "\n" for report in reports)


def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "reports.jsonl").read_text().splitlines()]


def train_all(rank: int, folder: Path, plans: dict[str, dict[str, int]]) -> None:
    for name, plan in plans.items():
        train(trainer(folder / name, Team.join(ParallelPlan(**plan), CFG)))
    for name, count in CHANGING[len(plans)]:
        train(trainer(folder.parent / "changing", Team.join(ParallelPlan(**plans[name]), CFG)), count)
    for name in BF16 if len(plans) == len(PLANS[2]) else ():
        train(trainer(folder / f"{name} BF16", Team.join(ParallelPlan(**plans[name]), CFG), "bf16"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, in folders: one/, and 2/NAME, 4/NAME."""
    root = tmp_path_factory.mktemp("runs")
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        train(trainer(root / f"one {precision}", precision=precision))
    for count, plans in PLANS.items():
        (root / str(count)).mkdir()
        together(count, train_all, root / str(count), plans)
    train(trainer(root / "changing"), 1)
    return root


def last(folder: Path) -> Checkpoint:
    return load_checkpoint(checkpoints(folder)[-1])


@pytest.mark.parametrize(("count", "name"), [*CASES, (".", "changing")])
def test_many_processes_take_the_steps_of_one(runs: Path, count: int | str, name: str) -> None:
    one, many = runs / "one fp32", runs / str(count) / name
    assert len(reports(one)) == STEPS
    for expected, found in zip(reports(one), reports(many), strict=True):
        for what in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
            assert found[what] == pytest.approx(expected[what], rel=1e-5, abs=1e-5), f"step {expected['step']}: {what}"
        assert found["load"] == expected["load"]  # every choice counted, and counted once
    expected, found = last(one).tensors, last(many).tensors
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if key.startswith("gate_bias."):
            assert torch.equal(found[key], tensor) and tensor.any(), key
        elif key.startswith("exp_avg"):
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5 * float(tensor.abs().max()), msg=key)
        else:
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5, msg=key)


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
    start = trainer(tmp_path / "run").optimizer.masters
    end = last(runs / "one fp32").tensors
    for name, weight in start.items():
        assert (end[f"master.{name}"] - weight).abs().max() > 20 * 1e-5, name


@pytest.mark.parametrize(("count", "name"), [(4, "EP on two nodes"), (2, "ZeRO-3")])
def test_one_process_goes_on_where_many_stopped(runs: Path, count: int, name: str) -> None:
    many, one = trainer(runs / str(count) / name), trainer(runs / "one fp32")
    assert many.step == one.step == STEPS
    assert many.train_step().loss == pytest.approx(one.train_step().loss, abs=1e-5)


@pytest.mark.parametrize("name", BF16)
def test_bf16_is_that_of_one_process(runs: Path, name: str) -> None:
    """Masters stay FP32; a sum in another order rounds to another BF16 number, 1 part in 256, in a few places."""
    many = runs / "2" / f"{name} BF16"
    for expected, found in zip(reports(runs / "one bf16"), reports(many), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-3)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-2)
    moments = (last(folder).tensors for folder in (runs / "one bf16", many))
    for (key, tensor), found in zip(*(sorted(m.items()) for m in moments), strict=True):
        if key.startswith(("exp_avg.", "master.")):
            assert found[1].dtype == torch.float32
            assert torch.cosine_similarity(tensor.flatten(), found[1].flatten(), dim=0) > 0.99, key


def test_micro_batches_are_as_many_in_every_process() -> None:
    for batch in range(4, 40):
        for micro in range(1, 9):
            rows = torch.arange(batch)[:, None]
            parts = [Team(rank=r, count=4, mesh=None, layouts={}).own_parts(rows, micro) for r in range(4)]
            assert len({len(own) for own in parts}) == 1
            assert all(len(part) for own in parts for part in own)
            assert sorted(int(row) for own in parts for part in own for row in part) == list(range(batch))
            assert max(len(part) for own in parts for part in own) <= micro + 1


def test_pipelines_are_refused() -> None:
    with pytest.raises(ConfigError, match="pp = 2 cannot be trained yet"):
        Team.join(ParallelPlan(pp=2), CFG)
