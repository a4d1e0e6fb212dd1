"""Held-out loss, and bits per byte: the same loss in a unit that does not depend on the tokenizer (report section 4.4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dsv3_mini.data.packing import IGNORED, inputs_and_targets
from dsv3_mini.data.stream import HeldOut
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.train.losses import token_losses


@dataclass(frozen=True)
class HeldOutLoss:
    """nats: summed over all targets. targets: how many there are."""

    nats: float
    targets: int

    @property
    def per_token(self) -> float:
        """Mean loss in nats: the validation loss."""
        return self.nats / self.targets

    def bits_per_byte(self, n_bytes: int) -> float:
        """Bits for each of the `n_bytes` of text that the targets spell."""
        return self.nats / math.log(2) / n_bytes


@torch.no_grad()
def held_out_loss(model: DeepSeekV3, rows: Int[Tensor, "b s1"], pad_id: int, batch: int = 16) -> HeldOutLoss:
    """The loss of the main model on held-out token rows; padding does not count."""
    nats, count = 0.0, 0
    for part in rows.split(batch):
        inputs, targets = inputs_and_targets(part, pad_id)
        states, _ = model.main_states(inputs)
        nats += token_losses(states, model.lm_head.weight, targets).double().sum().item()
        count += int((targets != IGNORED).sum())
    return HeldOutLoss(nats, count)


def bits_per_byte(model: DeepSeekV3, rows: Int[Tensor, "b s1"], n_bytes: int, pad_id: int, batch: int = 16) -> float:
    """Bits that the model needs for each byte of text.

    Args:
        rows: held-out token rows. n_bytes: how many bytes of text their targets spell.
    """
    return held_out_loss(model, rows, pad_id, batch).bits_per_byte(n_bytes)


def losses_by_domain(model: DeepSeekV3, held_out: Mapping[str, HeldOut], pad_id: int) -> dict[str, dict[str, float]]:
    """`validation_loss` (nats per token) and `bits_per_byte` of each domain, to four digits: as logs and scores hold them."""
    scores: dict[str, dict[str, float]] = {"validation_loss": {}, "bits_per_byte": {}}
    for domain, rows in held_out.items():
        loss = held_out_loss(model, rows.tokens.to(model.lm_head.weight.device), pad_id)
        scores["validation_loss"][domain] = round(loss.per_token, 4)
        scores["bits_per_byte"][domain] = round(loss.bits_per_byte(rows.n_bytes), 4)
    return scores
