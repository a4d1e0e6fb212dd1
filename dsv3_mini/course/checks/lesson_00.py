"""Checks of lesson 00: who visits the experts, how much of a model works for a token, and the loop that writes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property

# ---- tokens_per_expert -----------------------------------------------------------------------------------------------


def _choices(batch: int, length: int, n_experts: int, k: int, visited: int | None = None) -> Case:
    """Every token's k different experts; only the first `visited` experts are ever chosen."""

    def inputs(generator: torch.Generator) -> tuple[Tensor, int]:
        scores = torch.rand(batch, length, visited or n_experts, generator=generator)
        return scores.topk(k, dim=-1).indices, n_experts

    idle = f", the last {n_experts - visited} idle" if visited else ""
    return Case(f"{batch} x {length} tokens, {k} of {n_experts} experts{idle}", inputs)


def _one_place_each(chosen: Tensor, n_experts: int) -> Tensor:
    counts = torch.zeros(n_experts, dtype=torch.long)
    counts[chosen] += 1
    return counts


def _count(chosen: Tensor, n_experts: int) -> Tensor:
    return one_hot(chosen, n_experts).sum((0, 1, 2))


tokens_per_expert = Exercise(
    name="tokens_per_expert",
    reference=_count,
    cases=[_choices(2, 5, 8, 2, visited=6), _choices(1, 7, 6, 3), _choices(3, 40, 16, 4), _choices(2, 9, 4, 1)],
    mistakes=[
        Mistake(
            lambda chosen, n: torch.bincount(chosen.flatten()),
            "your list ends at the last expert that somebody visited: an idle expert has its place too, with a 0. There are "
            "n_experts of them (bincount has a minlength for this)",
        ),
        Mistake(
            _one_place_each,
            "your experts have 1 or 0: counts[chosen] += 1 writes every place once, however often it is named. Count the "
            "repeated ones too",
        ),
        Mistake(
            lambda chosen, n: _count(chosen[..., :1], n),
            "you count the first choice of each token: a token visits all k experts of its row, and each of them has work to do",
        ),
        Mistake(
            lambda chosen, n: _count(chosen[:1], n),
            "you count the first text of the batch: `chosen` is [b s k], and all b texts bring tokens",
        ),
        Mistake(
            lambda chosen, n: one_hot(chosen, n).sum((1, 2)),
            "you count each text apart, [b e]: an expert serves all texts of the batch at once, so add them up to [e]",
        ),
        Mistake(
            lambda chosen, n: _count(chosen, n) / chosen.numel(),
            "these are shares that add up to 1: give the counts themselves, which add up to b x s x k",
        ),
    ],
)

# ---- activated_share -------------------------------------------------------------------------------------------------


def _share(always: int, expert: int, layers: int, n_experts: int, k: int) -> float:
    at_work = whole = Fraction(always)
    for _ in range(layers):
        at_work, whole = at_work + k * expert, whole + n_experts * expert
    return float(at_work / whole)


def _sizes(what: str, *sizes: int) -> Case:
    return Case(what, lambda _: sizes)


activated_share = Exercise(
    name="activated_share",
    reference=_share,
    cases=[
        _sizes("2 layers of 8 experts, 3 numbers each", 10, 3, 2, 8, 2),
        _sizes("5 layers of 16 experts", 700, 40, 5, 16, 4),
        _sizes("very many small experts", 1_000, 7, 3, 4_096, 1),
    ],
    mistakes=[
        Mistake(
            lambda always, expert, layers, n, k: k / n,
            "that is the share of the experts alone: attention, embeddings, norms and shared experts (`always`) work for every "
            "token, and stand both in what works and in the whole",
        ),
        Mistake(
            lambda always, expert, layers, n, k: (always + k * expert) / (always + n * expert),
            "you count the experts of one layer: every sparse layer has n_experts of its own, and each token visits k in each",
        ),
        Mistake(
            lambda always, expert, layers, n, k: (always + k * expert) / (always + layers * n * expert),
            "above the line there are the experts of one layer, below it those of all: a token visits k experts in *each* layer",
        ),
        Mistake(
            lambda always, expert, layers, n, k: layers * k * expert / (always + layers * n * expert),
            "above the line `always` is missing: attention and embeddings work for the token too, not only its experts",
        ),
        Mistake(
            lambda always, expert, layers, n, k: (always + layers * k * expert) / (layers * n * expert),
            "below the line `always` is missing: the whole model is its experts *and* everything else",
        ),
        Mistake(
            lambda always, expert, layers, n, k: 1 / _share(always, expert, layers, n, k),
            "this is upside down: a share is what works, divided by the whole",
        ),
        Mistake(
            lambda always, expert, layers, n, k: 100 * _share(always, expert, layers, n, k),
            "these are percent: give the share as a number from 0 to 1",
        ),
    ],
    properties=[
        Property(
            "where a token visits all experts, the whole model works",
            lambda answer: abs(answer(11, 5, 3, 6, 6) - 1) < 1e-9,
            "with k = n_experts the share must be 1: what works and the whole are then the same sum",
        )
    ],
)

