"""Checks of lesson 11: the joint of state and next token, the chain of depths, its loss, a gradient audit, and a leak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property
from dsv3_mini.data.packing import IGNORED

# Norms, modules, embedding and head stand at module level, so that a case's inputs are the same objects each time they are
# made. They take any width.

Inputs = Callable[[torch.Generator], tuple[Any, ...]]
Step = Callable[[Tensor, Tensor], Tensor]


def _normed(x: Tensor, first: float, last: float) -> Tensor:
    weight = torch.linspace(first, last, x.shape[-1])
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def _hnorm(x: Tensor) -> Tensor:
    return _normed(x, 0.5, 1.5)


def _enorm(x: Tensor) -> Tensor:
    return _normed(x, 2.0, 0.8)


# ---- join --------------------------------------------------------------------------------------------------------------


def _join_inputs(b: int, s: int, d: int, size: float = 1.0) -> Inputs:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        hidden, embedding = (torch.randn(b, s, d, generator=random) for _ in range(2))
        return size * hidden, embedding, _hnorm, _enorm, torch.randn(d, 2 * d, generator=random)

    return inputs


def _reference_join(hidden: Tensor, embedding: Tensor, hnorm: Any, enorm: Any, eh_proj: Tensor) -> Tensor:
    """One position at a time; the projection's left half for the embedding, its right half for the state."""
    width = hidden.shape[-1]
    for_embedding, for_state = eh_proj[:, :width], eh_proj[:, width:]
    steps = range(hidden.shape[1] - 1)
    joined = [enorm(embedding[:, i + 1]) @ for_embedding.T + hnorm(hidden[:, i]) @ for_state.T for i in steps]
    return torch.stack(joined, dim=1)


def _join_with(
    pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda h, e: (h[:, :-1], e[:, 1:]),
    join: Callable[[Tensor, Tensor, Any, Any], Tensor] = lambda h, e, hn, en: torch.cat([en(e), hn(h)], -1),
) -> Callable[..., Tensor]:
    """A joint with cuts of one's own, or norms and an order of one's own."""

    def answer(hidden: Tensor, embedding: Tensor, hnorm: Any, enorm: Any, eh_proj: Tensor) -> Tensor:
        return join(*pair(hidden, embedding), hnorm, enorm) @ eh_proj.T

    return answer


join = Exercise(
    name="join",
    reference=_reference_join,
    cases=[
        Case("one row of 3 tokens, d = 4", _join_inputs(1, 3, 4)),
        Case("2 rows of 6 tokens, d = 5", _join_inputs(2, 6, 5)),
        Case("states ten times as large as embeddings", _join_inputs(2, 4, 6, size=10.0)),
    ],
    mistakes=[
        Mistake(
            _join_with(join=lambda h, e, hn, en: torch.cat([hn(h), en(e)], -1)),
            "the state comes first: so the report writes it, but the released weights want the embedding in the first half "
            "of eh_proj's input, and the state in the second",
        ),
        Mistake(
            _join_with(pair=lambda h, e: (h[:, :-1], e[:, :-1])),
            "the state meets the token that it has read already: the embedding is to be of the token *after* it, "
            "embedding[:, 1:]",
        ),
        Mistake(
            _join_with(pair=lambda h, e: (h[:, 1:], e[:, :-1])),
            "both are cut at the wrong end: the state loses its last position and the embedding its first, so that state i "
            "meets token i + 1; yours meets token i - 1",
        ),
        Mistake(
            _join_with(pair=lambda h, e: (h[:, 1:], e[:, 1:])),
            "both lose their first position, so each state still meets its own token: only the embedding is shifted, the "
            "state loses its last",
        ),
        Mistake(
            _join_with(pair=lambda h, e: (h, e.roll(-1, dims=1))),
            "roll hands the last state the *first* token of its row, which does not come after it: the last state has no "
            "next token here, so one position is lost",
        ),
        Mistake(
            _join_with(join=lambda h, e, hn, en: torch.cat([hn(e), en(h)], -1)),
            "the norms are exchanged: enorm is the embedding's, hnorm the state's; their weights differ",
        ),
        Mistake(
            _join_with(join=lambda h, e, hn, en: torch.cat([e, hn(h)], -1)),
            "the embedding is not normed: it enters through enorm, or a large state would drown it",
        ),
        Mistake(
            _join_with(join=lambda h, e, hn, en: torch.cat([en(e), h], -1)),
            "the state is not normed: it enters through hnorm, so that both halves have a size that training chose",
        ),
        Mistake(
            _join_with(join=lambda h, e, hn, en: torch.cat([e, h], -1)),
            "neither half is normed: the embedding enters through enorm, the state through hnorm",
        ),
        Mistake(
            _join_with(join=lambda h, e, hn, en: hn(torch.cat([e, h], -1))),
            "one norm over both halves: the larger of them then sets the scale for both. Norm each half by its own norm, "
            "then join",
        ),
    ],
)


