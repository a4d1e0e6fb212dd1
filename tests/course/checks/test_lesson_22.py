"""The checks of lesson 22: right answers in several spellings are accepted, wrong ones get their own hint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lesson_answers import (  # noqa: F401
    test_blank_is_unsolved_and_every_exercise_knows_mistakes,
    test_right_answers_are_accepted,
    test_wrong_answers_get_their_own_hint,
)
from torch import Tensor

from dsv3_mini.course.checks import lesson_22 as check
from dsv3_mini.course.checks.framework import Exercise, exercises_of

# ---- right answers, each written in two ways ---------------------------------------------------------------------------


def greedy_by_cumprod(drafts: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    best = logits.argmax(-1)
    held = torch.cumprod((best[:, :-1] == drafts).int(), 1).sum(1)
    return held, best.gather(1, held[:, None])[:, 0]


def greedy_by_rows(drafts: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    held, tokens = [], []
    for row, best in zip(drafts.tolist(), logits.max(-1).indices.tolist(), strict=True):
        h = 0
        for draft, wanted in zip(row, best, strict=False):
            if draft != wanted:
                break
            h += 1
        held.append(h)
        tokens.append(best[h])
    return torch.tensor(held), torch.tensor(tokens)


def verdict_by_min(p: Tensor, q: Tensor, draft: int) -> tuple[Any, Tensor]:
    rest = p - torch.minimum(p, q)
    return torch.minimum(torch.ones(()), p[draft] / q[draft]), rest / rest.sum() if rest.any() else p


def verdict_by_lists(p: Tensor, q: Tensor, draft: int) -> tuple[float, Tensor]:
    a, b = p.tolist(), q.tolist()
    rest = [max(x - y, 0.0) for x, y in zip(a, b, strict=True)]
    total = sum(rest) or None
    return (1.0 if a[draft] >= b[draft] else a[draft] / b[draft]), torch.tensor(
        [r / total for r in rest] if total else a
    )


def tokens_by_horner(shares: list[float]) -> float:
    total = 1.0
    for share in reversed(shares):
        total = 1 + share * total
    return total


def tokens_by_torch(shares: list[float]) -> float:
    return 1.0 + float(torch.tensor(shares, dtype=torch.float64).cumprod(0).sum()) if shares else 1.0


def kept_by_rows(before: list[int], drafts: int, held: list[int]) -> list[int]:
    return [before[row] + held[row] + 1 for row in range(len(before))]


def kept_by_forgetting(before: list[int], drafts: int, held: list[int]) -> list[int]:
    return [b + 1 + drafts - (drafts - h) for b, h in zip(before, held, strict=True)]


RIGHT: list[tuple[Exercise, Callable[..., Any]]] = [
    (check.verify_greedy, greedy_by_cumprod),
    (check.verify_greedy, greedy_by_rows),
    (check.verdict, verdict_by_min),
    (check.verdict, verdict_by_lists),
    (check.tokens_per_pass, tokens_by_horner),
    (check.tokens_per_pass, tokens_by_torch),
    (check.kept, kept_by_rows),
    (check.kept, kept_by_forgetting),
]


# ---- wrong answers -----------------------------------------------------------------------------------------------------


def greedy(held: Callable[[Tensor, Tensor], Tensor], at: Callable[[Tensor, int], Tensor]) -> Callable[..., Any]:
    def answer(drafts: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        best = logits.argmax(-1)
        count = held(drafts, best)
        return count, best[torch.arange(len(best)), at(count, drafts.shape[1])]

    return answer


def leading(drafts: Tensor, best: Tensor) -> Tensor:
    return (drafts == best[:, :-1]).long().cumprod(1).sum(1)


def rule(keep: Callable[[float, float], Any], instead: Callable[[Tensor, Tensor, int], Tensor]) -> Callable[..., Any]:
    return lambda p, q, x: (keep(float(p[x]), float(q[x])), instead(p, q, x))


def ratio(p: float, q: float) -> float:
    return min(1.0, p / q)


def residual(p: Tensor, q: Tensor, _: int = 0) -> Tensor:
    rest = torch.relu(p - q)
    return rest / rest.sum() if rest.sum() > 0 else p


def without_the_draft(p: Tensor, _: Tensor, x: int) -> Tensor:
    rest = p * (torch.arange(len(p)) != x)
    return rest / rest.sum()


def product(shares: list[float]) -> float:
    return float(torch.tensor(shares, dtype=torch.float64).prod())


WRONG: list[tuple[Exercise, Callable[..., Any], str]] = [
    (check.verify_greedy, greedy(lambda d, b: (d == b[:, :-1]).sum(1), lambda h, j: h), "you count all drafts that agree"),
    (check.verify_greedy, greedy(leading, lambda h, j: torch.full_like(h, j)), "always comes from the last place"),
    (check.verify_greedy, greedy(leading, lambda h, j: (h - 1).clamp(min=0)), "one place too early"),
    (check.verify_greedy, greedy(leading, lambda h, j: 0 * h), "always comes from place 0"),
    (check.verify_greedy, greedy(lambda d, b: (d == b[:, 1:]).long().cumprod(1).sum(1), lambda h, j: h),
     "compared with what follows it"),
    (check.verdict, rule(ratio, lambda p, q, x: p), "the replacement is drawn from p"),
    (check.verdict, rule(ratio, without_the_draft), "p without the draft"),
    (check.verdict, rule(ratio, lambda p, q, x: (p - q).abs() / (p - q).abs().sum()), "|p - q| also gives a share"),
    (check.verdict, rule(ratio, lambda p, q, x: residual(q, p)), "what there is too much of"),
    (check.verdict, rule(ratio, lambda p, q, x: torch.relu(p - q)), "do not add up to 1"),
    (check.verdict, rule(lambda p, q: min(1.0, q / p), residual), "stands on its head"),
    (check.verdict, rule(lambda p, q: p, residual), "forgets that it was drawn from q"),
    (check.verdict, rule(lambda p, q: p / q, residual), "the smaller of it and 1"),
    (check.verdict, lambda p, q, x: (1.0 if x == int(p.argmax()) else 0.0, residual(p, q)), "that is the greedy rule"),
    (check.tokens_per_pass, lambda a: 1 + sum(a), "you add the shares up"),
    (check.tokens_per_pass, lambda a: tokens_by_horner(a) - 1, "own token is missing"),
    (check.tokens_per_pass, lambda a: 1 / (1 - a[0]), "drafts without end"),
    (check.tokens_per_pass, lambda a: 1 + len(a) * product(a), "the passes in which all hold"),
    (check.tokens_per_pass, lambda a: 1 + (sum(a) / len(a) if a else 0.0), "a mean of the shares"),
    (check.kept, lambda before, drafts, held: [b + drafts + 1 for b in before], "this is still the bug"),
    (check.kept, lambda before, drafts, held: [b + h for b, h in zip(before, held, strict=True)], "one too few"),
    (check.kept, lambda before, drafts, held: [b + h + 2 for b, h in zip(before, held, strict=True)], "one too many"),
    (check.kept, lambda before, drafts, held: [b + 1 + min(held) for b in before], "cut as the worst of them"),
    (check.kept, lambda before, drafts, held: before[:], "everything that the pass read is forgotten"),
]  # fmt: skip


def test_a_rule_that_is_right_on_the_cases_and_loses_something_is_caught_by_the_law() -> None:
    """Right for vocabularies of other sizes than the property's five, which is in FP64."""

    def nearly(p: Tensor, q: Tensor, draft: int) -> tuple[float, Tensor]:
        return ratio(float(p[draft]), float(q[draft])), residual(p, q) if p.dtype == torch.float32 else p

    result = check.verdict.run(nearly)
    assert result.state == "wrong" and "is not p(y)" in "\n".join(result.lines)


def test_the_lessons_exercises_in_their_order() -> None:
    assert list(exercises_of(check)) == ["verify_greedy", "verdict", "tokens_per_pass", "kept"]
