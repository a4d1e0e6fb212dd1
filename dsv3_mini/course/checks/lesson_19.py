"""Lesson 19, expert parallelism: the checks. References are loops over ranks, tokens and single numbers, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Generator, Tensor

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property, Result
from dsv3_mini.course.exchanges import Program, meet

Rows = list[Tensor]

# ---- all_to_all --------------------------------------------------------------------------------------------------------


def _exchange_of(leaving: list[list[int]]) -> Callable[[Generator], tuple[Rows, Tensor]]:
    def inputs(g: Generator) -> tuple[Rows, Tensor]:
        return [torch.rand(sum(row), 3, generator=g) for row in leaving], torch.tensor(leaving)

    return inputs


def _all_to_all(rows: Rows, leaving: Tensor) -> Rows:
    ranks = len(rows)
    inbox: list[list[Tensor]] = [[] for _ in range(ranks)]
    for sender in range(ranks):
        place = 0
        for receiver in range(ranks):
            for _ in range(int(leaving[sender, receiver])):
                inbox[receiver].append(rows[sender][place])
                place += 1
    return [torch.stack(got) if got else rows[0].new_zeros(0, *rows[0].shape[1:]) for got in inbox]


def _later_senders_first(rows: Rows, leaving: Tensor) -> Rows:
    parts = [sent.split(counts) for sent, counts in zip(rows, leaving.tolist(), strict=True)]
    return [torch.cat(got[::-1]) for got in zip(*parts, strict=True)]


def _by_own_counts(rows: Rows, leaving: Tensor) -> Rows:
    """Each rank cuts by what it gets, not by what it gives."""
    parts = [sent.split(counts) for sent, counts in zip(rows, leaving.T.tolist(), strict=True)]
    return [torch.cat(got) for got in zip(*parts, strict=True)]


def _even_shares(rows: Rows, leaving: Tensor) -> Rows:
    parts = [sent.tensor_split(len(rows)) for sent in rows]
    return [torch.cat(got) for got in zip(*parts, strict=True)]


def _without_itself(rows: Rows, leaving: Tensor) -> Rows:
    parts = [list(sent.split(counts)) for sent, counts in zip(rows, leaving.tolist(), strict=True)]
    return [
        torch.cat([part[me][:0] if i == me else part[me] for i, part in enumerate(parts)]) for me in range(len(rows))
    ]


def _twice_is_home_again(answer: Callable[..., Any]) -> bool:
    rows, leaving = _exchange_of([[1, 4, 0], [0, 2, 3], [5, 0, 1]])(Generator().manual_seed(7))
    home = answer(answer(rows, leaving), leaving.T)
    return all(torch.equal(mine, theirs) for mine, theirs in zip(home, rows, strict=True))


all_to_all = Exercise(
    name="all_to_all",
    reference=_all_to_all,
    cases=[
        Case("three ranks, as many rows out as in", _exchange_of([[0, 1, 2], [2, 0, 1], [1, 2, 0]])),
        Case("two ranks, uneven", _exchange_of([[1, 3], [2, 0]])),
        Case(
            "four ranks, one of them with nothing to send",
            _exchange_of([[1, 0, 2, 1], [0, 0, 0, 0], [2, 1, 0, 3], [1, 1, 1, 1]]),
        ),
        Case("all rows to one rank", _exchange_of([[0, 4, 0], [0, 3, 0], [0, 1, 0]])),
    ],
    mistakes=[
        Mistake(
            lambda rows, leaving: list(rows),
            "every rank still has its own rows: nothing has travelled.",
        ),
        Mistake(
            _by_own_counts,
            "your ranks cut their rows by what they are going to *get*: row r of `leaving` says how rank r's rows are cut, a "
            "column what a rank gets.",
        ),
        Mistake(
            _later_senders_first,
            "what arrived lies in the wrong order: the rows of rank 0 come first, then those of rank 1, and so on.",
        ),
        Mistake(
            _even_shares,
            "you cut everything into equal parts: how many rows go to whom stands in `leaving`, and is different for each pair.",
        ),
        Mistake(
            _without_itself,
            "what a rank sends to itself is lost: it is a message like any other, on the diagonal of `leaving`.",
        ),
        Mistake(
            lambda rows, leaving: [torch.cat(rows)] * len(rows),
            "every rank gets everything: that is an all-gather. Each row goes to one rank only.",
        ),
    ],
    properties=[
        Property(
            "an exchange, and then one with the counts turned over, brings every row home",
            _twice_is_home_again,
            "exchange(exchange(rows, leaving), leaving.T) should be rows again: what rank i got from rank j it gives back.",
        )
    ],
)

# ---- copies_to_send ----------------------------------------------------------------------------------------------------


def _choices(tokens: int, k: int, n_experts: int, ranks: int) -> Case:
    def inputs(g: Generator) -> tuple[Tensor, int, int]:
        return torch.rand(tokens, n_experts, generator=g).topk(k).indices, n_experts, ranks

    return Case(f"{tokens} tokens, {k} of {n_experts} experts, {ranks} ranks", inputs)


def _copies(chosen: Tensor, n_experts: int, ranks: int) -> tuple[Tensor, Tensor]:
    token, leaving = [], []
    for rank in range(ranks):
        goes = [t for t, experts in enumerate(chosen.tolist()) if any(e * ranks // n_experts == rank for e in experts)]
        token += goes
        leaving.append(len(goes))
    return torch.tensor(token, dtype=torch.long), torch.tensor(leaving)


def _once_per_expert(chosen: Tensor, n_experts: int, ranks: int) -> tuple[Tensor, Tensor]:
    owner = (chosen // (n_experts // ranks)).flatten()
    return owner.argsort(stable=True) // chosen.shape[1], owner.bincount(minlength=ranks)


def _needed(chosen: Tensor, node: Tensor, ranks: int) -> Tensor:
    return torch.zeros(len(chosen), ranks, dtype=torch.bool).scatter(1, node, True)


def _of(needed: Tensor) -> tuple[Tensor, Tensor]:
    return needed.T.nonzero()[:, 1], needed.sum(dim=0)


def _by_token(chosen: Tensor, n_experts: int, ranks: int) -> tuple[Tensor, Tensor]:
    needed = _needed(chosen, chosen // (n_experts // ranks), ranks)
    return needed.nonzero()[:, 0], needed.sum(dim=0)


def _every_copy_is_wanted(answer: Callable[..., Any]) -> bool:
    chosen = torch.full((6, 3), 5)
    token, leaving = answer(chosen, 8, 4)
    return torch.as_tensor(token).tolist() == list(range(6)) and torch.as_tensor(leaving).tolist() == [0, 0, 6, 0]


copies_to_send = Exercise(
    name="copies_to_send",
    reference=_copies,
    cases=[_choices(7, 3, 8, 4), _choices(12, 4, 16, 4), _choices(5, 8, 256, 64), _choices(4, 2, 6, 1)],
    mistakes=[
        Mistake(
            _once_per_expert,
            "a token travels once for each *expert*: two experts on one rank need one copy, which is there for both.",
        ),
        Mistake(
            _by_token,
            "the copies lie token by token: an exchange cuts them by receiver, so that all that go to rank 0 come first.",
        ),
        Mistake(
            lambda c, e, ranks: _of(_needed(c, c % ranks, ranks)),
            "you deal the experts out like cards (expert % ranks): they lie in runs, the first experts all on rank 0.",
        ),
        Mistake(
            lambda c, e, ranks: _of(_needed(c, c[:, :1] // (e // ranks), ranks)),
            "only each token's first expert is looked at: it goes wherever one of its k experts lies.",
        ),
        Mistake(
            lambda c, e, ranks: (_copies(c, e, ranks)[0], _copies(c, e, ranks)[1].cumsum(0)),
            "the counts are running sums: `leaving` says how many rows go to each rank, not where they end.",
        ),
        Mistake(
            lambda c, e, ranks: _copies(c, e, ranks)[::-1],
            "token numbers and counts have changed places: the tokens come first.",
        ),
    ],
    properties=[
        Property(
            "where all choices fall on one expert, each token makes one copy",
            _every_copy_is_wanted,
            "six tokens that all chose expert 5 of 8, on 4 ranks: tokens 0 to 5 leave once each, all for rank 2.",
        )
    ],
)

# ---- bring_home --------------------------------------------------------------------------------------------------------


def _trip(leaving: list[list[int]], tokens: list[int]) -> Callable[[Generator], tuple[Rows, Rows, Tensor, list[int]]]:
    def inputs(g: Generator) -> tuple[Rows, Rows, Tensor, list[int]]:
        table = torch.tensor(leaving)
        results = [torch.rand(int(count), 3, generator=g) + 0.5 for count in table.sum(dim=0)]
        token = [
            torch.cat([torch.randperm(n, generator=g)[:count].sort().values for count in row])
            if n
            else torch.zeros(0).long()
            for n, row in zip(tokens, leaving, strict=True)
        ]
        return results, token, table, list(tokens)

    return inputs


def _bring_home(results: Rows, token: Rows, leaving: Tensor, tokens: list[int]) -> Rows:
    out = []
    for rank, count in enumerate(tokens):
        total = [torch.zeros(results[0].shape[1]) for _ in range(count)]
        row = 0
        for other in range(len(results)):
            first = int(leaving[:rank, other].sum())
            for i in range(int(leaving[rank, other])):
                which = int(token[rank][row])
                total[which] = total[which] + results[other][first + i]
                row += 1
        out.append(torch.stack(total) if total else torch.zeros(0, results[0].shape[1]))
    return out


def _returned(results: Rows, leaving: Tensor) -> Rows:
    return _all_to_all(results, leaving.T)


def _put(
    adds: Callable[[Tensor, Tensor, Tensor], Tensor], back: Callable[[Rows, Tensor], Rows] = _returned
) -> Callable[..., Rows]:
    def answer(results: Rows, token: Rows, leaving: Tensor, tokens: list[int]) -> Rows:
        zeros = [torch.zeros(n, results[0].shape[1]) for n in tokens]
        return [adds(z, t, r) for z, t, r in zip(zeros, token, back(results, leaving), strict=True)]

    return answer


def _overwrite(out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
    out[token] = rows
    return out


def _add_without_order(out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
    return out.index_add(0, token.sort().values, rows)


def _mean(out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
    count = token.bincount(minlength=len(out)).clamp(min=1)
    return out.index_add(0, token, rows) / count[:, None]


CIRCLE = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]

bring_home = Exercise(
    name="bring_home",
    reference=_bring_home,
    cases=[
        Case("three ranks, as many rows out as in", _trip(CIRCLE, [3, 2, 2])),
        Case("two ranks, uneven", _trip([[1, 3], [2, 0]], [3, 4])),
        Case("a rank without tokens, and one that got none", _trip([[2, 0, 3], [0, 0, 0], [1, 0, 2]], [4, 0, 2])),
    ],
    mistakes=[
        Mistake(
            _put(lambda out, token, rows: out.index_add(0, token, rows), back=_all_to_all),
            "the rows went to the wrong ranks: on the way back rank i gives to rank j what it *got* from it, so the counts are "
            "turned over, leaving.T.",
        ),
        Mistake(
            _put(_overwrite),
            "a token that went to two ranks keeps the result of the last one only: results of one token are *added*, "
            "index_add and not an assignment.",
        ),
        Mistake(
            _put(_add_without_order),
            "the rows were given to the wrong tokens: they come home in the order in which they left, row i is of token[i].",
        ),
        Mistake(
            _put(_mean),
            "you take the mean over the ranks that a token went to: the gates have weighed already, so it is a sum.",
        ),
        Mistake(
            lambda results, token, leaving, tokens: _returned(results, leaving),
            "these are the rows that came home, one for each copy: add them up, one for each token.",
        ),
        Mistake(
            lambda results, token, leaving, tokens: [
                torch.zeros(n, r.shape[1]).index_add(0, t[: len(r)], r[: len(t)])
                for n, t, r in zip(tokens, token, results, strict=True)
            ],
            "the results were never sent back: each rank adds up what it computed for others.",
        ),
    ],
)

# ---- to_message --------------------------------------------------------------------------------------------------------


def _vectors(tokens: int, tiles: int, spread: int) -> Case:
    def inputs(g: Generator) -> tuple[Tensor]:
        size = torch.exp2(torch.randint(-spread, spread + 1, (tokens, tiles, 1), generator=g).float())
        return ((torch.randn(tokens, tiles, 128, generator=g) * size).flatten(1),)

    return Case(f"{tokens} tokens of width {128 * tiles}, sizes from 2^-{spread} to 2^{spread}", inputs)


def _message(x: Tensor, up: Callable[[float], int] = math.ceil, tile: int = 128, bias: int = 127) -> Tensor:
    """Tile after tile; the exponent by frexp, which is exact."""
    rows = []
    for vector in x:
        numbers, exponents = [], []
        for part in vector.split(tile):
            mantissa, exponent = math.frexp(part.abs().max().item() / 448)
            power = exponent - (mantissa == 0.5) if up is math.ceil else up(math.log2(mantissa) + exponent)
            numbers.append((part / 2.0**power).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
            exponents += [(power + bias) % 256] * (tile // 128)
        rows.append(torch.cat([*numbers, torch.tensor(exponents, dtype=torch.uint8)]))
    return torch.stack(rows)


def _plain_cast(x: Tensor) -> Tensor:
    numbers = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.cat([numbers, torch.full((len(x), x.shape[1] // 128), 127, dtype=torch.uint8)], dim=1)


def _any_scale(x: Tensor) -> Tensor:
    """Divided by the scale itself, and only then the exponent is rounded."""
    tiles = x.unflatten(1, (-1, 128))
    scale = tiles.abs().amax(-1) / 448
    numbers = (tiles / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)
    return torch.cat([numbers, (scale.log2().ceil() + 127).to(torch.uint8)], dim=1)


def _of_the_largest(x: Tensor) -> Tensor:
    """The power above the largest number, not above a 448th of it."""
    tiles = x.unflatten(1, (-1, 128))
    exponent = tiles.abs().amax(-1).log2().ceil()
    numbers = (tiles / exponent.exp2()[..., None]).to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)
    return torch.cat([numbers, (exponent + 127).to(torch.uint8)], dim=1)


def _decoded(message: Tensor, width: int) -> Tensor:
    numbers = message[:, :width].contiguous().view(torch.float8_e4m3fn).float().unflatten(1, (-1, 128))
    return (numbers * torch.exp2(message[:, width:].float() - 127)[..., None]).flatten(1)


def _twice_is_once(answer: Callable[..., Any]) -> bool:
    x = torch.randn(20, 256, generator=Generator().manual_seed(3))
    once = _decoded(answer(x), 256)
    return torch.equal(_decoded(answer(once), 256), once)


to_message = Exercise(
    name="to_message",
    reference=_message,
    cases=[_vectors(3, 2, 3), _vectors(9, 1, 10), _vectors(1, 56, 5)],
    mistakes=[
        Mistake(
            _plain_cast,
            "the numbers are cast as they are: without a scale what is above 448 is cut off, and what is small is lost.",
        ),
        Mistake(
            lambda x: _message(x, up=math.floor),
            "the scale is rounded *down* to a power of two: then the largest number of a tile no longer fits below 448. Up.",
        ),
        Mistake(
            lambda x: _message(x, up=round),
            "the scale goes to the *nearest* power of two: where that is below it, the largest number does not fit. Up.",
        ),
        Mistake(
            _any_scale,
            "the numbers are divided by the scale before it was rounded up: divide by the power of two that travels with them.",
        ),
        Mistake(
            _of_the_largest,
            "your power of two stands above the largest number itself: 448 is the largest of E4M3, so it is the largest / 448 "
            "that is rounded up, or the top exponents stay unused.",
        ),
        Mistake(
            lambda x: _message(x, tile=x.shape[1]),
            "one scale for the whole vector: each 128 numbers have their own.",
        ),
        Mistake(
            lambda x: _message(x, bias=0),
            "the exponents lack their 127: a byte has no sign, and E8M0 stores 2^j as j + 127.",
        ),
        Mistake(
            lambda x: torch.cat([_message(x)[:, x.shape[1] :], _message(x)[:, : x.shape[1]]], dim=1),
            "scales and numbers have changed places: the numbers come first.",
        ),
        Mistake(
            lambda x: _message(x)[:, : x.shape[1]],
            "the exponents do not travel: without them nobody can read the numbers.",
        ),
    ],
    properties=[
        Property(
            "a message that is read and written again is the same numbers",
            _twice_is_once,
            "numbers that were in E4M3 under a power-of-two scale should pass unchanged: is every scale a power of two?",
        )
    ],
)

# ---- layer_on_a_rank (find the bug) ------------------------------------------------------------------------------------


def expert(rows: Tensor, number: int) -> Tensor:
    """Stands for an expert: each does something else."""
    return (rows * (number + 1)).tanh() + 0.1 * number * rows


def rank_of_tokens(xs: Rows, chosen: Rows, n_experts: int, program: Callable[..., Program]) -> Rows:
    """Run `program(x, chosen, rank, ranks, held, work)` on all ranks; `held` experts on each."""
    ranks, held = len(xs), n_experts // len(xs)

    def work_of(rank: int) -> Callable[[Tensor, Tensor], Tensor]:
        def work(rows: Tensor, choices: Tensor) -> Tensor:
            out = torch.zeros_like(rows)
            for number in range(rank * held, (rank + 1) * held):
                out = out + expert(rows, number) * (choices == number).sum(dim=1, keepdim=True)
            return out

        return work

    return meet(
        [program(x, c, rank, ranks, held, work_of(rank)) for rank, (x, c) in enumerate(zip(xs, chosen, strict=True))]
    )


@dataclass(frozen=True)
class OnRanks(Exercise):
    """An exercise whose answer is one rank's program: it is run on all ranks of each case."""

    def _run(self, answer: Any) -> Result:
        return super()._run(_OnAllRanks(answer) if callable(answer) else answer)


