"""Recipe: all that a pre-training run is besides its model and its data (report section 4.2), and the presets.

`deepseek-v3` holds the report's own values. The small presets keep its shape (five pieces of learning rate, a growing
batch, gamma switched off and lambda lowered near the end) with values that suit a model of millions of parameters.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dsv3_mini.data.stream import MIXTURE
from dsv3_mini.errors import ConfigError
from dsv3_mini.train.schedules import Piece, Schedule, constant, steps, tokens_after

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Precisions, and what each keeps all that is not FP8 in."""


@dataclass(frozen=True)
class Recipe:
    """How a run trains. Schedules are functions of tokens seen; `batch_size` and `micro_batch` count sequences.

    Raises:
        ConfigError: a field breaks a rule; the message names the field, its value and the rule.
    """

    total_tokens: int
    learning_rate: Schedule
    batch_size: Schedule
    context: Schedule
    gamma: Schedule
    mtp_lambda: Schedule
    alpha: float = 1e-4
    micro_batch: int = 16
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    ema_decay: float = 0.99
    precision: str = "fp32"  # or "bf16", "fp8": of weights and activations; the optimizer keeps FP32 masters always
    head_from_embedding: bool = False  # start the head as a copy of the embedding; they part with the first step
    seed: int = 0
    mixture: Mapping[str, float] = field(default_factory=lambda: dict(MIXTURE))
    log_every: int = 10  # steps
    evaluate_every: int = 1_000_000  # tokens
    checkpoint_every: int = 500_000  # tokens

    def __post_init__(self) -> None:
        for name in ("total_tokens", "micro_batch", "log_every", "evaluate_every", "checkpoint_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} = {value!r} must be a whole number of at least 1")
        for name in ("learning_rate", "batch_size", "context", "gamma", "mtp_lambda"):
            if not isinstance(getattr(self, name), Schedule):
                raise ConfigError(
                    f"{name} = {getattr(self, name)!r} must be a Schedule: constant({name!r}, value) is one"
                )
        for name in ("alpha", "weight_decay"):
            if not _is_number(getattr(self, name)) or getattr(self, name) < 0:
                raise ConfigError(f"{name} = {getattr(self, name)!r} must be a number of at least 0")
        if not _is_number(self.clip_norm) or self.clip_norm <= 0:
            raise ConfigError(f"clip_norm = {self.clip_norm!r} must be a number above 0")
        if not _is_number(self.ema_decay) or not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay = {self.ema_decay!r} must be at least 0 and below 1")
        if self.precision not in DTYPES:
            raise ConfigError(f"precision = {self.precision!r} must be 'fp32', 'bf16' or 'fp8'")
        betas = self.betas if isinstance(self.betas, tuple) else ()
        if len(betas) != 2 or not all(_is_number(value) and 0 <= value < 1 for value in betas):
            raise ConfigError(f"betas = {self.betas!r} must be two numbers, at least 0 and below 1")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Recipe:
        """A named recipe with any field changed. `total_tokens` stretches the preset's schedules to its length."""
        known = PRESETS | EXTENSIONS
        if name not in known:
            raise ConfigError(f"recipe {name!r} is not known: choose one of {', '.join(known)}")
        return known[name]().replace(**changes)

    def replace(self, **changes: Any) -> Recipe:
        names = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                raise ConfigError(f"{name} is not a field of Recipe" + (f": did you mean {close[0]}?" if close else ""))
        total = changes.get("total_tokens", self.total_tokens)
        recipe = self
        if isinstance(total, int) and total > 0 and total != self.total_tokens:
            factor = total / self.total_tokens
            schedules = {n: getattr(self, n).stretched(factor) for n in names if isinstance(getattr(self, n), Schedule)}
            recipe = dataclasses.replace(self, **schedules)
        return dataclasses.replace(recipe, **changes)


def deepseek_v3() -> Recipe:
    """Report section 4.2, token for token: 14.8T of them, AdamW, the two context extensions not counted."""
    trillion = 1e12
    context = constant("context", 4096)
    batch_size = Schedule("batch_size", (Piece(0.469 * trillion, 3072, 15360),))
    warmup = tokens_after(2000, batch_size, context)
    return Recipe(
        total_tokens=int(14.8 * trillion),
        learning_rate=Schedule(
            "learning_rate",
            (
                Piece(warmup, 0.0, 2.2e-4),
                Piece(10.0 * trillion, 2.2e-4, 2.2e-4),
                Piece(14.3 * trillion, 2.2e-4, 2.2e-5, "cosine"),
                Piece(14.633 * trillion, 2.2e-5, 2.2e-5),
                Piece(14.8 * trillion, 7.3e-6, 7.3e-6),
            ),
        ),
        batch_size=batch_size,
        context=context,
        gamma=steps("gamma", 0.001, (14.3 * trillion, 0.0)),
        mtp_lambda=steps("mtp_lambda", 0.3, (10.0 * trillion, 0.1)),
        alpha=1e-4,
        precision="bf16",
        checkpoint_every=10**11,
        evaluate_every=10**11,
    )