# ---- chain -------------------------------------------------------------------------------------------------------------


def _module_a(embedding: Tensor, hidden: Tensor) -> Tensor:
    return torch.tanh(0.9 * hidden - 0.6 * embedding)


def _module_b(embedding: Tensor, hidden: Tensor) -> Tensor:
    return 1.1 * embedding + torch.sin(hidden)


def _module_c(embedding: Tensor, hidden: Tensor) -> Tensor:
    return hidden * (1 + 0.5 * embedding)


_MODULES = (_module_a, _module_b, _module_c)


def _chain_inputs(b: int, s: int, d: int, depths: int) -> Inputs:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        hidden, embedding = (torch.randn(b, s, d, generator=random) for _ in range(2))
        return hidden, embedding, list(_MODULES[:depths])

    return inputs


def _reference_chain(hidden: Tensor, embedding: Tensor, modules: Sequence[Step]) -> list[Tensor]:
    """One position at a time: depth j's state at i is made of depth j - 1's at i and the embedding of token i + j."""
    length, before = hidden.shape[1], [hidden[:, i] for i in range(hidden.shape[1])]
    states = []
    for j, module in enumerate(modules, start=1):
        before = [module(embedding[:, i + j], before[i]) for i in range(length - j)]
        if before:
            states.append(torch.stack(before, dim=1))
    return states


def _chain_with(step: Callable[[Step, int, Tensor, Tensor, Tensor], Tensor]) -> Callable[..., list[Tensor]]:
    """A chain whose depth j is step(module, j, embedding, states of the depth before, main states)."""

    def answer(hidden: Tensor, embedding: Tensor, modules: Sequence[Step]) -> list[Tensor]:
        states = [hidden]
        for j, module in enumerate(modules, start=1):
            if j == hidden.shape[1]:
                break
            states.append(step(module, j, embedding, states[-1], hidden))
        return states[1:]

    return answer


def _one_module_for_all(hidden: Tensor, embedding: Tensor, modules: Sequence[Step]) -> list[Tensor]:
    return _reference_chain(hidden, embedding, [modules[0]] * len(modules))


def _main_states_too(hidden: Tensor, embedding: Tensor, modules: Sequence[Step]) -> list[Tensor]:
    return [hidden, *_reference_chain(hidden, embedding, modules)]


def _empty_depths_too(hidden: Tensor, embedding: Tensor, modules: Sequence[Step]) -> list[Tensor]:
    states = []
    for j, module in enumerate(modules, start=1):
        hidden = module(embedding[:, j:], hidden[:, :-1])
        states.append(hidden)
    return states


def _last_depth_only(hidden: Tensor, embedding: Tensor, modules: Sequence[Step]) -> Tensor:
    return _reference_chain(hidden, embedding, modules)[-1]


def _reads_no_further(answer: Callable[..., Any]) -> bool:
    """Token 4 changes: depth j may notice at positions from 4 - j on."""
    random = torch.Generator().manual_seed(7)
    hidden, embedding = (torch.randn(1, 7, 3, generator=random) for _ in range(2))
    before = answer(hidden, embedding, list(_MODULES))
    hidden, embedding = hidden.clone(), embedding.clone()
    hidden[:, 4:], embedding[:, 4:] = 2.0, -3.0
    after = answer(hidden, embedding, list(_MODULES))
    pairs = zip(before, after, strict=True)
    return all(torch.allclose(old[:, : 4 - j], new[:, : 4 - j]) for j, (old, new) in enumerate(pairs, start=1))


