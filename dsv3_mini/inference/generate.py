"""Generation: token by token, or several at once with MTP's drafts; one prompt, or many of unequal lengths together.

    generate   prompts [b s] -> the same rows, longer
    stream     the same, a token of every row at a time
    complete   prompts of any lengths -> each one's new tokens

All take the same `Settings`, and all are the loop in `writing.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dsv3_mini.errors import DataError
from dsv3_mini.inference.choosing import Source
from dsv3_mini.inference.sampling import choose
from dsv3_mini.inference.settings import Prompts, Settings
from dsv3_mini.inference.writing import Counts, Writing
from dsv3_mini.model import DeepSeekV3

__all__ = ["Stream", "choose", "complete", "generate", "stream"]

Stops = int | Sequence[int] | None


TEMPERATURE, TOP_P = 0.6, 0.95
"""Of free samples, unless they are told otherwise: those that `dsv3 sample` writes, and those that are judged in `dsv3 eval`
and during a run. With these two DeepSeek-R1's report samples its evaluations. With 1 and 1 (`--temperature 1 --top-p 1`) a
model also shows its doubts: whatever it gives a share of a thousandth comes in every tenth story of a hundred tokens."""


def generate(
    model: DeepSeekV3,
    tokens: Int[Tensor, "b s"],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    stop_id: Stops = None,
    generator: Source = None,
    use_mtp: bool = False,
    **more: Any,
) -> Int[Tensor, "b s_new"]:
    """The prompts with up to `max_new_tokens` more tokens; rows that reached a stop token are filled up with it.

    Args:
        temperature: 0 takes the likeliest token; 1 draws from the model's own distribution.
        stop_id: one token id, or several.
        generator: the source of randomness, on the model's device; or one for each row.
        use_mtp: draft with the MTP modules. The text is the same (drawn: its distribution), and it takes fewer passes.
        more: `top_p`, `min_p`, `repetition_penalty`, `drafts`, `prefix`: see `Settings`.

    Raises:
        DataError: an empty prompt, an unknown token id, or more tokens than the model's context.
        ConfigError: a setting out of its range, such as a temperature below 0 or no tokens asked for.
    """
    columns = stream(model, tokens, max_new_tokens, temperature, stop_id, generator, use_mtp=use_mtp, **more)
    return torch.cat([tokens, *(column[:, None] for column in columns)], dim=1)


def stream(
    model: DeepSeekV3,
    tokens: Int[Tensor, "b s"],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    stop_id: Stops = None,
    generator: Source = None,
    **more: Any,
) -> Stream:
    """`generate`, token by token as they come; ends early once every row has reached a stop token."""
    if not isinstance(tokens, Tensor):
        raise DataError(
            f"tokens is a {type(tokens).__name__}: give a tensor [b s]; complete() takes lists, of any lengths"
        )
    chosen = dict(max_new_tokens=max_new_tokens, temperature=temperature, stop_id=stop_id, generator=generator)
    return Stream(Writing(model, tokens, Settings(**chosen, **more)), tokens.device)


class Stream(Iterator[Tensor]):
    """The tokens [b] of all rows at one place, place after place; a row that stopped repeats its stop token.

    Rows whose drafts hold run ahead of others: a place comes when all rows have got there.
    """

    def __init__(self, writing: Writing, device: torch.device) -> None:
        self.writing = writing
        self._columns = self._run(device)

    def __next__(self) -> Int[Tensor, " b"]:
        return next(self._columns)

    @property
    def counts(self) -> Counts:
        """Passes, tokens and drafts so far."""
        return self.writing.counts

    def _run(self, device: torch.device) -> Iterator[Int[Tensor, " b"]]:
        rows, ended, shown = self.writing.rows, self.writing.ended, 0
        for _ in self.writing:
            going = [len(row) for row, end in zip(rows, ended, strict=True) if not end]
            ready = min(going) if going else max(map(len, rows))
            for place in range(shown, ready):
                yield torch.tensor([row[min(place, len(row) - 1)] for row in rows], device=device)
            shown = max(shown, ready)


def complete(
    model: DeepSeekV3,
    prompts: Prompts,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    stop_id: Stops = None,
    generator: Source = None,
    **more: Any,
) -> list[list[int]]:
    """The new tokens of each of many prompts, of any lengths, up to and without a stop token; all share a batch."""
    if len(prompts) == 0:
        return []
    chosen = dict(max_new_tokens=max_new_tokens, temperature=temperature, stop_id=stop_id, generator=generator)
    writing = Writing(model, prompts, Settings(**chosen, **more)).finish()
    return [row[:-1] if row[-1] in writing.stops else row for row in writing.rows]
