"""Runs that are killed with -9, again and again, against one that was not: equal to the bit in all that they save."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from nano_runs import nano_recipe, nano_trainer
from ranks import SERVER
from torch import Tensor

from dsv3_mini.train.checkpoint import checkpoints, load_checkpoint
from dsv3_mini.train.recipe import Recipe
from dsv3_mini.train.schedules import Piece, Schedule, steps

STEPS = 24


def recipe(precision: str) -> Recipe:
    """Everything changes on the way: rate, batch, lambda, gamma; a checkpoint every other step."""
    tokens = STEPS * 4 * 16
    return nano_recipe(
        steps=STEPS,
        seq_len=16,
        precision=precision,
        learning_rate=Schedule("learning_rate", (Piece(tokens / 2, 0.0, 3e-3), Piece(tokens, 3e-3, 3e-4, "cosine"))),
        batch_size=Schedule("batch_size", (Piece(tokens, 3, 5),)),
        gamma=steps("gamma", 0.01, (tokens * 0.8, 0.0)),
        mtp_lambda=steps("mtp_lambda", 0.3, (tokens * 0.6, 0.1)),
        checkpoint_every=2 * 4 * 16,
        micro_batch=3,
        log_every=1,
    )


def live(folder: Path, precision: str, fatal_flush: int | None) -> None:
    """One life of a run. `fatal_flush`: the flush of a checkpoint's files in which it ends."""
    torch.set_num_threads(1)
    fsync, flushed = os.fsync, 0

    def flush(handle: int) -> None:
        nonlocal flushed
        flushed += 1
        if flushed == fatal_flush:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    os.fsync = flush
    nano_trainer(folder, recipe(precision)).run()


def start(folder: Path, precision: str, fatal_flush: int | None = None) -> Any:
    process = SERVER.Process(target=live, args=(folder, precision, fatal_flush))
    process.start()
    return process


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The log's whole lines, one a step."""
    try:
        text = (folder / "log.jsonl").read_text()
    except FileNotFoundError:
        return []
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if line["kind"] == "step"]


def kill_after(process: Any, folder: Path, more_lines: int, pause: float) -> None:
    """Kill once the run has logged so many more steps, and a moment more has gone by."""
    begun, deadline = len(steps_of(folder)), time.monotonic() + 120
    while process.is_alive() and len(steps_of(folder)) < begun + more_lines and time.monotonic() < deadline:
        time.sleep(0.01)
        begun = min(begun, len(steps_of(folder)))  # a resumed run drops lines first
    time.sleep(pause)
    process.kill()


def end_of(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    last = load_checkpoint(checkpoints(folder)[-1])
    return last.tensors, {name: value for name, value in last.state.items() if name != "seconds"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_killed_at_five_random_moments_ends_bit_equal(precision: str, tmp_path: Path) -> None:
    dice = random.Random(f"five moments {precision}")
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    first = start(unbroken, precision)
    first.join()
    assert first.exitcode == 0
    # Three lives end from outside, at any point of a step; two in the middle of writing a checkpoint.
    ends = [("outside", dice.randint(2, 4)) for _ in range(3)] + [("writing", dice.randint(2, 8)) for _ in range(2)]
    for way, number in dice.sample(ends, len(ends)):
        process = start(broken, precision, number if way == "writing" else None)
        if way == "outside":
            kill_after(process, broken, number, dice.uniform(0.0, 0.05))
        process.join(timeout=120)
        assert process.exitcode == -signal.SIGKILL, f"{way} {number}: the run was to be killed, and was not"
    assert steps_of(broken)[-1]["step"] < steps_of(unbroken)[-1]["step"], "killed too late to have anything left to do"
    last = start(broken, precision)
    last.join(timeout=120)
    assert last.exitcode == 0

    (tensors, state), (expected_tensors, expected_state) = end_of(broken), end_of(unbroken)
    assert state == expected_state and state["tokens"] >= recipe(precision).total_tokens
    assert tensors.keys() == expected_tensors.keys()
    kinds = {name.split(".")[0] for name in tensors}
    assert kinds == {"master", "ema", "exp_avg", "exp_avg_sq", "step", "gate_bias", "rng"}
    differing = [name for name in tensors if not torch.equal(tensors[name], expected_tensors[name])]
    assert not differing, f"{len(differing)} of {len(tensors)} tensors differ, first {differing[0]}"

    logged = [line["step"] for line in steps_of(broken)]
    assert logged == list(range(1, state["step"] + 1)), "every step stands in the log once"
    for line, expected in zip(steps_of(broken), steps_of(unbroken), strict=True):
        for name in ("tokens", "loss", "mtp_loss", "balance_loss", "learning_rate", "grad_norm", "load"):
            assert line[name] == expected[name], f"step {line['step']}: {name}"
    assert not list((broken / "checkpoints").glob(".*")), "nothing half-written is left"