chain = Exercise(
    name="chain",
    reference=_reference_chain,
    cases=[
        Case("one depth, a row of 4 tokens", _chain_inputs(1, 4, 3, 1)),
        Case("three depths, 2 rows of 7 tokens", _chain_inputs(2, 7, 4, 3)),
        Case("three depths, a row of 2 tokens", _chain_inputs(1, 2, 3, 3)),
        Case("a row of 1 token: no depth has a position", _chain_inputs(2, 1, 3, 2)),
    ],
    mistakes=[
        Mistake(
            _chain_with(lambda module, j, e, before, main: module(e[:, j:], main[:, :-j])),
            "every depth starts from the main model's states: those are heads side by side. In a chain each depth goes on "
            "from the states of the depth before it",
        ),
        Mistake(
            _chain_with(lambda module, j, e, before, main: module(e[:, 1 : before.shape[1]], before[:, :-1])),
            "every depth reads the same token, i + 1: the state of depth j - 1 has read up to i + j - 1 already, so depth j "
            "reads token i + j, embedding[:, j:]",
        ),
        Mistake(
            _chain_with(lambda module, j, e, before, main: module(e[:, j:], before[:, 1:])),
            "the states lose their first position: then a state meets the token that it has read itself. They lose their "
            "last, hidden[:, :-1], and the embeddings their first j",
        ),
        Mistake(
            _chain_with(lambda module, j, e, before, main: module(e[:, :-j], before[:, :-1])),
            "the embeddings are not shifted: at position i depth j reads token i + j, embedding[:, j:]",
        ),
        Mistake(
            _chain_with(lambda module, j, e, before, main: module(before[:, :-1], e[:, j:])),
            "the module is given its inputs the wrong way round: embedding first, state second, as in its joint",
        ),
        Mistake(
            _one_module_for_all,
            "the first module does the work of all: each depth has a module (and weights) of its own",
        ),
        Mistake(_main_states_too, "the main model's own states are in the list: it begins with those of depth 1"),
        Mistake(
            _last_depth_only,
            "only the last depth comes back: every depth is asked for its prediction, so give the states of each, in a list",
        ),
        Mistake(
            _empty_depths_too,
            "the list holds depths without a single position: a row of s tokens has room for s - 1 depths, stop there",
        ),
    ],
    properties=[
        Property(
            "depth j reads up to token i + j and no further",
            _reads_no_further,
            "with other tokens later in the row, an earlier state changed: it has seen the token that it is to predict",
        )
    ],
)


# ---- total_loss --------------------------------------------------------------------------------------------------------


def _loss_inputs(b: int, s: int, depths: int, weight: float, ignored: int = 0, d: int = 4, v: int = 9) -> Inputs:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        states = [torch.randn(b, s - j, d, generator=random) for j in range(depths + 1)]
        targets = torch.randint(0, v, (b, s), generator=random)
        if ignored:
            targets[-1, s - ignored :] = IGNORED
        return states, 1.5 * torch.randn(v, d, generator=random), targets, weight

    return inputs


def _ce(hidden: Tensor, head: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    logits, wanted = rearrange(hidden @ head.T, "b s v -> (b s) v"), rearrange(targets, "b s -> (b s)")
    return F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction=reduction)


def _reference_total_loss(states: Sequence[Tensor], head: Tensor, targets: Tensor, mtp_weight: float) -> Tensor:
    """Each loss as a mean over the kept places, found one by one."""
    losses = []
    for j, hidden in enumerate(states):
        places = [(b, i) for b in range(len(targets)) for i in range(hidden.shape[1]) if targets[b, i + j] != IGNORED]
        costs = [-(hidden[b, i] @ head.T).log_softmax(-1)[targets[b, i + j]] for b, i in places]
        losses.append(torch.stack(costs).mean())
    main, deeper = losses[0], losses[1:]
    return main + mtp_weight * torch.stack(deeper).mean() if deeper else main


