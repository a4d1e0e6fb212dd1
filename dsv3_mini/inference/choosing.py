"""Which token comes next, and which of the drafted ones hold.

A text is `... token`, behind which someone has drafted x1, x2, ... The main model reads `token x1 x2 ...` in one pass and
says what it would have written after each of them. The first draft that it refutes ends the run; in its place stands a token
of its own. Where all hold, one more comes from behind the last, so that each pass gives at least one token.

The text must be just what the main model alone would have written:

    greedy   a draft holds if it is the main model's likeliest token: the same text
    drawn    x was drawn from q, and the main model says p: x holds with probability min(1, p(x) / q(x)); if it falls, the
             token is drawn from max(p - q, 0), made whole. Then y comes with probability
                 min(p(y), q(y)) + P(fall) max(p(y) - q(y), 0) / sum(max(p - q, 0)) = p(y),
             for what falls, sum(max(q - p, 0)), is as much as what is missing, sum(max(p - q, 0)). (Leviathan et al. 2023)

With nothing drafted both are plain decoding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv3_mini.errors import ConfigError
from dsv3_mini.inference.sampling import Sampling, penalised, seen_before

Source = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class Drafted:
    """Drafts for each row, and the distributions that they were drawn from (an empty list where none was drawn).

    chances: the share that the drafting module gave to each draft, for each row.
    """

    tokens: list[list[int]]
    shares: list[Float[Tensor, "b v"]]
    chances: list[list[float]] = field(default_factory=list)

    @classmethod
    def nothing(cls, batch: int) -> Drafted:
        return cls([[] for _ in range(batch)], [], [[] for _ in range(batch)])

    @property
    def count(self) -> int:
        """Drafts of each row."""
        return len(self.tokens[0])

    def add(self, proposal: Proposal) -> None:
        """One draft more for each row."""
        self.shares.extend(proposal.shares)
        for row, chances, token, chance in zip(
            self.tokens, self.chances, proposal.tokens, proposal.chances, strict=True
        ):
            row.append(token)
            chances.append(chance)


class Proposal(NamedTuple):
    """A draft for each row, the share that it had, and the distribution where it was drawn from one (none, or one for all rows)."""

    tokens: list[int]
    chances: list[float]
    shares: list[Float[Tensor, "b v"]]


class Dice:
    """Random numbers, from one generator for all rows, or from one for each: then a row's do not depend on the others."""

    def __init__(self, source: Source, batch: int) -> None:
        if isinstance(source, Sequence) and len(source) != batch:
            raise ConfigError(f"{len(source)} generators for {batch} rows: give one for each row, or one for all")
        self.source = source

    def uniform(self, count: int, like: Float[Tensor, "b v"]) -> Float[Tensor, "b count"]:
        """Numbers from 0 up to and without 1."""
        if isinstance(self.source, Sequence):
            return torch.stack([torch.rand(count, generator=each, device=like.device) for each in self.source])
        return torch.rand(len(like), count, generator=self.source, device=like.device)

    def draw(self, shares: Float[Tensor, "b v"]) -> Int[Tensor, " b"]:
        """A token of each row; the shares need not sum to 1."""
        if isinstance(self.source, Sequence):
            drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(shares, self.source, strict=True)]
            return torch.cat(drawn)
        return torch.multinomial(shares, 1, generator=self.source).squeeze(-1)


class Chooser(ABC):
    """What both ways share: what has been written so far, for the repetition penalty."""

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Sequence[int]], vocabulary: int, device: torch.device
    ) -> None:
        self.sampling, self.vocabulary = sampling, vocabulary
        self.seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=device)
        self.note(prompts)

    def note(self, rows: Sequence[Sequence[int]]) -> None:
        """These tokens now stand in the rows."""
        if self.sampling.penalises:
            for seen, tokens in zip(self.seen, rows, strict=True):
                seen[torch.tensor(tokens, dtype=torch.long, device=seen.device)] = True

    @abstractmethod
    def propose(self, logits: Float[Tensor, "b c"], earlier: list[list[int]]) -> Proposal:
        """A draft of each row to stand behind its `earlier` ones. `logits` are those of the vocabulary's first c tokens."""

    @abstractmethod
    def verify(self, logits: Float[Tensor, "b j1 v"], drafted: Drafted) -> tuple[list[int], list[int]]:
        """How many of each row's drafts hold, and the token that comes after those.

        Args:
            logits: the main model's, before each of the j drafts and behind the last.
        """

    def _penalised(self, logits: Float[Tensor, "b j1 v"], drafts: list[list[int]]) -> Float[Tensor, "b j1 v"]:
        if not self.sampling.penalises:
            return logits
        ids = torch.tensor(drafts, dtype=torch.long, device=logits.device)
        places: Bool[Tensor, "b j1 v"] = seen_before(self.seen, ids)[:, -logits.shape[1] :, : logits.shape[2]]
        return penalised(logits, places, self.sampling.repetition_penalty)


