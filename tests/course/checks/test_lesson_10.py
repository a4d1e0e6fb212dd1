"""Lesson 10's checks: each right answer accepted, each wrong one refused with its own hint, a blank one only noted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lesson_answers import (  # noqa: F401
    test_blank_is_unsolved_and_every_exercise_knows_mistakes,
    test_right_answers_are_accepted,
    test_wrong_answers_get_their_own_hint,
)
from torch import Tensor

from dsv3_mini.course.capacity import within_capacity
from dsv3_mini.course.checks import lesson_10 as check
from dsv3_mini.course.checks.framework import Exercise, exercises_of
from dsv3_mini.model.router import limit_to_groups
from dsv3_mini.parallel.traffic import nodes_reached, traffic

# ---- right answers, each written in two ways ---------------------------------------------------------------------------


def open_by_package(preference: Tensor, n_group: int, topk_group: int) -> Tensor:
    return limit_to_groups(preference, n_group, topk_group) > -torch.inf


def open_by_threshold(preference: Tensor, n_group: int, topk_group: int) -> Tensor:
    grouped = preference.unflatten(-1, (n_group, -1))
    rank = grouped.sort(dim=-1).values[..., -2:].mean(-1)  # ranks groups as the sum does
    lowest = rank.sort(dim=-1).values[..., -topk_group]
    return (rank >= lowest[..., None]).repeat_interleave(grouped.shape[-1], dim=-1)


def visited_by_one_hot(chosen: Tensor, n_experts: int, n_nodes: int) -> Tensor:
    return F.one_hot(chosen, n_experts).sum(1).view(len(chosen), n_nodes, -1).amax(-1) > 0


def messages_by_loop(visited: Tensor, home: Tensor) -> Tensor:
    rows = [visited[home == node].sum(0) for node in range(visited.shape[1])]
    return torch.stack(rows) * (1 - torch.eye(visited.shape[1], dtype=torch.long))


def place_by_expert(chosen: Tensor, n_experts: int, capacity: int) -> Tensor:
    kept = torch.zeros(chosen.numel(), dtype=torch.bool)
    for expert in range(n_experts):
        kept[(chosen.flatten() == expert).nonzero().flatten()[:capacity]] = True
    return kept.view(chosen.shape)


def choose_by_sorting(preference: Tensor, allowed: Tensor, k: int) -> Tensor:
    shut = torch.where(allowed, preference, torch.tensor(-torch.inf))
    return shut.argsort(dim=-1, descending=True)[..., :k]


def choose_by_lowering(preference: Tensor, allowed: Tensor, k: int) -> Tensor:
    far = preference.max() - preference.min() + 1
    return (preference - far * ~allowed).topk(k).indices


RIGHT: list[tuple[Exercise, Callable[..., Tensor]]] = [
    (check.open_experts, open_by_package),
    (check.open_experts, open_by_threshold),
    (check.visited_nodes, nodes_reached),
    (check.visited_nodes, visited_by_one_hot),
    (check.messages, traffic),
    (check.messages, messages_by_loop),
    (check.finds_place, within_capacity),
    (check.finds_place, place_by_expert),
    (check.choose, choose_by_sorting),
    (check.choose, choose_by_lowering),
]


# ---- wrong answers -----------------------------------------------------------------------------------------------------


def open_with(
    rank: Callable[[Tensor], Tensor] = lambda grouped: grouped.topk(2).values.sum(-1),
    members: Callable[[Tensor, int], Tensor] = lambda marks, m: marks.repeat_interleave(m, dim=-1),
    largest: bool = True,
) -> Callable[..., Tensor]:
    def answer(preference: Tensor, n_group: int, topk_group: int) -> Tensor:
        grouped = preference.unflatten(-1, (n_group, -1))
        best = rank(grouped).topk(topk_group, largest=largest).indices
        marks = torch.zeros(*preference.shape[:2], n_group, dtype=torch.bool).scatter(-1, best, True)
        return members(marks, grouped.shape[-1])

    return answer


def every_gth(preference: Tensor, n_group: int, topk_group: int) -> Tensor:
    grouped = preference.unflatten(-1, (-1, n_group)).mT
    best = grouped.topk(2).values.sum(-1).topk(topk_group).indices
    marks = torch.zeros(*preference.shape[:2], n_group, dtype=torch.bool).scatter(-1, best, True)
    return marks[..., None, :].expand(*marks.shape[:2], grouped.shape[-1], n_group).flatten(2)


def only_pairs(preference: Tensor, n_group: int, topk_group: int) -> Tensor:
    grouped = preference.unflatten(-1, (n_group, -1))
    pairs = grouped >= grouped.topk(2).values[..., 1:]
    return open_by_package(preference, n_group, topk_group) & pairs.flatten(2)


def same_for_all(preference: Tensor, n_group: int, topk_group: int) -> Tensor:
    rank = preference.unflatten(-1, (n_group, -1)).topk(2).values.sum(-1).sum((0, 1))
    marks = torch.zeros(n_group, dtype=torch.bool).scatter(0, rank.topk(topk_group).indices, True)
    return marks.repeat_interleave(preference.shape[-1] // n_group).expand_as(preference)


def by_size(preference: Tensor, n_group: int, topk_group: int) -> Tensor:
    """Right where the two best of each group are above 0."""
    two = preference.unflatten(-1, (n_group, -1)).topk(2).values
    best = two.abs().sum(-1).topk(topk_group).indices
    marks = torch.zeros(*preference.shape[:2], n_group, dtype=torch.bool).scatter(-1, best, True)
    return marks.repeat_interleave(preference.shape[-1] // n_group, dim=-1)


def marks_of(node: Tensor, n_nodes: int) -> Tensor:
    return F.one_hot(node, n_nodes).sum(1) > 0


def table(visited: Tensor, home: Tensor) -> Tensor:
    return torch.zeros(visited.shape[1], visited.shape[1], dtype=torch.long).index_add(0, home, visited.long())


def overwritten(visited: Tensor, home: Tensor) -> Tensor:
    sent = torch.zeros(visited.shape[1], visited.shape[1], dtype=torch.long)
    sent[home] += visited.long()
    return sent.fill_diagonal_(0)


def place_with(keep: Callable[[Tensor, Tensor, int], Tensor]) -> Callable[..., Tensor]:
    """`keep(count of the own expert up to here, load of the own expert, capacity)`."""

    def answer(chosen: Tensor, n_experts: int, capacity: int) -> Tensor:
        marks = F.one_hot(chosen.flatten(), n_experts)
        own = marks.bool()
        return keep(marks.cumsum(0)[own], marks.sum(0).expand_as(marks)[own], capacity).view(chosen.shape)

    return answer


def slots_first(chosen: Tensor, n_experts: int, capacity: int) -> Tensor:
    return place_by_expert(chosen.T.contiguous(), n_experts, capacity).T


def whole_tokens(chosen: Tensor, n_experts: int, capacity: int) -> Tensor:
    return place_by_expert(chosen, n_experts, capacity).all(1)[:, None].repeat(1, chosen.shape[1])


def last_first(chosen: Tensor, n_experts: int, capacity: int) -> Tensor:
    turned = chosen.flatten().flip(0)[:, None]
    return place_by_expert(turned, n_experts, capacity).flatten().flip(0).view(chosen.shape)


def multiplied(preference: Tensor, allowed: Tensor, k: int) -> Tensor:
    return torch.where(allowed, preference, 0.0).topk(k).indices


def closed_afterwards(preference: Tensor, allowed: Tensor, k: int) -> Tensor:
    chosen = preference.topk(k).indices
    return torch.where(allowed.gather(-1, chosen), chosen, -1)


def shut(preference: Tensor, allowed: Tensor) -> Tensor:
    return torch.where(allowed, preference, -torch.inf)


WRONG: list[tuple[Exercise, Callable[..., Any], str]] = [
    (check.open_experts, open_with(lambda grouped: grouped.max(-1).values), "by its best expert alone"),
    (check.open_experts, open_with(lambda grouped: grouped.mean(-1)), "by all of its experts"),
    (check.open_experts, open_with(largest=False), "the worst groups"),
    (check.open_experts, lambda p, g, t: ~open_by_package(p, g, t), "the wrong way round"),
    (check.open_experts, every_gth, "a group of every g-th expert"),
    (check.open_experts, open_with(members=lambda marks, m: marks.repeat(1, 1, m)), "land on other experts"),
    (check.open_experts, only_pairs, "only the two best of each group are open"),
    (check.open_experts, same_for_all, "all tokens get the same groups"),
    (check.open_experts, limit_to_groups, "one step further"),
    (check.open_experts, open_with(members=lambda marks, m: marks), "these are marks of groups"),
    (check.visited_nodes, lambda c, e, n: marks_of(c % n, n), "like cards"),
    (check.visited_nodes, lambda c, e, n: marks_of(c // n, n), "you divide by the number of nodes"),
    (check.visited_nodes, lambda c, e, n: F.one_hot(c // (e // n), n).sum(1), "once for each expert there"),
    (check.visited_nodes, lambda c, e, n: nodes_reached(c, e, n).sum(1), "how many nodes each token visits"),
    (check.visited_nodes, lambda c, e, n: nodes_reached(c, e, n).mT, "have changed places"),
    (check.visited_nodes, lambda c, e, n: nodes_reached(c[:, :1], e, n), "only the best expert"),
    (check.visited_nodes, lambda c, e, n: nodes_reached(c, e, n).logical_not(), "the wrong way round"),
    (check.visited_nodes, lambda c, e, n: F.one_hot(c // (e // n), n) == 1, "each choice still has its own row"),
    (check.messages, table, "crosses no network"),
    (check.messages, lambda v, home: traffic(v, home).T, "sender and receiver have changed places"),
    (check.messages, lambda v, home: v.sum(0), "wherever they come from"),
    (check.messages, overwritten, "the last one wins"),
    (check.messages, lambda v, home: traffic(v, home).clamp(max=1), "count them"),
    (check.messages, lambda v, home: traffic(v, home).sum(0), "what each node receives"),
    (check.messages, lambda v, home: traffic(v, home).sum(1), "what each node sends"),
    (check.messages, lambda v, home: traffic(v.logical_not(), home), "does *not* visit"),
    (check.finds_place, place_with(lambda come, load, places: come < places), "one place of each expert stays empty"),
    (check.finds_place, place_with(lambda come, load, places: come - 1 <= places), "one too many"),
    (check.finds_place, slots_first, "everybody's first choice"),
    (check.finds_place, place_with(lambda come, load, places: load <= places), "turns all of them away"),
    (check.finds_place, place_with(lambda come, load, places: torch.arange(len(come)) < places), "in one queue"),
    (check.finds_place, whole_tokens, "loses all of them"),
    (check.finds_place, place_with(lambda come, load, places: come > places), "the wrong way round"),
    (check.finds_place, last_first, "served first"),
    (check.finds_place, lambda c, e, places: (~place_by_expert(c, e, places)).sum(), "how many are dropped"),
    (check.choose, multiplied, "this is still the bug"),
    (check.choose, lambda p, a, k: (p * a).topk(k).indices, "this is still the bug"),
    (check.choose, lambda p, a, k: torch.where(a, p, -1.0).topk(k).indices, "closed experts stand at -1"),
    (check.choose, lambda p, a, k: p.topk(k).indices, "the free choice"),
    (check.choose, closed_afterwards, "close afterwards"),
    (check.choose, lambda p, a, k: shut(p, ~a).topk(k).indices, "the mask is the wrong way round"),
    (check.choose, lambda p, a, k: shut(p, a).topk(k).values, "these are preferences"),
    (check.choose, lambda p, a, k: shut(p, a).topk(k).indices.sort(-1).values,
     "ordered by number"),
    (check.choose, lambda p, a, k: (p + torch.where(a, 0.0, 1.0) * -torch.inf).topk(k).indices, "nan"),
    (check.choose, lambda p, a, k: torch.where(a, p, torch.inf).topk(k, largest=False).indices, "k least wanted"),
]  # fmt: skip


def test_ranks_by_size_are_caught() -> None:
    assert check.open_experts.run(by_size).state == "wrong"


def test_a_number_low_enough_for_the_cases_is_not_low_enough() -> None:
    result = check.choose.run(lambda p, a, k: torch.where(a, p, -5.0).topk(k).indices)
    assert result.state == "wrong" and "must lose against any number" in "\n".join(result.lines)


def test_the_lessons_exercises_in_their_order() -> None:
    assert list(exercises_of(check)) == ["open_experts", "visited_nodes", "messages", "finds_place", "choose"]
