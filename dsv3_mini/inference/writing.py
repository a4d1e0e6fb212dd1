"""The loop: read the prompts, choose a token for each row; then draft, read, keep what holds, and again.

Plain decoding is this loop with nothing drafted: each pass reads one token a row and gives the next. With d drafts a pass
reads 1 + d tokens a row and gives 1 to 1 + d. Rows advance each at its own pace, since a row's cache holds as many tokens as
are certain in *it*. A row that has ended stands still until the last one has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_mini.inference.cache import LatentCache
from dsv3_mini.inference.choosing import Drafted, chooser
from dsv3_mini.inference.few_tokens import FewTokens, fits
from dsv3_mini.inference.settings import Prompts, Settings, checked_prompts
from dsv3_mini.inference.speculative import Drafter
from dsv3_mini.model import DeepSeekV3


@dataclass
class Counts:
    """What drafting brought, counted over rows.

    passes: of the main model, after the one that read the prompt. tokens: written in them. drafted: made for them.
    checked[j], held[j]: how often draft j+1 was judged (those before it had held), and how often it held.
    """

    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    checked: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    @property
    def acceptance(self) -> float:
        """The share of first drafts that held: what the report calls the acceptance rate of the second token. 0: none was made."""
        return self.acceptance_at(1)

    def acceptance_at(self, depth: int) -> float:
        """The share of drafts `depth` tokens ahead that held, among those that were judged."""
        judged = self.checked[depth - 1] if depth <= len(self.checked) else 0
        return self.held[depth - 1] / judged if judged else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """1 in plain decoding; with d drafts up to 1 + d."""
        return self.tokens / self.passes if self.passes else 0.0

    @property
    def drafts_per_pass(self) -> float:
        """0 in plain decoding."""
        return self.drafted / self.passes if self.passes else 0.0

    def add(self, drafted: int, agreed: int, written: int) -> None:
        """A pass of one row: `agreed` of its drafts held, and it wrote `written` tokens, fewer where the text ended earlier."""
        self.passes, self.tokens, self.drafted = self.passes + 1, self.tokens + written, self.drafted + drafted
        while len(self.checked) < drafted:
            self.checked.append(0)
            self.held.append(0)
        for draft in range(min(drafted, written)):
            self.checked[draft] += 1
            self.held[draft] += draft < agreed


class Reader:
    """The main model with its cache: reads tokens after all that it has kept."""

    def __init__(self, model: DeepSeekV3, cache: list[LatentCache], few: FewTokens | None = None) -> None:
        self.model, self.cache, self.few = model, cache, few
        self.lengths = cache[0].lengths  # of what is kept

    @classmethod
    def with_room(cls, model: DeepSeekV3, batch: int, capacity: int) -> Reader:
        weight = model.lm_head.weight
        cache = LatentCache.for_model(model.cfg, batch, capacity, weight.dtype, weight.device)
        return cls(model, cache, FewTokens(model) if fits(model) else None)

    def read(self, tokens: Int[Tensor, "b s"]) -> Float[Tensor, "b s d"]:
        new = tokens.shape[1]
        if self.few is not None and self.few.absorbs(new, self.cache[0].length + new):
            return self.few.main_states(tokens, self.cache)
        states, _ = self.model.main_states(tokens, cache=self.cache)
        return states

    def logits(self, states: Float[Tensor, "b s d"]) -> Float[Tensor, "b s v"]:
        """What the head says of them, in FP32."""
        return self.model.lm_head(states).float() if self.few is None else self.few.logits(states)

    def keep(self, counts: Sequence[int]) -> None:
        """Of the tokens just read, remember the first counts[row] of each row."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        for layer in self.cache:
            layer.truncate(self.lengths)

    def select(self, rows: Sequence[int]) -> Reader:
        """A new one with these rows, in memory of its own."""
        return Reader(self.model, [layer.select(rows) for layer in self.cache], self.few)


