"""Two processes that share each batch against one that has it alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nano_runs import NANO, nano_recipe, small_tokenizer
from safetensors.torch import load_file

from dsv3_mini.errors import ConfigError
from dsv3_mini.train.replicas import Replicas
from dsv3_mini.train.trainer import Trainer

TOKENS = 4096


def train(folder: Path, processes: int) -> list[dict]:
    command = [
        sys.executable,
        "-m",
        "dsv3_mini.cli",
        "train",
        "--preset",
        "nano",
        "--tokens",
        str(TOKENS),
        "--threads",
        "1",
    ]
    command += ["--judge", "0", "--processes", str(processes), "--out", str(folder)]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    one, two = train(tmp_path / "one", 1), train(tmp_path / "two", 2)
    assert [line["kind"] for line in one] == [line["kind"] for line in two]
    steps = [(a, b) for a, b in zip(one, two, strict=True) if a["kind"] == "step"]
    assert len(steps) >= 8
    for a, b in steps:
        # The same rows, so the same losses but for the order of sums, and whole counts of the experts' load. Later a token that
        # sits between two experts may fall to the other side.
        assert b["tokens"] == a["tokens"]
        for name in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=2e-4), name
        assert {k: sum(v) for k, v in b["load"].items()} == {k: sum(v) for k, v in a["load"].items()}
    first = steps[0]
    assert first[0]["load"] == first[1]["load"]
    weights = [load_file(next((tmp_path / name / "model").glob("*.safetensors"))) for name in ("one", "two")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name].float(), weight.float(), atol=2e-3, rtol=2e-2, msg=name)


def test_rows_are_shared_and_none_is_lost() -> None:
    rows = torch.arange(14).reshape(7, 2)
    shares = [Replicas(rank, 3).own_rows(rows) for rank in range(3)]
    assert sorted(torch.cat(shares)[:, 0].tolist()) == rows[:, 0].tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_processes_than_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size = 4 cannot be shared among 5 processes"):
        Trainer(tmp_path / "run", NANO, nano_recipe(batch=4), small_tokenizer(), replicas=Replicas(0, 5))
    assert not (tmp_path / "run").exists()
