"""The dense baseline: the plain decoder that DeepSeek-V3 departs from, and a training loop in a few lines.

Multi-head attention and one SwiGLU a layer, each behind a norm and beside the residual stream. Later lessons change one
part and compare: they subclass `BaselineBlock`, or hand `Baseline` a block of their own.

    model = Baseline(BaselineShape())
    for step in train_steps(model, story_batches(tokenizer)):
        print(step.number, step.loss)

Simplified against a real training: one learning rate after a warm-up, stories alone, no checkpoints, FP32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from dsv3_mini.data.packing import inputs_and_targets
from dsv3_mini.data.stream import TokenStream, held_out_rows
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import ConfigError
from dsv3_mini.model.attention import attention
from dsv3_mini.model.feed_forward import SwiGLU
from dsv3_mini.model.norm import RMSNorm
from dsv3_mini.model.rope import rotate
from dsv3_mini.train.losses import cross_entropy, token_losses

Batch = tuple[Int[Tensor, "b s"], Int[Tensor, "b s"]]


@dataclass(frozen=True)
class BaselineShape:
    """The shape of a baseline.

    width: of the residual stream (d). heads: they share the width. ffn_width: of the SwiGLU (f). context: the longest row.
    rope_theta: None gives every position a learned vector; a number (10000) turns queries and keys instead.

    Raises:
        ConfigError: the heads do not share the width evenly, or a head is too odd for RoPE.
    """

    vocab_size: int = 4096
    width: int = 96
    layers: int = 4
    heads: int = 4
    ffn_width: int = 256
    context: int = 128
    rope_theta: float | None = None
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"heads = {self.heads} must divide width ({self.width}): every head has the same share")
        if self.rope_theta is not None and self.head_width % 2:
            raise ConfigError(
                f"heads = {self.heads} leaves {self.head_width} to a head: RoPE turns pairs, make it even"
            )

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class MultiHeadAttention(nn.Module):
    """Every head has its own queries, keys and values; a token sees itself and what stands before it."""

    def __init__(self, shape: BaselineShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv_proj = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)

    def forward(
        self, x: Float[Tensor, "b s d"], turn: Complex[Tensor, "s pairs"] | None = None
    ) -> Float[Tensor, "b s d"]:
        query, key, value = rearrange(self.qkv_proj(x), "b s (qkv h v) -> qkv b s h v", qkv=3, h=self.heads)
        if turn is not None:
            query, key = rotate(query, turn), rotate(key, turn)
        mixed = attention(query, key, value, scale=query.shape[-1] ** -0.5, mask=None)
        return self.o_proj(rearrange(mixed, "b s h v -> b s (h v)"))


class BaselineBlock(nn.Module):
    """Attention and SwiGLU. Each reads the stream through a norm, and adds what it found."""

    def __init__(self, shape: BaselineShape) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.width, shape.eps)
        self.attention = MultiHeadAttention(shape)
        self.ffn_norm = RMSNorm(shape.width, shape.eps)
        self.feed_forward = SwiGLU(shape.width, shape.ffn_width)

    def forward(
        self, x: Float[Tensor, "b s d"], turn: Complex[Tensor, "s pairs"] | None = None
    ) -> Float[Tensor, "b s d"]:
        x = x + self.attention(self.attention_norm(x), turn)
        return x + self.feed_forward(self.ffn_norm(x))


class NoResidualBlock(BaselineBlock):
    """The same weights without the stream: each part replaces what it read. For comparison."""

    def forward(
        self, x: Float[Tensor, "b s d"], turn: Complex[Tensor, "s pairs"] | None = None
    ) -> Float[Tensor, "b s d"]:
        x = self.attention(self.attention_norm(x), turn)
        return self.feed_forward(self.ffn_norm(x))


class PostNormBlock(BaselineBlock):
    """The norm after the addition, as in the transformer of 2017: the stream itself is rescaled. For comparison."""

    def forward(
        self, x: Float[Tensor, "b s d"], turn: Complex[Tensor, "s pairs"] | None = None
    ) -> Float[Tensor, "b s d"]:
        x = self.attention_norm(x + self.attention(x, turn))
        return self.ffn_norm(x + self.feed_forward(x))


class Baseline(nn.Module):
    """Embedding, blocks, final norm, head.

    Every matrix starts from a normal of std 1 / sqrt(width): a token's embedding then has a length of about 1, and what
    a token *is* can be told from what it has in common with others from the first step on.

    Args:
        block: what a layer is made of; called with the shape, and then with (x, turn).
    """

    def __init__(self, shape: BaselineShape, block: type[nn.Module] = BaselineBlock) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.width)
        self.embed_positions = nn.Embedding(shape.context, shape.width) if shape.rope_theta is None else None
        self.layers = nn.ModuleList(block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width, shape.eps)
        self.lm_head = nn.Linear(shape.width, shape.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=shape.width**-0.5)

    def hidden_states(self, tokens: Int[Tensor, "b s"]) -> Float[Tensor, "b s d"]:
        """What the head reads."""
        x, turn = self.embed_tokens(tokens), None
        if self.embed_positions is None:
            turn = self._turn(tokens.shape[1])
        else:
            x = x + self.embed_positions.weight[: tokens.shape[1]]
        for block in self.layers:
            x = block(x, turn)
        return self.norm(x)

    def forward(self, tokens: Int[Tensor, "b s"]) -> Float[Tensor, "b s v"]:
        """Logits of the next token at every position."""
        return self.lm_head(self.hidden_states(tokens))

    def loss(self, tokens: Int[Tensor, "b s"], targets: Int[Tensor, "b s"]) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats per token; targets of -100 are left out."""
        return cross_entropy(self.hidden_states(tokens), self.lm_head.weight, targets)

    def _turn(self, length: int) -> Complex[Tensor, "s pairs"]:
        pairs = self.shape.head_width // 2
        w = self.shape.rope_theta ** (-torch.arange(pairs) / pairs)
        angles = torch.outer(torch.arange(length).float(), w)
        return torch.polar(torch.ones_like(angles), angles).to(self.lm_head.weight.device)


