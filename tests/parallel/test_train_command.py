"""dsv3 train in processes that share weights and experts: the same run, and the same files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dsv3_mini.cli import main
from dsv3_mini.commands.train import parse_layout
from dsv3_mini.parallel.plan import ParallelPlan

WORDS = "--preset nano --tokens 1280 --threads 1 --judge 0 --mixture sums"


def train(folder: Path, *command: str) -> list[dict]:
    words = [sys.executable, "-m", *command, *WORDS.split(), "--out", str(folder)]
    done = subprocess.run(words, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """The run of one process, and its log."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    return folder, train(folder, "dsv3_mini.cli", "train")


@pytest.mark.parametrize("layout", ["dp_shard=2,ep=2,recompute", "pp=2"])
def test_torchrun_and_a_layout_give_the_run_of_one_process(
    one: tuple[Path, list[dict]], tmp_path: Path, layout: str
) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dsv3_mini.train"]
    two = train(tmp_path / "two", *torchrun, "--layout", layout)
    assert [line["kind"] for line in two] == [line["kind"] for line in one[1]]
    assert sum(line["kind"] == "step" for line in two) >= 4
    for a, b in zip(one[1], two, strict=True):
        assert b["tokens"] == a["tokens"]
        if a["kind"] == "evaluation":
            assert b["validation_loss"] == pytest.approx(a["validation_loss"], abs=2e-4)  # logged in four digits
        else:
            assert b["loss"] == pytest.approx(a["loss"], rel=2e-5) and b["load"] == a["load"]
    weights = [load_file(next((folder / "model").glob("*.safetensors"))) for folder in (one[0], tmp_path / "two")]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert (weights[1][name].float() - weight.float()).abs().max() < 2e-3, name  # a BF16 step at 0.25


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("dp_shard=2,ep=3", "ep = 3 must divide dp_shard"),
        ("dp_shard", "'dp_shard' must be one of pp, dp_replicate, dp_shard, ep, ep_nodes, tp, zero, dispatch, "),
        ("recompute=1", "'recompute=1' must be one of"),
        ("ep=2,ep=2", "'ep=2' must be one of"),
        ("shard=2", "'shard=2' must be one of"),
        ("pp=2,schedule", "'schedule' must be one of"),
        ("pp=2,schedule=DualPipe", "schedule = 'DualPipe' must be one of torch's: GPipe, 1F1B, "),
        ("pp=2,schedule=DualPipeV", "pp = 2 must be at most num_hidden_layers (3) / 2, as DualPipeV has 2 stages a process"),
        ("pp=1,dp_shard=2,schedule=DualPipeV", "schedule = 'DualPipeV' is an order of pipeline stages"),
        ("pp=2,dp_shard=2", "zero = 3 cannot go with pp = 2: "),
        ("pp=2,recompute,schedule=InterleavedZeroBubble", "schedule = 'InterleavedZeroBubble' cannot go with recompute: "),
        ("dispatch", "'dispatch' must be one of"),
        ("ep=2,dispatch=fp4", "dispatch = 'fp4' must be one of plain, fp8, deep_ep"),
        ("dp_shard=3,zero=1", "the plan is for 3 processes (pp 1 x dp_replicate 1 x dp_shard 3 x tp 1), but 2 were started"),
    ],
)  # fmt: skip
def test_a_layout_that_does_not_fit_is_one_line(layout: str, said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--preset", "nano", "--processes", "2", "--layout", layout]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("dsv3 train: ") and said in complaint and complaint.count("\n") == 1


def test_fp8_and_shared_weights_are_refused_together(capsys: pytest.CaptureFixture) -> None:
    """FSDP would round masters to BF16 before they are rounded to FP8, and nobody would notice."""
    assert main(["train", "--preset", "nano", "--precision", "fp8", "--layout", "dp_shard=2,ep=2"]) == 2
    said = "--precision fp8 does not go with dp_shard = 2 in --layout yet: use dp_replicate, with or without ep"
    assert capsys.readouterr().err == f"dsv3 train: {said}\n"


def test_a_layout_is_read_into_a_plan() -> None:
    plan = parse_layout("dp_replicate=4, ep=4,ep_nodes=2,dispatch=fp8,recompute")
    assert plan == ParallelPlan(dp_replicate=4, ep=4, ep_nodes=2, dispatch="fp8", recompute=True)
