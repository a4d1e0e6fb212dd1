"""Checks of lesson 04: RMSNorm, SwiGLU, causal attention, cross-entropy, and a block whose stream is left alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property
from dsv3_mini.data.packing import IGNORED

# ---- rms_norm ----------------------------------------------------------------------------------------------------------


def _norm_inputs(*shape: int, size: float, eps: float) -> Callable[[torch.Generator], tuple[Any, ...]]:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        # A mean that is not 0 tells it from LayerNorm, weights that are not 1 that they are used.
        x = size * (torch.randn(*shape, generator=random) + 0.7)
        return x, 0.5 + torch.rand(shape[-1], generator=random), eps

    return inputs


def _reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _mean_square(x: Tensor, dim: int = -1) -> Tensor:
    return x.square().mean(dim, keepdim=True)


def _grows_with_the_input(answer: Callable[..., Any]) -> bool:
    x, weight = torch.linspace(-1, 2, 12).view(3, 4), torch.tensor([1.0, 2.0, 0.5, 3.0])
    return torch.allclose(answer(1000 * x, weight, 1e-12), answer(x, weight, 1e-12), rtol=1e-4)


rms_norm = Exercise(
    name="rms_norm",
    reference=_reference_rms_norm,
    cases=[
        Case("two tokens of width 5", _norm_inputs(2, 5, size=1.0, eps=1e-6)),
        Case("a batch of rows, [2, 3, 8]", _norm_inputs(2, 3, 8, size=4.0, eps=1e-6)),
        Case("states so small that eps counts", _norm_inputs(2, 6, 4, size=0.1, eps=0.05)),
    ],
    mistakes=[
        Mistake(
            lambda x, w, eps: F.layer_norm(x, w.shape, w, None, eps),
            "you take the mean off first: that is LayerNorm. RMSNorm leaves the mean where it is and divides only",
        ),
        Mistake(
            lambda x, w, eps: w * (x - x.mean(-1, keepdim=True)) * torch.rsqrt(_mean_square(x) + eps),
            "you take the mean off, and divide by the size that x had before: RMSNorm takes no mean off at all",
        ),
        Mistake(
            lambda x, w, eps: x * torch.rsqrt(_mean_square(x) + eps),
            "the weight is missing: after the division every dimension is multiplied by its own learned number",
        ),
        Mistake(
            lambda x, w, eps: w * x / (x.norm(dim=-1, keepdim=True).square() + eps).sqrt(),
            "you divide by the length, the root of the *sum* of squares; it is the root of their *mean*. Yours comes out "
            "smaller by sqrt(d)",
        ),
        Mistake(
            lambda x, w, eps: w * x / (_mean_square(x) + eps),
            "you divide by the mean square, without its root: an input twice as large would come out half as large",
        ),
        Mistake(
            lambda x, w, eps: w * x / (_mean_square(x).sqrt() + eps),
            "eps stands outside the root: it belongs to the mean square, sqrt(mean + eps)",
        ),
        Mistake(
            lambda x, w, eps: w * x * torch.rsqrt(_mean_square(x)),
            "eps is missing: a token of all zeros would be divided by 0",
        ),
        Mistake(
            lambda x, w, eps: w * x * torch.rsqrt(_mean_square(x, -2) + eps),
            "you take the mean over the tokens (the axis before the last): a norm looks at one token at a time, over its d "
            "dimensions",
        ),
        Mistake(
            lambda x, w, eps: w * x * torch.rsqrt(x.square().mean() + eps),
            "you take one mean over everything: every token has its own, over its d dimensions (keep that axis, with size 1)",
        ),
        Mistake(
            lambda x, w, eps: (1 + w) * x * torch.rsqrt(_mean_square(x) + eps),
            "you multiply by 1 + weight, as some other models do: here the weight starts at 1 and multiplies directly",
        ),
    ],
    properties=[
        Property(
            "an input a thousand times as large gives the same",
            _grows_with_the_input,
            "what is divided by has to grow as the input does: the root of the mean of its squares",
        )
    ],
)


# ---- swiglu ------------------------------------------------------------------------------------------------------------


def _swiglu_inputs(d: int, f: int, *leading: int) -> Callable[[torch.Generator], tuple[Any, ...]]:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        x = torch.randn(*leading, d, generator=random)
        gate, up = (torch.randn(f, d, generator=random) for _ in range(2))
        return x, gate, up, torch.randn(d, f, generator=random)

    return inputs


def _reference_swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """One hidden unit at a time."""
    out = torch.zeros_like(x)
    for unit in range(gate.shape[0]):
        opening = (x * gate[unit]).sum(-1, keepdim=True)
        carried = (x * up[unit]).sum(-1, keepdim=True)
        out = out + opening / (1 + torch.exp(-opening)) * carried * down[:, unit]
    return out


def _gated_by(act: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, gate, up, down: (act(x @ gate.T) * (x @ up.T)) @ down.T


swiglu = Exercise(
    name="swiglu",
    reference=_reference_swiglu,
    cases=[
        Case("one token, d = 3, f = 5", _swiglu_inputs(3, 5, 1)),
        Case("a batch [2, 4], d = 6, f = 9", _swiglu_inputs(6, 9, 2, 4)),
        Case("as wide as it is long, d = f = 4", _swiglu_inputs(4, 4, 3)),
    ],
    mistakes=[
        Mistake(
            lambda x, gate, up, down: ((x @ gate.T) * F.silu(x @ up.T)) @ down.T,
            "silu stands on the wrong half: it bends the gate, silu(gate x) * (up x)",
        ),
        Mistake(
            _gated_by(torch.sigmoid),
            "your gate is the sigmoid alone: that is a plain GLU. silu(z) is z * sigmoid(z); the factor z is missing",
        ),
        Mistake(_gated_by(F.gelu), "your gate is a GELU: that is GeGLU. This model bends its gate with silu"),
        Mistake(
            _gated_by(F.relu), "your gate is a ReLU: silu is its smooth kin, and also lets small negatives through"
        ),
        Mistake(_gated_by(lambda z: z), "silu is missing: gate and up are only multiplied"),
        Mistake(
            lambda x, gate, up, down: F.silu(x @ gate.T) @ down.T,
            "up is missing: silu(gate x) is to be multiplied by up x, entry by entry, before down",
        ),
        Mistake(
            lambda x, gate, up, down: F.silu((x @ gate.T) * (x @ up.T)) @ down.T,
            "silu comes too late: first silu of gate x, then times up x; you bend the product",
        ),
        Mistake(
            lambda x, gate, up, down: (F.silu(x @ gate.T) + (x @ up.T)) @ down.T,
            "gate and up are added: a gate multiplies, so that it can close",
        ),
        Mistake(
            lambda x, gate, up, down: (F.silu(x @ gate) * (x @ up)) @ down,
            "the matrices are used without turning them: they are [out, in], as nn.Linear keeps them. einsum names the axes: "
            '"... d, f d -> ... f"',
        ),
    ],
)


# ---- causal_attention --------------------------------------------------------------------------------------------------


def _attention_inputs(
    b: int, s: int, h: int, q: int, v: int, size: float = 1.0
) -> Callable[[torch.Generator], tuple[Any, ...]]:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        query, key = (size * torch.randn(b, s, h, q, generator=random) for _ in range(2))
        return query, key, torch.randn(b, s, h, v, generator=random)

    return inputs


def _reference_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


def _attend(weigh: Callable[[Tensor, Tensor], Tensor], scale: Callable[[int], float] = lambda q: q**-0.5) -> Any:
    """Attention with weights of one's own: `weigh(scores [b h s t], later [s t])`."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = einsum(query, key, "b s h q, b t h q -> b h s t") * scale(query.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return einsum(weigh(scores, later), value, "b h s t, b t h v -> b s h v")

    return attend


