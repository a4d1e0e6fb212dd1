"""One text, pass by pass: what was drafted, what held, and what the main model wrote instead.

`Writing` says which tokens a pass gave. Who wants to *see* drafting wants those that fell as well: `watch` stands between the
loop and its chooser and notes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from dsv3_mini.inference.choosing import Chooser, Drafted, Proposal
from dsv3_mini.inference.settings import Settings
from dsv3_mini.inference.writing import Counts, Writing
from dsv3_mini.model import DeepSeekV3


@dataclass(frozen=True)
class Pass:
    """One pass of the main model over one text.

    drafts: tokens that were drafted for it. held: how many of them hold.
    written: what the text gained: the drafts that hold, and behind them a token of the main model's own. Fewer where the text
        ended earlier; the first pass, over the prompt, has no drafts and gives one token.
    """

    drafts: list[int]
    held: int
    written: list[int]

    @property
    def from_drafts(self) -> int:
        """How many of the written tokens were drafted."""
        return min(self.held, len(self.written))

    @property
    def refused(self) -> int | None:
        """The draft in whose place the main model's own token stands; None where none fell, or nobody came to see it."""
        fell = self.held < min(len(self.drafts), len(self.written))
        return self.drafts[self.held] if fell else None


class Watched(Iterator[Pass]):
    """The passes of one text as they come; `counts` as in `Writing`."""

    def __init__(self, model: DeepSeekV3, prompt: Sequence[int], settings: Settings) -> None:
        self._writing = Writing(model, [list(prompt)], settings)
        self._writing.chooser = self._noting = _Noting(self._writing.chooser)

    def __next__(self) -> Pass:
        (written,) = next(self._writing)
        return Pass(self._noting.drafts, self._noting.held, list(written))

    @property
    def counts(self) -> Counts:
        return self._writing.counts


def watch(model: DeepSeekV3, prompt: Sequence[int], **settings: object) -> Watched:
    """The passes that continue `prompt`; `settings` are those of `Settings`.

    Raises:
        DataError, ConfigError: as `complete` does.
    """
    return Watched(model, prompt, Settings(**settings))


class _Noting(Chooser):
    """A chooser that remembers what was judged last, in a batch of one."""

    def __init__(self, inner: Chooser) -> None:
        self.inner, self.sampling, self.seen = inner, inner.sampling, inner.seen
        self.drafts: list[int] = []
        self.held = 0

    def note(self, rows: Sequence[Sequence[int]]) -> None:
        self.inner.note(rows)

    def propose(self, logits: Float[Tensor, "b c"], earlier: list[list[int]]) -> Proposal:
        return self.inner.propose(logits, earlier)

    def verify(self, logits: Float[Tensor, "b j1 v"], drafted: Drafted) -> tuple[list[int], list[int]]:
        agreed, token = self.inner.verify(logits, drafted)
        (self.drafts,), (self.held,) = drafted.tokens, agreed
        return agreed, token
