"""From logits to the distribution that the next token is drawn from: small functions, each for one idea.

    penalised    what was already written becomes less likely (CTRL, section 4.1)
    tempered     softmax(logits / temperature): below 1 sharper, above 1 flatter, 0 is greedy
    top_p        the likeliest tokens that together hold a share p (nucleus sampling)
    min_p        the tokens that are at least a share p as likely as the likeliest

They apply in this order. The last two change which tokens remain, never the proportions between those that do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv3_mini.errors import ConfigError


def penalised(logits: Float[Tensor, "... v"], seen: Bool[Tensor, "... v"], penalty: float) -> Float[Tensor, "... v"]:
    """Logits of the tokens that were `seen`, divided by the penalty if positive, multiplied if negative."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def tempered(logits: Float[Tensor, "... v"], temperature: float) -> Float[Tensor, "... v"]:
    """softmax(logits / temperature), for a temperature above 0."""
    below_best = logits - logits.amax(dim=-1, keepdim=True)  # 0 at the best, so that no temperature can overflow it
    return (below_best / temperature).softmax(dim=-1)


def top_p(shares: Float[Tensor, "... v"], p: float) -> Float[Tensor, "... v"]:
    """The fewest tokens, likeliest first, that together hold at least `p`; all others get 0."""
    ranked, order = shares.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(dim=-1) - ranked  # what the likelier ones hold: 0 for the first, which therefore stays
    return _whole(torch.zeros_like(shares).scatter(-1, order, ranked.masked_fill(before >= p, 0.0)))


def min_p(shares: Float[Tensor, "... v"], p: float) -> Float[Tensor, "... v"]:
    """Tokens at least `p` times as likely as the likeliest; all others get 0."""
    return _whole(shares.masked_fill(shares < p * shares.amax(dim=-1, keepdim=True), 0.0))


def choose(logits: Float[Tensor, "b v"], temperature: float, generator: torch.Generator | None) -> Int[Tensor, " b"]:
    """The likeliest token of each row, or one drawn at the temperature."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial(tempered(logits, temperature), 1, generator=generator).squeeze(-1)


def seen_before(seen: Bool[Tensor, "b v"], drafts: Int[Tensor, "b j"]) -> Bool[Tensor, "b j1 v"]:
    """What stands before each of the j drafts, and before the token after them: `seen`, and the drafts up to there."""
    earlier = F.one_hot(drafts, seen.shape[-1]).cumsum(dim=1) > 0
    return seen[:, None] | torch.cat([torch.zeros_like(seen)[:, None], earlier], dim=1)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. The defaults take the likeliest one.

    Raises:
        ConfigError: a value is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        rules = (
            ("temperature", 0 <= self.temperature < math.inf, "must be at least 0"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "must be between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "must be above 0 (1 does nothing)"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ConfigError(f"{name} = {getattr(self, name)} {rule}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1

    def shares(self, logits: Float[Tensor, "... v"]) -> Float[Tensor, "... v"]:
        """The distribution that a token is drawn from, at a temperature above 0 (penalties are the caller's)."""
        shares = tempered(logits, self.temperature)
        if self.top_p < 1:
            shares = top_p(shares, self.top_p)
        if self.min_p > 0:
            shares = min_p(shares, self.min_p)
        return shares


def _whole(shares: Float[Tensor, "... v"]) -> Float[Tensor, "... v"]:
    """The same proportions, with a sum of 1."""
    return shares / shares.sum(dim=-1, keepdim=True)
