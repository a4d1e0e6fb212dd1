"""Processes that share weights, experts, batches and layers, against one process that has it all: the same five steps.

The batch does not come out even (11 rows over 4 processes, micro-batches of 2), some rows are mostly padding, and MTP
rests in the first step: what is averaged where it should be added up, or counted twice, shows.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jaxtyping import Int
from nano_runs import nano_recipe, small_tokenizer
from ranks import together
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_mini.config import ModelConfig
from dsv3_mini.parallel.pipeline_team import join
from dsv3_mini.parallel.plan import ParallelPlan
from dsv3_mini.parallel.sharding import units
from dsv3_mini.parallel.team import Team
from dsv3_mini.parallel.torch_schedules import ONE_STAGE, TORCH_SCHEDULES
from dsv3_mini.train.checkpoint import Checkpoint, checkpoints, load_checkpoint
from dsv3_mini.train.replicas import ALONE, Replicas
from dsv3_mini.train.schedules import constant, steps
from dsv3_mini.train.trainer import Trainer

STEPS, BATCH, LENGTH = 5, 11, 12
# By their layers: of 4, two processes have two stages each; of 8, four do.
CFGS = {layers: ModelConfig.preset("nano", vocab_size=512, num_hidden_layers=layers) for layers in (2, 4, 8)}
RECIPE = nano_recipe(
    steps=STEPS, batch=BATCH, seq_len=LENGTH, micro_batch=2,
    # The report's learning rate. Adam divides each gradient by its own size, so that a weight whose gradient nearly cancels
    # follows the order of sums: by a hundredth of a step, here 2e-6. That gradients themselves agree is asked of the moments.
    learning_rate=constant("learning_rate", 2.2e-4),
    mtp_lambda=steps("mtp_lambda", 0.0, (BATCH * LENGTH, 0.3)),
    alpha=1e-2,
)  # fmt: skip
# Eight layers follow the order of sums further than two: where four processes have eight stages, it is that of one process,
# eight micro-batches of a row. A first step without MTP would be eight rows long.
RECIPES = {2: RECIPE, 4: RECIPE, 8: RECIPE.replace(
    batch_size=constant("batch_size", 8), micro_batch=1, mtp_lambda=steps("mtp_lambda", 0.0, (8 * LENGTH, 0.3))
)}  # fmt: skip

Plans = dict[str, dict[str, Any]]
# Processes, layers, and what each plan is.
PLANS: dict[tuple[int, int], Plans] = {
    (4, 2): {
        "DP": dict(dp_replicate=4),
        "EP": dict(dp_replicate=4, ep=2),
        "EP on two nodes": dict(dp_replicate=4, ep=4, ep_nodes=2),
        "ZeRO-1": dict(dp_shard=4, zero=1),
        "ZeRO-2": dict(dp_shard=4, zero=2),
        "ZeRO-3": dict(dp_shard=4, zero=3),
        "EP, ZeRO-3": dict(dp_shard=4, ep=2, zero=3, recompute=True),
        "EP, ZeRO-2, two copies": dict(dp_replicate=2, dp_shard=2, ep=2, zero=2),
    },
    (2, 2): {
        "DP": dict(dp_replicate=2),
        "EP": dict(dp_replicate=2, ep=2, recompute=True),
        "ZeRO-1": dict(dp_shard=2, zero=1),
        "ZeRO-2": dict(dp_shard=2, zero=2),
        "ZeRO-3": dict(dp_shard=2, zero=3),
        "EP, ZeRO-2": dict(dp_shard=2, ep=2, zero=2),
    },
    (4, 4): {
        "PP": dict(pp=4),
        "DP, PP": dict(pp=2, dp_replicate=2, recompute=True),
        "EP, PP": dict(pp=2, dp_replicate=2, ep=2),
        "EP, PP, interleaved": dict(pp=2, dp_replicate=2, ep=2, schedule="Interleaved1F1B"),
        "EP, PP, zero bubble": dict(pp=2, dp_replicate=2, ep=2, schedule="InterleavedZeroBubble"),
        "EP, PP, DualPipeV": dict(pp=2, dp_replicate=2, ep=2, schedule="DualPipeV"),
        "ZeRO-1, PP": dict(pp=2, dp_shard=2, zero=1),
        "EP, ZeRO-1, PP, DualPipeV": dict(pp=2, dp_shard=2, ep=2, zero=1, schedule="DualPipeV"),
    },
    (2, 4): {f"PP, {name}": dict(pp=2, schedule=name) for name in TORCH_SCHEDULES},
    (4, 8): {f"PP, {name}": dict(pp=4, schedule=name) for name in TORCH_SCHEDULES if name not in ONE_STAGE},
}
BF16 = {
    (2, 2): ("EP", "ZeRO-1", "EP, ZeRO-2"),
    (4, 4): ("EP, PP", "EP, PP, zero bubble", "EP, ZeRO-1, PP, DualPipeV"),
}
# Runs that go on in another layout, on 4, 2 and 1 processes: plans and steps, by processes and layers.
CHANGING = {
    (4, 2): [("EP, ZeRO-3", 2), ("EP on two nodes", 1)],
    (2, 2): [("EP, ZeRO-2", 1)],
    (4, 4): [("EP, PP", 1), ("EP, ZeRO-1, PP, DualPipeV", 1), ("EP, PP, zero bubble", 1)],
    (2, 4): [("PP, DualPipeV", 1)],
}
# Where the checkpoint of four processes, two stages by two that share experts, goes on.
RESUMING: dict[int, Plans] = {
    4: {"ZeRO-3": dict(dp_shard=4, ep=2), "PP, DualPipeV": dict(pp=2, dp_shard=2, zero=1, schedule="DualPipeV")},
    2: {"EP": dict(dp_replicate=2, ep=2), "PP, zero bubble": dict(pp=2, schedule="ZBVZeroBubble")},
    1: {"one": {}},
}
CASES = [(count, layers, name) for (count, layers), plans in PLANS.items() for name in plans]


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


def trainer(folder: Path, layers: int, replicas: Replicas = ALONE, precision: str = "fp32") -> Trainer:
    recipe = RECIPES[layers].replace(precision=precision)
    return Trainer(folder, CFGS[layers], recipe, small_tokenizer(), Rows, replicas=replicas)


def planned(folder: Path, layers: int, plan: dict[str, Any], precision: str = "fp32") -> Trainer:
    return trainer(folder, layers, join(ParallelPlan(**plan), CFGS[layers]), precision)


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


def train_all(rank: int, folder: Path, count: int) -> None:
    for (processes, layers), plans in PLANS.items():
        if processes != count:
            continue
        for name, plan in plans.items():
            train(planned(folder / str(layers) / name, layers, plan))
        for name, taken in CHANGING.get((count, layers), ()):
            train(planned(folder.parent / f"changing {layers}", layers, plans[name]), taken)
        for name in BF16.get((count, layers), ()):
            train(planned(folder / str(layers) / f"{name} BF16", layers, plans[name], "bf16"))
    written = folder.parent / "4" / "4" / "EP, PP"
    for name, plan in RESUMING[count].items():
        copy = folder / "resumed" / name
        if rank == 0:
            shutil.copytree(written, copy)
        dist.barrier()
        train(planned(copy, 4, plan), 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, in folders: "one LAYERS PRECISION", and PROCESSES/LAYERS/NAME."""
    root = tmp_path_factory.mktemp("runs")
    for layers, precision in ((2, "fp32"), (4, "fp32"), (8, "fp32"), (2, "bf16"), (4, "bf16")):
        torch.manual_seed(0)
        train(trainer(root / f"one {layers} {precision}", layers, precision=precision))
    for count in (4, 2):
        (root / str(count)).mkdir()
        together(count, train_all, root / str(count), count)
    for layers in (2, 4):
        train(trainer(root / f"changing {layers}", layers), 1)
    shutil.copytree(root / "4" / "4" / "EP, PP", root / "1" / "resumed" / "one")
    train(trainer(root / "1" / "resumed" / "one", 4), 1)
    return root


