"""Lesson 11's checks: each right answer accepted, each wrong one refused with its own hint, a blank one only noted."""

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

from dsv3_mini.course.checks import lesson_11 as check
from dsv3_mini.course.checks.framework import Exercise, exercises_of
from dsv3_mini.data.packing import IGNORED

# ---- right answers, each written in two ways ---------------------------------------------------------------------------


def join_by_halves(hidden: Tensor, embedding: Tensor, hnorm: Any, enorm: Any, eh_proj: Tensor) -> Tensor:
    for_embedding, for_state = eh_proj.chunk(2, dim=1)
    return enorm(embedding)[:, 1:] @ for_embedding.T + hnorm(hidden)[:, :-1] @ for_state.T


def join_with_zip(hidden: Tensor, embedding: Tensor, hnorm: Any, enorm: Any, eh_proj: Tensor) -> Tensor:
    pairs = zip(hidden.unbind(1)[:-1], embedding.unbind(1)[1:], strict=True)
    return torch.stack([F.linear(torch.cat([enorm(e), hnorm(h)], dim=-1), eh_proj) for h, e in pairs], dim=1)


def chain_by_lengths(hidden: Tensor, embedding: Tensor, modules: list) -> list[Tensor]:
    length, states = hidden.shape[1], [hidden]
    for j in range(1, min(len(modules), length - 1) + 1):
        states.append(modules[j - 1](embedding[:, j:length], states[j - 1][:, : length - j]))
    return states[1:]


def chain_by_recursion(hidden: Tensor, embedding: Tensor, modules: list) -> list[Tensor]:
    if not modules or hidden.shape[1] == 1:
        return []
    embedding = embedding[:, 1:]
    deeper = modules[0](embedding, hidden[:, :-1])
    return [deeper, *chain_by_recursion(deeper, embedding, modules[1:])]


def loss_by_torch(states: list[Tensor], head: Tensor, targets: Tensor, mtp_weight: float) -> Tensor:
    total = torch.zeros(())
    for j, hidden in enumerate(states):
        logits = torch.einsum("bsd,vd->bvs", hidden, head)
        weight = mtp_weight / (len(states) - 1) if j else 1.0
        total = total + weight * F.cross_entropy(logits, targets[:, j:], ignore_index=IGNORED)
    return total


def loss_by_masks(states: list[Tensor], head: Tensor, targets: Tensor, mtp_weight: float) -> Tensor:
    losses = []
    for j, hidden in enumerate(states):
        wanted = targets[:, j:]
        kept = wanted != IGNORED
        log_p = (hidden[kept] @ head.T).log_softmax(-1)
        losses.append(-log_p.gather(-1, wanted[kept][:, None]).mean())
    return losses[0] if len(losses) == 1 else losses[0] + mtp_weight * torch.stack(losses[1:]).mean()


def audit_by_backward(loss: Tensor, parameters: dict[str, Tensor]) -> list[str]:
    for parameter in parameters.values():
        parameter.grad = None
    loss.backward(retain_graph=True)
    return [name for name, p in parameters.items() if p.grad is None or not p.grad.abs().max() > 0]


def audit_one_by_one(loss: Tensor, parameters: dict[str, Tensor]) -> list[str]:
    names = []
    for name, parameter in parameters.items():
        (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
        if gradient is None or torch.count_nonzero(gradient) == 0:
            names.append(name)
    return names


def second_by_targets(targets: Tensor, hidden: Tensor, embed: Any, module: Any, head: Any) -> Tensor:
    return head(module(embed(targets[:, :-1]), hidden[:, :-1]))


def second_by_length(targets: Tensor, hidden: Tensor, embed: Any, module: Any, head: Any) -> Tensor:
    kept = targets.shape[1] - 1
    return head(module(embed(targets).narrow(1, 0, kept), hidden.narrow(1, 0, kept)))


RIGHT: list[tuple[Exercise, Callable[..., Any]]] = [
    (check.join, join_by_halves),
    (check.join, join_with_zip),
    (check.chain, chain_by_lengths),
    (check.chain, chain_by_recursion),
    (check.total_loss, loss_by_torch),
    (check.total_loss, loss_by_masks),
    (check.unreached, audit_by_backward),
    (check.unreached, audit_one_by_one),
    (check.second_token_logits, second_by_targets),
    (check.second_token_logits, second_by_length),
]


# ---- wrong answers -----------------------------------------------------------------------------------------------------


def joined(make: Callable[[Tensor, Tensor, Any, Any], Tensor]) -> Callable[..., Tensor]:
    return lambda hidden, embedding, hnorm, enorm, eh_proj: F.linear(make(hidden, embedding, hnorm, enorm), eh_proj)


def glue(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second], dim=2)


