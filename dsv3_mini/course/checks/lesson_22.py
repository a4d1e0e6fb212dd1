"""Checks of lesson 22: which drafts hold, the lossless rule for drawn text, tokens per pass, and what the cache keeps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property

Inputs = Callable[[torch.Generator], tuple[Any, ...]]


# ---- verify_greedy -----------------------------------------------------------------------------------------------------


def _greedy_inputs(b: int, j: int, v: int, agree: float) -> Inputs:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        logits = torch.randn(b, j + 1, v, generator=random)
        drafts = torch.randint(0, v, (b, j), generator=random)
        right = torch.rand(b, j, generator=random) < agree
        return torch.where(right, logits[:, :-1].argmax(-1), drafts), logits

    return inputs


def _islands_inputs(random: torch.Generator) -> tuple[Any, ...]:
    """Agreement, refusal and agreement again, in every pattern of four drafts."""
    right = torch.tensor(list(itertools.product([True, False], repeat=4)))
    logits = torch.randn(len(right), 5, 7, generator=random)
    best = logits[:, :-1].argmax(-1)
    return torch.where(right, best, (best + 1) % 7), logits


def _reference_greedy(drafts: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    held, tokens = [], []
    for row, scores in zip(drafts.tolist(), logits, strict=True):
        count = 0
        while count < len(row) and row[count] == int(scores[count].argmax()):
            count += 1
        held.append(count)
        tokens.append(int(scores[count].argmax()))
    return torch.tensor(held), torch.tensor(tokens)


def _greedy_with(
    count: Callable[[Tensor], Tensor] = lambda holds: holds.long().cumprod(1).sum(1),
    place: Callable[[Tensor], Tensor] = lambda held: held,
    compare: Callable[[Tensor, Tensor], Tensor] = lambda drafts, best: drafts == best[:, :-1],
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def answer(drafts: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        best = logits.argmax(-1)
        held = count(compare(drafts, best))
        return held, best[torch.arange(len(best)), place(held).clamp(0, best.shape[1] - 1)]

    return answer


verify_greedy = Exercise(
    name="verify_greedy",
    reference=_reference_greedy,
    cases=[
        Case("every pattern of four drafts", _islands_inputs),
        Case("two rows of one draft", _greedy_inputs(2, 1, 5, 0.5)),
        Case("32 rows of three drafts", _greedy_inputs(32, 3, 9, 0.7)),
        Case("nothing drafted", _greedy_inputs(3, 0, 5, 0.5)),
    ],
    mistakes=[
        Mistake(
            _greedy_with(count=lambda holds: holds.long().sum(1)),
            "you count all drafts that agree: behind the first that is refused nothing counts, for those were judged after a "
            "text that will never stand there. Count up to the first refusal (cumprod of zeros and ones does)",
        ),
        Mistake(
            _greedy_with(place=lambda held: torch.full_like(held, 10**6)),
            "the next token always comes from the last place: logits[:, j] is what follows all j drafts, and it is of use only "
            "where all of them hold. Where h hold, the token after them stands at place h",
        ),
        Mistake(
            _greedy_with(place=lambda held: held - 1),
            "the next token is read one place too early: logits[:, i] says what comes *before* draft i is read, in its place. "
            "After h drafts that hold, that is place h",
        ),
        Mistake(
            _greedy_with(place=lambda held: torch.zeros_like(held)),
            "the next token always comes from place 0: that is the first draft's place. After h drafts that hold it is place h",
        ),
        Mistake(
            _greedy_with(compare=lambda drafts, best: drafts == best[:, 1:]),
            "each draft is compared with what follows it: logits[:, i] is what the main model wants in the place of draft i",
        ),
    ],
)


# ---- verdict -----------------------------------------------------------------------------------------------------------


def _shares_inputs(v: int, sharp: float = 1.0, gap: bool = False, welcome: bool = False) -> Inputs:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        p, q = ((sharp * torch.randn(v, generator=random)).softmax(-1) for _ in range(2))
        if gap:  # as top-p leaves them: tokens that one of the two cannot give
            p[0], q[1] = 0.0, 0.0
            p, q = p / p.sum(), q / q.sum()
        draft = (p - q if welcome else q - p).argmax()
        return p, q, int(draft)

    return inputs


def _equal_inputs(random: torch.Generator) -> tuple[Any, ...]:
    p = torch.randn(6, generator=random).softmax(-1)
    return p, p.clone(), 2


def _reference_verdict(p: Tensor, q: Tensor, draft: int) -> tuple[float, Tensor]:
    keep = min(1.0, float(p[draft]) / float(q[draft]))
    lacking = [max(0.0, float(a) - float(b)) for a, b in zip(p, q, strict=True)]
    whole = sum(lacking)
    return keep, torch.tensor([x / whole for x in lacking]) if whole > 0 else p.clone()


def _verdict_with(
    keep: Callable[[Tensor, Tensor, int], Any] = lambda p, q, x: (p[x] / q[x]).clamp(max=1).item(),
    instead: Callable[[Tensor, Tensor, int], Tensor] = lambda p, q, x: _whole((p - q).clamp(min=0), p),
) -> Callable[[Tensor, Tensor, int], tuple[Any, Tensor]]:
    return lambda p, q, draft: (keep(p, q, draft), instead(p, q, draft))


def _whole(weights: Tensor, otherwise: Tensor) -> Tensor:
    return weights / weights.sum() if float(weights.sum()) > 0 else otherwise


def _without(p: Tensor, draft: int) -> Tensor:
    rest = p.clone()
    rest[draft] = 0
    return _whole(rest, p)


def _lossless(answer: Callable[..., Any]) -> bool:
    """Over all drafts together the token that comes has the distribution p: exactly, with no dice."""
    for seed in range(5):
        random = torch.Generator().manual_seed(seed)
        p, q = (torch.randn(5, generator=random, dtype=torch.float64).softmax(-1) for _ in range(2))
        comes = torch.zeros(5, dtype=torch.float64)
        for draft in range(5):
            keep, instead = answer(p.clone(), q.clone(), draft)
            comes[draft] += q[draft] * float(keep)
            comes += q[draft] * (1 - float(keep)) * torch.as_tensor(instead, dtype=torch.float64)
        if not torch.allclose(comes, p, atol=1e-6):
            return False
    return True


verdict = Exercise(
    name="verdict",
    reference=_reference_verdict,
    cases=[
        Case("five tokens, a draft that q likes too much", _shares_inputs(5)),
        Case("five tokens, a draft that p likes better", _shares_inputs(5, welcome=True)),
        Case("forty tokens, both sure of themselves", _shares_inputs(40, sharp=3.0)),
        Case("tokens that one of the two never gives", _shares_inputs(8, gap=True)),
        Case("p and q the same", _equal_inputs),
    ],
    mistakes=[
        Mistake(
            _verdict_with(instead=lambda p, q, x: p),
            "the replacement is drawn from p: what q gives often came as a draft already, and would come a second time here. "
            "Draw from what is still *lacking*, max(p - q, 0), made whole",
        ),
        Mistake(
            _verdict_with(instead=lambda p, q, x: _without(p, x)),
            "the replacement is p without the draft: not only this draft was tried, on average all of q was. What is lacking "
            "is max(p - q, 0), made whole",
        ),
        Mistake(
            _verdict_with(instead=lambda p, q, x: _whole((p - q).abs(), p)),
            "|p - q| also gives a share to tokens of which there are too many already: take max(p - q, 0)",
        ),
        Mistake(
            _verdict_with(instead=lambda p, q, x: _whole((q - p).clamp(min=0), p)),
            "max(q - p, 0) is what there is too much of: the replacement comes from what is lacking, max(p - q, 0)",
        ),
        Mistake(
            _verdict_with(instead=lambda p, q, x: (p - q).clamp(min=0)),
            "the replacement's shares do not add up to 1: divide max(p - q, 0) by its sum (and where it is all 0, p = q, give p)",
        ),
        Mistake(
            _verdict_with(keep=lambda p, q, x: (q[x] / p[x]).clamp(max=1).item()),
            "the ratio stands on its head: a draft that q likes better than p does has to fall sometimes, p(x) / q(x)",
        ),
        Mistake(
            _verdict_with(keep=lambda p, q, x: p[x].item()),
            "the draft is kept with probability p(x): that forgets that it was drawn from q, so that good drafts fall as well. "
            "What is kept of x altogether is q(x) times your number, and it should come to min(p(x), q(x))",
        ),
        Mistake(
            _verdict_with(keep=lambda p, q, x: (p[x] / q[x]).item()),
            "this is above 1 where p likes the draft better than q does: it is a probability, so take the smaller of it and 1",
        ),
        Mistake(
            _verdict_with(keep=lambda p, q, x: float(int(p.argmax()) == x)),
            "the draft is kept if it is the likeliest token: that is the greedy rule. Text that is drawn would lose its variety",
        ),
    ],
    properties=[
        Property(
            "what comes is distributed as p",
            _lossless,
            "summed over all drafts that q may give, q(x) keep(x) [x comes] + q(x) (1 - keep(x)) instead(y) is not p(y)",
        )
    ],
    tolerance=1e-4,
)


# ---- tokens_per_pass ---------------------------------------------------------------------------------------------------


def _acceptances(*shares: float) -> Inputs:
    return lambda _: (list(shares),)


def _reference_tokens(acceptances: Sequence[float]) -> float:
    """Over all that can happen: d drafts hold and the next falls."""
    total, reached = 0.0, 1.0
    for held, share in enumerate(acceptances):
        total += reached * (1 - share) * (held + 1)
        reached *= share
    return total + reached * (len(acceptances) + 1)


def _products(shares: Sequence[float]) -> list[float]:
    return list(itertools.accumulate(shares, lambda a, b: a * b))


tokens_per_pass = Exercise(
    name="tokens_per_pass",
    reference=_reference_tokens,
    cases=[
        Case("one draft that holds at 85%", _acceptances(0.85)),
        Case("three drafts, each less sure", _acceptances(0.9, 0.6, 0.3)),
        Case("the second never holds", _acceptances(0.8, 0.0, 0.7)),
        Case("all hold", _acceptances(1.0, 1.0, 1.0, 1.0)),
        Case("nothing drafted", _acceptances()),
    ],
    mistakes=[
        Mistake(
            lambda shares: 1 + sum(shares),
            "you add the shares up: draft 2 is judged only where draft 1 held, so that it comes in a1 * a2 of all passes",
        ),
        Mistake(
            lambda shares: sum(_products(shares)),
            "the main model's own token is missing: every pass gives one, even if all drafts fall",
        ),
        Mistake(
            lambda shares: 1 / (1 - shares[0]),
            "that is the sum for drafts without end which all hold as often: here they end, and each has a share of its own",
        ),
        Mistake(
            lambda shares: 1 + (_products(shares) or [0.0])[-1] * len(shares),
            "this counts the passes in which all hold, and no others: where one of three holds, that one is kept as well",
        ),
        Mistake(
            lambda shares: 1 + len(shares) * sum(shares) / max(1, len(shares)) ** 2 if shares else 1.0,
            "a mean of the shares does not do: each is a share of the passes in which the draft before it held",
        ),
    ],
)


# ---- kept (find the bug) -----------------------------------------------------------------------------------------------


def _kept_inputs(before: list[int], drafts: int, held: list[int]) -> Inputs:
    return lambda _: (list(before), drafts, list(held))


def _reference_kept(before: Sequence[int], drafts: int, held: Sequence[int]) -> list[int]:
    """What is read in the pass: the newest token, then the drafts; the last drafts - held of these are to be forgotten."""
    return [length + (1 + drafts) - (drafts - h) for length, h in zip(before, held, strict=True)]


kept = Exercise(
    name="kept",
    reference=_reference_kept,
    cases=[
        Case("one row that keeps one of three", _kept_inputs([7], 3, [1])),
        Case("one row whose two drafts fall", _kept_inputs([7], 2, [0])),
        Case("three rows that keep 0, 1 and 3 of three", _kept_inputs([5, 9, 4], 3, [0, 1, 3])),
        Case("nothing drafted", _kept_inputs([3, 8], 0, [0, 0])),
    ],
    mistakes=[
        Mistake(
            lambda before, drafts, held: [length + 1 + drafts for length in before],
            "this is still the bug: latents of the drafts that fell stay in the cache, and later queries look at them as if "
            "their tokens stood in the text",
        ),
        Mistake(
            lambda before, drafts, held: [length + h for length, h in zip(before, held, strict=True)],
            "one too few: the pass read the newest token first, and its drafts after it. That token is certain, its latent "
            "stays",
        ),
        Mistake(
            lambda before, drafts, held: [length + h + 2 for length, h in zip(before, held, strict=True)],
            "one too many: the token that the main model puts after the drafts that hold has not been *read* yet. The next "
            "pass reads it first",
        ),
        Mistake(
            lambda before, drafts, held: [length + 1 + min(held) for length in before],
            "all rows are cut as the worst of them: each row has a length of its own, and may keep what held in it",
        ),
        Mistake(
            lambda before, drafts, held: list(before),
            "everything that the pass read is forgotten: then the next pass has no latent of the tokens that hold. Each row "
            "keeps the newest token and its drafts that hold",
        ),
    ],
)
