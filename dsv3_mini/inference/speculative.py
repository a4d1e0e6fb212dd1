"""Drafting with the modules of multi-token prediction (report sections 2.2 and 5.4.3).

One rule covers the whole chain: *who reads a token gets, beside it, the state of the depth before, after the token before.*
The main model has read `... a b` and chosen `c`. Then

    depth 1   reads c beside the main model's state after b    and drafts x1, what may follow c
    depth 2   reads x1 beside depth 1's state after c          and drafts x2
    depth 3   reads x2 beside depth 2's state after x1         and drafts x3

Each depth has read the text before in the same way and keeps a latent cache of it: one layer's. When the main model has
judged the drafts, a depth reads what is now certain (beside certain states, which the main model's pass has just
given) and what it had read of the drafts is forgotten.

A model that was trained with fewer depths than one wants drafts (the released one has one) uses its last module on and on,
beside that module's own states. Such drafts hold less often, unless it was trained for that (`train/draft_chain.py`).
Asked to draft `while_likely`, the chain ends where its own shares say that all of its drafts will hardly hold: in the middle of a
word there are many, at the beginning of a sentence one.

A draft is one of the first quarter of the vocabulary (of the first `COMMON` tokens at least): the ids of a BPE tokenizer stand
in the order in which pairs were merged, the most frequent first. The head is the largest matrix that a draft reads, and the
rare tokens' three quarters of it would cost more time than they win: a rare token is written by the main model.
Nothing here can harm the text, only its speed: `choosing.py` decides what stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from statistics import fmean

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3_mini.inference.cache import LatentCache
from dsv3_mini.inference.choosing import Chooser, Drafted
from dsv3_mini.inference.few_product import FewProduct
from dsv3_mini.inference.few_tokens import FewTokens, at_places
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.rope import rotations
from dsv3_mini.model.transformer import visible

COMMON = 1536  # tokens, or a quarter of the vocabulary where that is more
LIKELY = 0.5  # the chance that all drafts hold, below which no other one is added


class Drafter:
    """The chain of MTP modules that `drafts` tokens a pass need, with their caches, for `batch` rows of `capacity` tokens."""

    def __init__(self, model: DeepSeekV3, drafts: int, batch: int, capacity: int, few: FewTokens | None = None) -> None:
        weight = model.lm_head.weight
        self.model, self.modules = model, list(model.mtp)[:drafts]
        self.few = few
        self.head = FewProduct(common_rows(model))
        self.caches = [LatentCache(model.cfg, batch, capacity, weight.dtype, weight.device) for _ in self.modules]
        # Of each depth the state after the last certain token: the next one that comes is read beside it, a depth further.
        self.carried: list[Float[Tensor, "b 1 d"]] = []

    def draft(
        self,
        read: Sequence[Sequence[int]],
        states: Float[Tensor, "b s d"],
        kept: Sequence[int],
        chosen: Sequence[int],
        count: int,
        chooser: Chooser,
        while_likely: bool = False,
    ) -> Drafted:
        """`count` tokens that may follow the `chosen` ones. Between calls the count may fall, and must not rise.

        A prompt shorter than the chain is one that training has no place for: the first drafts behind it are worse, no more.

        Args:
            read: what the main model has read since the last call; of row b the first kept[b] tokens are certain.
            states: its states after each of them.
            kept: 0 for a row that has ended: its drafts mean nothing.
            chosen: what it chose to follow them.
            while_likely: draft fewer where a row's drafts will hardly all hold: the shares that the modules gave them, multiplied,
                are below LIKELY, on average over the rows. (Each module drafts one in any case: it has to read what is certain.)
        """
        if count == 0:
            return Drafted.nothing(len(read))
        length, newest = max(1, *kept), [max(k, 1) - 1 for k in kept]
        # What the chain reads: the token after each that was read, the chosen one at place `newest`, and the drafts behind it.
        text = [
            [*row[1 : n + 1], token] + [0] * (length + count)
            for row, n, token in zip(read, newest, chosen, strict=True)
        ]
        hidden, carried, certain = states[:, :length], [], []
        drafted = Drafted.nothing(len(read))

        def propose(state: Float[Tensor, "b d"]) -> None:
            drafted.add(chooser.propose(self.head(state).float(), drafted.tokens))

        depths = self.caches[:count]
        for depth, cache in enumerate(depths):
            if depth and self.carried:
                hidden = torch.cat([self.carried[depth - 1], hidden], dim=1)
            first = length + depth - hidden.shape[1]  # the place in `text` of the first token that is read now
            held = cache.lengths
            certain.append([n + max(0, k - first) for n, k in zip(held, kept, strict=True)])
            read_now, places = [row[first : length + depth] for row in text], [n + depth - first for n in newest]
            if depth + 1 < len(depths):
                hidden = self._read(depth, read_now, hidden)
                carried.append(at_places(hidden, [max(n - first, 0) for n in newest])[:, None])
                state = at_places(hidden, places)
            else:  # no depth reads beside this one's states: only the last ones matter
                state = self._read(depth, read_now, hidden, places)[:, 0]
            propose(state)
            for row, n, drafts in zip(text, newest, drafted.tokens, strict=True):
                row[n + depth + 1] = drafts[-1]

        if count > len(depths):  # the last module goes on, beside its own states
            cache.truncate([n + k + depth - first for n, k in zip(held, kept, strict=True)])
        for _ in range(count - len(depths)):
            if while_likely and fmean(prod(row) for k, row in zip(kept, drafted.chances, strict=True) if k) < LIKELY:
                break
            state = self._read(depth, [row[-1:] for row in drafted.tokens], state[:, None])[:, 0]
            propose(state)

        for cache, lengths in zip(depths, certain, strict=True):
            cache.truncate(lengths)
        self.carried = carried
        return drafted

    def _read(
        self, depth: int, text: list[list[int]], beside: Float[Tensor, "b s d"], places: list[int] | None = None
    ) -> Float[Tensor, "b s_or_1 d"]:
        """One module's states after these tokens, or after one of each row.

        Its slots count from the first token that it read: RoPE sees distances.
        """
        cache, tokens = self.caches[depth], torch.tensor(text, device=beside.device)
        new = tokens.shape[1]
        if self.few is not None and self.few.absorbs(new, cache.length + new):
            return self.few.mtp_states(depth, tokens, beside, cache, places)
        positions = cache.positions(new)
        mask = visible(positions, cache.length + new) if cache.length else None
        turn = rotations(self.model.cfg, positions)
        states, _ = self.modules[depth](self.model.embed_tokens(tokens), beside, turn, mask, cache)
        return states if places is None else at_places(states, places)[:, None]

    def select(self, rows: Sequence[int]) -> Drafter:
        """A new one with these rows, in memory of its own."""
        chosen = object.__new__(type(self))
        vars(chosen).update(vars(self))
        chosen.caches = [cache.select(rows) for cache in self.caches]
        chosen.carried = [state[list(rows)] for state in self.carried]
        return chosen


def common_rows(model: DeepSeekV3) -> Float[Tensor, "common d"]:
    """The head's rows for the tokens that are drafted."""
    return model.lm_head.weight[: max(COMMON, model.cfg.vocab_size // 4)]