def chained(next_states: Callable[[Any, int, Tensor, list[Tensor]], Tensor]) -> Callable[..., list[Tensor]]:
    """next_states(module, j, embedding, [main, depth 1, ...]) -> depth j."""

    def answer(hidden: Tensor, embedding: Tensor, modules: list) -> list[Tensor]:
        made = [hidden]
        for j, module in enumerate(modules[: hidden.shape[1] - 1], start=1):
            made.append(next_states(module, j, embedding, made))
        return made[1:]

    return answer


def without_end(hidden: Tensor, embedding: Tensor, modules: list) -> list[Tensor]:
    made = []
    for module in modules:
        embedding = embedding[:, 1:]
        hidden = module(embedding, hidden[:, :-1])
        made.append(hidden)
    return made


def depth_losses(states: list[Tensor], head: Tensor, targets: Tensor) -> list[Tensor]:
    return [
        F.cross_entropy((h @ head.T).transpose(1, 2), targets[:, j:], ignore_index=IGNORED)
        for j, h in enumerate(states)
    ]


def summed(add_up: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """add_up(main loss, losses of the depths [D], lambda)."""

    def answer(states: list[Tensor], head: Tensor, targets: Tensor, mtp_weight: float) -> Tensor:
        main, *deeper = depth_losses(states, head, targets)
        return add_up(main, torch.stack(deeper), mtp_weight)

    return answer


def aimed(aim: Callable[[Tensor, int, int], Tensor], keep: Callable[[int], int] = lambda length: length) -> Any:
    """Targets of one's own: aim(targets, depth, length of that depth)."""

    def answer(states: list[Tensor], head: Tensor, targets: Tensor, mtp_weight: float) -> Tensor:
        main, *deeper = [
            F.cross_entropy(
                (h[:, : keep(h.shape[1]) if j else None] @ head.T).transpose(1, 2),
                aim(targets, j, h.shape[1]) if j else targets,
                ignore_index=IGNORED,
            )
            for j, h in enumerate(states)
        ]
        return main + mtp_weight * sum(deeper) / max(1, len(deeper))

    return answer


def all_tokens_in_one(states: list[Tensor], head: Tensor, targets: Tensor, mtp_weight: float) -> Tensor:
    logits = torch.cat([(h @ head.T).flatten(0, 1) for h in states[1:]])
    wanted = torch.cat([targets[:, j:].flatten() for j in range(1, len(states))])
    return depth_losses(states, head, targets)[0] + mtp_weight * F.cross_entropy(logits, wanted, ignore_index=IGNORED)


def padding_in_the_mean(states: list[Tensor], head: Tensor, targets: Tensor, mtp_weight: float) -> Tensor:
    losses = []
    for j, h in enumerate(states):
        wanted = targets[:, j:]
        costs = F.cross_entropy((h @ head.T).transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
        losses.append(costs.mean())
    return losses[0] + mtp_weight * sum(losses[1:]) / max(1, len(losses) - 1)


def audit(idle: Callable[[Tensor | None], bool]) -> Callable[..., list[str]]:
    def answer(loss: Tensor, parameters: dict[str, Tensor]) -> list[str]:
        grads = torch.autograd.grad(loss, tuple(parameters.values()), allow_unused=True, retain_graph=True)
        return [name for name, grad in zip(parameters, grads, strict=True) if idle(grad)]

    return answer


def stale_audit(idle: Callable[[Tensor | None], bool]) -> Callable[..., list[str]]:
    def answer(loss: Tensor, parameters: dict[str, Tensor]) -> list[str]:
        loss.backward(retain_graph=True)
        return [name for name, parameter in parameters.items() if idle(parameter.grad)]

    return answer


def paired(pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    def answer(targets: Tensor, hidden: Tensor, embed: Any, module: Any, head: Any) -> Tensor:
        first, second = pair(embed(targets), hidden)
        return head(module(first, second))

    return answer


WRONG: list[tuple[Exercise, Callable[..., Any], str]] = [
    (check.join, joined(lambda h, e, hn, en: glue(hn(h[:, :-1]), en(e[:, 1:]))), "the state comes first"),
    (check.join, joined(lambda h, e, hn, en: glue(en(e), hn(h))[:, :-1]), "that it has read already"),
    (check.join, joined(lambda h, e, hn, en: glue(en(e[:, :-1]), hn(h[:, 1:]))), "yours meets token i - 1"),
    (check.join, joined(lambda h, e, hn, en: glue(en(e), hn(h))[:, 1:]), "still meets its own token"),
    (check.join, joined(lambda h, e, hn, en: glue(en(torch.cat([e[:, 1:], e[:, :1]], 1)), hn(h))), "roll hands the last"),
    (check.join, joined(lambda h, e, hn, en: glue(hn(e[:, 1:]), en(h[:, :-1]))), "the norms are exchanged"),
    (check.join, joined(lambda h, e, hn, en: glue(e[:, 1:], hn(h[:, :-1]))), "the embedding is not normed"),
    (check.join, joined(lambda h, e, hn, en: glue(en(e[:, 1:]), h[:, :-1])), "the state is not normed"),
    (check.join, joined(lambda h, e, hn, en: glue(e[:, 1:], h[:, :-1])), "neither half is normed"),
    (check.join, joined(lambda h, e, hn, en: hn(glue(e[:, 1:], h[:, :-1]))), "one norm over both halves"),
    (check.chain, chained(lambda m, j, e, made: m(e[:, j:], made[0][:, :-j])), "heads side by side"),
    (check.chain, chained(lambda m, j, e, made: m(e[:, 1 : e.shape[1] - j + 1], made[-1][:, :-1])), "reads the same token"),
    (check.chain, chained(lambda m, j, e, made: m(e[:, j:], made[-1][:, 1:])), "lose their first position"),
    (check.chain, chained(lambda m, j, e, made: m(e[:, : e.shape[1] - j], made[-1][:, :-1])), "are not shifted"),
    (check.chain, chained(lambda m, j, e, made: m(made[-1][:, :-1], e[:, j:])), "the wrong way round"),
    (check.chain, lambda h, e, ms: chain_by_lengths(h, e, ms[:1] * len(ms)), "a module (and weights) of its own"),
    (check.chain, lambda h, e, ms: [h, *chain_by_lengths(h, e, ms)], "the main model's own states"),
    (check.chain, lambda h, e, ms: chain_by_lengths(h, e, ms)[-1], "only the last depth"),
    (check.chain, without_end, "without a single position"),
    (check.total_loss, aimed(lambda t, j, n: t[:, :n]), "which depth 1 has just read"),
    (check.total_loss, aimed(lambda t, j, n: t[:, 1 : n + 1]), "against the same token"),
    (check.total_loss, aimed(lambda t, j, n: t[:, j + 1 :], lambda n: n - 1), "shifted once too often"),
    (check.total_loss, summed(lambda main, deeper, w: main + w * deeper.sum()), "it is their *mean*"),
    (check.total_loss, summed(lambda main, deeper, w: main + deeper.mean()), "lambda is missing"),
    (check.total_loss, summed(lambda main, deeper, w: w * (main + deeper.mean())), "weighs the main loss too"),
    (check.total_loss, summed(lambda main, deeper, w: main + w * torch.cat([main[None], deeper]).mean()),
     "is in the mean over the depths"),
    (check.total_loss, summed(lambda main, deeper, w: main + w * (deeper.mean() - main)), "taken from the main loss"),
    (check.total_loss, summed(lambda main, deeper, w: main + (deeper * torch.tensor([w**i for i in range(1, len(deeper) + 1)])).mean()),
     "shrinks from depth to depth"),
    (check.total_loss, all_tokens_in_one, "averaged in one"),
    (check.total_loss, padding_in_the_mean, "padding is counted"),
    (check.unreached, stale_audit(lambda g: g is None), "two kinds slip through"),
    (check.unreached, audit(lambda g: g is None), "a gradient of zeros slips through"),
    (check.unreached, stale_audit(lambda g: g is None or g.count_nonzero() == 0), "still held another loss's gradient"),
    (check.unreached, audit(lambda g: g is None or float(g.mean().abs()) < 1e-7), "cancel"),
    (check.unreached, audit(lambda g: g is None or bool((g == 0).any())), "whether *all* entries"),
    (check.unreached, audit(lambda g: g is not None and g.count_nonzero() > 0), "that *are* reached"),
    (check.unreached, audit(lambda g: g is not None and g.count_nonzero() == 0), "its gradient is None"),
    (check.second_token_logits, paired(lambda e, h: (e[:, 1:], h[:, :-1])), "this is still the bug"),
    (check.second_token_logits, paired(lambda e, h: (e[:, 1:], h[:, 1:])), "both lost their *first* position"),
    (check.second_token_logits, paired(lambda e, h: (e[:, :-1], h[:, 1:])), "the state is one too late"),
    (check.second_token_logits, paired(lambda e, h: (e, h)), "one position too many"),
    (check.second_token_logits, paired(lambda e, h: (h[:, :-1], e[:, :-1])), "in the wrong order"),
]  # fmt: skip


def test_uneven_lengths_are_told_in_words() -> None:
    lines = check.second_token_logits.run(paired(lambda e, h: (e[:, 1:], h))).lines
    assert "have to be as long" in lines[0]


def test_a_graph_that_is_used_up_is_told_by_torch() -> None:
    def once(loss: Tensor, parameters: dict[str, Tensor]) -> list[str]:
        grads = torch.autograd.grad(loss, tuple(parameters.values()), allow_unused=True)
        return [name for name, grad in zip(parameters, grads, strict=True) if grad is None or not grad.any()]

    result = check.unreached.run(once)
    assert result.state == "wrong" and "retain_graph" in "\n".join(result.lines)


def test_an_audit_that_remembers_is_caught_by_the_property() -> None:
    """Right on every case, whose tensors are new each time; of a second loss it repeats what it said of the first."""
    said: dict[int, tuple[dict[str, Tensor], list[str]]] = {}

    def remembering(loss: Tensor, parameters: dict[str, Tensor]) -> list[str]:
        return said.setdefault(id(parameters), (parameters, audit_one_by_one(loss, parameters)))[1]

    result = check.unreached.run(remembering)
    assert result.state == "wrong" and "its own loss alone" in "\n".join(result.lines)


def test_a_chain_that_looks_ahead_by_other_means_is_caught_by_the_property() -> None:
    """Right on every case's numbers; in rows of 7 tokens and 3 depths of one row it looks at the row's end."""

    def peeking(hidden: Tensor, embedding: Tensor, modules: list) -> list[Tensor]:
        states = chain_by_lengths(hidden, embedding, modules)
        return [s + embedding[:, -1:].mean() for s in states] if hidden.shape[:2] == (1, 7) else states

    result = check.chain.run(peeking)
    assert result.state == "wrong" and "it has seen the token" in "\n".join(result.lines)


def test_the_lessons_exercises_in_their_order() -> None:
    assert list(exercises_of(check)) == ["join", "chain", "total_loss", "unreached", "second_token_logits"]
