"""Runs of five steps by processes that share the work, and what must be as in one process: for tests of teams.

The batch does not come out even (11 rows over 4 processes, micro-batches of 2), some rows are mostly padding, and MTP
rests in the first step: what is averaged where it should be added up, or counted twice, shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Int
from nano_runs import nano_recipe, small_tokenizer
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.parallel.pipeline_team import join
from dsv3_mini.parallel.plan import ParallelPlan
from dsv3_mini.train.checkpoint import Checkpoint, checkpoints, load_checkpoint
from dsv3_mini.train.recipe import Recipe
from dsv3_mini.train.replicas import ALONE, Replicas
from dsv3_mini.train.schedules import constant, steps
from dsv3_mini.train.trainer import Trainer

STEPS, BATCH, LENGTH = 5, 11, 12
RECIPE = nano_recipe(
    steps=STEPS, batch=BATCH, seq_len=LENGTH, micro_batch=2,
    # The report's learning rate. Adam divides each gradient by its own size, so that a weight whose gradient nearly cancels
    # follows the order of sums: by a hundredth of a step, here 2e-6. That gradients themselves agree is asked of the moments.
    learning_rate=constant("learning_rate", 2.2e-4),
    mtp_lambda=steps("mtp_lambda", 0.0, (BATCH * LENGTH, 0.3)),
    alpha=1e-2,
)  # fmt: skip
SUMS = ("loss", "mtp_loss", "balance_loss", "grad_norm")


def shape(layers: int) -> ModelConfig:
    return ModelConfig.preset("nano", vocab_size=512, num_hidden_layers=layers)


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


def trainer(folder: Path, cfg: ModelConfig, replicas: Replicas = ALONE, recipe: Recipe = RECIPE) -> Trainer:
    return Trainer(folder, cfg, recipe, small_tokenizer(), Rows, replicas=replicas)


def planned(folder: Path, cfg: ModelConfig, plan: dict[str, Any], recipe: Recipe = RECIPE) -> Trainer:
    """A run of the processes that have met."""
    return trainer(folder, cfg, join(ParallelPlan(**plan), cfg), recipe)


def keep(run: Trainer, found: list[dict[str, Any]]) -> None:
    """A checkpoint, and what the steps reported beside it."""
    run.save()
    if run.replicas.first:
        with (run.folder / "reports.jsonl").open("a") as file:
            file.writelines(json.dumps(report) + "\n" for report in found)


def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "reports.jsonl").read_text().splitlines()]


def last(folder: Path) -> Checkpoint:
    return load_checkpoint(checkpoints(folder)[-1])


def assert_same_step(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["step"] == expected["step"]
    for what in SUMS:
        assert found[what] == pytest.approx(expected[what], rel=1e-5, abs=1e-5), f"step {expected['step']}: {what}"
    assert found["load"] == expected["load"]  # every choice counted, and counted once


def assert_same_run(many: Path, one: Path) -> None:
    """FP32: every step's losses, and in the end weights and averages, within 1e-5; biases to the bit."""
    assert len(reports(one)) == STEPS
    for expected, found in zip(reports(one), reports(many), strict=True):
        assert_same_step(found, expected)
    expected, found = last(one).tensors, last(many).tensors
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if key.startswith("gate_bias."):
            assert torch.equal(found[key], tensor) and tensor.any(), key
        elif key.startswith("exp_avg"):
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5 * float(tensor.abs().max()), msg=key)
        else:
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5, msg=key)


def assert_same_in_bf16(many: Path, one: Path, alike: float) -> None:
    """Masters stay FP32; a sum in another order rounds to another BF16 number, 1 part in 256, in a few places.

    Args:
        alike: the cosine between moments, and between masters, at least.
    """
    for expected, found in zip(reports(one), reports(many), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-3)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-2)
    moments = (last(folder).tensors for folder in (one, many))
    for (key, tensor), found in zip(*(sorted(m.items()) for m in moments), strict=True):
        if key.startswith(("exp_avg.", "master.")):
            assert found[1].dtype == torch.float32
            assert torch.cosine_similarity(tensor.flatten(), found[1].flatten(), dim=0) > alike, key
