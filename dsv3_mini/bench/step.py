"""The training step that benchmarks time: `Trainer.train_step`, in a process set up as `dsv3 train` sets it up.

Its rows are random and here already, so that no reading of text is timed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from dsv3_mini.config import ModelConfig

if TYPE_CHECKING:
    from dsv3_mini.train.trainer import Trainer


def trainer_for(folder: str, cfg: ModelConfig, batch: int, context: int, precision: str = "fp32") -> Trainer:
    """A run in `folder` whose batches are `batch` rows of `context` tokens, one micro-batch each."""
    # Here, as the sides that are not ours would have these in their memory, too.
    from dsv3_mini.train.allocator import keep_freed_memory
    from dsv3_mini.train.recipe import Recipe
    from dsv3_mini.train.schedules import constant
    from dsv3_mini.train.trainer import Trainer

    keep_freed_memory()
    rows = Rows(cfg.vocab_size, batch, context)
    recipe = Recipe.preset(
        "tiny", total_tokens=10**9, batch_size=constant("batch_size", batch), context=constant("context", context),
        learning_rate=constant("learning_rate", 1e-3), gamma=constant("gamma", 1e-3), micro_batch=batch,
        precision=precision,
    )  # fmt: skip
    return Trainer(Path(folder), cfg, recipe, tokenizer=rows, open_stream=lambda _: rows)


class Rows:
    """The same batches of random tokens for every side; for the trainer it is stream and tokenizer in one."""

    def __init__(self, vocab_size: int, batch: int, context: int) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.n_vocab, self.pad_id = vocab_size, vocab_size - 1
        self.batch, self.seq_len = batch, context

    def next(self) -> Int[Tensor, "b s"]:
        return torch.randint(0, self.pad_id, (self.batch, self.seq_len), generator=self.random)

    def next_batch(self, batch_size: int) -> Int[Tensor, "b s1"]:
        """Padding follows each row: its last token has no target, as where transformers shifts labels within the row."""
        assert batch_size == self.batch
        return F.pad(self.next(), (0, 1), value=self.pad_id)