def _total_with(
    add_up: Callable[[Tensor, list[Tensor], float], Tensor] = lambda main, deeper, w: (
        main + w * sum(deeper) / len(deeper)
    ),
    cost: Callable[[Tensor, Tensor, Tensor, int], Tensor] = lambda h, head, t, j: _ce(h, head, t[:, j:]),
) -> Callable[..., Tensor]:
    """A total with a sum of one's own, or targets of one's own (`cost` of depth j)."""

    def answer(states: Sequence[Tensor], head: Tensor, targets: Tensor, mtp_weight: float) -> Tensor:
        main = _ce(states[0], head, targets)
        return add_up(main, [cost(h, head, targets, j) for j, h in enumerate(states) if j], mtp_weight)

    return answer


def _pooled(states: Sequence[Tensor], head: Tensor, targets: Tensor, mtp_weight: float) -> Tensor:
    costs = [_ce(h, head, targets[:, j:], "sum") for j, h in enumerate(states) if j]
    count = sum((targets[:, j:] != IGNORED).sum() for j in range(1, len(states)))
    return _ce(states[0], head, targets) + mtp_weight * sum(costs) / count


def _padding_counts(states: Sequence[Tensor], head: Tensor, targets: Tensor, mtp_weight: float) -> Tensor:
    main, *deeper = [_ce(h, head, targets[:, j:], "sum") / targets[:, j:].numel() for j, h in enumerate(states)]
    return main + mtp_weight * sum(deeper) / max(len(deeper), 1)


total_loss = Exercise(
    name="total_loss",
    reference=_reference_total_loss,
    cases=[
        Case("one depth, lambda = 0.3", _loss_inputs(2, 5, 1, 0.3)),
        Case("three depths, lambda = 0.5", _loss_inputs(2, 7, 3, 0.5)),
        Case("two depths, a row that ends in padding", _loss_inputs(3, 6, 2, 0.8, ignored=3)),
        Case("no depth at all", _loss_inputs(2, 4, 0, 0.3)),
    ],
    mistakes=[
        Mistake(
            _total_with(cost=lambda h, head, t, j: _ce(h, head, t[:, :-j])),
            "the targets are not shifted: targets[:, i] is token i + 1, which depth 1 has just read. Depth j predicts token "
            "i + j + 1, targets[:, j:]",
        ),
        Mistake(
            _total_with(cost=lambda h, head, t, j: _ce(h, head, t[:, 1 : 1 + h.shape[1]])),
            "every depth is measured against the same token: each depth predicts one further, so depth j's targets start j "
            "places later, targets[:, j:]",
        ),
        Mistake(
            _total_with(cost=lambda h, head, t, j: _ce(h[:, :-1], head, t[:, j + 1 :])),
            "the targets are shifted once too often: they are one ahead of the tokens already, so depth j takes "
            "targets[:, j:]",
        ),
        Mistake(
            _total_with(lambda main, deeper, w: main + w * sum(deeper)),
            "the depths are added up: it is their *mean*, so that a further depth takes its share from the others and not "
            "from the main loss",
        ),
        Mistake(
            _total_with(lambda main, deeper, w: main + sum(deeper) / len(deeper)),
            "lambda is missing: the mean over the depths is multiplied by mtp_weight",
        ),
        Mistake(
            _total_with(lambda main, deeper, w: w * (main + sum(deeper) / len(deeper))),
            "lambda weighs the main loss too: it weighs the depths only, the main loss counts in full",
        ),
        Mistake(
            _total_with(lambda main, deeper, w: main + w * (main + sum(deeper)) / (1 + len(deeper))),
            "the main loss is in the mean over the depths: it stands alone, before the plus",
        ),
        Mistake(
            _total_with(lambda main, deeper, w: (1 - w) * main + w * sum(deeper) / len(deeper)),
            "what lambda gives to the depths is taken from the main loss: nothing is taken, the main loss counts in full",
        ),
        Mistake(
            _total_with(lambda main, deeper, w: main + sum(w**j * x for j, x in enumerate(deeper, 1)) / len(deeper)),
            "lambda shrinks from depth to depth: all depths have the same weight, lambda over their number",
        ),
        Mistake(
            _pooled,
            "the tokens of all depths are averaged in one: a depth with fewer targets then counts less. Take each depth's "
            "mean, then the mean of the means",
        ),
        Mistake(
            _padding_counts,
            "padding is counted: divide by the targets that are not IGNORED (cross_entropy does)",
        ),
    ],
)


