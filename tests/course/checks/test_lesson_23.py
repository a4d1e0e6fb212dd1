"""Lesson 23's checks: each right answer accepted, each wrong one refused with its own hint, a blank one only noted."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from lesson_answers import (  # noqa: F401
    test_blank_is_unsolved_and_every_exercise_knows_mistakes,
    test_right_answers_are_accepted,
    test_wrong_answers_get_their_own_hint,
)
from torch import Tensor

from dsv3_mini.course.checks import lesson_23 as check
from dsv3_mini.course.checks.framework import Exercise, exercises_of
from dsv3_mini.inference.bins import sort_greedily
from dsv3_mini.inference.placement import Placement, replicate

# ---- right answers, each written in two ways ---------------------------------------------------------------------------


def load_by_package(load: Tensor, expert: Tensor, gpus: int) -> Tensor:
    return Placement(expert[None], len(load), gpus).gpu_load(load[None])[0]


def load_by_marks(load: Tensor, expert: Tensor, gpus: int) -> Tensor:
    marks = F.one_hot(expert, len(load)).double()
    return (marks / marks.sum(0)).view(gpus, -1, len(load)).sum(1) @ load.double()


def counts_by_package(load: Tensor, slots: int) -> Tensor:
    return replicate(load[None], slots)[0]


def counts_by_heap(load: Tensor, slots: int) -> Tensor:
    heap = [(-x, e, 1) for e, x in enumerate(load.tolist())]
    heapq.heapify(heap)
    for _ in range(slots - len(load)):
        _, e, n = heap[0]
        heapq.heapreplace(heap, (-load[e].item() / (n + 1), e, n + 1))
    return torch.tensor([n for _, _, n in sorted(heap, key=lambda entry: entry[1])])


def gpus_by_package(weight: Tensor, gpus: int) -> Tensor:
    held = sort_greedily(weight[None].double(), gpus)[0]
    return torch.zeros(len(weight), dtype=torch.long).scatter(
        0, held.flatten(), torch.arange(len(weight)) * gpus // len(weight)
    )


def gpus_by_lists(weight: Tensor, gpus: int) -> Tensor:
    held: list[list[int]] = [[] for _ in range(gpus)]
    for item in sorted(range(len(weight)), key=lambda i: weight[i], reverse=True):
        room = [own for own in held if len(own) < len(weight) // gpus]
        min(room, key=lambda own: sum(weight[i].item() for i in own)).append(item)
    return torch.tensor([next(g for g in range(gpus) if item in held[g]) for item in range(len(weight))])


def queue_by_sums(arrival: Tensor, reading: Tensor) -> Tensor:
    done = reading.cumsum(0)
    return done + (arrival - done + reading).cummax(0).values - arrival


def queue_by_times(arrival: Tensor, reading: Tensor) -> Tensor:
    end = torch.zeros_like(arrival)
    for i in range(len(arrival)):
        end[i] = reading[i] + (torch.maximum(arrival[i], end[i - 1]) if i else arrival[i])
    return end - arrival


def slots_by_cycles(chosen: Tensor, expert: Tensor) -> Tensor:
    own = defaultdict(list)
    for slot, e in enumerate(expert.tolist()):
        own[e].append(slot)
    turns = {e: cycle(slots) for e, slots in own.items()}
    return torch.tensor([[next(turns[e]) for e in row] for row in chosen.tolist()])


def slots_by_expert(chosen: Tensor, expert: Tensor) -> Tensor:
    flat = chosen.flatten().clone()
    for e in range(int(expert.max()) + 1):
        mine, slots = (chosen.flatten() == e).nonzero()[:, 0], (expert == e).nonzero()[:, 0]
        flat[mine] = slots[torch.arange(len(mine)) % len(slots)]
    return flat.view(chosen.shape)


RIGHT: list[tuple[Exercise, Callable[..., Tensor]]] = [
    (check.gpu_load, load_by_package),
    (check.gpu_load, load_by_marks),
    (check.replicas, counts_by_package),
    (check.replicas, counts_by_heap),
    (check.sort_onto_gpus, gpus_by_package),
    (check.sort_onto_gpus, gpus_by_lists),
    (check.first_tokens, queue_by_sums),
    (check.first_tokens, queue_by_times),
    (check.choose_slots, slots_by_cycles),
    (check.choose_slots, slots_by_expert),
]

# ---- wrong answers -----------------------------------------------------------------------------------------------------


def shares(load: Tensor, expert: Tensor) -> Tensor:
    return load[expert] / torch.bincount(expert)[expert]


def count_with(pick: Callable[[Tensor, Tensor], Tensor], start: int = 1) -> Callable[..., Tensor]:
    def answer(load: Tensor, slots: int) -> Tensor:
        count = torch.full_like(load, start)
        while count.sum() < slots:
            count[pick(load, count)] += 1
        return count.long()

    return answer


def second_for_the_top(load: Tensor, slots: int) -> Tensor:
    return 1 + torch.zeros(len(load), dtype=torch.long).scatter(0, load.topk(slots - len(load)).indices, 1)


def sorted_with(order: Callable[[Tensor], Tensor], full: bool = True) -> Callable[..., Tensor]:
    def answer(weight: Tensor, gpus: int) -> Tensor:
        carried, held, found = torch.zeros(gpus), torch.zeros(gpus), torch.zeros(len(weight), dtype=torch.long)
        for item in order(weight).tolist():
            free = held < len(weight) / gpus if full else torch.ones(gpus, dtype=torch.bool)
            gpu = carried.masked_fill(~free, torch.inf).argmin()
            found[item], carried[gpu], held[gpu] = gpu, carried[gpu] + weight[item], held[gpu] + 1
        return found

    return answer


def dealt(pattern: Callable[[Tensor, int, int], Tensor]) -> Callable[..., Tensor]:
    def answer(weight: Tensor, gpus: int) -> Tensor:
        rank = weight.argsort(descending=True).argsort()
        return pattern(rank, gpus, len(weight))

    return answer


def back_and_forth(rank: Tensor, gpus: int, _: int) -> Tensor:
    place = rank % (2 * gpus)
    return torch.minimum(place, 2 * gpus - 1 - place)


def first_replica(chosen: Tensor, expert: Tensor) -> Tensor:
    return torch.stack([(expert == e).nonzero()[0, 0] for e in chosen.flatten()]).view(chosen.shape)


def overwritten(chosen: Tensor, expert: Tensor) -> Tensor:
    slot = {e: s for s, e in enumerate(expert.tolist())}
    return torch.tensor([[slot[e] for e in row] for row in chosen.tolist()])


def by_token(chosen: Tensor, expert: Tensor) -> Tensor:
    own = [(expert == e).nonzero()[:, 0] for e in range(int(expert.max()) + 1)]
    return torch.stack([torch.stack([own[e][t % len(own[e])] for e in row.tolist()]) for t, row in enumerate(chosen)])


def one_too_far(chosen: Tensor, expert: Tensor) -> Tensor:
    first = chosen.new_tensor(range(int(expert.max()) + 1))[:, None].expand(-1, chosen.shape[1])
    return slots_by_expert(torch.cat((first[:, :1].T.flatten(), chosen.flatten()))[:, None], expert)[len(first) :].view(
        chosen.shape
    )


def replica_numbers(chosen: Tensor, expert: Tensor) -> Tensor:
    slot, earlier = slots_by_cycles(chosen, expert), F.one_hot(expert).cumsum(0) - 1
    return earlier[slot, chosen]


WRONG: list[tuple[Exercise, Callable[..., Any], str]] = [
    (check.gpu_load, lambda x, e, g: x[e].view(g, -1).sum(1), "whole load"),
    (check.gpu_load, lambda x, e, g: shares(x, e).view(-1, g).sum(0), "like cards"),
    (check.gpu_load, lambda x, e, g: shares(x, e).view(g, -1).mean(1), "the mean of a GPU's slots"),
    (check.gpu_load, lambda x, e, g: load_by_package(x, e, g).max(), "the busiest GPU only"),
    (check.gpu_load, lambda x, e, g: shares(x, e), "the load of each slot"),
    (check.gpu_load, lambda x, e, g: x[e].view(g, -1).sum(1) * len(x) / len(e), "the mean number of replicas"),
    (check.replicas, count_with(lambda load, count: load.argmax()), "go to one expert"),
    (check.replicas, second_for_the_top, "nobody a third"),
    (check.replicas, count_with(lambda load, count: (load / (1 + count)).argmax()), "*after* the gift"),
    (check.replicas, count_with(lambda load, count: (load / (1 + count)).argmax(), start=0), "no replica at all"),
    (check.replicas, lambda x, slots: (slots * x / x.sum()).round().clamp(min=1).long(), "do not add up"),
    (check.replicas, lambda x, slots: counts_by_heap(x, slots) - 1, "the redundant ones only"),
    (check.replicas, lambda x, slots: torch.arange(len(x)).repeat_interleave(counts_by_heap(x, slots)), "expert of each slot"),
    (check.replicas, count_with(lambda load, count: (load / count).argmin()), "the quietest experts"),
    (check.sort_onto_gpus, sorted_with(lambda w: torch.arange(len(w))), "as they come"),
    (check.sort_onto_gpus, sorted_with(lambda w: w.argsort()), "the lightest replicas come first"),
    (check.sort_onto_gpus, sorted_with(lambda w: w.argsort(descending=True), full=False), "more replicas than others"),
    (check.sort_onto_gpus, dealt(lambda rank, g, n: rank % g), "dealt round"),
    (check.sort_onto_gpus, dealt(back_and_forth), "there and back"),
    (check.sort_onto_gpus, dealt(lambda rank, g, n: rank // (n // g)), "all on GPU 0"),
    (check.sort_onto_gpus, lambda w, g: gpus_by_lists(w.sort(descending=True).values, g), "of the *sorted* replicas"),
    (check.sort_onto_gpus, lambda w, g: torch.bincount(gpus_by_lists(w, g), w), "the loads of the GPUs"),
    (check.first_tokens, lambda came, takes: takes, "begins* to read"),
    (check.first_tokens, lambda came, takes: queue_by_times(came, takes) + came, "times on the clock"),
    (check.first_tokens, lambda came, takes: queue_by_sums(came, takes) - takes, "the wait in the queue"),
    (check.first_tokens, lambda came, takes: takes.cumsum(0) - (came - came[0]), "without a pause"),
    (check.first_tokens, lambda came, takes: torch.maximum(came, F.pad((came + takes)[:-1], (1, 0))) + takes - came,
     "carry the time"),
    (check.first_tokens, lambda came, takes: queue_by_times(came, takes).mean(), "this is the mean"),
    (check.choose_slots, first_replica, "this is still the bug"),
    (check.choose_slots, overwritten, "*last* replica"),
    (check.choose_slots, by_token, "by the number of the token"),
    (check.choose_slots, one_too_far, "turns start at 0"),
    (check.choose_slots, replica_numbers, "the numbers of the replicas"),
    (check.choose_slots, lambda c, e: slots_by_cycles(c.T, e).T, "column by column"),
    (check.choose_slots, lambda c, e: c.clone(), "still experts"),
    (check.choose_slots, lambda c, e: e[slots_by_cycles(c, e)], "still experts"),
]  # fmt: skip


def test_replicas_that_are_only_nearly_best_are_caught() -> None:
    """One replica moved from the busiest to the quietest: the sum is right, and the minimum, and nothing else."""

    def shifted(load: Tensor, slots: int) -> Tensor:
        counts = counts_by_heap(load, slots)
        if counts[load.argmax()] > 1:
            counts[load.argmax()] -= 1
            counts[load.argmin()] += 1
        return counts

    assert check.replicas.run(shifted).state == "wrong"


def test_the_lessons_exercises_in_their_order() -> None:
    names = ["gpu_load", "replicas", "sort_onto_gpus", "first_tokens", "choose_slots"]
    assert list(exercises_of(check)) == names
