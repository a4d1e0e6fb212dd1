"""Generation: one token after the other, from the latent cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_mini.errors import ConfigError, DataError
from dsv3_mini.inference.cache import LatentCache
from dsv3_mini.model import DeepSeekV3

TEMPERATURE = 0.8
"""Of the samples that `dsv3 sample` writes and `dsv3 eval` judges, unless they are told otherwise. At 1 a model also shows
its doubts: whatever it gives a share of a thousandth comes in every tenth story of a hundred tokens."""


def generate(
    model: DeepSeekV3,
    tokens: Int[Tensor, "b s"],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    stop_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b s_new"]:
    """The prompts with up to `max_new_tokens` more tokens; rows that reached `stop_id` are filled up with it.

    Args:
        temperature: 0 takes the likeliest token; 1 samples from the model's own distribution.
        generator: the source of randomness, on the model's device.

    Raises:
        DataError: an empty prompt, an unknown token id, or more tokens than the model's context.
        ConfigError: a temperature below 0 or no tokens asked for.
    """
    parts = [
        tokens,
        *(token[:, None] for token in stream(model, tokens, max_new_tokens, temperature, stop_id, generator)),
    ]
    return torch.cat(parts, dim=1)


@torch.no_grad()
def stream(
    model: DeepSeekV3,
    tokens: Int[Tensor, "b s"],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    stop_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Int[Tensor, " b"]]:
    """`generate`, token by token as they come; ends early once every row has reached `stop_id`."""
    _check(model, tokens, max_new_tokens, temperature)
    batch, length = tokens.shape
    cache = LatentCache.for_model(
        model.cfg, batch, length + max_new_tokens, model.lm_head.weight.dtype, model.lm_head.weight.device
    )
    done = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        states, _ = model.main_states(tokens, cache=cache)
        token = choose(model.lm_head(states[:, -1]).float(), temperature, generator)
        if stop_id is not None:
            token = torch.where(done, stop_id, token)
            done |= token == stop_id
        yield token
        if done.all():
            return
        tokens = token[:, None]


def choose(logits: Float[Tensor, "b v"], temperature: float, generator: torch.Generator | None) -> Int[Tensor, " b"]:
    """The likeliest token of each row, or one sampled at the temperature."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    below_best = logits - logits.amax(dim=-1, keepdim=True)  # 0 at the best, so that no temperature can overflow it
    return torch.multinomial((below_best / temperature).softmax(dim=-1), 1, generator=generator).squeeze(-1)


def complete(
    model: DeepSeekV3,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    stop_id: int | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """The new tokens of each of many prompts, up to and without `stop_id`; prompts of one length share a batch."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    completed: list[list[int]] = [[] for _ in prompts]
    for length, members in sorted(by_length.items()):
        tokens = torch.tensor([list(prompts[i]) for i in members], device=model.lm_head.weight.device)
        rows = generate(model, tokens, max_new_tokens, temperature, stop_id, generator)[:, length:].tolist()
        for i, row in zip(members, rows, strict=True):
            completed[i] = row[: row.index(stop_id)] if stop_id in row else row
    return completed


def _check(model: DeepSeekV3, tokens: Tensor, max_new_tokens: int, temperature: float) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {max_new_tokens} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature = {temperature} must be at least 0")
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise DataError(f"prompt of shape {tuple(tokens.shape)} cannot be continued: give at least one token a row")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.cfg.vocab_size:
        raise DataError(f"token id {low if low < 0 else high} is not in the vocabulary of {model.cfg.vocab_size}")
    total = tokens.shape[1] + max_new_tokens
    if total > model.cfg.max_position_embeddings:
        raise DataError(
            f"prompt of {tokens.shape[1]} and max_new_tokens = {max_new_tokens} are more than max_position_embeddings = "
            f"{model.cfg.max_position_embeddings}: shorten one of them"
        )