class Greedy(Chooser):
    """Always the likeliest token."""

    def propose(self, logits: Tensor, earlier: list[list[int]]) -> Proposal:
        logits = self._penalised(logits[:, None], earlier)[:, 0]
        largest = logits.amax(dim=-1, keepdim=True)
        return Proposal(best(logits), (logits - largest).exp_().sum(dim=-1).reciprocal_().tolist(), [])

    def verify(self, logits: Tensor, drafted: Drafted) -> tuple[list[int], list[int]]:
        chosen = best(self._penalised(logits, drafted.tokens))
        held = [
            next((place for place, draft in enumerate(drafts) if draft != row[place]), len(drafts))
            for row, drafts in zip(chosen, drafted.tokens, strict=True)
        ]
        return held, [row[place] for row, place in zip(chosen, held, strict=True)]


class Drawn(Chooser):
    """Tokens are drawn from the distribution that `sampling` makes of the logits."""

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Sequence[int]], vocabulary: int, device: torch.device, dice: Dice
    ) -> None:
        super().__init__(sampling, prompts, vocabulary, device)
        self.dice = dice

    def propose(self, logits: Tensor, earlier: list[list[int]]) -> Proposal:
        shares = self.sampling.shares(self._penalised(logits[:, None], earlier)[:, 0])
        drawn = self.dice.draw(shares)
        chances = shares.gather(-1, drawn[:, None])[:, 0].tolist()
        return Proposal(drawn.tolist(), chances, [F.pad(shares, (0, self.vocabulary - shares.shape[-1]))])

    def verify(self, logits: Tensor, drafted: Drafted) -> tuple[list[int], list[int]]:
        p = self.sampling.shares(self._penalised(logits, drafted.tokens))
        q = torch.stack(
            [*drafted.shares, torch.zeros_like(p[:, 0])], dim=1
        )  # behind the last draft nothing was drafted
        drafts = torch.tensor(drafted.tokens, dtype=torch.long, device=p.device)[..., None]
        p_draft, q_draft = (x[:, :-1].gather(-1, drafts)[..., 0] for x in (p, q))
        agreed = _first_ones(self.dice.uniform(drafts.shape[1], p[:, 0]) * q_draft < p_draft)
        return agreed.tolist(), self.dice.draw(missing(_at(p, agreed), _at(q, agreed))).tolist()


def best(logits: Float[Tensor, "... v"]) -> list[Any]:
    """The likeliest tokens, as nested lists. On a CPU NumPy finds them in a fifth of the time that torch takes."""
    return (logits.numpy() if logits.device.type == "cpu" else logits).argmax(-1).tolist()


def missing(p: Float[Tensor, "b v"], q: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
    """What q has too little of: the weights of the token that stands where a draft fell. Where q is 0, just p."""
    lacking = (p - q).clamp(min=0)
    # Where p = q no draft falls, but rounding may make one fall: then nothing is lacking, and p is as good.
    return torch.where(lacking.sum(dim=-1, keepdim=True) > 0, lacking, p)


def chooser(
    sampling: Sampling, source: Source, prompts: Sequence[Sequence[int]], vocabulary: int, device: torch.device
) -> Chooser:
    """Greedy at temperature 0, else drawn.

    Raises:
        ConfigError: as many generators as rows were asked for, and there are more or fewer.
    """
    dice = Dice(source, len(prompts))
    if sampling.greedy:
        return Greedy(sampling, prompts, vocabulary, device)
    return Drawn(sampling, prompts, vocabulary, device, dice)


def _first_ones(holds: Bool[Tensor, "b j"]) -> Int[Tensor, " b"]:
    """How many hold before the first that does not."""
    return holds.long().cumprod(dim=1).sum(dim=1)


def _at(x: Float[Tensor, "b s ..."], place: Int[Tensor, " b"]) -> Float[Tensor, "b ..."]:
    """Of each row the entry at its own place."""
    return x[torch.arange(len(x), device=x.device), place]
