"""How to write, checked when it is made, and prompts, checked before a model sees them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from dsv3_mini.errors import ConfigError, DataError
from dsv3_mini.inference.choosing import Source
from dsv3_mini.inference.sampling import Sampling
from dsv3_mini.model import DeepSeekV3

if TYPE_CHECKING:
    from dsv3_mini.inference.prefix import Prefix

Prompts = Int[Tensor, "b s"] | Sequence[Sequence[int] | Int[Tensor, " s"]]


MOST_DRAFTS = 8  # a pass, where nobody says how many


@dataclass(frozen=True, kw_only=True)
class Settings(Sampling):
    """All that `generate`, `stream` and `complete` take beside model and prompts.

    Args:
        max_new_tokens: so many at most, for each row.
        temperature: 0 takes the likeliest token; 1 draws from the model's own distribution.
        top_p: below 1, draw from the likeliest tokens that together hold this share.
        min_p: above 0, draw from tokens at least this share as likely as the likeliest.
        repetition_penalty: above 1, tokens that stand in the prompt or have been written become less likely.
        stop_id: a token id, or several; a row ends behind the first of them that it writes.
        generator: the source of randomness, on the model's device; or one for each row, so that a row draws the same
            numbers whatever rows are beside it.
        use_mtp: draft with the MTP modules and verify several tokens in one pass. Greedy, the text is the same; drawn, it
            has the same distribution (and is another text for the same seed).
        drafts: how many tokens to draft a pass; None: as many as are likely to hold, at most MOST_DRAFTS.
        prefix: what all prompts begin with, read before (`Prefix`).

    Raises:
        ConfigError: a value is out of its range, or goes with another that is not set.
    """

    max_new_tokens: int = 64
    stop_id: int | Collection[int] | None = None
    generator: Source = None
    use_mtp: bool = False
    drafts: int | None = None
    prefix: Prefix | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (
            ("max_new_tokens", self.max_new_tokens),
            ("drafts", 1 if self.drafts is None else self.drafts),
        ):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} = {value} must be a whole number of at least 1")
        if self.drafts is not None and not self.use_mtp:
            raise ConfigError(
                f"drafts = {self.drafts} needs use_mtp=True (dsv3 sample: --mtp): the MTP modules make them"
            )

    @property
    def stops(self) -> frozenset[int]:
        if self.stop_id is None:
            return frozenset()
        return frozenset([self.stop_id] if isinstance(self.stop_id, int) else self.stop_id)

    def drafts_for(self, model: DeepSeekV3) -> int:
        """How many tokens to draft a pass with this model, at most.

        Raises:
            ConfigError: use_mtp, and the model has no MTP module.
        """
        if not self.use_mtp:
            return 0
        if len(model.mtp) == 0:
            raise ConfigError(
                "use_mtp = True needs a model with MTP modules, and num_nextn_predict_layers = 0: load one with mtp=True, "
                "or leave use_mtp out"
            )
        return self.drafts or max(MOST_DRAFTS, len(model.mtp))


def checked_prompts(prompts: Prompts, model: DeepSeekV3, max_new_tokens: int) -> list[list[int]]:
    """The prompts as lists of token ids.

    Raises:
        DataError: no prompt, an empty one, something else than whole numbers, an id that the model does not know, or more
            tokens than its context holds.
    """
    if isinstance(prompts, Tensor) and (prompts.ndim != 2 or prompts.numel() == 0):
        raise DataError(f"prompt of shape {tuple(prompts.shape)} cannot be continued: give at least one token a row")
    rows = [_whole_numbers(prompt, number) for number, prompt in enumerate(prompts)]
    if not rows:
        raise DataError("there is no prompt: give at least one row")
    cfg = model.cfg
    for number, row in enumerate(rows):
        if not row:
            raise DataError(f"prompt {number} is empty and cannot be continued: give at least one token a row")
        unknown = next((token for token in row if not 0 <= token < cfg.vocab_size), None)
        if unknown is not None:
            raise DataError(f"prompt {number}: token id {unknown} is not in the vocabulary of {cfg.vocab_size}")
        if len(row) + max_new_tokens > cfg.max_position_embeddings:
            raise DataError(
                f"prompt {number} of {len(row)} and max_new_tokens = {max_new_tokens} are more than "
                f"max_position_embeddings = {cfg.max_position_embeddings}: shorten one of them"
            )
    return rows


def _whole_numbers(prompt: Sequence[int] | Tensor, number: int) -> list[int]:
    if isinstance(prompt, Tensor):
        if prompt.ndim != 1 or prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
            raise DataError(
                f"prompt {number} is of shape {tuple(prompt.shape)} and type {prompt.dtype}: give whole numbers, one row each"
            )
        return prompt.tolist()
    for token in prompt:
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise DataError(f"prompt {number} holds {token!r}: give whole numbers, the ids of tokens")
    return list(prompt)
