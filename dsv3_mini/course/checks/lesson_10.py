"""Lesson 10, node-limited routing: the checks. References are loops over single tokens, in plain Python."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from einops import rearrange, reduce, repeat
from torch import Generator, Tensor

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property

# ---- open_experts ------------------------------------------------------------------------------------------------------


def _open_experts(preference: Tensor, n_group: int, topk_group: int) -> Tensor:
    size = preference.shape[-1] // n_group
    allowed = torch.zeros(preference.shape, dtype=torch.bool)
    for b, s in product(*map(range, preference.shape[:2])):
        groups = [sorted(group) for group in preference[b, s].view(n_group, size).tolist()]
        ranks = sorted((group[-1] + group[-2], number) for number, group in enumerate(groups))
        for _, number in ranks[-topk_group:]:
            allowed[b, s, number * size : (number + 1) * size] = True
    return allowed


def _grouped(preference: Tensor, n_group: int) -> Tensor:
    return rearrange(preference, "b s (g m) -> b s g m", g=n_group)


def _two_best(grouped: Tensor) -> Tensor:
    return grouped.topk(2, dim=-1).values.sum(-1)


def _best_groups(rank: Tensor, topk_group: int, largest: bool = True) -> Tensor:
    """[b s g], true for the best."""
    best = rank.topk(topk_group, dim=-1, largest=largest).indices
    return torch.zeros_like(rank, dtype=torch.bool).scatter(-1, best, True)


def _members(groups: Tensor, preference: Tensor) -> Tensor:
    return repeat(groups, "b s g -> b s (g m)", m=preference.shape[-1] // groups.shape[-1])


def _open_by(rank: Callable[[Tensor], Tensor], largest: bool = True) -> Callable[..., Tensor]:
    """The right steps, with a rank [b s g m] -> [b s g] of one's own."""
    return lambda p, g, kept: _members(_best_groups(rank(_grouped(p, g)), kept, largest), p)