# ---- unreached ---------------------------------------------------------------------------------------------------------


def _audit_inputs(width: int) -> Inputs:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        names = ("matrix", "idle", "silenced", "balanced", "one row of it", "of another loss")
        tensors = [torch.randn(4, width, generator=random).requires_grad_() for _ in names]
        matrix, _, silenced, balanced, table, other = tensors
        other.grad = torch.ones_like(other)
        signs = torch.ones(4, width)
        signs[::2] = -1.0  # a gradient whose entries add up to 0 without being 0
        loss = matrix.square().sum() + (0.0 * silenced).sum() + (signs * balanced).sum() + table[2].sum()
        return loss, dict(zip(names, tensors, strict=True))

    return inputs


def _nothing_reached_inputs(random: torch.Generator) -> tuple[Any, ...]:
    used, first, second = (torch.randn(3, generator=random).requires_grad_() for _ in range(3))
    return (used * used).sum(), {"a": first, "b": second}


def _reference_unreached(loss: Tensor, parameters: dict[str, Tensor]) -> list[str]:
    """A fresh backward pass, read from .grad."""
    for parameter in parameters.values():
        parameter.grad = None
    loss.backward(retain_graph=True)
    grads = {name: p.grad for name, p in parameters.items()}
    return [name for name, grad in grads.items() if grad is None or float(grad.abs().max()) == 0]


def _audit_with(
    idle: Callable[[Tensor | None], bool], fresh: bool = True
) -> Callable[[Tensor, dict[str, Tensor]], list[str]]:
    """An audit with an opinion of its own on which gradient is none."""

    def answer(loss: Tensor, parameters: dict[str, Tensor]) -> list[str]:
        if fresh:
            grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        else:
            loss.backward(retain_graph=True)
            grads = tuple(p.grad for p in parameters.values())
        return [name for name, grad in zip(parameters, grads, strict=True) if idle(grad)]

    return answer


def _two_losses_of_one_pass(answer: Callable[..., Any]) -> bool:
    x, y = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    shared = x.exp() + 0.0 * y
    first, second = shared.sum(), (shared.square() * y).sum()
    parameters = {"x": x, "y": y}
    return [list(answer(loss, parameters)) for loss in (first, second, first)] == [["y"], [], ["y"]]


unreached = Exercise(
    name="unreached",
    reference=_reference_unreached,
    cases=[
        Case("six tensors, of which three get nothing", _audit_inputs(3)),
        Case("the same with wider tensors", _audit_inputs(6)),
        Case("a loss that reaches none", _nothing_reached_inputs),
    ],
    mistakes=[
        Mistake(
            _audit_with(lambda grad: grad is None, fresh=False),
            "two kinds slip through: a gradient of zeros trains nothing either, and .grad may still hold what another loss "
            "left there. Look at fresh gradients, and at whether any entry is not 0",
        ),
        Mistake(
            _audit_with(lambda grad: grad is None),
            "a gradient of zeros slips through: it is there, and trains nothing. Ask whether any entry is not 0",
        ),
        Mistake(
            _audit_with(lambda grad: grad is None or not grad.any(), fresh=False),
            "'of another loss' slips through: backward adds to .grad, which still held another loss's gradient. Clear it "
            "first, or ask torch.autograd.grad, which does not use it",
        ),
        Mistake(
            _audit_with(lambda grad: grad is None or grad.sum().abs().item() < 1e-6),
            "you add the entries up, and positive and negative ones cancel ('balanced'): ask whether *any* entry is not 0",
        ),
        Mistake(
            _audit_with(lambda grad: grad is None or not grad.all()),
            "you ask whether *all* entries are not 0: of an embedding a batch reads some rows, and those are trained. One "
            "entry that is not 0 is enough",
        ),
        Mistake(
            _audit_with(lambda grad: grad is not None and bool(grad.any())),
            "these are the tensors that *are* reached: the others are asked for",
        ),
        Mistake(
            _audit_with(lambda grad: grad is not None and not grad.any()),
            "a tensor that the loss does not depend on at all is missing: its gradient is None, not a tensor of zeros",
        ),
    ],
    properties=[
        Property(
            "several losses of one pass can be audited",
            _two_losses_of_one_pass,
            "asked for a second loss of the same pass, or again for the first, it said something else: each answer is about "
            "its own loss alone",
        )
    ],
)