def last(folder: Path) -> Checkpoint:
    return load_checkpoint(checkpoints(folder)[-1])


@pytest.mark.parametrize(
    ("folder", "layers"),
    [*((f"{count}/{layers}/{name}", layers) for count, layers, name in CASES), ("changing 2", 2), ("changing 4", 4)],
)
def test_many_processes_take_the_steps_of_one(runs: Path, folder: str, layers: int) -> None:
    one, many = runs / f"one {layers} fp32", runs / folder
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


@pytest.mark.parametrize("count", [4, 2])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_each_zero_form_sends_what_it_says(runs: Path, count: int, zero: int) -> None:
    """Gradients are summed once a step or once a micro-batch; weights gathered once a step, or forward and backward."""
    last = reports(runs / str(count) / "2" / f"ZeRO-{zero}")[-1]
    # Embedding, norm and head; two blocks; MTP's module and its block; experts of the sparse block and of MTP's.
    assert last["units"] == 7
    parts = math.ceil(math.ceil(BATCH / count) / 2)
    assert last["scatters"] == last["units"] * (1 if zero == 1 else parts)
    once, twice = last["units"], parts * (2 * last["units"] - 1)  # the head's unit stays from forward to backward
    # torch gathers the next unit ahead of its turn, and now and then one that is done.
    assert last["gathers"] - (twice if zero == 3 else once) in (0, 1)