def _right_weights(scores: Tensor, later: Tensor) -> Tensor:
    return scores.masked_fill(later, -math.inf).softmax(-1)


def _across_heads(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = einsum(query, key, "b s h q, b s g q -> b s h g") * query.shape[-1] ** -0.5
    return einsum(scores.softmax(-1), value, "b s h g, b s g v -> b s h v")


def _past_does_not_depend_on_the_future(answer: Callable[..., Any]) -> bool:
    random = torch.Generator().manual_seed(7)
    query, key, value = (torch.randn(1, 6, 2, 4, generator=random) for _ in range(3))
    before = answer(query, key, value)[:, :4]
    key, value = key.clone(), value.clone()
    key[:, 4:], value[:, 4:] = 5.0, -9.0
    return torch.allclose(answer(query, key, value)[:, :4], before, atol=1e-5)


causal_attention = Exercise(
    name="causal_attention",
    reference=_reference_attention,
    cases=[
        Case("one head, three tokens", _attention_inputs(1, 3, 1, 4, 4)),
        Case("2 rows, 5 tokens, 3 heads, widths 4 and 6", _attention_inputs(2, 5, 3, 4, 6)),
        Case("sharp scores", _attention_inputs(1, 7, 2, 16, 8, size=4.0)),
    ],
    mistakes=[
        Mistake(
            _attend(lambda scores, later: scores.softmax(-1)),
            "nothing is masked: every token sees the tokens after it, and training would learn to copy the answer",
        ),
        Mistake(
            _attend(lambda scores, later: scores.masked_fill(later, 0.0).softmax(-1)),
            "the mask fills in 0, and e^0 = 1: a later token still gets a weight, more than one with a negative score. "
            "Fill in -inf",
        ),
        Mistake(
            _attend(lambda scores, later: scores.softmax(-1).masked_fill(later, 0.0)),
            "the mask comes after the softmax: the weights left over no longer sum to 1, and how much is missing tells "
            "about the future. Mask the scores, then take the softmax",
        ),
        Mistake(
            _attend(lambda scores, later: scores.masked_fill(later, -math.inf).softmax(-2)),
            "the softmax runs over the queries (s): each query's weights over the keys (t) are to sum to 1",
        ),
        Mistake(
            _attend(lambda scores, later: scores.masked_fill(later, -math.inf).softmax(1)),
            "the softmax runs over the heads: each query's weights over the keys (t) are to sum to 1, in every head",
        ),
        Mistake(
            _attend(_right_weights, lambda q: 1.0),
            "the scale is missing: scores are divided by sqrt(q), the root of the width of a query",
        ),
        Mistake(_attend(_right_weights, lambda q: 1 / q), "you divide the scores by q: it is by its root, sqrt(q)"),
        Mistake(
            _attend(_right_weights, lambda q: q**0.5), "you multiply the scores by sqrt(q): it is a division by sqrt(q)"
        ),
        Mistake(
            _attend(lambda scores, later: scores.masked_fill(later.T, -math.inf).softmax(-1)),
            "the mask is turned around: a token sees only itself and what comes *after* it. Mask the keys with t > s",
        ),
        Mistake(
            _attend(lambda scores, later: scores.masked_fill(~later.T, -math.inf).softmax(-1)),
            "a token does not see itself: mask t > s, not t >= s (the first token has nothing else to look at, so its row "
            "becomes nan)",
        ),
        Mistake(
            _attend(lambda scores, later: scores.masked_fill(later, -math.inf).softmax(-1).transpose(-1, -2)),
            "the weights are summed over the wrong axis at the end: sum over the keys (t), and keep the queries (s)",
        ),
        Mistake(
            _across_heads,
            "the heads of one token attend to each other: s is both the query's and the key's letter in your einsum. Give "
            "the keys a letter of their own, t",
        ),
    ],
    properties=[
        Property(
            "what comes later changes nothing earlier",
            _past_does_not_depend_on_the_future,
            "with other tokens at the end, the output at the beginning changed: something from the future gets through",
        )
    ],
)


# ---- cross_entropy -----------------------------------------------------------------------------------------------------


def _loss_inputs(
    b: int, s: int, v: int, ignored: int = 0, size: float = 2.0, shift: float = 0.0
) -> Callable[[torch.Generator], tuple[Any, ...]]:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        logits = size * torch.randn(b, s, v, generator=random) + shift
        targets = torch.randint(0, v, (b, s), generator=random)
        if ignored:
            targets[-1, s - ignored :] = IGNORED
        return logits, targets

    return inputs


def _reference_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """[b s], 0 where ignored."""
    right = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -right * (targets != IGNORED)


def _unguarded(logits: Tensor, targets: Tensor) -> Tensor:
    share = logits.exp() / logits.exp().sum(-1, keepdim=True)
    kept = targets != IGNORED
    return -share.gather(-1, targets.clamp(min=0)[..., None])[..., 0].log()[kept].mean()


def _ignored_taken_for_the_last(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), torch.where(targets < 0, logits.shape[-1] - 1, targets).flatten())