class Writing:
    """Texts that grow, a row for each prompt. Each step of the iteration is a pass of the model; it gives the rows' new tokens.

    rows[b]: all new tokens of row b so far, with the stop token where it ended at one. ended[b]: whether no more will come.
    counts: what drafting brought.

    Raises:
        DataError, ConfigError: as `checked_prompts`, `Settings` and `Prefix.check` say.
    """

    def __init__(self, model: DeepSeekV3, prompts: Prompts, settings: Settings) -> None:
        self.model, self.settings, self.stops = model, settings, settings.stops
        self.prompts = checked_prompts(prompts, model, settings.max_new_tokens)
        self.drafts, self.while_likely = settings.drafts_for(model), settings.drafts is None
        self.device = model.lm_head.weight.device
        self.chooser = chooser(settings, settings.generator, self.prompts, model.cfg.vocab_size, self.device)
        if settings.prefix is not None:
            settings.prefix.check(self.prompts, model, self.drafts)
        self.rows: list[list[int]] = [[] for _ in self.prompts]
        self.ended = [False] * len(self.prompts)
        self.counts = Counts()
        self._steps = self._write()

    def __iter__(self) -> Iterator[list[list[int]]]:
        return self

    def __next__(self) -> list[list[int]]:
        return next(self._steps)

    def finish(self) -> Writing:
        """Write to the end."""
        for _ in self:
            pass
        return self

    @torch.inference_mode()  # no bookkeeping for gradients at all: a quarter of what a small kernel costs
    def _write(self) -> Iterator[list[list[int]]]:
        reader, drafter, unread = self._begin()
        read, kept = unread, [len(prompt) for prompt in unread]
        states = reader.read(self._padded(unread))
        reader.keep(kept)
        last = states[torch.arange(len(kept), device=self.device), torch.tensor(kept, device=self.device) - 1]
        _, chosen = self.chooser.verify(reader.logits(last[:, None]), Drafted.nothing(len(kept)))
        yield self._take([[token] for token in chosen])
        while not all(self.ended):
            room = self._room(reader)
            drafted = drafter.draft(read, states, kept, chosen, room, self.chooser, self.while_likely)
            read = [[token, *drafts] for token, drafts in zip(chosen, drafted.tokens, strict=True)]
            states = reader.read(torch.tensor(read, device=self.device))
            held, chosen = self.chooser.verify(reader.logits(states), drafted)
            runs = zip(drafted.tokens, held, chosen, strict=True)
            written = self._take([[*drafts[:count], token] for drafts, count, token in runs])
            for gained, count in zip(written, held, strict=True):
                if gained:
                    self.counts.add(drafted.count, count, len(gained))
            # A row that has ended keeps nothing more: what it read last is read again, in vain, until all have ended.
            kept = [0 if ended else 1 + count for ended, count in zip(self.ended, held, strict=True)]
            reader.keep(kept)
            yield written

    def _begin(self) -> tuple[Reader, Drafter, list[list[int]]]:
        """The model and its drafter, having read the prefix where there is one; and what is left of the prompts to read."""
        batch, prefix = len(self.prompts), self.settings.prefix
        if prefix is not None:
            return (*prefix.fork(batch), [prompt[prefix.read :] for prompt in self.prompts])
        capacity = max(map(len, self.prompts)) + self.settings.max_new_tokens + self.drafts
        reader = Reader.with_room(self.model, batch, capacity)
        return reader, Drafter(self.model, self.drafts, batch, capacity, reader.few), self.prompts

    def _room(self, reader: Reader) -> int:
        """How many tokens to draft: no more than any row still wants behind its next one, or than the context has places for."""
        wanted = max(
            self.settings.max_new_tokens - len(row) for row, end in zip(self.rows, self.ended, strict=True) if not end
        )
        return min(self.drafts, wanted - 1, self.model.cfg.max_position_embeddings - max(reader.lengths) - 1)

    def _take(self, offered: list[list[int]]) -> list[list[int]]:
        """What the rows take of what they are offered: up to a stop token, and no more than they may have."""
        taken = []
        for row, (written, tokens) in enumerate(zip(self.rows, offered, strict=True)):
            tokens = [] if self.ended[row] else tokens[: self.settings.max_new_tokens - len(written)]
            stop = next((place for place, token in enumerate(tokens) if token in self.stops), len(tokens))
            tokens = tokens[: stop + 1]
            written += tokens
            self.ended[row] |= len(written) == self.settings.max_new_tokens or written[-1] in self.stops
            taken.append(tokens)
        self.chooser.note(taken)
        return taken

    def _padded(self, rows: list[list[int]]) -> Int[Tensor, "b s"]:
        """Rows of one length; what fills them up stands behind a row's end, where none of its tokens looks."""
        longest = max(map(len, rows))
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
