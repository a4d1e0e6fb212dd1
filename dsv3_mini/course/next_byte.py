"""Small models that differ in their feed-forward alone, and the text on which they race.

A `NextByte` predicts a byte from the eight before it. There is no attention: each of the eight is looked up in a table of
its place, the vectors are added, and every layer adds `feed_forward(norm(x))` to the stream. What such a model knows beyond
its tables lies in its feed-forwards, so two of them can be compared by what they learn in the same steps.

    for arrangement in LADDER:
        model = NextByte(arrangement)
        losses = train_bytes(model, byte_batches(), steps=300)

Simplified against a real training: eight bytes of context, one learning rate after a warm-up, FP32. The gate biases follow
the load as in `train/balance.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3_mini.config import ModelConfig
from dsv3_mini.data.corpora import DOMAINS, load_corpus
from dsv3_mini.errors import ConfigError
from dsv3_mini.model.feed_forward import SwiGLU
from dsv3_mini.model.moe import MoE
from dsv3_mini.model.norm import RMSNorm
from dsv3_mini.model.router import Routing
from dsv3_mini.train.balance import update_biases

CONTEXT = 8  # bytes that the model sees
EPS = 1e-6


@dataclass(frozen=True)
class Arrangement:
    """How the feed-forward of a layer is cut into experts.

    expert: the inner width of one expert (f). routed: how many routed experts there are (e), k: how many of them a token
    visits. shared: how many experts every token visits. A dense feed-forward is one shared expert and no routed ones.

    Raises:
        ConfigError: a token visits more routed experts than there are, or no expert at all.
    """

    name: str
    expert: int
    routed: int
    k: int
    shared: int

    def __post_init__(self) -> None:
        if not 0 <= self.k <= self.routed:
            raise ConfigError(f"k = {self.k} must be at most routed ({self.routed}): a token visits an expert once")
        if self.expert < 1 or self.k + self.shared < 1:
            raise ConfigError(f"arrangement {self.name!r} gives a token no expert to visit")

    @property
    def activated(self) -> int:
        """Inner width that works for one token."""
        return self.expert * (self.k + self.shared)

    @property
    def total(self) -> int:
        """Inner width of all experts together."""
        return self.expert * (self.routed + self.shared)

    @property
    def combinations(self) -> int:
        """How many different sets of routed experts a token can be sent to."""
        return math.comb(self.routed, self.k)

    def module(self, width: int, layer: int) -> nn.Module:
        """The feed-forward, for a stream of `width` numbers. Its gate values sum to k: on average an expert weighs as much
        as the same slice of a dense feed-forward would.
        """
        if not self.routed:
            return SwiGLU(width, self.shared * self.expert)
        cfg = ModelConfig.preset(
            "nano",
            hidden_size=width,
            moe_intermediate_size=self.expert,
            n_routed_experts=self.routed,
            n_shared_experts=self.shared,
            num_experts_per_tok=self.k,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=float(self.k),
        )
        return MoE(cfg, layer)


LADDER = (
    Arrangement("dense", expert=64, routed=0, k=0, shared=1),
    Arrangement("coarse experts", expert=32, routed=8, k=2, shared=0),
    Arrangement("fine-grained experts", expert=8, routed=32, k=8, shared=0),
    Arrangement("fine-grained, one shared", expert=8, routed=31, k=7, shared=1),
)


class NextByte(nn.Module):
    """Eight bytes in, the logits of the ninth out.

    First weights have the same distribution in every arrangement, as if the experts were cut from one dense feed-forward:
    std 1 / sqrt(inputs), where the inputs of `down` are all that is activated.
    """

    def __init__(self, arrangement: Arrangement, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embed_bytes = nn.Embedding(CONTEXT * 256, width)
        self.norms = nn.ModuleList(RMSNorm(width, EPS) for _ in range(layers))
        self.feed_forwards = nn.ModuleList(arrangement.module(width, layer) for layer in range(layers))
        self.norm = RMSNorm(width, EPS)
        self.head = nn.Linear(width, 256, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                inputs = arrangement.activated if "down_proj" in name else CONTEXT if "embed" in name else width
                nn.init.normal_(parameter, std=inputs**-0.5)

    def forward(self, rows: Int[Tensor, "b s8"]) -> tuple[Float[Tensor, "b s v"], list[Routing]]:
        """Rows of s + 8 bytes -> the logits of the last s of them, and how each sparse layer routed."""
        windows = rows.unfold(-1, CONTEXT, 1)[:, :-1]  # [b s place]; what follows the last window is not in the row
        places = 256 * torch.arange(CONTEXT, device=rows.device)
        x, routings = reduce(self.embed_bytes(windows + places), "b s place d -> b s d", "sum"), []
        for norm, feed_forward in zip(self.norms, self.feed_forwards, strict=True):
            fed = feed_forward(norm(x))
            if isinstance(fed, tuple):
                fed, routing = fed
                routings.append(routing)
            x = x + fed
        return self.head(self.norm(x)), routings

    def feed_forward_parameters(self) -> int:
        """Parameters of all feed-forwards, routers included."""
        return sum(parameter.numel() for parameter in self.feed_forwards.parameters())


def byte_losses(logits: Float[Tensor, "b s v"], rows: Int[Tensor, "b s8"]) -> Float[Tensor, " n"]:
    """Cross-entropy of each predicted byte, in bits."""
    targets = rearrange(rows[:, CONTEXT:], "b s -> (b s)")
    return F.cross_entropy(rearrange(logits, "b s v -> (b s) v"), targets, reduction="none") / math.log(2)


def train_bytes(
    model: NextByte,
    batches: Iterable[Int[Tensor, "b s8"]],
    steps: int,
    learning_rate: float = 1e-2,
    warmup: int = 20,
    gamma: float = 0.01,
) -> list[float]:
    """Train with AdamW; gate biases move by `gamma` after each step. Returns each step's loss in bits per byte."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    losses = []
    for step, rows in enumerate(islice(batches, steps), start=1):
        # Linear up, then linear down to a tenth: the end of a short run says little while steps are large.
        done = max(0.0, (step - warmup) / max(1, steps - warmup))
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, step / warmup) * (1 - 0.9 * done)
        logits, routings = model(rows)
        loss = byte_losses(logits, rows).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_biases(model, {routing.layer: routing.load for routing in routings}, gamma)
        losses.append(loss.item())
    return losses