def _neighbours_apart(preference: Tensor, n_group: int, topk_group: int) -> Tensor:
    groups = _best_groups(_two_best(rearrange(preference, "b s (m g) -> b s g m", g=n_group)), topk_group)
    return repeat(groups, "b s g -> b s (m g)", m=preference.shape[-1] // n_group)


def _members_laid_out_wrongly(preference: Tensor, n_group: int, topk_group: int) -> Tensor:
    groups = _best_groups(_two_best(_grouped(preference, n_group)), topk_group)
    return repeat(groups, "b s g -> b s (m g)", m=preference.shape[-1] // n_group)


def _two_of_each(preference: Tensor, n_group: int, topk_group: int) -> Tensor:
    grouped = _grouped(preference, n_group)
    pair = torch.zeros_like(grouped, dtype=torch.bool).scatter(-1, grouped.topk(2, dim=-1).indices, True)
    open_groups = _best_groups(_two_best(grouped), topk_group)
    return rearrange(pair & open_groups[..., None], "b s g m -> b s (g m)")


def _alike_for_all(preference: Tensor, n_group: int, topk_group: int) -> Tensor:
    rank = _two_best(_grouped(preference, n_group))
    everybody = reduce(rank, "b s g -> 1 1 g", "sum").expand_as(rank)
    return _members(_best_groups(everybody, topk_group), preference)


def _masked_already(preference: Tensor, n_group: int, topk_group: int) -> Tensor:
    return preference.masked_fill(~_open_experts(preference, n_group, topk_group), -torch.inf)


def _preferences(what: str, b: int, s: int, n_group: int, size: int, kept: int) -> Case:
    return Case(what, lambda g: (torch.randn(b, s, n_group * size, generator=g), n_group, kept))


def _only_differences_count(answer: Callable[..., Any]) -> bool:
    preference = torch.randn(2, 9, 20, generator=Generator().manual_seed(3))
    return torch.equal(answer(preference - 8, 5, 2), answer(preference, 5, 2))


open_experts = Exercise(
    name="open_experts",
    reference=_open_experts,
    cases=[
        _preferences("5 groups of 4 experts, 2 of them open", 2, 7, 5, 4, 2),
        _preferences("3 groups of 4 experts, 1 of them open", 1, 9, 3, 4, 1),
        _preferences("8 groups of 32 experts, 4 of them open, as in the released model", 1, 6, 8, 32, 4),
        _preferences("all 4 groups open", 1, 3, 4, 3, 4),
    ],
    mistakes=[
        Mistake(
            _open_by(lambda grouped: grouped.amax(-1)),
            "you rank a group by its best expert alone: a token takes several experts from each of its nodes, so the rank "
            "is the sum of the group's *two* best.",
        ),
        Mistake(
            _open_by(lambda grouped: grouped.sum(-1)),
            "you rank a group by all of its experts: those that nobody would choose then outvote the good ones. Sum the two "
            "best only.",
        ),
        Mistake(
            _open_by(_two_best, largest=False),
            "these are the worst groups: topk takes the largest if you let it.",
        ),
        Mistake(
            lambda p, g, kept: ~_open_experts(p, g, kept),
            "the marks are the wrong way round: true is for experts that the token may choose.",
        ),
        Mistake(
            _neighbours_apart,
            "your parentheses say (m g): that makes a group of every g-th expert. A group is what lies on one node, a run of "
            "neighbours: (g m).",
        ),
        Mistake(
            _members_laid_out_wrongly,
            "the groups are the right ones, and their marks land on other experts: when you repeat the mark of a group for "
            "its members, the members run fastest, '(g m)'.",
        ),
        Mistake(
            _two_of_each,
            "only the two best of each group are open: the two best decide *which* groups open, and then all experts of "
            "those groups may be chosen.",
        ),
        Mistake(
            _alike_for_all,
            "all tokens get the same groups: each token ranks the groups for itself, so keep b and s on the right.",
        ),
        Mistake(
            _masked_already,
            "you went one step further and masked the preferences. Here only the marks are wanted, true and false.",
        ),
        Mistake(
            lambda p, g, kept: _best_groups(_two_best(_grouped(p, g)), kept),
            "these are marks of groups, [b s g]: give each expert the mark of its group, [b s e].",
        ),
    ],
    properties=[
        Property(
            "a number added to all preferences changes nothing",
            _only_differences_count,
            "with 8 taken off every preference other groups were opened: compare sums as they are, without a size (abs) or "
            "a zero in between.",
        )
    ],
)


# ---- visited_nodes -----------------------------------------------------------------------------------------------------


def _choices(tokens: int, k: int, n_experts: int, n_nodes: int) -> Case:
    def inputs(g: Generator) -> tuple[Tensor, int, int]:
        return torch.rand(tokens, n_experts, generator=g).topk(k).indices, n_experts, n_nodes

    return Case(f"{n_experts} experts on {n_nodes} nodes, {k} for a token", inputs)


def _visited_nodes(chosen: Tensor, n_experts: int, n_nodes: int) -> Tensor:
    visited = torch.zeros(len(chosen), n_nodes, dtype=torch.bool)
    for token, experts in enumerate(chosen.tolist()):
        for expert in experts:
            visited[token, expert * n_nodes // n_experts] = True
    return visited


def _marked(chosen: Tensor, node: Tensor, n_nodes: int) -> Tensor:
    return torch.zeros(len(chosen), n_nodes, dtype=torch.bool).scatter(1, node, True)


def _visits(chosen: Tensor, n_experts: int, n_nodes: int) -> Tensor:
    return torch.nn.functional.one_hot(chosen // (n_experts // n_nodes), n_nodes).sum(1)


def _order_does_not_matter(answer: Callable[..., Any]) -> bool:
    chosen = torch.tensor([[0, 9, 1, 11], [7, 6, 2, 8]])
    return torch.equal(answer(chosen, 12, 4), answer(chosen.flip(1), 12, 4))


visited_nodes = Exercise(
    name="visited_nodes",
    reference=_visited_nodes,
    cases=[_choices(9, 4, 16, 8), _choices(12, 4, 16, 4), _choices(7, 8, 256, 8), _choices(5, 3, 12, 1)],
    mistakes=[
        Mistake(
            lambda c, e, n: _marked(c, c % n, n),
            "you deal the experts out like cards (expert % nodes). They lie in runs: the first experts all on node 0, the "
            "next on node 1. Divide by how many lie on a node, with //.",
        ),
        Mistake(
            lambda c, e, n: _marked(c, c // n, n),
            "you divide by the number of nodes: divide by how many experts lie on one node, n_experts // n_nodes.",
        ),
        Mistake(
            _visits,
            "you count a node once for each expert there: two experts on one node are one visit, for the copy is handed on "
            "inside. True or false is wanted.",
        ),
        Mistake(
            lambda c, e, n: _visited_nodes(c, e, n).sum(1),
            "this is how many nodes each token visits: which ones is wanted, a mark for each, [T g].",
        ),
        Mistake(
            lambda c, e, n: _visited_nodes(c, e, n).T,
            "tokens and nodes have changed places: tokens come first, [T g].",
        ),
        Mistake(
            lambda c, e, n: _marked(c, c[:, :1] // (e // n), n),
            "only the best expert of each token is looked at: all k send it somewhere.",
        ),
        Mistake(
            lambda c, e, n: ~_visited_nodes(c, e, n),
            "the marks are the wrong way round: true is for nodes that the token visits.",
        ),
        Mistake(
            lambda c, e, n: torch.nn.functional.one_hot(c // (e // n), n).bool(),
            "each choice still has its own row of marks, [T k g]: a node is visited if *any* of the k choices lies there.",
        ),
    ],
    properties=[
        Property(
            "the order of a token's experts does not matter",
            _order_does_not_matter,
            "with the same experts in another order other nodes were marked.",
        )
    ],
)


# ---- messages ----------------------------------------------------------------------------------------------------------


def _visits_from(tokens: int, nodes: int) -> Case:
    def inputs(g: Generator) -> tuple[Tensor, Tensor]:
        return torch.rand(tokens, nodes, generator=g) < 0.6, torch.randint(0, nodes, (tokens,), generator=g)

    return Case(f"{tokens} tokens on {nodes} nodes", inputs)


def _messages(visited: Tensor, home: Tensor) -> Tensor:
    nodes = visited.shape[1]
    sent = [[0] * nodes for _ in range(nodes)]
    for marks, sender in zip(visited.tolist(), home.tolist(), strict=True):
        for receiver, here in enumerate(marks):
            sent[sender][receiver] += here and receiver != sender
    return torch.tensor(sent)


def _with_diagonal(visited: Tensor, home: Tensor) -> Tensor:
    sender = torch.nn.functional.one_hot(home, visited.shape[1])
    return sender.T @ visited.long()


def _last_one_wins(visited: Tensor, home: Tensor) -> Tensor:
    sent = torch.zeros(visited.shape[1], visited.shape[1], dtype=torch.long)
    sent[home] += visited.long()
    return sent.fill_diagonal_(0)


def _nothing_is_lost(answer: Callable[..., Any]) -> bool:
    home = torch.tensor([0, 0, 0, 2, 1])
    sent = answer(torch.ones(5, 3, dtype=torch.bool), home)
    return int(sent.sum()) == 10 and torch.as_tensor(sent).sum(1).tolist() == [6, 2, 2]


messages = Exercise(
    name="messages",
    reference=_messages,
    cases=[_visits_from(40, 4), _visits_from(100, 8), _visits_from(3, 5), _visits_from(6, 1)],
    mistakes=[
        Mistake(
            _with_diagonal,
            "what a token has on its own node crosses no network: the diagonal, from a node to itself, is 0.",
        ),
        Mistake(
            lambda visited, home: _messages(visited, home).T,
            "sender and receiver have changed places: row i holds what node i *sends*.",
        ),
        Mistake(
            lambda visited, home: visited.sum(0),
            "this is how many tokens want each node, wherever they come from: one row for each sending node is wanted.",
        ),
        Mistake(
            _last_one_wins,
            "`sent[home] += ...` writes each row once: of several tokens with the same home the last one wins. Sum over "
            "the tokens, with an einsum or index_add.",
        ),
        Mistake(
            lambda visited, home: (_messages(visited, home) > 0).long(),
            "your table says whether there was a message at all: count them.",
        ),
        Mistake(
            lambda visited, home: _messages(visited, home).sum(0),
            "this is what each node receives: keep the senders apart, one row for each.",
        ),
        Mistake(
            lambda visited, home: _messages(visited, home).sum(1),
            "this is what each node sends: keep the receivers apart, one column for each.",
        ),
        Mistake(
            lambda visited, home: _messages(~visited, home),
            "you count the nodes that a token does *not* visit: `visited` is true where it goes.",
        ),
    ],
    properties=[
        Property(
            "every visit away from home is one message",
            _nothing_is_lost,
            "five tokens that visit all of 3 nodes send two messages each, ten in all, and a node with three of them sends six.",
        )
    ],
)


# ---- finds_place -------------------------------------------------------------------------------------------------------


def _crowd(tokens: int, k: int, n_experts: int, capacity: int) -> Case:
    def inputs(g: Generator) -> tuple[Tensor, int, int]:
        popular = torch.linspace(0, 1, n_experts)  # the last ones are wanted more
        return (torch.rand(tokens, n_experts, generator=g) + popular).topk(k).indices, n_experts, capacity

    return Case(f"{tokens} tokens, {k} of {n_experts} experts, {capacity} places each", inputs)


def _finds_place(chosen: Tensor, n_experts: int, capacity: int) -> Tensor:
    taken, kept = [0] * n_experts, []
    for experts in chosen.tolist():
        row = []
        for expert in experts:
            row.append(taken[expert] < capacity)
            taken[expert] += 1
        kept.append(row)
    return torch.tensor(kept)


def _by_slot(chosen: Tensor, n_experts: int, capacity: int) -> Tensor:
    by_slot = rearrange(chosen, "T k -> (k T) 1")
    return rearrange(_finds_place(by_slot, n_experts, capacity), "(k T) 1 -> T k", k=chosen.shape[1])


def _all_or_nothing(chosen: Tensor, n_experts: int, capacity: int) -> Tensor:
    load = torch.bincount(chosen.flatten(), minlength=n_experts)
    return (load <= capacity)[chosen]


def _one_queue(chosen: Tensor, n_experts: int, capacity: int) -> Tensor:
    return torch.arange(chosen.numel()).view_as(chosen) < capacity


def _as_many_as_fit(answer: Callable[..., Any]) -> bool:
    chosen = torch.rand(50, 6, generator=Generator().manual_seed(5)).topk(3).indices
    load = torch.bincount(chosen.flatten(), minlength=6)
    kept = torch.bincount(chosen[torch.as_tensor(answer(chosen, 6, 22)).bool()], minlength=6)
    return torch.equal(kept, load.clamp(max=22)) and bool(torch.as_tensor(answer(chosen, 6, 50)).all())


finds_place = Exercise(
    name="finds_place",
    reference=_finds_place,
    cases=[_crowd(12, 2, 6, 4), _crowd(40, 4, 16, 10), _crowd(9, 3, 5, 1), _crowd(5, 2, 8, 9)],
    mistakes=[
        Mistake(
            lambda c, e, places: _finds_place(c, e, places - 1),
            "one place of each expert stays empty: a running count that includes the choice itself may go up to capacity.",
        ),
        Mistake(
            lambda c, e, places: _finds_place(c, e, places + 1),
            "each expert takes one too many: with as many before it as there are places, a choice finds none.",
        ),
        Mistake(
            _by_slot,
            "you let everybody's first choice in before anybody's second: here tokens come one after the other, each with "
            "all of its choices. Flatten [T k] as it stands.",
        ),
        Mistake(
            _all_or_nothing,
            "an expert with too many choices turns all of them away: the first `capacity` of them still find a place.",
        ),
        Mistake(
            _one_queue,
            "all choices stand in one queue: each expert has its own.",
        ),
        Mistake(
            lambda c, e, places: _finds_place(c, e, places).all(1, keepdim=True).expand_as(c),
            "a token that finds one expert full loses all of them: its other choices still count.",
        ),
        Mistake(
            lambda c, e, places: ~_finds_place(c, e, places),
            "the marks are the wrong way round: true is for a choice that finds a place.",
        ),
        Mistake(
            lambda c, e, places: _finds_place(c.flip(0, 1), e, places).flip(0, 1),
            "those who come last are served first: the queue starts with the first token.",
        ),
        Mistake(
            lambda c, e, places: int((~_finds_place(c, e, places)).sum()),
            "this is how many are dropped: which ones is wanted, a mark for each choice, [T k].",
        ),
    ],
    properties=[
        Property(
            "an expert serves as many as it has places for, and no choice is lost where all fit",
            _as_many_as_fit,
            "of an expert's choices exactly min(choices, capacity) are kept.",
        )
    ],
)


# ---- choose (find the bug) ---------------------------------------------------------------------------------------------


def _offers(what: str, size: float, shift: float, b: int, s: int, groups: int, members: int, kept: int, k: int) -> Case:
    def inputs(g: Generator) -> tuple[Tensor, Tensor, int]:
        preference = size * torch.rand(b, s, groups * members, generator=g) + shift
        groups_open = _best_groups(torch.rand(b, s, groups, generator=g), kept)
        return preference, _members(groups_open, preference), k

    return Case(what, inputs)


def _choose(preference: Tensor, allowed: Tensor, k: int) -> Tensor:
    rows = []
    for wants, may in zip(preference.flatten(0, 1).tolist(), allowed.flatten(0, 1).tolist(), strict=True):
        candidates = [expert for expert, yes in enumerate(may) if yes]
        rows.append(sorted(candidates, key=lambda expert, wants=wants: -wants[expert])[:k])
    return torch.tensor(rows).view(*preference.shape[:2], k)


def _filled(value: float) -> Callable[..., Tensor]:
    return lambda p, allowed, k: p.masked_fill(~allowed, value).topk(k, dim=-1).indices


def _chosen_then_closed(preference: Tensor, allowed: Tensor, k: int) -> Tensor:
    chosen = preference.topk(k, dim=-1).indices
    return chosen.masked_fill(~allowed.gather(-1, chosen), -1)


def _zero_times_infinity(preference: Tensor, allowed: Tensor, k: int) -> Tensor:
    return (preference + ~allowed * -torch.inf).topk(k, dim=-1).indices


def _one_bias_for_all(answer: Callable[..., Any]) -> bool:
    g = Generator().manual_seed(11)
    preference = torch.rand(1, 30, 12, generator=g)
    allowed = _members(_best_groups(torch.rand(1, 30, 4, generator=g), 2), preference)
    return all(torch.equal(answer(preference + bias, allowed, 3), answer(preference, allowed, 3)) for bias in (-7, 7))


choose = Exercise(
    name="choose",
    reference=_choose,
    cases=[
        _offers("preferences above 0", 1.0, 0.1, 2, 5, 4, 3, 2, 4),
        _offers("preferences on both sides of 0", 1.0, -0.6, 2, 8, 4, 4, 2, 4),
        _offers("preferences around -1", 0.8, -1.4, 2, 8, 4, 4, 2, 4),
        _offers("preferences far below 0", 1.0, -4.0, 1, 9, 4, 4, 2, 4),
        _offers("as many choices as open experts", 2.0, -2.5, 1, 7, 3, 2, 1, 2),
    ],
    mistakes=[
        Mistake(
            _filled(0.0),
            "this is still the bug: a closed expert stands at 0 (multiplying by the marks does that, too), and 0 beats every "
            "open expert whose preference is below it. No number is low enough but -inf.",
        ),
        Mistake(
            _filled(-1.0),
            "closed experts stand at -1: that is enough until a bias has pushed the open ones lower. Only -inf is below "
            "everything.",
        ),
        Mistake(
            lambda p, allowed, k: p.topk(k, dim=-1).indices,
            "this is the free choice: `allowed` closes the other nodes' experts before the choice.",
        ),
        Mistake(
            _chosen_then_closed,
            "you choose first and close afterwards: the token is left with fewer than k experts. Close first, and it finds "
            "the next best on its nodes.",
        ),
        Mistake(
            lambda p, allowed, k: p.masked_fill(allowed, -torch.inf).topk(k, dim=-1).indices,
            "the mask is the wrong way round: `allowed` is true for open experts, so fill where it is not, ~allowed.",
        ),
        Mistake(
            lambda p, allowed, k: p.masked_fill(~allowed, -torch.inf).topk(k, dim=-1).values,
            "these are preferences: the numbers of the experts are wanted, topk's indices.",
        ),
        Mistake(
            lambda p, allowed, k: p.masked_fill(~allowed, -torch.inf).topk(k, dim=-1).indices.sort(dim=-1).values,
            "the experts are the right ones, ordered by number: the best comes first, as topk gives them.",
        ),
        Mistake(
            _zero_times_infinity,
            "0 times infinity is not 0 but nan, which topk takes for the largest: fill with -inf where it is closed, do not "
            "add or multiply.",
        ),
        Mistake(
            lambda p, allowed, k: p.masked_fill(~allowed, torch.inf).topk(k, dim=-1, largest=False).indices,
            "these are the k least wanted of the open experts.",
        ),
    ],
    properties=[
        Property(
            "the same bias for all experts changes no choice",
            _one_bias_for_all,
            "with 7 taken off (or added to) every preference the token chose other experts: what stands in the closed places "
            "must lose against any number.",
        )
    ],
)