@dataclass(frozen=True)
class _OnAllRanks:
    """A program as a function of the whole cluster; errors are told with the program's own lines."""

    program: Callable[..., Program]

    def __call__(self, xs: Rows, chosen: Rows, n_experts: int) -> Rows:
        return rank_of_tokens(xs, chosen, n_experts, self.program)

    @property
    def __code__(self) -> CodeType | None:
        return getattr(self.program, "__code__", None)


def _each_needs_all(tokens: int, ranks: int, held: int) -> Case:
    """Every message has as many rows: what goes astray is not noticed by its size."""

    def inputs(g: Generator) -> tuple[Rows, Rows, int]:
        def choices() -> Tensor:
            return torch.randint(0, held, (tokens, ranks), generator=g) + held * torch.arange(ranks)

        return (
            [torch.randn(tokens, 4, generator=g) for _ in range(ranks)],
            [choices() for _ in range(ranks)],
            ranks * held,
        )

    return Case(f"{ranks} ranks, {tokens} tokens on each that need all of them", inputs)


def _tokens(what: str, counts: list[int], n_experts: int, k: int, only: int | None = None) -> Case:
    def inputs(g: Generator) -> tuple[Rows, Rows, int]:
        xs = [torch.randn(count, 4, generator=g) for count in counts]
        chosen = [torch.rand(count, n_experts, generator=g).topk(k).indices for count in counts]
        return xs, chosen if only is None else [torch.full_like(c, only) for c in chosen], n_experts

    return Case(what, inputs)