def tiny() -> Recipe:
    """A laptop, less than an hour. The report's shape; a higher learning rate and small batches, as small models take them.

    Gamma starts above the report's, since biases have some thousand steps to find their place and not a million. Two things
    are not of the report. The head starts as a copy of the embedding: what is to be repeated is then found by *one* map from
    what was read to what is written, where two tables of their own would have to learn it word by word. And MTP, which is
    two fifths of the arithmetic at this size, rests until the model itself has learnt the most.
    """
    million = 1e6
    return Recipe(
        total_tokens=13_000_000,
        learning_rate=Schedule(
            "learning_rate",
            (
                Piece(0.15 * million, 0.0, 2.4e-3),
                Piece(6.0 * million, 2.4e-3, 2.4e-3),
                Piece(12.2 * million, 2.4e-3, 1.2e-4, "cosine"),
                Piece(12.6 * million, 1.2e-4, 1.2e-4),
                Piece(13.0 * million, 4e-5, 4e-5),
            ),
        ),
        batch_size=Schedule("batch_size", (Piece(7.0 * million, 8, 16),)),
        context=constant("context", 208),
        gamma=steps("gamma", 0.005, (6.0 * million, 0.002), (12.2 * million, 0.0005), (12.6 * million, 0.0)),
        mtp_lambda=steps("mtp_lambda", 0.0, (10.0 * million, 0.3), (12.2 * million, 0.1)),
        alpha=1e-3,
        head_from_embedding=True,
        mixture={"stories": 0.76, "sums": 0.12, "code": 0.06, "prose": 0.06},
        log_every=20,
    )


def nano() -> Recipe:
    """Seconds: for tests and for the first look at a run."""
    return Recipe(
        total_tokens=32_768,
        learning_rate=Schedule(
            "learning_rate",
            (
                Piece(2_048, 0.0, 3e-3),
                Piece(20_480, 3e-3, 3e-3),
                Piece(28_672, 3e-3, 3e-4, "cosine"),
                Piece(30_720, 3e-4, 3e-4),
                Piece(32_768, 1e-4, 1e-4),
            ),
        ),
        batch_size=Schedule("batch_size", (Piece(8_192, 4, 8),)),
        context=constant("context", 64),
        gamma=steps("gamma", 0.01, (30_720, 0.0)),
        mtp_lambda=steps("mtp_lambda", 0.3, (20_480, 0.1)),
        micro_batch=8,
        log_every=1,
        evaluate_every=16_384,
        checkpoint_every=4_096,
    )


PRESETS = {"deepseek-v3": deepseek_v3, "tiny": tiny, "nano": nano}


# ---- context extension (report section 4.3): a training that starts from a trained model, stretched by YaRN --------------


def deepseek_v3_phase(context: int, batch_size: int) -> Recipe:
    """1,000 steps at the last learning rate of pre-training; the report gives context, batch size and rate."""
    return Recipe(
        total_tokens=1000 * context * batch_size,
        learning_rate=constant("learning_rate", 7.3e-6),
        batch_size=constant("batch_size", batch_size),
        context=constant("context", context),
        gamma=constant("gamma", 0.0),
        mtp_lambda=constant("mtp_lambda", 0.1),
        alpha=1e-4,
        precision="bf16",
        checkpoint_every=10**10,
        evaluate_every=10**10,
    )


def tiny_4x() -> Recipe:
    """The first phase for `tiny`: from rows of 208 tokens to rows of 832, on twelve million tokens.

    The report's rate here is the last one of pre-training, over 63 billion tokens. Twelve million leave no time for that: the
    rate begins above the one that pre-training ended with, and comes down to it. Short texts stay in the mixture, so that
    what the model could do at the old length is not lost. MTP rests.
    """
    million = 1e6
    return Recipe(
        total_tokens=12_000_000,
        learning_rate=Schedule(
            "learning_rate",
            (
                Piece(0.1 * million, 0.0, 7e-4),
                Piece(4.5 * million, 7e-4, 7e-4),
                Piece(11.4 * million, 7e-4, 4e-5, "cosine"),
                Piece(12.0 * million, 4e-5, 4e-5),
            ),
        ),
        batch_size=Schedule("batch_size", (Piece(1.5 * million, 2, 4),)),
        context=constant("context", 832),
        gamma=constant("gamma", 0.0),
        mtp_lambda=constant("mtp_lambda", 0.0),
        alpha=1e-3,
        seed=1,
        mixture={"stories": 0.52, "sums": 0.05, "code": 0.04, "prose": 0.04, "long_stories:655": 0.35},
        log_every=10,
        checkpoint_every=250_000,
    )


def tiny_16x() -> Recipe:
    """The second phase for `tiny`: from rows of 832 tokens to rows of 3,328, on two million tokens, twice as many a step as before.

    The model has learnt in the first phase to look back for what a question asks. Now it has to do so over four times the
    distance, at rotations that YaRN has slowed again.
    """
    million = 1e6
    return Recipe(
        total_tokens=2_000_000,
        learning_rate=Schedule(
            "learning_rate",
            (
                Piece(0.05 * million, 0.0, 5e-4),
                Piece(0.8 * million, 5e-4, 5e-4),
                Piece(1.9 * million, 5e-4, 4e-5, "cosine"),
                Piece(2.0 * million, 4e-5, 4e-5),
            ),
        ),
        batch_size=constant("batch_size", 2),
        context=constant("context", 3328),
        gamma=constant("gamma", 0.0),
        mtp_lambda=constant("mtp_lambda", 0.0),
        alpha=1e-3,
        micro_batch=1,
        seed=2,
        mixture={
            "stories": 0.3, "sums": 0.04, "code": 0.03, "prose": 0.03, "long_stories:655": 0.2, "long_stories:2620": 0.4,
        },
        log_every=10,
        checkpoint_every=250_000,
    )  # fmt: skip


EXTENSIONS = {
    "deepseek-v3-32k": lambda: deepseek_v3_phase(32_768, 1920),
    "deepseek-v3-128k": lambda: deepseek_v3_phase(131_072, 480),
    "tiny-4x": tiny_4x,
    "tiny-16x": tiny_16x,
}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
