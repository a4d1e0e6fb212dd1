"""Checks of lesson 08: gate values, a feed-forward cut into experts, the loop over experts, the sort, and the sum per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property

# ---- gate_values -------------------------------------------------------------------------------------------------------


def _tokens_and_centroids(T: int, d: int, e: int, k: int, scale: float) -> Callable[[Generator], tuple[Any, ...]]:
    def inputs(random: Generator) -> tuple[Any, ...]:
        # Scores spread enough that softmax and sigmoid differ, and not so much that the sigmoid is 0 or 1.
        return torch.randn(T, d, generator=random), 1.2 * torch.randn(e, d, generator=random) / d**0.5, k, scale

    return inputs


def _reference_gates(x: Tensor, centroids: Tensor, k: int, scale: float) -> Tensor:
    """Token by token."""
    gates = torch.zeros(x.shape[0], centroids.shape[0])
    for t, token in enumerate(x.double()):
        affinity = [1 / (1 + float(torch.exp(-(token @ c)))) for c in centroids.double()]
        best = sorted(range(len(affinity)), key=affinity.__getitem__, reverse=True)[:k]
        for e in best:
            gates[t, e] = scale * affinity[e] / sum(affinity[i] for i in best)
    return gates


def _best(x: Tensor, k: int, dim: int = -1, largest: bool = True) -> Tensor:
    """1 where x is among the k largest, else 0."""
    return torch.zeros_like(x).scatter(dim, x.topk(k, dim=dim, largest=largest).indices, 1.0)


def _gated(
    score: Callable[[Tensor], Tensor], weigh: Callable[[Tensor, Tensor, float], Tensor]
) -> Callable[[Tensor, Tensor, int, float], Tensor]:
    """Gate values in two steps of one's own: score(logits), and weigh(scores, 1 where chosen, scale)."""

    def answer(x: Tensor, centroids: Tensor, k: int, scale: float) -> Tensor:
        scores = score(x @ centroids.T)
        return weigh(scores, _best(scores, k), scale)

    return answer


def _share(kept: Tensor) -> Tensor:
    return kept / kept.sum(-1, keepdim=True)


def _only_the_chosen(x: Tensor, centroids: Tensor, k: int, scale: float) -> Tensor:
    best = (x @ centroids.T).sigmoid().topk(k).values
    return scale * _share(best)


def _experts_choose(x: Tensor, centroids: Tensor, k: int, scale: float) -> Tensor:
    scores = (x @ centroids.T).sigmoid()
    return scale * _share(scores * _best(scores, k, dim=0))


def _worst(x: Tensor, centroids: Tensor, k: int, scale: float) -> Tensor:
    scores = (x @ centroids.T).sigmoid()
    return scale * _share(scores * _best(scores, k, largest=False))


gate_values = Exercise(
    name="gate_values",
    reference=_reference_gates,
    cases=[
        Case("3 tokens, 6 experts, 2 chosen", _tokens_and_centroids(3, 8, 6, 2, 1.0)),
        Case("9 tokens, 5 experts, 3 chosen, scaled by 2.5", _tokens_and_centroids(9, 4, 5, 3, 2.5)),
        Case("one expert chosen", _tokens_and_centroids(4, 6, 7, 1, 2.0)),
        Case("all experts chosen", _tokens_and_centroids(5, 3, 4, 4, 0.5)),
    ],
    mistakes=[
        Mistake(
            _gated(torch.sigmoid, lambda s, best, scale: scale * s * best),
            "the normalisation is missing: divide by the sum of the chosen affinities, so that a token's gate values sum to "
            "scale whatever it visits (equation 13)",
        ),
        Mistake(
            _gated(torch.sigmoid, lambda s, best, scale: _share(s * best)),
            "scale is missing: it is multiplied in after the division (before it, it would cancel)",
        ),
        Mistake(
            _gated(torch.sigmoid, lambda s, best, scale: scale * s * best / s.sum(-1, keepdim=True)),
            "you divide by the sum over *all* experts: the sum runs over the chosen only, or the gate values would shrink "
            "with every expert that the model has",
        ),
        Mistake(
            _gated(torch.sigmoid, lambda s, best, scale: scale * s / (s * best).sum(-1, keepdim=True)),
            "experts that were not chosen have a gate value too: theirs is exactly 0, else all of them must be computed",
        ),
        Mistake(
            _gated(lambda z: z.softmax(-1), lambda s, best, scale: scale * _share(s * best)),
            "your affinities come from a softmax: there, one expert's rise is every other's fall. Here each expert is scored "
            "on its own, by a sigmoid, and only the chosen are then divided by their sum",
        ),
        Mistake(
            _gated(lambda z: z.softmax(-1), lambda s, best, scale: scale * s * best),
            "these are the softmax over all experts, as earlier mixtures of experts had it: take the sigmoid of each score, "
            "and divide the chosen by their sum",
        ),
        Mistake(
            _gated(torch.sigmoid, lambda s, best, scale: scale * s.masked_fill(best == 0, -torch.inf).softmax(-1)),
            "you take a softmax of the affinities: they are divided by their plain sum, without another exponential",
        ),
        Mistake(
            _gated(lambda z: z, lambda s, best, scale: scale * _share(s * best)),
            "you weigh with the raw scores: without the sigmoid they can be negative, and their sum can be 0",
        ),
        Mistake(
            _gated(torch.sigmoid, lambda s, best, scale: scale * _share(best)),
            "all chosen experts weigh the same: each weighs by its affinity, or the router would get no gradient",
        ),
        Mistake(
            _experts_choose,
            "you choose along the wrong axis: every expert picks k tokens. Each *token* picks its k experts, along e",
        ),
        Mistake(_worst, "you choose the k smallest affinities: topk takes the largest if you let it"),
        Mistake(
            _only_the_chosen,
            "you give the k gate values without their experts: the result is [T e], each value in its expert's column "
            "(scatter puts it there)",
        ),
        Mistake(
            _gated(torch.sigmoid, lambda s, best, scale: scale * s * best / (s * best).sum(0, keepdim=True)),
            "you divide by a sum over the tokens: each token is normalised by itself, over its experts",
        ),
    ],
)