@torch.no_grad()
def bits_per_byte(model: NextByte, domain: str, count: int = 16_384) -> float:
    """Mean loss on the first `count` held-out bytes of a domain, in bits."""
    text = domain_bytes(domain, "held_out", count)
    rows = text[: (len(text) - CONTEXT) // 256 * 256 + CONTEXT].unfold(0, 256 + CONTEXT, 256)
    logits, _ = model(rows)
    return byte_losses(logits, rows).mean().item()


def byte_batches(rows: int = 16, length: int = 64, seed: int = 0, amount: int = 200_000) -> Iterator[Tensor]:
    """Batches [rows, length + 8] of bytes without end, a quarter from each domain, cut at random from its first `amount`."""
    random = torch.Generator().manual_seed(seed)
    texts = [domain_bytes(domain, "train", amount) for domain in DOMAINS]
    each = rows // len(texts)
    while True:
        cuts = [
            text[start : start + length + CONTEXT]
            for text in texts
            for start in torch.randint(0, len(text) - length - CONTEXT, (each,), generator=random).tolist()
        ]
        yield torch.stack(cuts)


@functools.cache
def domain_bytes(domain: str, split: str, count: int) -> Int[Tensor, " n"]:
    """The first `count` bytes of a domain's documents in UTF-8, a zero byte after each document."""
    found = bytearray()
    for row in load_corpus(domain, split):
        found += row["text"].encode("utf-8", "replace") + b"\0"
        if len(found) >= count:
            break
    return torch.frombuffer(found[:count], dtype=torch.uint8).long()