def _layer(xs: Rows, chosen: Rows, n_experts: int) -> Rows:
    """One process that has all experts."""
    return [
        torch.stack([sum(expert(row, e) for e in c) for row, c in zip(x, cs.tolist(), strict=True)]) if len(x) else x
        for x, cs in zip(xs, chosen, strict=True)
    ]


def _program(
    adds: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda out, token, rows: out.index_add(0, token, rows),
    goes: Callable[[Tensor, int, int, int], Tensor] = lambda c, to, held, me: (
        (c // held == to).any(dim=1).nonzero()[:, 0]
    ),
    home: Callable[[Rows], Rows] = lambda rows: rows,
) -> Callable[..., Rows]:
    def program(x: Tensor, chosen: Tensor, rank: int, ranks: int, held: int, work: Callable[..., Tensor]) -> Program:
        tokens = [goes(chosen, to, held, rank) for to in range(ranks)]
        arrived = yield [(x[token], chosen[token]) for token in tokens]
        returned = yield home([work(rows, choices) for rows, choices in arrived])
        out = torch.zeros_like(x)
        for token, rows in zip(tokens, returned, strict=True):
            out = adds(out, token, rows)
        return out

    return lambda xs, chosen, n_experts: rank_of_tokens(xs, chosen, n_experts, program)


def _not_to_itself(chosen: Tensor, to: int, held: int, me: int) -> Tensor:
    needs = (chosen // held == to).any(dim=1) & (to != me)
    return needs.nonzero()[:, 0]


layer_on_a_rank = OnRanks(
    name="layer_on_a_rank",
    reference=_layer,
    cases=[
        _each_needs_all(3, 3, 2),
        _tokens("three ranks with tokens", [4, 3, 5], 6, 2),
        _tokens("a rank without tokens", [3, 0, 4], 6, 2),
        _tokens("a rank that nobody needs", [3, 2, 4], 6, 2, only=5),
        _tokens("no token at all", [0, 0], 4, 2),
        _tokens("one rank has all tokens", [0, 7, 0, 0], 8, 3),
    ],
    mistakes=[
        Mistake(
            _program(adds=_overwrite),
            "a token's results are written over each other: what comes home from several ranks is added up.",
        ),
        Mistake(
            _program(goes=_not_to_itself),
            "tokens whose expert lies on their own rank are left out: what a rank sends to itself is a message, too.",
        ),
        Mistake(
            _program(home=lambda rows: rows[::-1]),
            "the results went back to the wrong ranks: `arrived` stands in the order of the senders, and so must the results.",
        ),
    ],
)
