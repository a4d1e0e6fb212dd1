"""Lesson 23, serving: the checks. References are loops in plain Python over single experts, GPUs, requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property

# ---- gpu_load ----------------------------------------------------------------------------------------------------------


def _laid_out(experts: int, slots: int, gpus: int) -> Case:
    def inputs(g: Generator) -> tuple[Tensor, Tensor, int]:
        more = torch.randint(0, experts, (slots - experts,), generator=g)
        expert = torch.cat((torch.arange(experts), more))[torch.randperm(slots, generator=g)]
        return torch.randint(10, 500, (experts,), generator=g), expert, gpus

    return Case(f"{experts} experts in {slots} slots on {gpus} GPUs", inputs)


def _gpu_load(load: Tensor, expert: Tensor, gpus: int) -> Tensor:
    slots = expert.tolist()
    room, found = len(slots) // gpus, [0.0] * gpus
    for slot, e in enumerate(slots):
        found[slot // room] += load[e].item() / slots.count(e)
    return torch.tensor(found, dtype=torch.float64)


def _counts(load: Tensor, expert: Tensor) -> Tensor:
    return torch.bincount(expert, minlength=len(load))


def _nothing_is_lost(answer: Callable[..., Any]) -> bool:
    load, expert = torch.tensor([30.0, 6.0, 12.0]), torch.tensor([0, 0, 1, 2, 0, 2])
    return abs(float(torch.as_tensor(answer(load, expert, 2)).sum()) - 48) < 1e-3


gpu_load = Exercise(
    name="gpu_load",
    reference=_gpu_load,
    cases=[_laid_out(4, 6, 2), _laid_out(6, 6, 3), _laid_out(16, 24, 8), _laid_out(5, 12, 4)],
    mistakes=[
        Mistake(
            lambda load, expert, gpus: load[expert].double().view(gpus, -1).sum(1),
            "every replica carries its expert's whole load: an expert's load is shared by its replicas, so divide by how "
            "many slots hold it.",
        ),
        Mistake(
            lambda load, expert, gpus: (load / _counts(load, expert))[expert].view(-1, gpus).sum(0),
            "you deal the slots out like cards: slots lie GPU by GPU, the first ones all on GPU 0, '(gpu m) -> gpu'.",
        ),
        Mistake(
            lambda load, expert, gpus: (load / _counts(load, expert))[expert].view(gpus, -1).mean(1),
            "this is the mean of a GPU's slots: it has to do all of their work, the sum.",
        ),
        Mistake(
            lambda load, expert, gpus: _gpu_load(load, expert, gpus).max(),
            "this is the busiest GPU only: give the load of each, [gpu].",
        ),
        Mistake(
            lambda load, expert, gpus: (load / _counts(load, expert))[expert],
            "this is the load of each slot: add up the slots of each GPU.",
        ),
        Mistake(
            lambda load, expert, gpus: (load[expert] / (len(expert) / len(load))).double().view(gpus, -1).sum(1),
            "you divide by the mean number of replicas: each expert has a number of its own.",
        ),
    ],
    properties=[
        Property(
            "all GPUs together carry the whole load",
            _nothing_is_lost,
            "the shares of an expert's replicas sum to its load.",
        )
    ],
)


# ---- replicas ----------------------------------------------------------------------------------------------------------


def _popular(experts: int, slots: int, spread: float) -> Case:
    def inputs(g: Generator) -> tuple[Tensor, int]:
        return (spread * torch.randn(experts, generator=g)).exp() * 100, slots

    return Case(f"{experts} experts, {slots} slots, {'very ' if spread > 1 else ''}unequal load", inputs)


def _replicas(load: Tensor, slots: int) -> Tensor:
    loads, counts = load.tolist(), [1] * len(load)
    while sum(counts) < slots:
        counts[max(range(len(counts)), key=lambda e: loads[e] / counts[e])] += 1
    return torch.tensor(counts)


def _one_each_to_the_top(load: Tensor, slots: int) -> Tensor:
    counts = torch.ones(len(load), dtype=torch.long)
    counts[load.argsort(descending=True)[: slots - len(load)]] += 1
    return counts


def _all_to_the_top(load: Tensor, slots: int) -> Tensor:
    counts = torch.ones(len(load), dtype=torch.long)
    counts[load.argmax()] += slots - len(load)
    return counts


def _after_the_gift(load: Tensor, slots: int) -> Tensor:
    counts = torch.ones(len(load), dtype=torch.long)
    for _ in range(slots - len(load)):
        counts[(load / (counts + 1)).argmax()] += 1
    return counts


def _from_nothing(load: Tensor, slots: int) -> Tensor:
    counts = torch.zeros(len(load), dtype=torch.long)
    for _ in range(slots):
        counts[(load / (counts + 1)).argmax()] += 1
    return counts


def _quiet_first(load: Tensor, slots: int) -> Tensor:
    counts = torch.ones(len(load), dtype=torch.long)
    for _ in range(slots - len(load)):
        counts[(load / counts).argmin()] += 1
    return counts


def _by_proportion(load: Tensor, slots: int) -> Tensor:
    return (slots * load / load.sum()).round().clamp(min=1).long()


def _no_count_does_better(answer: Callable[..., Any]) -> bool:
    load = torch.tensor([70.0, 40.0, 9.0, 8.0, 3.0])
    counts = torch.as_tensor(answer(load, 11))
    best = max(x / n for x, n in zip([70.0, 40.0, 9.0, 8.0, 3.0], [5, 3, 1, 1, 1], strict=True))
    return int(counts.sum()) == 11 and int(counts.min()) >= 1 and float((load / counts).max()) <= best + 1e-4


replicas = Exercise(
    name="replicas",
    reference=_replicas,
    cases=[_popular(6, 12, 0.8), _popular(16, 24, 0.8), _popular(16, 40, 1.8), _popular(9, 9, 0.8)],
    mistakes=[
        Mistake(
            _all_to_the_top,
            "all further replicas go to one expert: once it has two, its replicas carry half each, and another expert's may "
            "be busier. Look at load / replicas anew each time.",
        ),
        Mistake(
            _one_each_to_the_top,
            "the busiest experts get a second replica each, and nobody a third: look again after every single one.",
        ),
        Mistake(
            _after_the_gift,
            "you ask whose replicas would be busiest *after* the gift, load / (replicas + 1): what counts is who is busiest "
            "now, load / replicas.",
        ),
        Mistake(
            _from_nothing,
            "you begin with no replica at all, so that a quiet expert may end without any: a token that chooses it would find "
            "nobody. Begin with one each.",
        ),
        Mistake(
            _by_proportion,
            "rounded shares do not add up to the slots: give the slots away one by one.",
        ),
        Mistake(
            lambda load, slots: _replicas(load, slots) - 1,
            "these are the redundant ones only: count the first replica of each expert, too.",
        ),
        Mistake(
            lambda load, slots: torch.repeat_interleave(torch.arange(len(load)), _replicas(load, slots)),
            "this is the expert of each slot: the number of replicas of each expert is wanted, [e].",
        ),
        Mistake(
            _quiet_first,
            "the quietest experts get the replicas: argmax finds the busiest.",
        ),
    ],
    properties=[
        Property(
            "every slot is filled, and no other counts make the busiest replica quieter",
            _no_count_does_better,
            "with loads 70, 40, 9, 8, 3 and 11 slots the busiest replica need not carry more than 14.",
        )
    ],
)


# ---- sort_onto_gpus ----------------------------------------------------------------------------------------------------


def _weights(items: int, gpus: int) -> Case:
    def inputs(g: Generator) -> tuple[Tensor, int]:
        return 1 + 99 * torch.rand(items, generator=g) ** 2, gpus

    return Case(f"{items} replicas on {gpus} GPUs", inputs)


def _onto_gpus(weight: Tensor, gpus: int, order: Callable[[list[int], list[float]], list[int]] | None = None,
               room: int | None = None) -> Tensor:  # fmt: skip
    weights, numbers = weight.tolist(), list(range(len(weight)))
    order = order or (lambda items, w: sorted(items, key=lambda i: -w[i]))
    room = len(weights) // gpus if room is None else room
    load, held, found = [0.0] * gpus, [0] * gpus, [0] * len(weights)
    for item in order(numbers, weights):
        gpu = min((g for g in range(gpus) if held[g] < room), key=lambda g: load[g])
        load[gpu], held[gpu], found[item] = load[gpu] + weights[item], held[gpu] + 1, gpu
    return torch.tensor(found)


def _by_rank(weight: Tensor, gpu_of_rank: Callable[[int], int]) -> Tensor:
    found = torch.zeros(len(weight), dtype=torch.long)
    found[weight.argsort(descending=True)] = torch.tensor([gpu_of_rank(i) for i in range(len(weight))])
    return found


def _there_and_back(weight: Tensor, gpus: int) -> Tensor:
    return _by_rank(weight, lambda i: i % gpus if i // gpus % 2 == 0 else gpus - 1 - i % gpus)


def _equal_numbers(answer: Callable[..., Any]) -> bool:
    weight = torch.tensor([900.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    found = torch.as_tensor(answer(weight, 2))
    return found.tolist() == [0, 0, 0, 1, 1, 1]


sort_onto_gpus = Exercise(
    name="sort_onto_gpus",
    reference=_onto_gpus,
    cases=[_weights(9, 3), _weights(12, 4), _weights(24, 8), _weights(8, 8), _weights(10, 2)],
    mistakes=[
        Mistake(
            lambda w, gpus: _onto_gpus(w, gpus, lambda items, _: items),
            "replicas are taken as they come: sort them first. A heavy one that comes last finds no light GPU with room.",
        ),
        Mistake(
            lambda w, gpus: _onto_gpus(w, gpus, lambda items, x: sorted(items, key=lambda i: x[i])),
            "the lightest replicas come first: begin with the heaviest, while there is still room to make up for it.",
        ),
        Mistake(
            lambda w, gpus: _onto_gpus(w, gpus, room=len(w)),
            "some GPUs hold more replicas than others: a full GPU, with n / gpus of them, takes no more, however light it is.",
        ),
        Mistake(
            lambda w, gpus: _by_rank(w, lambda i: i % gpus),
            "sorted and dealt round like cards: the first GPU gets the heavier one in every round. Ask each time which GPU is "
            "the lightest.",
        ),
        Mistake(
            _there_and_back,
            "dealt there and back: better than round and round, and still blind. Ask each time which GPU is the lightest.",
        ),
        Mistake(
            lambda w, gpus: _by_rank(w, lambda i: i * gpus // len(w)),
            "the heaviest replicas are all on GPU 0: each goes to the GPU that is lightest so far.",
        ),
        Mistake(
            lambda w, gpus: _onto_gpus(w, gpus)[w.argsort(descending=True)],
            "the GPUs stand in the order of the *sorted* replicas: number i of your answer is the GPU of weight[i].",
        ),
        Mistake(
            lambda w, gpus: torch.zeros(gpus).index_add(0, _onto_gpus(w, gpus), w),
            "these are the loads of the GPUs: the GPU of each replica is wanted, [slots].",
        ),
    ],
    properties=[
        Property(
            "each GPU holds equally many, also beside a giant",
            _equal_numbers,
            "with weights 900, 1, 2, 3, 4, 5 on two GPUs: 900 goes to the first, 5, 4 and 3 fill the second, and 2 and 1 must "
            "join the giant.",
        )
    ],
)


# ---- first_tokens ------------------------------------------------------------------------------------------------------


def _queue(count: int, load: float) -> Case:
    def inputs(g: Generator) -> tuple[Tensor, Tensor]:
        gaps = -torch.rand(count, generator=g, dtype=torch.float64).log()
        return gaps.cumsum(0), load * (0.5 + torch.rand(count, generator=g, dtype=torch.float64))

    return Case(f"{count} requests, {load:.0%} of the time at work", inputs)


def _first_tokens(arrival: Tensor, reading: Tensor) -> Tensor:
    free, found = 0.0, []
    for came, takes in zip(arrival.tolist(), reading.tolist(), strict=True):
        free = max(free, came) + takes
        found.append(free - came)
    return torch.tensor(found, dtype=torch.float64)


def _only_the_one_before(arrival: Tensor, reading: Tensor) -> Tensor:
    before = torch.cat((torch.zeros(1, dtype=torch.float64), (arrival + reading)[:-1]))
    return torch.maximum(arrival, before) + reading - arrival


def _never_idle(arrival: Tensor, reading: Tensor) -> Tensor:
    return arrival[0] + reading.cumsum(0) - arrival


def _three_at_once(answer: Callable[..., Any]) -> bool:
    found = torch.as_tensor(answer(torch.tensor([5.0, 5.0, 5.0, 60.0]), torch.tensor([2.0, 3.0, 1.0, 4.0])))
    return torch.allclose(found.double(), torch.tensor([2.0, 5.0, 6.0, 4.0], dtype=torch.float64))


first_tokens = Exercise(
    name="first_tokens",
    reference=_first_tokens,
    cases=[_queue(6, 0.5), _queue(40, 0.9), _queue(15, 3.0)],
    mistakes=[
        Mistake(
            lambda arrival, reading: reading,
            "the clock starts when the unit *begins* to read: the reader of the answer waits from the moment of asking. The "
            "queue is what hurts, and this leaves it out.",
        ),
        Mistake(
            lambda arrival, reading: _first_tokens(arrival, reading) + arrival,
            "these are times on the clock: subtract the arrival, to say how long each one waited.",
        ),
        Mistake(
            lambda arrival, reading: _first_tokens(arrival, reading) - reading,
            "this is the wait in the queue: the first token comes when the prompt has been read, so reading counts as well.",
        ),
        Mistake(
            _never_idle,
            "the unit reads on without a pause, even prompts that have not arrived: it begins at max(free, arrival).",
        ),
        Mistake(
            _only_the_one_before,
            "each waits for the one before as if that one had not waited itself: carry the time at which the unit gets free "
            "along.",
        ),
        Mistake(
            lambda arrival, reading: _first_tokens(arrival, reading).mean(),
            "this is the mean: how long each request waits is wanted, [n].",
        ),
    ],
    properties=[
        Property(
            "three that come at once wait for each other, and one that comes late for nobody",
            _three_at_once,
            "arrivals 5, 5, 5, 60 and readings of 2, 3, 1, 4 seconds give 2, 5, 6, 4.",
        )
    ],
)


# ---- choose_slots (find the bug) -----------------------------------------------------------------------------------------


def _crowd(tokens: int, k: int, experts: int, slots: int) -> Case:
    def inputs(g: Generator) -> tuple[Tensor, Tensor]:
        popular = torch.linspace(0, 1, experts)
        chosen = (torch.rand(tokens, experts, generator=g) + popular).topk(k).indices
        more = torch.randint(experts // 2, experts, (slots - experts,), generator=g)
        return chosen, torch.cat((torch.arange(experts), more))[torch.randperm(slots, generator=g)]

    return Case(f"{tokens} tokens, {k} of {experts} experts in {slots} slots", inputs)


def _choose_slots(chosen: Tensor, expert: Tensor, turn: Callable[[int, int], int] | None = None) -> Tensor:
    slots, come, found = expert.tolist(), {}, []
    for token, choices in enumerate(chosen.tolist()):
        row = []
        for e in choices:
            own = [slot for slot, held in enumerate(slots) if held == e]
            number = come.get(e, 0) if turn is None else turn(come.get(e, 0), token)
            row.append(own[number % len(own)])
            come[e] = come.get(e, 0) + 1
        found.append(row)
    return torch.tensor(found)


def _copy_numbers(chosen: Tensor, expert: Tensor) -> Tensor:
    counts = torch.bincount(expert)
    come = torch.nn.functional.one_hot(chosen.flatten(), len(counts)).cumsum(0).gather(1, chosen.flatten()[:, None]) - 1
    return (come[:, 0] % counts[chosen.flatten()]).view(chosen.shape)


def _taken_in_turn(answer: Callable[..., Any]) -> bool:
    expert, chosen = torch.tensor([0, 1, 0, 0]), torch.tensor([[0, 1]] * 7)
    found = torch.as_tensor(answer(chosen, expert))
    return found[:, 0].tolist() == [0, 2, 3, 0, 2, 3, 0] and found[:, 1].tolist() == [1] * 7


choose_slots = Exercise(
    name="choose_slots",
    reference=_choose_slots,
    cases=[_crowd(8, 2, 4, 6), _crowd(40, 4, 16, 24), _crowd(12, 3, 6, 6), _crowd(30, 2, 6, 15)],
    mistakes=[
        Mistake(
            lambda chosen, expert: _choose_slots(chosen, expert, lambda come, token: 0),
            "this is still the bug: every choice goes to its expert's first replica, and the others wait for nothing.",
        ),
        Mistake(
            lambda chosen, expert: _choose_slots(chosen, expert, lambda come, token: -1),
            "every choice goes to its expert's *last* replica, as in a dict that was overwritten: take turns.",
        ),
        Mistake(
            lambda chosen, expert: _choose_slots(chosen, expert, lambda come, token: token),
            "you take turns by the number of the token: tokens that choose an expert may all be even. Count the choices of "
            "each expert by themselves.",
        ),
        Mistake(
            lambda chosen, expert: _choose_slots(chosen, expert, lambda come, token: come + 1),
            "the first choice of an expert goes to its second replica: a count that includes the choice itself starts at 1, "
            "and turns start at 0.",
        ),
        Mistake(
            _copy_numbers,
            "these are the numbers of the replicas, 0, 1, ...: the slot in which that replica lies is wanted.",
        ),
        Mistake(
            lambda chosen, expert: _choose_slots(chosen.T, expert).T,
            "you count column by column, everybody's first choice before anybody's second: choices come token by token, from "
            "left to right.",
        ),
        Mistake(
            lambda chosen, expert: chosen,
            "these are still experts: with replicas, an expert's number and its slot are two things.",
        ),
    ],
    properties=[
        Property(
            "seven tokens take three replicas in turn",
            _taken_in_turn,
            "expert 0 lies in slots 0, 2 and 3, so that its choices go to 0, 2, 3, 0, 2, 3, 0.",
        )
    ],
)