# ---- training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step that was taken: its number (from 1), its loss in nats per token, and the tokens read so far."""

    number: int
    loss: float
    tokens: int


def train_steps(
    model: Baseline, batches: Iterable[Batch], learning_rate: float = 6e-3, warmup: int = 10
) -> Iterator[Step]:
    """Train, one step for each `next`. AdamW with the report's betas, decay and clipping (section 4.2)."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    seen = 0
    for number, (tokens, targets) in enumerate(batches, start=1):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, number / warmup)
        loss = model.loss(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += tokens.numel()
        yield Step(number, loss.item(), seen)


def story_batches(tokenizer: Tokenizer, rows: int = 8, seq_len: int = 128, seed: int = 0) -> Iterator[Batch]:
    """Inputs and targets [rows, seq_len] of generated stories, without end and without repetition."""
    stream = TokenStream(
        tokenizer, seq_len, {"stories": 1.0}, seed=seed, fim_rate=0.0, split_rate=0.0, block_rows=8 * rows
    )
    try:
        while True:
            yield inputs_and_targets(stream.next_batch(rows), tokenizer.pad_id)
    finally:
        stream.close()


def held_out_loss(model: Baseline, tokenizer: Tokenizer, rows: int = 16) -> float:
    """Nats per token on stories that training never sees."""
    held_out = held_out_rows("stories", tokenizer, model.shape.context, rows).tokens
    tokens, targets = inputs_and_targets(held_out, tokenizer.pad_id)
    with torch.no_grad():
        losses = token_losses(model.hidden_states(tokens), model.lm_head.weight, targets)
    return (losses.sum() / (targets >= 0).sum()).item()


@torch.no_grad()
def write(model: Baseline, tokenizer: Tokenizer, opening: str, new_tokens: int = 40) -> str:
    """Go on from `opening`, the likeliest token each time, up to the end of the text or of the context."""
    ids = [tokenizer.eos_id, *tokenizer.encode(opening)]
    for _ in range(min(new_tokens, model.shape.context - len(ids))):
        best = int(model(torch.tensor([ids]))[0, -1].argmax())
        if best == tokenizer.eos_id:
            break
        ids.append(best)
    return tokenizer.decode(ids[1:])


# ---- looking inside ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signal:
    """What a batch leaves in the stream, before the first layer and after each (layers + 1 numbers).

    size: root mean square of the states. likeness: cosine between the states of two tokens, averaged over all pairs of
    a row; at 1 nothing tells tokens apart. gradient: size of the loss's gradient with respect to the states.
    """

    size: list[float]
    likeness: list[float]
    gradient: list[float]


def signal_by_layer(model: Baseline, tokens: Int[Tensor, "b s"], targets: Int[Tensor, "b s"]) -> Signal:
    """One pass forwards and back, listened to between the layers. The model's gradients are left empty."""
    states: list[Tensor] = []

    def listen(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for state in [output] if states else [inputs[0], output]:
            state.retain_grad()
            states.append(state)

    hooks = [layer.register_forward_hook(listen) for layer in model.layers]
    model.loss(tokens, targets).backward()
    for hook in hooks:
        hook.remove()
    signal = Signal([_rms(x) for x in states], [_likeness(x.detach()) for x in states], [_rms(x.grad) for x in states])
    model.zero_grad()
    return signal


def _rms(x: Tensor) -> float:
    return x.detach().square().mean().sqrt().item()


def _likeness(x: Float[Tensor, "b s d"]) -> float:
    """The mean over pairs comes from the mean vector: |sum of units|^2 counts every pair twice and each token once."""
    units = nn.functional.normalize(x, dim=-1)
    length = x.shape[1]
    together = reduce(units, "b s d -> b d", "sum").square().sum(-1)
    return ((together - length) / (length * (length - 1))).mean().item()