# ---- write_on, the bug -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyModel:
    """Scores of the next token after every position, made from the text up to there, as a causal model's are."""

    seed: int
    vocabulary: int

    def __call__(self, ids: Iterable[int]) -> Float[Tensor, "s v"]:
        ids = [int(i) for i in ids]
        return torch.stack([self._row(ids[: end + 1]) for end in range(len(ids))])

    def _row(self, ids: Sequence[int]) -> Float[Tensor, " v"]:
        seed = zlib.crc32(repr((self.seed, ids)).encode())
        return torch.rand(self.vocabulary, generator=torch.Generator().manual_seed(seed))


Scores = Callable[[Iterable[int]], Float[Tensor, "s v"]]


def _writing(length: int, n_new: int, vocabulary: int) -> Case:
    def inputs(generator: torch.Generator) -> tuple[ToyModel, list[int], int]:
        ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
        return ToyModel(int(ids[0]) + 100 * length, vocabulary), ids, n_new

    return Case(f"{n_new} tokens after an opening of {length}", inputs)


def _likeliest(row: Float[Tensor, " v"]) -> int:
    values = row.tolist()
    return values.index(max(values))


def _written(scores_of: Scores, ids: Sequence[int], n_new: int) -> list[int]:
    written = list(ids)
    while len(written) < len(ids) + n_new:
        written.append(_likeliest(scores_of(written)[-1]))
    return written


def _from_the_opening(scores_of: Scores, ids: Sequence[int], n_new: int) -> list[int]:
    return [*ids, *[_likeliest(scores_of(ids)[-1])] * n_new]


def _first_row(scores_of: Scores, ids: Sequence[int], n_new: int) -> list[int]:
    return [*ids, *[_likeliest(scores_of(ids)[0])] * n_new]


def _without_memory(scores_of: Scores, ids: Sequence[int], n_new: int) -> list[int]:
    written = list(ids)
    for _ in range(n_new):
        written.append(_likeliest(scores_of(written[-1:])[-1]))
    return written


def _wrong_axis(scores_of: Scores, ids: Sequence[int], n_new: int) -> list[int]:
    written = list(ids)
    for _ in range(n_new):
        written.append(int(scores_of(written).argmax(dim=0)[-1]))
    return written


write_on = Exercise(
    name="write_on",
    reference=_written,
    cases=[_writing(3, 4, 101), _writing(6, 9, 60), _writing(1, 12, 50)],
    mistakes=[
        Mistake(
            _from_the_opening,
            "all your new tokens are the same one, read off the end of the opening. The text grows: append each token before "
            "the next is asked for, and read the last row of the scores as they are *now*",
        ),
        Mistake(
            _first_row,
            "you read row 0, which says what follows the first token. What follows the whole text stands in the last row",
        ),
        Mistake(
            _wrong_axis,
            "you take the best *position* for one token (argmax over axis 0): take the best token, over the vocabulary, of one row",
        ),
        Mistake(
            _without_memory,
            "you show the model its newest token only: it keeps nothing between two calls, so give it the whole text each time",
        ),
        Mistake(
            lambda scores_of, ids, n_new: _written(scores_of, ids, n_new)[len(ids) :],
            "these are the new tokens alone: give the opening too, ids and then n_new more",
        ),
        Mistake(
            lambda scores_of, ids, n_new: _written(scores_of, ids, n_new + 1),
            "there is one token too many: n_new new ones are wanted",
        ),
        Mistake(
            lambda scores_of, ids, n_new: _written(scores_of, ids, n_new - 1),
            "there is one token too few: n_new new ones are wanted",
        ),
    ],
)
