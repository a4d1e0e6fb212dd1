"""Two processes that share each batch against one that has it alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nano_runs import NANO, interrupted, nano_recipe, small_tokenizer
from safetensors.torch import load_file

from dsv3_mini.errors import ConfigError
from dsv3_mini.train.replicas import Replicas
from dsv3_mini.train.trainer import Trainer

TOKENS = 4096


def command(folder: Path, processes: int, tokens: int = TOKENS) -> list[str]:
    words = f"-m dsv3_mini.cli train --preset nano --tokens {tokens} --threads 1 --judge 0 --processes {processes}"
    return [sys.executable, *words.split(), "--out", str(folder)]


def train(folder: Path, processes: int) -> list[dict]:
    subprocess.run(command(folder, processes), check=True, timeout=300, capture_output=True)
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


def test_what_is_wrong_is_said_once_and_in_one_line(tmp_path: Path) -> None:
    """Not once a process, and without the launcher's report: a mistake that is only found where the run begins."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.json").write_text("{}")
    done = subprocess.run(command(folder, 2), timeout=300, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"dsv3 train: [^\n]*recipe\.json[^\n]*\n", done.stderr), done.stderr


def test_ctrl_c_reaches_all_processes_and_they_save(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    printed = interrupted(command(folder, 2, tokens=2_000_000), folder)
    assert re.search(r"stopped after step \d+ .* saved: the same command goes on from here", printed)
    assert list(folder.glob("checkpoints/*/state.json")) or list(folder.rglob("state.json"))