def _ignored_taken_for_the_first(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.clamp(min=0).flatten())


def _count(targets: Tensor) -> Tensor:
    return (targets != IGNORED).sum()


def _fresh_model_knows_nothing(answer: Callable[..., Any]) -> bool:
    loss = answer(torch.zeros(2, 3, 50), torch.full((2, 3), 7))
    return abs(float(loss) - math.log(50)) < 1e-4


cross_entropy = Exercise(
    name="cross_entropy",
    reference=_reference_loss,
    cases=[
        Case("2 rows of 3 tokens, 7 in the vocabulary", _loss_inputs(2, 3, 7)),
        Case("a row that ends in padding (targets of -100)", _loss_inputs(3, 5, 11, ignored=3)),
        Case("logits near 500", _loss_inputs(2, 4, 6, ignored=1, shift=500.0)),
    ],
    mistakes=[
        Mistake(
            _unguarded,
            "exp of a logit of 500 is infinite: take the largest logit off first (the softmax stays the same), or use "
            "logsumexp, which does",
        ),
        Mistake(
            lambda logits, targets: _token_losses(logits, targets).sum(),
            "this is the sum over the tokens: divide by how many count, or a longer batch would mean a larger step",
        ),
        Mistake(
            lambda logits, targets: _token_losses(logits, targets).mean(),
            "padding is counted in the mean: divide by the targets that are not -100, not by all",
        ),
        Mistake(
            lambda logits, targets: _reference_loss(logits, targets) / math.log(2),
            "this is in bits (log2): the loss is in nats, with the natural logarithm",
        ),
        Mistake(
            lambda logits, targets: -_reference_loss(logits, targets),
            "the sign is the wrong way round: the log of a probability is negative, a loss is minus that",
        ),
        Mistake(
            lambda logits, targets: (
                -logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0][targets != IGNORED].mean()
            ),
            "the normalisation is missing: logits are no log-probabilities until logsumexp over the vocabulary is taken off",
        ),
        Mistake(
            lambda logits, targets: (
                (_token_losses(logits, targets).neg().exp() * (targets != IGNORED)).sum().neg() / _count(targets)
            ),
            "this is minus the mean probability: take the logarithm of each probability before the mean",
        ),
        Mistake(
            _ignored_taken_for_the_last,
            "a target of -100 counts as if it were a token: leave those places out of sum and count",
        ),
        Mistake(
            _ignored_taken_for_the_first,
            "a target of -100 is clamped to token 0 and then counts: leave those places out of sum and count",
        ),
        Mistake(
            lambda logits, targets: (
                -logits.log_softmax(1).gather(-1, targets.clamp(min=0)[..., None])[..., 0][targets != IGNORED].mean()
            ),
            "the softmax runs over the tokens: probabilities sum to 1 over the vocabulary, the last axis",
        ),
        Mistake(
            lambda logits, targets: torch.stack(
                [_token_losses(x, t).sum() / _count(t).clamp(min=1) for x, t in zip(logits, targets, strict=True)]
            ).mean(),
            "you average each row and then the rows: a token in a short row weighs more then. Sum over the whole batch, "
            "divide once",
        ),
    ],
    properties=[
        Property(
            "logits all equal cost ln(vocabulary)",
            _fresh_model_knows_nothing,
            "with 50 tokens, all as likely, the loss is ln 50 = 3.91 whatever the target",
        )
    ],
)