@pytest.mark.parametrize("layers", CFGS)
def test_the_steps_are_large_beside_the_tolerance(runs: Path, tmp_path: Path, layers: int) -> None:
    torch.manual_seed(0)
    start = trainer(tmp_path / "run", layers).optimizer.masters
    end = last(runs / f"one {layers} fp32").tensors
    for name, weight in start.items():
        assert (end[f"master.{name}"] - weight).abs().max() > 20 * 1e-5, name


@pytest.mark.parametrize(("count", "name"), [(4, "EP on two nodes"), (2, "ZeRO-3")])
def test_one_process_goes_on_where_many_stopped(runs: Path, count: int, name: str) -> None:
    many, one = trainer(runs / str(count) / "2" / name, 2), trainer(runs / "one 2 fp32", 2)
    assert many.step == one.step == STEPS
    assert many.train_step().loss == pytest.approx(one.train_step().loss, abs=1e-5)


def test_stages_and_experts_on_four_processes_go_on_anywhere(runs: Path) -> None:
    """What EP 2 x PP 2 wrote, on 1, 2 and 4 processes in another layout: the step that one process would take next."""
    one = trainer(runs / "one 4 fp32", 4).train_step().to_log()
    resumed = [runs / str(count) / "resumed" / name for count, plans in RESUMING.items() for name in plans]
    assert len(resumed) == 5
    for folder in resumed:
        found = reports(folder)
        assert [report["step"] for report in found] == [*range(1, STEPS + 2)], folder
        for what in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
            assert found[-1][what] == pytest.approx(one[what], rel=1e-5, abs=1e-5), (folder, what)
        assert found[-1]["load"] == {str(layer): load for layer, load in one["load"].items()}


BF16_CASES = [(count, layers, name) for (count, layers), names in BF16.items() for name in names]


@pytest.mark.parametrize(("count", "layers", "name"), BF16_CASES)
def test_bf16_is_that_of_one_process(runs: Path, count: int, layers: int, name: str) -> None:
    """Masters stay FP32; a sum in another order rounds to another BF16 number, 1 part in 256, in a few places."""
    one, many = runs / f"one {layers} bf16", runs / str(count) / str(layers) / f"{name} BF16"
    for expected, found in zip(reports(one), reports(many), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-3)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-2)
    moments = (last(folder).tensors for folder in (one, many))
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