# ---- cut_into_experts --------------------------------------------------------------------------------------------------


def _dense(w: int, d: int, e: int) -> Callable[[Generator], tuple[Any, ...]]:
    return lambda random: (torch.randn(2 * w, d, generator=random), torch.randn(d, w, generator=random), e)


def _reference_cut(gate_up: Tensor, down: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    gates, ups = (half.chunk(n_experts) for half in gate_up.chunk(2))
    pieces = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
    return torch.stack(pieces), torch.stack(down.chunk(n_experts, dim=1))


def _runs(down: Tensor, e: int) -> Tensor:
    return rearrange(down, "d (e f) -> e d f", e=e)


def _cut(gate_up: str, down: str) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    def answer(both: Tensor, narrow: Tensor, e: int) -> tuple[Tensor, Tensor]:
        lengths = {"two": 2} if "two" in gate_up else {}
        return rearrange(both, gate_up, e=e, **lengths), rearrange(narrow, down, e=e)

    return answer


RIGHT_UP, RIGHT_DOWN = "(two e f) d -> e (two f) d", "d (e f) -> e d f"


def _experts_add_up_to_the_dense(answer: Callable[..., Any]) -> bool:
    random = torch.Generator().manual_seed(5)
    gate_up, down, x = (torch.randn(*shape, generator=random) for shape in ((24, 5), (5, 12), (7, 5)))

    def feed(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = (x @ gate_up.T).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ down.T

    pieces = answer(gate_up, down, 4)
    total = sum(feed(x, *piece) for piece in zip(*pieces, strict=True))
    return torch.allclose(total, feed(x, gate_up, down), atol=1e-4)


cut_into_experts = Exercise(
    name="cut_into_experts",
    reference=_reference_cut,
    cases=[
        Case("a width of 6 cut in 2", _dense(6, 4, 2)),
        Case("a width of 12 cut in 3", _dense(12, 5, 3)),
        Case("a width of 8 cut in 8", _dense(8, 3, 8)),
    ],
    mistakes=[
        Mistake(
            _cut("(e ff) d -> e ff d", RIGHT_DOWN),
            "gate_up is cut as if it were one matrix: its upper half is gate, its lower half up, so your first experts have "
            "only gate rows and your last only up rows. Name the halves: (two e f)",
        ),
        Mistake(
            _cut("(two e f) d -> e (f two) d", RIGHT_DOWN),
            "gate and up rows alternate in your experts: swiglu cuts an expert's rows in the middle, so all gate rows come "
            "first, then all up rows: (two f)",
        ),
        Mistake(
            _cut("(two f e) d -> e (two f) d", "d (f e) -> e d f"),
            "each of your experts has every n-th unit. That computes the same sum, and is not the cut that is asked for: "
            "expert 0 has the first f units, its neighbour the next: (e f), not (f e)",
        ),
        Mistake(
            _cut(RIGHT_UP, "d (f e) -> e d f"),
            "down is cut otherwise than gate and up: unit i is column i of down, and it must go where row i of gate went",
        ),
        Mistake(
            _cut("(two f e) d -> e (two f) d", RIGHT_DOWN),
            "gate and up are cut otherwise than down: row i of gate must go where column i of down goes, in runs: (e f)",
        ),
        Mistake(
            lambda gate_up, down, e: (
                rearrange(gate_up, RIGHT_UP, two=2, e=e),
                down.reshape(e, down.shape[0], -1),
            ),
            "down has the right shape and the wrong numbers: reshape moves the brackets only. Its *columns* are cut, so the "
            "new axis has to come out of the second one: d (e f) -> e d f",
        ),
        Mistake(
            _cut(RIGHT_UP, "d (e f) -> e f d"),
            "an expert's down is turned around: it stays [d f], out times in, as nn.Linear keeps it",
        ),
        Mistake(
            lambda gate_up, down, e: (
                rearrange(gate_up.roll(len(gate_up) // 2, 0), RIGHT_UP, two=2, e=e),
                _runs(down, e),
            ),
            "up stands before gate in your experts: silu would bend the wrong half",
        ),
        Mistake(
            lambda gate_up, down, e: (rearrange(gate_up, RIGHT_UP, two=2, e=e), _runs(down, e) / e),
            "you divide down by the number of experts: the experts' outputs are added, not averaged, so nothing is divided",
        ),
        Mistake(
            _cut("(two e f) d -> e two f d", RIGHT_DOWN),
            "gate and up have an axis of their own in your experts: put them one after the other again, (two f)",
        ),
    ],
    properties=[
        Property(
            "all experts together, with a weight of 1 each, give what the whole gave",
            _experts_add_up_to_the_dense,
            "each unit (a row of gate, the same row of up, the same column of down) has to land in one expert, whole",
        )
    ],
)


# ---- experts_in_a_loop -------------------------------------------------------------------------------------------------


def _routed_tokens(
    T: int, d: int, f: int, e: int, k: int, idle: int | None = None
) -> Callable[[Generator], tuple[Any, ...]]:
    def inputs(random: Generator) -> tuple[Any, ...]:
        scores = torch.rand(T, e, generator=random)
        if idle is not None:
            scores[:, idle] = -1.0
        gates = 2.5 * _share(scores * _best(scores, k))
        x = torch.randn(T, d, generator=random)
        return x, gates, torch.randn(e, 2 * f, d, generator=random), torch.randn(e, d, f, generator=random)

    return inputs


def _outputs(x: Tensor, gate_up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor] = F.silu) -> Tensor:
    """[T e d]: what every expert makes of every token."""
    gate, up = torch.einsum("td,efd->tef", x, gate_up).chunk(2, dim=-1)
    return torch.einsum("tef,edf->ted", act(gate) * up, down)


def _reference_loop(x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return (gates[..., None] * _outputs(x, gate_up, down)).sum(1)


def _weighed(weigh: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, gates, gate_up, down: (weigh(gates)[..., None] * _outputs(x, gate_up, down)).sum(1)


def _gates_the_input(x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for e in range(len(gate_up)):
        gate, up = ((gates[:, e, None] * x) @ gate_up[e].T).chunk(2, dim=-1)
        total += (F.silu(gate) * up) @ down[e].T
    return total


def _last_wins(x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    outputs, total = gates[..., None] * _outputs(x, gate_up, down), torch.zeros_like(x)
    for e in range(len(gate_up)):
        mine = gates[:, e] > 0
        total[mine] = outputs[mine, e]
    return total


def _up_bends(x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return _reference_loop(x, gates, gate_up.roll(gate_up.shape[1] // 2, 1), down)


def _works_only_where_chosen(answer: Callable[..., Any]) -> bool:
    T, d, f, e, k = 12, 8, 4, 6, 2
    inputs = _routed_tokens(T, d, f, e, k)(torch.Generator().manual_seed(3))
    with FlopCounterMode(display=False) as counter:
        answer(*inputs)
    return counter.get_total_flops() <= 1.05 * T * k * 2 * 3 * d * f


experts_in_a_loop = Exercise(
    name="experts_in_a_loop",
    reference=_reference_loop,
    cases=[
        Case("one token, 3 experts, 1 chosen", _routed_tokens(1, 4, 3, 3, 1)),
        Case("8 tokens, 5 experts, 2 chosen", _routed_tokens(8, 6, 4, 5, 2)),
        Case("an expert that nobody chose", _routed_tokens(7, 5, 3, 4, 3, idle=2)),
    ],
    mistakes=[
        Mistake(
            _weighed(lambda gates: (gates > 0).float()),
            "the gate values are missing: each expert's output is multiplied by its gate value before it is added",
        ),
        Mistake(
            _gates_the_input,
            "the gate value multiplies the expert's *input*: SwiGLU is not linear, an input half as large does not give an "
            "output half as large. Weigh what comes out",
        ),
        Mistake(
            _last_wins,
            "a token keeps only the output of the last expert that it visited: add to what earlier experts have left there",
        ),
        Mistake(
            _up_bends,
            "silu bends the up half: the first f rows of gate_up are the gate, and they are bent",
        ),
        Mistake(
            _weighed(lambda gates: gates / (gates > 0).sum(-1, keepdim=True)),
            "you average over the experts that a token visits: equation 12 adds, the gate values do the weighing",
        ),
        Mistake(
            lambda x, *rest: x + _reference_loop(x, *rest),
            "x itself is in your sum: the residual stream is added by the block, outside the feed-forward",
        ),
        Mistake(
            _weighed(torch.square),
            "the gate value is multiplied in twice: once is enough, behind the nonlinearity",
        ),
        Mistake(
            _weighed(lambda gates: gates * _best(gates, 1)),
            "each token's best expert alone has worked: all that have a gate value above 0 do",
        ),
        Mistake(
            lambda x, gates, gate_up, down: (gates[..., None] * _outputs(x, gate_up, down, act=lambda z: z)).sum(1),
            "silu is missing: an expert is a SwiGLU, silu(gate) * up",
        ),
    ],
    properties=[
        Property(
            "an expert works on the tokens that chose it, and on no others",
            _works_only_where_chosen,
            "the numbers are right and the work is not: every expert runs on every token, and most of that is multiplied by "
            "0. Pick an expert's tokens first (`gates[:, e].nonzero()[:, 0]`), then compute",
        )
    ],
)


# ---- dispatch ----------------------------------------------------------------------------------------------------------


def _choices(T: int, k: int, e: int, idle: int | None = None) -> Callable[[Generator], tuple[Any, ...]]:
    def inputs(random: Generator) -> tuple[Any, ...]:
        scores = torch.rand(T, e, generator=random)
        if idle is not None:
            scores[:, idle] = -1.0
        return scores.topk(k).indices, e

    return inputs


def _reference_dispatch(chosen: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    k, flat = chosen.shape[1], [expert for row in chosen.tolist() for expert in row]
    slots = [slot for expert in range(n_experts) for slot, other in enumerate(flat) if other == expert]
    ends = [sum(other <= expert for other in flat) for expert in range(n_experts)]
    return torch.tensor(slots), torch.tensor([slot // k for slot in slots]), torch.tensor(ends)


def _slots(chosen: Tensor) -> Tensor:
    return chosen.flatten().argsort(stable=True)


def _counts(chosen: Tensor, n_experts: int) -> Tensor:
    return torch.bincount(chosen.flatten(), minlength=n_experts)


def _with_token(token: Callable[[Tensor, Tensor, int], Tensor]) -> Callable[[Tensor, int], tuple[Tensor, ...]]:
    return lambda c, e: (_slots(c), token(_slots(c), c, e), _counts(c, e).cumsum(0))


def _with_slot(slot: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int], tuple[Tensor, ...]]:
    return lambda c, e: (slot(c), slot(c) // c.shape[1], _counts(c, e).cumsum(0))


def _with_ends(ends: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], tuple[Tensor, ...]]:
    return lambda c, e: (_slots(c), _slots(c) // c.shape[1], ends(c, e))


def _by_slot_first(chosen: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    slot = chosen.T.flatten().argsort(stable=True)
    return slot, slot % chosen.shape[0], _counts(chosen, n_experts).cumsum(0)


dispatch = Exercise(
    name="dispatch",
    reference=_reference_dispatch,
    cases=[
        Case("5 tokens, 2 of 4 experts", _choices(5, 2, 4)),
        Case("9 tokens, 3 of 5 experts", _choices(9, 3, 5)),
        Case("the last expert stays empty", _choices(6, 2, 4, idle=3)),
        Case("one choice a token", _choices(8, 1, 3)),
    ],
    mistakes=[
        Mistake(
            _with_token(lambda slot, c, e: slot % c.shape[1]),
            "token is `slot % k`: that says which of its k choices it is. Whose it is, is `slot // k`",
        ),
        Mistake(
            _with_token(lambda slot, c, e: slot // e),
            "token is slot divided by the number of *experts*: a token has k slots, one for each choice",
        ),
        Mistake(
            _with_token(lambda slot, c, e: slot % c.shape[0]),
            "token is `slot % T`: that would be right if all first choices stood before all second ones. flatten puts a "
            "token's k choices side by side: `slot // k`",
        ),
        Mistake(
            _with_token(lambda slot, c, e: c.flatten()[slot]),
            "token holds the experts' numbers: it is to say whose row each is",
        ),
        Mistake(
            _with_ends(_counts),
            "ends holds how many rows each expert has: where a run *ends* is the running total of that, `cumsum(0)`",
        ),
        Mistake(
            _with_ends(lambda c, e: _counts(c, e).cumsum(0) - _counts(c, e)),
            "ends holds where each run begins: the end of a run is the beginning of the next",
        ),
        Mistake(
            _with_ends(lambda c, e: _counts(c, e).cumsum(0) - 1),
            "ends holds the last row of each run: it is one past the last, as in a Python slice",
        ),
        Mistake(
            _with_ends(lambda c, e: torch.bincount(c.flatten()).cumsum(0)),
            "where nobody chose the last experts your ends is too short: an empty expert has a place too, so tell bincount "
            "its minlength",
        ),
        Mistake(
            _with_slot(lambda c: torch.arange(c.numel())),
            "nothing is sorted: the choices stand in the order of their tokens still",
        ),
        Mistake(
            _with_slot(lambda c: _slots(c).argsort()),
            "this is the way back: where each choice *went*. slot says for each sorted row which choice it is: argsort once",
        ),
        Mistake(
            _with_slot(lambda c: c.flatten().sort(stable=True).values),
            "slot holds the sorted experts' numbers: it is to hold *positions*, where in the flat list each sorted choice "
            "stood: argsort, not sort",
        ),
        Mistake(
            _with_slot(lambda c: c.flatten().argsort(descending=True, stable=True)),
            "the last expert comes first: sort upwards, so that expert e's rows end at ends[e]",
        ),
        Mistake(
            _by_slot_first,
            "you flatten choice by choice, all first choices before all second ones: it is a sort as well, but `gates` is "
            "flattened token by token, and slot has to fit to it",
        ),
    ],
)


# ---- add_up (find the bug) ---------------------------------------------------------------------------------------------


def _sorted_rows(T: int, k: int, e: int, d: int) -> Callable[[Generator], tuple[Any, ...]]:
    def inputs(random: Generator) -> tuple[Any, ...]:
        chosen, _ = _choices(T, k, e)(random)
        return torch.randn(T * k, d, generator=random), _slots(chosen) // k, T

    return inputs


def _reference_sum(results: Tensor, token: Tensor, n_tokens: int) -> Tensor:
    rows = [results[token == t].sum(0) for t in range(n_tokens)]
    return torch.stack(rows)


def _keeps(rows: Callable[[int], range]) -> Callable[[Tensor, Tensor, int], Tensor]:
    def answer(results: Tensor, token: Tensor, n_tokens: int) -> Tensor:
        out = torch.zeros(n_tokens, results.shape[1])
        for row in rows(len(results)):
            out[token[row]] = results[row]
        return out

    return answer


def _nothing_is_lost(answer: Callable[..., Any]) -> bool:
    results, token = torch.arange(24.0).view(8, 3), torch.tensor([2, 0, 1, 2, 0, 2, 0, 2])
    return torch.allclose(answer(results, token, 3).sum(0), results.sum(0))


add_up = Exercise(
    name="add_up",
    reference=_reference_sum,
    cases=[
        Case("5 tokens, 2 experts each", _sorted_rows(5, 2, 4, 3)),
        Case("9 tokens, 3 experts each", _sorted_rows(9, 3, 6, 4)),
    ],
    mistakes=[
        Mistake(
            _keeps(range),
            "this is still the bug: `out[token] += rows` reads out[token] once, adds, and writes back, so of the rows of one "
            "token only the last is kept. `index_add_` adds them one after the other",
        ),
        Mistake(
            _keeps(lambda n: range(n - 1, -1, -1)),
            "of each token's rows only the first is kept: all of them are to be added",
        ),
        Mistake(
            lambda results, token, n: rearrange(results, "(T k) d -> T k d", T=n).sum(1),
            "you add up k neighbouring rows: that would be right before the sort. Now the rows stand by expert, and `token` "
            "says whose each of them is",
        ),
        Mistake(
            lambda results, token, n: _reference_sum(results, token, n) * n / len(results),
            "this is the mean of a token's rows: the rows are weighed already, add them",
        ),
        Mistake(
            lambda results, token, n: results[token][:n],
            "you gather, `results[token]`: token says where a row *goes*, not where it comes from",
        ),
    ],
    properties=[
        Property(
            "nothing is lost: all tokens together hold what all rows held",
            _nothing_is_lost,
            "the sum over all rows changed. Tokens may have any number of rows: here one has a single row, another four",
        )
    ],
)
