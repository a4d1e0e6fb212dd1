"""Bits per byte: validation loss that does not depend on the tokenizer (report section 4.4)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor

from dsv3_mini.data.packing import inputs_and_targets
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.train.losses import token_losses


@torch.no_grad()
def bits_per_byte(model: DeepSeekV3, rows: Int[Tensor, "b s1"], n_bytes: int, pad_id: int, batch: int = 16) -> float:
    """Bits that the model needs for each byte of text.

    Args:
        rows: held-out token rows. n_bytes: how many bytes of text their targets spell.
    """
    nats = 0.0
    for part in rows.split(batch):
        inputs, targets = inputs_and_targets(part, pad_id)
        states, _ = model.main_states(inputs)
        nats += token_losses(states, model.lm_head.weight, targets).double().sum().item()
    return nats / math.log(2) / n_bytes
