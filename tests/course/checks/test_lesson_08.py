"""Lesson 08's checks: each right answer accepted, each wrong one refused with its own hint, a blank one only noted."""

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

from dsv3_mini.course.checks import lesson_08 as check
from dsv3_mini.course.checks.framework import Exercise, exercises_of

# ---- right answers, each written in two ways ---------------------------------------------------------------------------


def gates_by_mask(x: Tensor, centroids: Tensor, k: int, scale: float) -> Tensor:
    affinity = torch.sigmoid(x @ centroids.T)
    least = affinity.sort(dim=-1, descending=True).values[:, k - 1 : k]
    kept = torch.where(affinity >= least, affinity, 0.0)
    return kept / kept.sum(dim=1, keepdim=True) * scale


def gates_in_place(x: Tensor, centroids: Tensor, k: int, scale: float) -> Tensor:
    scores = F.linear(x, centroids)
    chosen = scores.topk(k, dim=-1, sorted=False).indices  # the sigmoid keeps the order
    picked = scores.sigmoid().gather(1, chosen)
    out = torch.zeros_like(scores)
    out.scatter_(1, chosen, scale * picked / picked.sum(1, True))
    return out


def cut_by_views(gate_up: Tensor, down: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    d, w = down.shape
    halves = gate_up.view(2, n_experts, w // n_experts, d)
    return halves.transpose(0, 1).reshape(n_experts, -1, d), down.view(d, n_experts, -1).transpose(0, 1)


def cut_in_a_loop(gate_up: Tensor, down: Tensor, n_experts: int) -> list[Tensor]:
    f = down.shape[1] // n_experts
    gate, up = gate_up[: len(gate_up) // 2], gate_up[len(gate_up) // 2 :]
    runs = [slice(e * f, (e + 1) * f) for e in range(n_experts)]
    return [torch.stack([torch.cat([gate[r], up[r]]) for r in runs]), torch.stack([down[:, r] for r in runs])]


def feed(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.mT).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down.mT


def loop_by_mask(x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, (wide, narrow) in enumerate(zip(gate_up, down, strict=True)):
        mine = gates[:, e] > 0
        out[mine] = out[mine] + gates[mine, e].unsqueeze(1) * feed(x[mine], wide, narrow)
    return out


def loop_by_tokens(x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    rows = []
    for t in range(len(x)):
        visited = gates[t].nonzero().flatten().tolist()
        rows.append(sum(gates[t, e] * feed(x[t : t + 1], gate_up[e], down[e])[0] for e in visited))
    return torch.stack(rows)


def dispatch_by_sort(chosen: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    experts, slot = torch.sort(chosen.reshape(-1), stable=True)
    token = torch.arange(len(chosen)).repeat_interleave(chosen.shape[1])[slot]
    return slot, token, torch.searchsorted(experts, torch.arange(n_experts), right=True)


def dispatch_by_lists(chosen: Tensor, n_experts: int) -> list[Tensor]:
    found = [(chosen == e).flatten().nonzero()[:, 0] for e in range(n_experts)]
    slot = torch.cat(found)
    token = slot.div(chosen.shape[1], rounding_mode="floor")
    return [slot, token, torch.tensor([len(f) for f in found]).cumsum(0).to(torch.int32)]


def sum_by_index_add(results: Tensor, token: Tensor, n_tokens: int) -> Tensor:
    return torch.zeros(n_tokens, results.shape[1]).index_add_(0, token, results)


def sum_by_one_hot(results: Tensor, token: Tensor, n_tokens: int) -> Tensor:
    return F.one_hot(token, n_tokens).float().T @ results


RIGHT: list[tuple[Exercise, Callable[..., Any]]] = [
    (check.gate_values, gates_by_mask),
    (check.gate_values, gates_in_place),
    (check.cut_into_experts, cut_by_views),
    (check.cut_into_experts, cut_in_a_loop),
    (check.experts_in_a_loop, loop_by_mask),
    (check.experts_in_a_loop, loop_by_tokens),
    (check.dispatch, dispatch_by_sort),
    (check.dispatch, dispatch_by_lists),
    (check.add_up, sum_by_index_add),
    (check.add_up, sum_by_one_hot),
]


# ---- wrong answers -----------------------------------------------------------------------------------------------------


def gates_with(
    weigh: Callable[[Tensor, Tensor, float], Tensor], score: Callable[[Tensor], Tensor] = torch.sigmoid
) -> Callable[..., Tensor]:
    """weigh(scores [T e], chosen [T k], scale)."""

    def answer(x: Tensor, centroids: Tensor, k: int, scale: float) -> Tensor:
        scores = score(torch.einsum("td,ed->te", x, centroids))
        return weigh(scores, scores.topk(k).indices, scale)

    return answer


def kept(scores: Tensor, chosen: Tensor) -> Tensor:
    return torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))


def plain(scores: Tensor, chosen: Tensor, scale: float) -> Tensor:
    return scale * F.normalize(kept(scores, chosen), p=1, dim=-1)


def chosen_softmax(scores: Tensor, chosen: Tensor, scale: float) -> Tensor:
    return torch.zeros_like(scores).scatter(1, chosen, scale * scores.gather(1, chosen).softmax(-1))


def over_tokens(x: Tensor, centroids: Tensor, k: int, scale: float) -> Tensor:
    scores = torch.sigmoid(x @ centroids.T)
    best = torch.zeros_like(scores).scatter(0, scores.topk(k, dim=0).indices, 1.0)
    return scale * (scores * best) / (scores * best).sum(1, keepdim=True)


def smallest(x: Tensor, centroids: Tensor, k: int, scale: float) -> Tensor:
    scores = torch.sigmoid(x @ centroids.T)
    return plain(scores, (-scores).topk(k).indices, scale)


def values_alone(x: Tensor, centroids: Tensor, k: int, scale: float) -> Tensor:
    best = torch.sigmoid(x @ centroids.T).topk(k).values
    return scale * best / best.sum(-1, keepdim=True)


def cut_wrongly(
    wide: Callable[[Tensor, int], Tensor] | None = None, narrow: Callable[[Tensor, int], Tensor] | None = None
) -> Callable[..., Any]:
    """The right cut, but for the part that is given."""

    def answer(gate_up: Tensor, down: Tensor, e: int) -> tuple[Tensor, Tensor]:
        right = cut_by_views(gate_up, down, e)
        return (wide(gate_up, e) if wide else right[0]), (narrow(down, e) if narrow else right[1])

    return answer


def strided_up(gate_up: Tensor, e: int) -> Tensor:
    gate, up = gate_up.chunk(2)
    return torch.stack([torch.cat([gate[i::e], up[i::e]]) for i in range(e)])


def strided_down(down: Tensor, e: int) -> Tensor:
    return torch.stack([down[:, i::e] for i in range(e)])


def alternating(gate_up: Tensor, e: int) -> Tensor:
    gate, up = gate_up.chunk(2)
    return torch.stack([gate, up], dim=1).view(e, -1, gate_up.shape[1])


def up_first(gate_up: Tensor, e: int) -> Tensor:
    gate, up = gate_up.chunk(2)
    return torch.stack([torch.cat([u, g]) for u, g in zip(up.chunk(e), gate.chunk(e), strict=True)])


def loop_with(one: Callable[..., Tensor], into: str = "add") -> Callable[..., Tensor]:
    """A loop over experts whose body is one(x, gate values, gate_up, down), added or written."""

    def answer(x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(gates.shape[1]):
            mine = gates[:, e].nonzero()[:, 0]
            rows = one(x[mine], gates[mine, e][:, None], gate_up[e], down[e])
            out[mine] = rows if into == "write" else out[mine] + rows
        return out

    return answer


def swapped(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (gate * F.silu(up)) @ down.T


def unbent(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (gate * up) @ down.T


def averaged(x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return loop_by_mask(x, gates, gate_up, down) / gates.count_nonzero(dim=1)[:, None]


def best_only(x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    value, expert = gates.max(dim=1)
    return torch.stack(
        [v * feed(row[None], gate_up[e], down[e])[0] for row, v, e in zip(x, value, expert, strict=True)]
    )


def everybody_works(x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Right numbers, e / k times the work."""
    return sum(gates[:, e, None] * feed(x, gate_up[e], down[e]) for e in range(len(gate_up)))


def sent(
    slot: Callable[[Tensor], Tensor] = lambda c: c.flatten().sort(stable=True).indices,
    token: Callable[[Tensor, Tensor, int], Tensor] = lambda slot, c, e: slot // c.shape[1],
    ends: Callable[[Tensor, int], Tensor] = lambda c, e: torch.bincount(c.flatten(), minlength=e).cumsum(0),
) -> Callable[[Tensor, int], tuple[Tensor, ...]]:
    return lambda c, e: (slot(c), token(slot(c), c, e), ends(c, e))


def starts(c: Tensor, e: int) -> Tensor:
    return F.pad(torch.bincount(c.flatten(), minlength=e).cumsum(0), (1, 0))[:-1]


def undone(c: Tensor) -> Tensor:
    return c.flatten().sort(stable=True).indices.argsort()


def choice_by_choice(c: Tensor, e: int) -> tuple[Tensor, Tensor, Tensor]:
    slot = torch.cat(list(c.T)).sort(stable=True).indices
    return slot, slot % len(c), torch.bincount(c.flatten(), minlength=e).cumsum(0)


def plus_equals(results: Tensor, token: Tensor, n_tokens: int) -> Tensor:
    out = torch.zeros(n_tokens, results.shape[1])
    out[token] += results
    return out


def written_backwards(results: Tensor, token: Tensor, n_tokens: int) -> Tensor:
    out = torch.zeros(n_tokens, results.shape[1])
    for row, t in reversed(list(zip(results, token.tolist(), strict=True))):
        out[t] = row
    return out


def neighbours(results: Tensor, token: Tensor, n_tokens: int) -> Tensor:
    return results.view(n_tokens, -1, results.shape[1]).sum(dim=1)


def means(results: Tensor, token: Tensor, n_tokens: int) -> Tensor:
    counts = torch.bincount(token, minlength=n_tokens)[:, None]
    return sum_by_index_add(results, token, n_tokens) / counts


def first_of_each(results: Tensor, token: Tensor, n_tokens: int) -> Tensor:
    order = token.argsort(stable=True)
    return results[order].view(n_tokens, -1, results.shape[1])[:, 0]


WRONG: list[tuple[Exercise, Callable[..., Any], str]] = [
    (check.gate_values, gates_with(lambda s, c, scale: scale * kept(s, c)), "normalisation is missing"),
    (check.gate_values, gates_with(lambda s, c, scale: plain(s, c, 1.0)), "scale is missing"),
    (check.gate_values, gates_with(lambda s, c, scale: plain(s * scale, c, 1.0)), "scale is missing"),
    (check.gate_values, gates_with(lambda s, c, scale: scale * kept(s / s.sum(1, True), c)), "sum over *all* experts"),
    (check.gate_values, gates_with(lambda s, c, scale: scale * s / kept(s, c).sum(1, True)), "not chosen"),
    (check.gate_values, gates_with(plain, lambda z: F.softmax(z, -1)), "rise is every other's fall"),
    (check.gate_values, gates_with(chosen_softmax, torch.clone), "rise is every other's fall"),
    (check.gate_values, gates_with(lambda s, c, scale: scale * kept(s, c), lambda z: F.softmax(z, -1)), "softmax over all"),
    (check.gate_values, gates_with(chosen_softmax), "softmax of the affinities"),
    (check.gate_values, gates_with(lambda s, c, scale: scale * kept(s, c) / kept(s, c).sum(1, True), torch.clone),
     "raw scores"),
    (check.gate_values, gates_with(lambda s, c, scale: plain(torch.ones_like(s), c, scale)), "weigh the same"),
    (check.gate_values, over_tokens, "wrong axis"),
    (check.gate_values, smallest, "k smallest"),
    (check.gate_values, values_alone, "without their experts"),
    (check.gate_values, gates_with(lambda s, c, scale: scale * kept(s, c) / kept(s, c).sum(0)), "sum over the tokens"),
    (check.cut_into_experts, cut_wrongly(wide=lambda w, e: w.view(e, -1, w.shape[1])), "only gate rows"),
    (check.cut_into_experts, cut_wrongly(wide=alternating), "alternate"),
    (check.cut_into_experts, cut_wrongly(strided_up, strided_down), "every n-th unit"),
    (check.cut_into_experts, cut_wrongly(narrow=strided_down), "down is cut otherwise than gate and up"),
    (check.cut_into_experts, cut_wrongly(wide=strided_up), "gate and up are cut otherwise than down"),
    (check.cut_into_experts, cut_wrongly(narrow=lambda n, e: n.reshape(e, len(n), -1)), "moves the brackets only"),
    (check.cut_into_experts, cut_wrongly(narrow=lambda n, e: torch.stack(n.T.chunk(e))), "turned around"),
    (check.cut_into_experts, cut_wrongly(wide=up_first), "up stands before gate"),
    (check.cut_into_experts, cut_wrongly(narrow=lambda n, e: torch.stack(n.chunk(e, 1)) / e), "added, not averaged"),
    (check.cut_into_experts, cut_wrongly(wide=lambda w, e: w.view(2, e, -1, w.shape[1]).transpose(0, 1)), "axis of their own"),
    (check.experts_in_a_loop, loop_with(lambda x, g, wide, narrow: feed(x, wide, narrow)), "gate values are missing"),
    (check.experts_in_a_loop, loop_with(lambda x, g, wide, narrow: feed(g * x, wide, narrow)), "expert's *input*"),
    (check.experts_in_a_loop, loop_with(lambda x, g, wide, narrow: g * feed(x, wide, narrow), "write"), "last expert"),
    (check.experts_in_a_loop, loop_with(lambda x, g, wide, narrow: g * swapped(x, wide, narrow)), "bends the up half"),
    (check.experts_in_a_loop, averaged, "you average"),
    (check.experts_in_a_loop, lambda x, *rest: loop_by_mask(x, *rest) + x, "x itself"),
    (check.experts_in_a_loop, loop_with(lambda x, g, wide, narrow: g * g * feed(x, wide, narrow)), "multiplied in twice"),
    (check.experts_in_a_loop, best_only, "best expert alone"),
    (check.experts_in_a_loop, loop_with(lambda x, g, wide, narrow: g * unbent(x, wide, narrow)), "silu is missing"),
    (check.experts_in_a_loop, everybody_works, "every expert runs on every token"),
    (check.dispatch, sent(token=lambda slot, c, e: slot % c.shape[1]), "which of its k choices"),
    (check.dispatch, sent(token=lambda slot, c, e: slot // e), "number of *experts*"),
    (check.dispatch, sent(token=lambda slot, c, e: slot % len(c)), "slot % T"),
    (check.dispatch, sent(token=lambda slot, c, e: c.flatten().sort().values), "say whose row"),
    (check.dispatch, sent(ends=lambda c, e: torch.bincount(c.flatten(), minlength=e)), "running total"),
    (check.dispatch, sent(ends=starts), "where each run begins"),
    (check.dispatch, sent(ends=lambda c, e: torch.bincount(c.flatten(), minlength=e).cumsum(0) - 1), "one past the last"),
    (check.dispatch, sent(ends=lambda c, e: torch.bincount(c.flatten()).cumsum(0)), "minlength"),
    (check.dispatch, sent(slot=lambda c: torch.arange(c.numel())), "nothing is sorted"),
    (check.dispatch, sent(slot=undone), "the way back"),
    (check.dispatch, sent(slot=lambda c: c.flatten().sort().values), "argsort, not sort"),
    (check.dispatch, sent(slot=lambda c: (-c.flatten()).sort(stable=True).indices), "last expert comes first"),
    (check.dispatch, choice_by_choice, "choice by choice"),
    (check.add_up, plus_equals, "this is still the bug"),
    (check.add_up, written_backwards, "only the first is kept"),
    (check.add_up, neighbours, "neighbouring rows"),
    (check.add_up, means, "the mean of a token's rows"),
    (check.add_up, first_of_each, "only the first is kept"),
    (check.add_up, lambda results, token, n: results[token][:n], "you gather"),
]  # fmt: skip


def test_every_hint_is_shown_to_somebody() -> None:
    """No hint stands there that the wrong answers above never reach."""
    told = {(exercise.name, hint) for exercise, _, hint in WRONG}
    for exercise in exercises_of(check).values():
        for mistake in exercise.mistakes:
            assert any(name == exercise.name and hint in mistake.hint for name, hint in told), mistake.hint


def test_the_lessons_exercises_in_their_order() -> None:
    assert list(exercises_of(check)) == ["gate_values", "cut_into_experts", "experts_in_a_loop", "dispatch", "add_up"]


def test_a_token_with_more_rows_than_others_is_not_cut_short() -> None:
    """Right as long as every token has k rows, which holds on one machine only."""

    def by_view(results: Tensor, token: Tensor, n_tokens: int) -> Tensor:
        if len(token.unique(return_counts=True)[1].unique()) > 1:
            return results[:n_tokens]
        return results[token.argsort(stable=True)].view(n_tokens, -1, results.shape[1]).sum(1)

    result = check.add_up.run(by_view)
    assert result.state == "wrong" and "any number of rows" in "\n".join(result.lines)