# ---- block (find the bug) ----------------------------------------------------------------------------------------------
# Functions stand at module level, so that a case's inputs are the same objects each time they are made.


def _norm_a(x: Tensor) -> Tensor:
    return 1.5 * x / (_mean_square(x) + 1e-6).sqrt()


def _norm_b(x: Tensor) -> Tensor:
    return 0.5 * x / (_mean_square(x) + 1e-6).sqrt()


def _mean_of_the_past(x: Tensor) -> Tensor:
    """Stands for attention."""
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


def _bend(x: Tensor) -> Tensor:
    """Stands for the feed-forward."""
    return x.flip(-1) * torch.sigmoid(x)


def _nothing(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def _reference_block(x: Tensor, norm_1: Any, attend: Any, norm_2: Any, feed: Any) -> Tensor:
    middle = torch.add(x, attend(norm_1(x)))
    return torch.add(middle, feed(norm_2(middle)))


def _norms_the_stream(x: Tensor, norm_1: Any, attend: Any, norm_2: Any, feed: Any) -> Tensor:
    x = norm_1(x)
    x = x + attend(x)
    x = norm_2(x)
    return x + feed(x)


def _norms_after(x: Tensor, norm_1: Any, attend: Any, norm_2: Any, feed: Any) -> Tensor:
    x = norm_1(x + attend(x))
    return norm_2(x + feed(x))


def _no_stream(x: Tensor, norm_1: Any, attend: Any, norm_2: Any, feed: Any) -> Tensor:
    return feed(norm_2(attend(norm_1(x))))


def _half_a_stream(x: Tensor, norm_1: Any, attend: Any, norm_2: Any, feed: Any) -> Tensor:
    x = x + attend(norm_1(x))
    return feed(norm_2(x))


def _half_cured(x: Tensor, norm_1: Any, attend: Any, norm_2: Any, feed: Any) -> Tensor:
    x = x + attend(norm_1(x))
    x = norm_2(x)
    return x + feed(x)


def _side_by_side(x: Tensor, norm_1: Any, attend: Any, norm_2: Any, feed: Any) -> Tensor:
    return x + attend(norm_1(x)) + feed(norm_2(x))


def _one_norm_twice(x: Tensor, norm_1: Any, attend: Any, norm_2: Any, feed: Any) -> Tensor:
    x = x + attend(norm_1(x))
    return x + feed(norm_1(x))


def _no_norms(x: Tensor, norm_1: Any, attend: Any, norm_2: Any, feed: Any) -> Tensor:
    x = x + attend(x)
    return x + feed(x)


def _block_inputs(*shape: int) -> Callable[[torch.Generator], tuple[Any, ...]]:
    return lambda random: (3 * torch.randn(*shape, generator=random), _norm_a, _mean_of_the_past, _norm_b, _bend)


def _silent_parts_change_nothing(answer: Callable[..., Any]) -> bool:
    x = torch.linspace(-5, 9, 24).view(2, 3, 4)
    return torch.equal(answer(x, _norm_a, _nothing, _norm_b, _nothing), x)


block = Exercise(
    name="block",
    reference=_reference_block,
    cases=[Case("2 rows, 4 tokens, width 6", _block_inputs(2, 4, 6)), Case("one token", _block_inputs(1, 1, 8))],
    mistakes=[
        Mistake(
            _norms_the_stream,
            "this is still the bug: `x = norm_1(x)` overwrites the stream itself. Give the normed copy to attention only, and "
            "add what comes back to x as it was",
        ),
        Mistake(
            _half_cured,
            "the first half is right; in the second `x = norm_2(x)` still overwrites the stream",
        ),
        Mistake(
            _norms_after,
            "the norm comes after the addition here (as in the transformer of 2017): it rescales the stream, so what an early "
            "layer wrote fades. Norm what a part *reads*",
        ),
        Mistake(_no_stream, "nothing is added: each part replaces the stream by its output. It is x + part(norm(x))"),
        Mistake(_half_a_stream, "the feed-forward's output replaces the stream: add it, x + feed(norm_2(x))"),
        Mistake(
            _side_by_side,
            "both parts read the stream as it came in: the feed-forward is to read what attention has added already",
        ),
        Mistake(_one_norm_twice, "the feed-forward reads through norm_1: it has a norm of its own, norm_2"),
        Mistake(
            _no_norms, "the norms are gone: each part reads the stream through its norm, and the stream stays as it is"
        ),
    ],
    properties=[
        Property(
            "parts that say nothing leave the stream as it was",
            _silent_parts_change_nothing,
            "with attention and feed-forward that return zeros, the block is to return x itself, to the last bit",
        )
    ],
)
