"""The card race: four kinds of attention on one weights budget, on a task that asks for nothing but what is cached.

Cards lie on a table. Each has a name, no two the same, and some facts. For every name all its facts are asked for at once.
A reader sees a card through what its attention caches of it, so what does not fit in there cannot be answered.

    heads ask, 2 d w weights each (query and output);  groups answer, 2 d w each (key and value): heads + groups is the budget
    a latent of c numbers costs d c to make, and 2 w c for each head that rebuilds its key and value from it

Simplified: one layer, no positions, no mask, and the questions leave nothing in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from dsv3_mini.errors import ConfigError
from dsv3_mini.model.attention import attention
from dsv3_mini.model.norm import RMSNorm

WIDTH, HEAD_WIDTH = 64, 16  # d and w: keys and values are equally wide here
NAMES, CARDS, FIELDS, VALUES = 24, 12, 8, 32
STEPS, ROWS, LEARNING_RATE = 300, 32, 1e-2


@dataclass(frozen=True)
class CacheShape:
    """An attention by what it caches of a token: a key and a value for each of `groups`, or a latent of `latent` numbers.

    Raises:
        ConfigError: not exactly one of the two is given, or the groups do not divide the heads.
    """

    heads: int
    groups: int | None = None
    latent: int | None = None

    def __post_init__(self) -> None:
        if (self.groups is None) == (self.latent is None):
            raise ConfigError("give either groups (MHA, GQA, MQA) or latent (MLA): one of them says what is cached")
        if self.groups is not None and self.heads % self.groups:
            raise ConfigError(
                f"groups = {self.groups} must divide heads ({self.heads}): each group serves as many heads"
            )

    @property
    def name(self) -> str:
        if self.groups is None:
            return f"MLA, {self.heads} heads"
        kind = "MHA" if self.groups == self.heads else "MQA" if self.groups == 1 else f"GQA-{self.groups}"
        return f"{kind}, {self.heads} heads"

    @property
    def cached(self) -> int:
        """Numbers that a token leaves."""
        return self.latent or 2 * self.groups * HEAD_WIDTH

    @property
    def weights(self) -> int:
        """Entries of the attention's matrices."""
        asking = 2 * WIDTH * HEAD_WIDTH * self.heads
        if self.latent is None:
            return asking + 2 * WIDTH * HEAD_WIDTH * self.groups
        return asking + self.latent * (WIDTH + 2 * HEAD_WIDTH * self.heads)


RACE = (
    CacheShape(4, groups=4),
    CacheShape(6, groups=2),
    CacheShape(7, groups=1),
    CacheShape(4, latent=42),
    CacheShape(5, latent=27),
    CacheShape(6, latent=16),
)  # all within one percent of 4 d^2 weights


class CardReader(nn.Module):
    """One attention from questions to cards, and a head that reads the facts off what it brings back."""

    def __init__(self, shape: CacheShape) -> None:
        super().__init__()
        self.shape = shape
        pair = 2 * HEAD_WIDTH
        self.names = nn.Embedding(NAMES, WIDTH)
        self.facts = nn.Embedding(FIELDS * VALUES, WIDTH)
        self.query = nn.Linear(WIDTH, shape.heads * HEAD_WIDTH, bias=False)
        if shape.latent is None:
            self.key_value = nn.Linear(WIDTH, shape.groups * pair, bias=False)
        else:
            down = nn.Linear(WIDTH, shape.latent, bias=False)
            up = nn.Linear(shape.latent, shape.heads * pair, bias=False)
            self.key_value = nn.Sequential(down, RMSNorm(shape.latent, 1e-6), up)
        self.out = nn.Linear(shape.heads * HEAD_WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, FIELDS * VALUES, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(self, names: Int[Tensor, "b t"], facts: Int[Tensor, "b t field"]) -> Float[Tensor, "b t field value"]:
        """Logits of every fact of every name on the table; the questions are asked in the order of the cards."""
        asked = self.names(names)
        written = self.facts(facts + VALUES * torch.arange(FIELDS))
        cards = (asked + reduce(written, "b t field d -> b t d", "sum")) / (1 + FIELDS) ** 0.5
        logits = self.head(self.attend(asked, cards))
        return rearrange(logits, "b t (field value) -> b t field value", field=FIELDS)

    def attend(self, asked: Float[Tensor, "b s d"], cards: Float[Tensor, "b t d"]) -> Float[Tensor, "b s d"]:
        query = rearrange(self.query(asked), "b s (h w) -> b s h w", w=HEAD_WIDTH)
        key, value = rearrange(self.key_value(cards), "b t (g kv w) -> kv b t g w", kv=2, w=HEAD_WIDTH)
        members = self.shape.heads // key.shape[2]  # 1 where every head has a key of its own: MHA and MLA
        key, value = (repeat(x, "b t g w -> b t (g m) w", m=members) for x in (key, value))
        everything = torch.ones(1, asked.shape[1], cards.shape[1], dtype=torch.bool)
        mixed = attention(query, key, value, HEAD_WIDTH**-0.5, everything)
        return self.out(rearrange(mixed, "b s h w -> b s (h w)"))


@dataclass(frozen=True)
class Finish:
    """A shape, and the share of the facts, from 0 to 1, that its trained reader got right on tables it never saw."""

    shape: CacheShape
    right: float


def race(shapes: Sequence[CacheShape] = RACE, steps: int = STEPS, seed: int = 0) -> list[Finish]:
    """Train a reader of each shape on the same tables, and ask it on new ones."""
    return [Finish(shape, share_right(train(shape, steps, seed))) for shape in shapes]


def deal(random: Generator, rows: int) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t field"]]:
    """Tables of cards: different names, any facts."""
    names = torch.rand(rows, NAMES, generator=random).argsort(dim=-1)[:, :CARDS]
    return names, torch.randint(VALUES, (rows, CARDS, FIELDS), generator=random)


def train(shape: CacheShape, steps: int = STEPS, seed: int = 0) -> CardReader:
    """A reader after `steps` tables of `ROWS` rows each; the caller's random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = CardReader(shape)
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(reader.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 10) * (1 - step / steps)
        names, facts = deal(random, ROWS)
        loss = F.cross_entropy(reader(names, facts).flatten(0, 2), facts.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return reader


@torch.no_grad()
def share_right(reader: CardReader, rows: int = 256) -> float:
    """The share of facts that a reader names, on tables that no training deals."""
    names, facts = deal(torch.Generator().manual_seed(987_654), rows)
    return (reader(names, facts).argmax(dim=-1) == facts).float().mean().item()
