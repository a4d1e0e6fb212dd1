"""Runs of seconds: the nano model on stories and sums, read through the first 504 tokens of the shipped tokenizer."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.data.stream import TokenStream
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.train.balance import routers
from dsv3_mini.train.recipe import Recipe
from dsv3_mini.train.schedules import constant
from dsv3_mini.train.trainer import Trainer

MIXTURE = {"stories": 0.6, "sums": 0.4}
NANO = ModelConfig.preset("nano", vocab_size=512)


@cache
def small_tokenizer() -> Tokenizer:
    """512 tokens, special tokens included: what the nano model can read."""
    return Tokenizer.from_ranks(Tokenizer.shipped().ranks[:504])


def nano_recipe(steps: int = 8, batch: int = 4, seq_len: int = 32, **changes: Any) -> Recipe:
    """`steps` steps of a constant batch; the learning rate warms up at once. Any field can be changed."""
    tokens = steps * batch * seq_len
    fixed = {
        "learning_rate": constant("learning_rate", 3e-3),
        "batch_size": constant("batch_size", batch),
        "context": constant("context", seq_len),
        "gamma": constant("gamma", 0.01),
        "mtp_lambda": constant("mtp_lambda", 0.3),
        "mixture": MIXTURE,
        "checkpoint_every": 10**9,
        "evaluate_every": 10**9,
    }
    return Recipe.preset("nano").replace(**{"total_tokens": tokens, **fixed, **changes})


def nano_trainer(folder: Path, recipe: Recipe | None = None, cfg: ModelConfig | None = None) -> Trainer:
    """A trainer whose stream is made in small blocks, so that runs of seconds cross from block to block."""
    recipe, tokenizer = recipe or nano_recipe(), small_tokenizer()

    def open_stream(context: int) -> TokenStream:
        return TokenStream(tokenizer, context, recipe.mixture, seed=recipe.seed, block_rows=16)

    return Trainer(folder, cfg or NANO, recipe, tokenizer, open_stream)


def all_state(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that a run ends with: weights in the model, masters, moments, averages, biases."""
    state = {f"model.{name}": tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}
    state |= {name: tensor.clone() for name, tensor in trainer.optimizer.tensors().items()}
    return state | {f"bias.{r.layer}": r.e_score_correction_bias.clone() for r in routers(trainer.model)}


def assert_bit_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    differing = [name for name in left if not torch.equal(left[name], right[name])]
    assert not differing, f"{len(differing)} of {len(left)} tensors differ, first {differing[0]}"


def interrupted(command: Sequence[str], folder: Path) -> str:
    """What a run in `folder` prints when Ctrl-C meets it after it has begun; it must end well and complain of nothing."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None and not (folder / "log.jsonl").exists():
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            printed, complaints = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (process.returncode, complaints) == (0, "")
    return printed
