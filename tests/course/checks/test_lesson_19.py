"""Lesson 19's checks: each right answer accepted, each wrong one refused with its own hint, a blank one only noted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lesson_answers import (  # noqa: F401
    test_blank_is_unsolved_and_every_exercise_knows_mistakes,
    test_right_answers_are_accepted,
    test_wrong_answers_get_their_own_hint,
)
from torch import Tensor

from dsv3_mini.course.checks import lesson_19 as check
from dsv3_mini.course.checks.framework import Exercise, exercises_of
from dsv3_mini.course.exchanges import Deadlock, all_to_all, meet
from dsv3_mini.errors import UserError
from dsv3_mini.fp8.formats import E8M0, encode, power_of_two_at_least
from dsv3_mini.parallel.fp8_hop import packed

Rows = list[Tensor]

# ---- right answers, each written in two ways ---------------------------------------------------------------------------


def exchange_by_places(rows: Rows, leaving: Tensor) -> Rows:
    ends = leaving.cumsum(1)
    starts = ends - leaving
    ranks = range(len(rows))
    return [torch.cat([rows[i][starts[i, j] : ends[i, j]] for i in ranks]) for j in ranks]


def copies_by_sorting(chosen: Tensor, n_experts: int, ranks: int) -> tuple[Tensor, Tensor]:
    owner = chosen // (n_experts // ranks)
    pairs = (owner * len(chosen) + torch.arange(len(chosen))[:, None]).unique()
    return pairs % len(chosen), (pairs // len(chosen)).bincount(minlength=ranks)


def copies_by_rank(chosen: Tensor, n_experts: int, ranks: int) -> tuple[Tensor, Tensor]:
    held = n_experts // ranks
    goes = [((chosen // held) == rank).any(1).nonzero()[:, 0] for rank in range(ranks)]
    return torch.cat(goes), torch.tensor([len(each) for each in goes])


def home_by_autograd(results: Rows, token: Rows, leaving: Tensor, tokens: list[int]) -> Rows:
    xs = [torch.zeros(count, 3, requires_grad=True) for count in tokens]
    arrived = all_to_all([x[which] for x, which in zip(xs, token, strict=True)], leaving)
    return list(torch.autograd.grad(arrived, xs, results))


def home_by_marks(results: Rows, token: Rows, leaving: Tensor, tokens: list[int]) -> Rows:
    returned = exchange_by_places(results, leaving.T)
    marks = [
        torch.nn.functional.one_hot(which, count).float().T for which, count in zip(token, tokens, strict=True) if count
    ]
    full = iter(marks)
    return [next(full) @ rows if count else rows[:0] for rows, count in zip(returned, tokens, strict=True)]


def message_by_bits(x: Tensor) -> Tensor:
    tiles = x.view(len(x), -1, 128)
    scale = power_of_two_at_least(tiles.abs().amax(-1) / 448)
    numbers = (tiles / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.cat([numbers.flatten(1), encode(scale, E8M0)], dim=1)


def program_by_masks(x: Tensor, chosen: Tensor, rank: int, ranks: int, held: int, work: Callable[..., Tensor]) -> Any:
    needed = torch.stack([((chosen >= r * held) & (chosen < (r + 1) * held)).any(1) for r in range(ranks)])
    arrived = yield [(x[mask], chosen[mask]) for mask in needed]
    returned = yield [work(*message) for message in arrived]
    return sum(
        (torch.zeros_like(x).masked_scatter(m[:, None], r) for m, r in zip(needed, returned, strict=True)), x * 0
    )


def program_of_one_visit(
    x: Tensor, chosen: Tensor, rank: int, ranks: int, held: int, work: Callable[..., Tensor]
) -> Any:
    """Says first how much will come, as ranks on a cluster do."""
    tokens = [(chosen // held == to).any(dim=1).nonzero()[:, 0] for to in range(ranks)]
    counts = yield [len(token) for token in tokens]
    arrived = yield [(x[token], chosen[token]) for token in tokens]
    assert [len(rows) for rows, _ in arrived] == counts
    returned = yield [work(rows, choices) for rows, choices in arrived]
    out = torch.zeros_like(x)
    for token, rows in zip(tokens, returned, strict=True):
        out.index_add_(0, token, rows)
    return out


RIGHT: list[tuple[Exercise, Callable[..., Any]]] = [
    (check.all_to_all, all_to_all),
    (check.all_to_all, exchange_by_places),
    (check.copies_to_send, copies_by_sorting),
    (check.copies_to_send, copies_by_rank),
    (check.bring_home, home_by_autograd),
    (check.bring_home, home_by_marks),
    (check.to_message, packed),
    (check.to_message, message_by_bits),
    (check.layer_on_a_rank, program_by_masks),
    (check.layer_on_a_rank, program_of_one_visit),
]

# ---- wrong answers -----------------------------------------------------------------------------------------------------


def copies_with(owner: Callable[[Tensor, int, int], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def answer(chosen: Tensor, n_experts: int, ranks: int) -> tuple[Tensor, Tensor]:
        marks = torch.nn.functional.one_hot(owner(chosen, n_experts, ranks), ranks).sum(1) > 0
        return marks.T.nonzero()[:, 1], marks.sum(0)

    return answer


def token_by_token(chosen: Tensor, n_experts: int, ranks: int) -> tuple[Tensor, Tensor]:
    marks = torch.nn.functional.one_hot(chosen // (n_experts // ranks), ranks).sum(1) > 0
    return marks.nonzero()[:, 0], marks.sum(0)


def copy_per_expert(chosen: Tensor, n_experts: int, ranks: int) -> tuple[Tensor, Tensor]:
    order = chosen.flatten().sort(stable=True)
    owner = chosen.flatten() // (n_experts // ranks)
    return owner.sort(stable=True).indices // chosen.shape[1], torch.bincount(
        order.values // (n_experts // ranks), minlength=ranks
    )


def home_with(add: Callable[[Tensor, Tensor, Tensor], Tensor], turned: bool = True) -> Callable[..., Rows]:
    def answer(results: Rows, token: Rows, leaving: Tensor, tokens: list[int]) -> Rows:
        returned = exchange_by_places(results, leaving.T if turned else leaving)
        return [add(torch.zeros(n, 3), t, r) for n, t, r in zip(tokens, token, returned, strict=True)]

    return answer


def written_over(out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
    return out.index_copy(0, token, rows)


def averaged(out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
    return out.index_add(0, token, rows) / token.bincount(minlength=len(out)).clamp(min=1)[:, None]


def in_order_of_tokens(out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
    return out.index_add(0, token.sort().values, rows)


def message_with(
    exponent: Callable[[Tensor], Tensor] = torch.ceil,
    divide: Callable[[Tensor, Tensor], Tensor] = lambda scale, power: power,
    largest: float = 448.0,
    bias: int = 127,
) -> Callable[[Tensor], Tensor]:
    def answer(x: Tensor) -> Tensor:
        tiles = x.unflatten(1, (-1, 128))
        scale = tiles.abs().amax(-1) / largest
        power = exponent(scale.log2())
        numbers = (tiles / divide(scale, power.exp2())[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        return torch.cat([numbers.view(torch.uint8).flatten(1), ((power + bias) % 256).to(torch.uint8)], dim=1)

    return answer


def message_of_one_scale(x: Tensor) -> Tensor:
    power = (x.abs().amax(1, keepdim=True) / 448).log2().ceil()
    numbers = (x / power.exp2()).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.cat([numbers, (power + 127).to(torch.uint8).expand(-1, x.shape[1] // 128)], dim=1)


def message_without_scale(x: Tensor) -> Tensor:
    tail = torch.full((len(x), x.shape[1] // 128), 127, dtype=torch.uint8)
    return torch.cat([x.to(torch.float8_e4m3fn).view(torch.uint8), tail], dim=1)


def with_the_bug(x: Tensor, chosen: Tensor, rank: int, ranks: int, held: int, work: Callable[..., Tensor]) -> Any:
    if len(x) == 0:
        return x
    return (yield from program_by_masks(x, chosen, rank, ranks, held, work))


def leaves_when_nothing_came(
    x: Tensor, chosen: Tensor, rank: int, ranks: int, held: int, work: Callable[..., Tensor]
) -> Any:
    tokens = [(chosen // held == to).any(dim=1).nonzero()[:, 0] for to in range(ranks)]
    arrived = yield [(x[token], chosen[token]) for token in tokens]
    if not any(len(rows) for rows, _ in arrived):
        return torch.zeros_like(x)
    returned = yield [work(rows, choices) for rows, choices in arrived]
    return sum((torch.zeros_like(x).index_add(0, t, r) for t, r in zip(tokens, returned, strict=True)), x * 0)


def program_with(add: str = "index_add", own: bool = True, turned: bool = False) -> Callable[..., Any]:
    def program(x: Tensor, chosen: Tensor, rank: int, ranks: int, held: int, work: Callable[..., Tensor]) -> Any:
        tokens = [((chosen // held == to).any(dim=1) & (own or to != rank)).nonzero()[:, 0] for to in range(ranks)]
        arrived = yield [(x[token], chosen[token]) for token in tokens]
        results = [work(rows, choices) for rows, choices in arrived]
        returned = yield results[::-1] if turned else results
        out = torch.zeros_like(x)
        for token, rows in zip(tokens, returned, strict=True):
            out = getattr(out, add)(0, token, rows)
        return out

    return program


WRONG: list[tuple[Exercise, Callable[..., Any], str]] = [
    (check.all_to_all, lambda rows, leaving: [each.clone() for each in rows], "nothing has travelled"),
    (check.all_to_all, lambda rows, leaving: exchange_by_places(rows, leaving.T), "what they are going to *get*"),
    (check.all_to_all, lambda rows, leaving: [torch.cat([p.split(c)[j] for p, c in zip(rows[::-1], leaving.flip(0).tolist(), strict=True)])
     for j in range(len(rows))], "in the wrong order"),
    (check.all_to_all, lambda rows, leaving: [torch.cat(got) for got in zip(*(r.chunk(len(rows)) for r in rows), strict=True)],
     "equal parts"),
    (check.all_to_all, lambda rows, leaving: [torch.cat([p.split(c)[j] for i, (p, c) in enumerate(zip(rows, leaving.tolist(), strict=True))
     if i != j]) for j in range(len(rows))], "on the diagonal"),
    (check.all_to_all, lambda rows, leaving: [torch.cat(rows) for _ in rows], "an all-gather"),
    (check.copies_to_send, copy_per_expert, "once for each *expert*"),
    (check.copies_to_send, token_by_token, "token by token"),
    (check.copies_to_send, copies_with(lambda c, e, r: c % r), "like cards"),
    (check.copies_to_send, copies_with(lambda c, e, r: c[:, :1] // (e // r)), "only each token's first expert"),
    (check.copies_to_send, lambda c, e, r: (copies_by_rank(c, e, r)[0], copies_by_rank(c, e, r)[1].cumsum(0)), "running sums"),
    (check.copies_to_send, lambda c, e, r: tuple(reversed(copies_by_rank(c, e, r))), "the tokens come first"),
    (check.bring_home, home_with(lambda out, t, r: out.index_add(0, t, r), turned=False), "leaving.T"),
    (check.bring_home, home_with(written_over), "results of one token are *added*"),
    (check.bring_home, home_with(averaged), "the mean over the ranks"),
    (check.bring_home, home_with(in_order_of_tokens), "row i is of token[i]"),
    (check.bring_home, lambda results, t, leaving, n: exchange_by_places(results, leaving.T), "one for each copy"),
    (check.to_message, message_without_scale, "without a scale"),
    (check.to_message, message_with(exponent=torch.floor), "rounded *down*"),
    (check.to_message, message_with(exponent=torch.round), "*nearest* power of two"),
    (check.to_message, message_with(divide=lambda scale, power: scale), "before it was rounded up"),
    (check.to_message, message_with(largest=1.0), "above the largest number itself"),
    (check.to_message, message_of_one_scale, "one scale for the whole vector"),
    (check.to_message, message_with(bias=0), "the exponents lack their 127"),
    (check.to_message, lambda x: packed(x).roll(x.shape[1] // 128, 1), "the numbers come first"),
    (check.to_message, lambda x: packed(x)[:, : x.shape[1]], "the exponents do not travel"),
    (check.layer_on_a_rank, with_the_bug, "takes part in every exchange"),
    (check.layer_on_a_rank, leaves_when_nothing_came, "takes part in every exchange"),
    (check.layer_on_a_rank, program_with(add="index_copy"), "written over each other"),
    (check.layer_on_a_rank, program_with(own=False), "left out"),
    (check.layer_on_a_rank, program_with(turned=True), "back to the wrong ranks"),
    (check.layer_on_a_rank, lambda x, *rest: x, "has no `yield`"),
]  # fmt: skip


def test_an_error_names_the_line_of_the_program() -> None:
    def program(x: Tensor, chosen: Tensor, rank: int, ranks: int, held: int, work: Callable[..., Tensor]) -> Any:
        arrived = yield [x for _ in range(ranks)]
        return arrived.sum()

    assert "in line 3 of your function: return arrived.sum()" in "\n".join(check.layer_on_a_rank.run(program).lines)


def test_the_lessons_exercises_in_their_order() -> None:
    assert list(exercises_of(check)) == ["all_to_all", "copies_to_send", "bring_home", "to_message", "layer_on_a_rank"]


# ---- ranks in one process ----------------------------------------------------------------------------------------------


def test_programs_that_meet_get_what_the_others_gave() -> None:
    def program(rank: int) -> Any:
        first = yield [f"{rank}>{to}" for to in range(3)]
        second = yield [text + "!" for text in first]
        return first, second

    for rank, (first, second) in enumerate(meet([program(rank) for rank in range(3)])):
        assert first == [f"{sender}>{rank}" for sender in range(3)]
        assert second == [f"{rank}>{sender}!" for sender in range(3)]


def test_a_rank_that_does_not_come_is_named() -> None:
    def program(rank: int) -> Any:
        yield [0, 0, 0]
        if rank != 1:
            yield [0, 0, 0]

    with pytest.raises(Deadlock, match="exchange 2: ranks 0, 2 wait for rank 1, who came no more"):
        meet([program(rank) for rank in range(3)])

    def short() -> Any:
        yield [0]

    with pytest.raises(UserError, match="exchange 1: rank 0 must give a list of 2 messages"):
        meet([short(), short()])
