"""A conversation with a model that only ever continues a text: what the reader says becomes text, the model goes on.

The course's models are not trained to chat (that is post-training). They have read stories with questions behind them, so a
line that ends in a question mark is put as such a question, and the answer ends with its line; any other line is told on
from, to the end of the document. What was said before is not read again: it is a `Prefix` that grows with each turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import DataError
from dsv3_mini.inference.prefix import Prefix
from dsv3_mini.inference.watching import watch
from dsv3_mini.inference.writing import Counts
from dsv3_mini.model import DeepSeekV3

GARBLED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Piece:
    """What came to light of an answer at once: some text, whether MTP drafted its (last) token, and a draft that fell before it."""

    text: str
    drafted: bool = False
    refused: str | None = None


class Conversation:
    """`for piece in conversation.say("Where is the lamp?"): print(piece.text, end="")`.

    Args:
        seed: of what is drawn; None: another conversation each time.
        settings: those of `Settings`, such as temperature, top_p, use_mtp; they may be changed between turns.
    """

    def __init__(self, model: DeepSeekV3, tokenizer: Tokenizer, seed: int | None = None, **settings: Any) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, {"max_new_tokens": 200, **settings}
        self._generator = torch.Generator(device=model.lm_head.weight.device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._line_ends = {id_ for id_, token in enumerate(tokenizer.ranks) if b"\n" in token}
        self.counts = Counts()
        self.restart()

    def restart(self) -> None:
        """A new text begins."""
        self.ids = [self.tokenizer.eos_id]
        self._prefix: Prefix | None = None

    @property
    def text(self) -> str:
        """All that was said on both sides."""
        return self.tokenizer.decode(self.ids[1:])

    def say(self, line: str) -> Iterator[Piece]:
        """The answer, piece by piece; who stops listening keeps what was said so far.

        Raises:
            DataError: nothing was said, or the text has filled the model's context.
            ConfigError: a setting is out of its range.
        """
        if not line.strip():
            raise DataError("an empty line says nothing: write the beginning of a story, or a question about it")
        asks = line.rstrip().endswith("?")
        ids = [*self.ids, *self.tokenizer.encode(self._framed(line, asks))]
        room = self.model.cfg.max_position_embeddings - len(ids)
        if room < 1:
            raise DataError(
                f"the text has {len(ids)} tokens and fills the context of {len(ids) + room}: begin a new one"
            )
        prefix = self._prefix.extended(ids[len(self._prefix.tokens) :]) if self._prefix else self._read(ids)
        settings = {**self.settings, "max_new_tokens": min(self.settings["max_new_tokens"], room)}
        stops = {self.tokenizer.eos_id} | (self._line_ends if asks else set())
        passes = watch(self.model, ids, stop_id=stops, generator=self._generator, prefix=prefix, **settings)
        self.ids, self._prefix = ids, prefix
        yield from self._pieces(passes)

    def _read(self, ids: list[int]) -> Prefix:
        # The MTP modules read along, even if nobody wants drafts now: a later turn may.
        return Prefix(self.model, ids, use_mtp=len(self.model.mtp) > 0)

    def _framed(self, line: str, asks: bool) -> str:
        said = self.text
        pause = "" if not said or said[-1].isspace() else "\n" if asks else " "
        return pause + (f"Question: {line.strip()}\nAnswer:" if asks else line)

    def _pieces(self, passes: Any) -> Iterator[Piece]:
        unseen: list[int] = []  # a letter of several tokens is shown when it is whole
        for each in passes:
            self.counts = passes.counts
            for place, token in enumerate(each.written):
                if token == self.tokenizer.eos_id:
                    return
                self.ids.append(token)
                unseen.append(token)
                text = self.tokenizer.decode(unseen)
                if text.endswith(GARBLED):
                    continue
                drafted = place < each.from_drafts
                fell = None if drafted or each.refused is None else self.tokenizer.decode([each.refused])
                yield Piece(text, drafted, fell)
                unseen = []
        if unseen:
            yield Piece(self.tokenizer.decode(unseen))
