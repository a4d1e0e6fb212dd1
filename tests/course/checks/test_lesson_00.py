"""Lesson 00's checks: right answers of several kinds pass; each known mistake is refused with its own hint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_mini.config import PRESETS, ModelConfig
from dsv3_mini.course.checks import lesson_00
from dsv3_mini.course.checks.framework import Exercise, exercises_of
from dsv3_mini.ledger import count_parameters
from dsv3_mini.model.router import expert_load


def blank(*_: Any) -> Any:
    raise NotImplementedError


def counted_one_by_one(chosen: Tensor, n_experts: int) -> list[int] | Tensor:
    counts = [0] * n_experts
    for text in chosen.tolist():
        for token in text:
            for expert in token:
                counts[expert] += 1
    return torch.tensor(counts)


def compared_with_all(chosen: Tensor, n_experts: int) -> Tensor:
    return (chosen[..., None] == torch.arange(n_experts)).flatten(0, 2).sum(0).float()


def once_each(chosen: Tensor, n_experts: int) -> Tensor:
    counts = torch.zeros(n_experts, dtype=torch.long)
    counts[chosen] += 1
    return counts


def by_difference(always: int, expert: int, layers: int, n_experts: int, k: int) -> float:
    whole = always + expert * layers * n_experts
    return 1 - expert * layers * (n_experts - k) / whole


def in_a_tensor(always: int, expert: int, layers: int, n_experts: int, k: int) -> Tensor:
    sizes = torch.tensor([always, *[expert * k] * layers], dtype=torch.float64)
    return sizes.sum() / (always + layers * n_experts * expert)


def with_a_list(scores_of: Any, ids: list[int], n_new: int) -> list[int]:
    new: list[int] = []
    while len(new) < n_new:
        new += [int(scores_of(ids + new)[-1].topk(1).indices)]
    return ids + new


def with_a_position(scores_of: Any, ids: list[int], n_new: int) -> tuple[int, ...]:
    grown = tuple(ids)
    for _ in range(n_new):
        grown = (*grown, scores_of(grown)[len(grown) - 1].argmax().item())
    return grown


def as_the_friend(scores_of: Any, ids: list[int], n_new: int) -> list[int]:
    ids = list(ids)
    last = len(ids) - 1
    for _ in range(n_new):
        ids.append(int(scores_of(ids)[last].argmax()))
    return ids


def never_appended(scores_of: Any, ids: list[int], n_new: int) -> list[int]:
    return ids + [int(scores_of(ids)[-1].argmax()) for _ in range(n_new)]


def row(choose: Callable[[Any, list[int]], int]) -> Callable[..., list[int]]:
    def write(scores_of: Any, ids: list[int], n_new: int) -> list[int]:
        ids = list(ids)
        for _ in range(n_new):
            ids.append(choose(scores_of, ids))
        return ids

    return write


def in_the_callers_list(scores_of: Any, ids: list[int], n_new: int) -> list[int]:
    for _ in range(n_new):
        ids.append(int(scores_of(ids)[-1].argmax()))
    return ids


COUNT, SHARE, WRITE = lesson_00.tokens_per_expert, lesson_00.activated_share, lesson_00.write_on

RIGHT = [
    (COUNT, counted_one_by_one),
    (COUNT, compared_with_all),
    (COUNT, expert_load),
    (SHARE, by_difference),
    (SHARE, in_a_tensor),
    (WRITE, with_a_list),
    (WRITE, with_a_position),
    (WRITE, row(lambda scores_of, ids: int(scores_of(torch.tensor(ids))[-1].argmax()))),
]

WRONG = [
    (COUNT, lambda chosen, n: torch.bincount(chosen.flatten()), "minlength"),
    (COUNT, once_each, "writes every place once"),
    (COUNT, lambda chosen, n: torch.bincount(chosen[:, :, 0].flatten(), minlength=n), "first choice of each token"),
    (COUNT, lambda chosen, n: torch.bincount(chosen[0].flatten(), minlength=n), "first text of the batch"),
    (COUNT, lambda chosen, n: torch.stack([torch.bincount(c.flatten(), minlength=n) for c in chosen]), "[b e]"),
    (COUNT, lambda chosen, n: expert_load(chosen, n) / chosen.numel(), "shares that add up to 1"),
    (SHARE, lambda always, expert, layers, n, k: k / n, "share of the experts alone"),
    (SHARE, lambda always, expert, layers, n, k: (always + k * expert) / (always + n * expert), "experts of one layer: every"),
    (SHARE, lambda always, expert, layers, n, k: (always + k * expert) / (always + layers * n * expert), "in *each* layer"),
    (SHARE, lambda always, expert, layers, n, k: k * expert * layers / (always + layers * n * expert), "above the line `always`"),
    (SHARE, lambda always, expert, layers, n, k: (always + k * expert * layers) / (layers * n * expert), "below the line `always`"),
    (SHARE, lambda *sizes: 1 / by_difference(*sizes), "upside down"),
    (SHARE, lambda *sizes: 100 * by_difference(*sizes), "from 0 to 1"),
    (WRITE, as_the_friend, "all your new tokens are the same one"),
    (WRITE, never_appended, "all your new tokens are the same one"),
    (WRITE, row(lambda scores_of, ids: int(scores_of(ids)[0].argmax())), "row 0"),
    (WRITE, row(lambda scores_of, ids: int(scores_of(ids).argmax(0)[-1])), "best *position*"),
    (WRITE, row(lambda scores_of, ids: int(scores_of(ids[-1:])[-1].argmax())), "newest token only"),
    (WRITE, lambda scores_of, ids, n: with_a_list(scores_of, ids, n)[len(ids) :], "new tokens alone"),
    (WRITE, lambda scores_of, ids, n: with_a_list(scores_of, ids, n + 1), "one token too many"),
    (WRITE, lambda scores_of, ids, n: with_a_list(scores_of, ids, n - 1), "one token too few"),
    (WRITE, in_the_callers_list, "changes its input number 2 in place"),
]  # fmt: skip


@pytest.mark.parametrize(("exercise", "answer"), RIGHT)
def test_right_answers_pass(exercise: Exercise, answer: Callable[..., Any]) -> None:
    result = exercise.run(answer)
    assert result.state == "right", str(result)


@pytest.mark.parametrize(("exercise", "answer", "hint"), WRONG)
def test_mistakes_get_their_own_hint(exercise: Exercise, answer: Callable[..., Any], hint: str) -> None:
    result = exercise.run(answer)
    assert result.state == "wrong"
    assert hint in " ".join(result.lines)
    others = [mistake.hint for mistake in exercise.mistakes if hint not in mistake.hint]
    assert not any(other in " ".join(result.lines) for other in others)


@pytest.mark.parametrize("exercise", exercises_of(lesson_00).values(), ids=lambda exercise: exercise.name)
def test_a_blank_is_unsolved(exercise: Exercise) -> None:
    assert exercise.run(blank).state == "unsolved"


def test_every_mistake_is_given_here() -> None:
    for exercise in exercises_of(lesson_00).values():
        for mistake in exercise.mistakes:
            assert any(hint in mistake.hint for other, _, hint in WRONG if other is exercise), mistake.hint


def test_the_share_is_the_ledgers() -> None:
    for preset in PRESETS:
        cfg, counts = ModelConfig.preset(preset), count_parameters(ModelConfig.preset(preset))
        routed = counts.moe_layers * cfg.n_routed_experts * counts.expert.total
        sizes = (counts.main_trainable - routed, counts.expert.total, counts.moe_layers)
        share = SHARE.reference(*sizes, cfg.n_routed_experts, cfg.num_experts_per_tok)
        assert share == pytest.approx(counts.activated / counts.main_trainable, rel=1e-12)


def test_the_toy_model_is_causal() -> None:
    toy = lesson_00.ToyModel(3, 7)
    assert torch.equal(toy([1, 2, 3])[:2], toy([1, 2]))
    assert not torch.equal(toy([1, 2])[1], toy([3, 2])[1])