# ---- second_token_logits (find the bug) --------------------------------------------------------------------------------


def _embed(tokens: Tensor) -> Tensor:
    return torch.sin((tokens[..., None] + 1) * torch.tensor([0.7, 1.9, 3.1, 0.3]))


def _module(embedding: Tensor, hidden: Tensor) -> Tensor:
    if embedding.shape != hidden.shape:
        raise ValueError(f"embedding {tuple(embedding.shape)} and hidden {tuple(hidden.shape)} have to be as long")
    return torch.tanh(hidden + 2.0 * embedding)


def _head(hidden: Tensor) -> Tensor:
    return torch.stack([(hidden * torch.cos(torch.arange(4.0) + token)).sum(-1) for token in range(6)], dim=-1)


def _leak_inputs(b: int, s: int) -> Inputs:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        targets = torch.randint(0, 6, (b, s), generator=random)
        return targets, torch.randn(b, s, 4, generator=random), _embed, _module, _head

    return inputs


def _reference_second(targets: Tensor, hidden: Tensor, embed: Any, module: Any, head: Any) -> Tensor:
    steps = range(targets.shape[1] - 1)
    return torch.cat([head(module(embed(targets[:, i : i + 1]), hidden[:, i : i + 1])) for i in steps], dim=1)


def _second_with(pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    def answer(targets: Tensor, hidden: Tensor, embed: Any, module: Any, head: Any) -> Tensor:
        return head(module(*pair(embed(targets), hidden)))

    return answer


def _does_not_know_the_answer(answer: Callable[..., Any]) -> bool:
    """The logits of place i are about targets[i + 1]: another token there changes nothing up to i."""
    random = torch.Generator().manual_seed(3)
    targets, hidden = torch.randint(0, 6, (1, 6), generator=random), torch.randn(1, 6, 4, generator=random)
    other = targets.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 6
    before, after = (answer(each, hidden, _embed, _module, _head) for each in (targets, other))
    return torch.allclose(before[:, :4], after[:, :4])


second_token_logits = Exercise(
    name="second_token_logits",
    reference=_reference_second,
    cases=[Case("one row of 4", _leak_inputs(1, 4)), Case("3 rows of 7", _leak_inputs(3, 7))],
    mistakes=[
        Mistake(
            _second_with(lambda e, h: (e[:, 1:], h[:, :-1])),
            "this is still the bug: targets are one ahead of the tokens already. embed(targets)[:, 0] is the token after "
            "position 0, the one that depth 1 reads there; one further is the token that it is asked for",
        ),
        Mistake(
            _second_with(lambda e, h: (e[:, 1:], h[:, 1:])),
            "every state meets the right token now, but both lost their *first* position: what stands in place i belongs to "
            "position i + 1, has read targets[i + 1], and is measured against it. They lose their last",
        ),
        Mistake(
            _second_with(lambda e, h: (e[:, :-1], h[:, 1:])),
            "the state is one too late: it has read the token already that it meets. Both lose their last position",
        ),
        Mistake(
            _second_with(lambda e, h: (e, h)),
            "one position too many: after the last state's next token no target is left in the row. Both lose their last",
        ),
        Mistake(
            _second_with(lambda e, h: (h[:, :-1], e[:, :-1])),
            "the right pairs in the wrong order: module takes the embedding first, then the state",
        ),
    ],
    properties=[
        Property(
            "another token in the place that is asked for changes nothing",
            _does_not_know_the_answer,
            "it has read the token that it is to predict",
        )
    ],
)
