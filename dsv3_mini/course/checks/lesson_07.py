"""Checks of lesson 07: the mask of a chunk, a decode loop, absorbed attention, its FLOPs, and rows of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property

# ---- visible -----------------------------------------------------------------------------------------------------------


def _reference_visible(seen: int, new: int) -> Tensor:
    return torch.tensor([[t <= seen + s for t in range(seen + new)] for s in range(new)])


def _ones(seen: int, new: int) -> Tensor:
    return torch.ones(new, seen + new, dtype=torch.bool)


visible = Exercise(
    name="visible",
    reference=_reference_visible,
    cases=[
        Case("an empty cache and 4 new tokens", lambda random: (0, 4)),
        Case("5 tokens in the cache and 3 new ones", lambda random: (5, 3)),
        Case("2 in the cache and 6 new ones", lambda random: (2, 6)),
        Case("9 in the cache and 1 new one", lambda random: (9, 1)),
    ],
    mistakes=[
        Mistake(
            lambda seen, new: _ones(seen, new).tril(),
            "the triangle starts at the first key, so the first new token sees one key of the cache and nothing else. It "
            "stands at position `seen`: move the diagonal by that much",
        ),
        Mistake(
            lambda seen, new: _ones(seen, new).tril(seen - 1),
            "a new token does not see itself: key t is visible where t <= seen + s, equal included",
        ),
        Mistake(
            lambda seen, new: _ones(seen, new).tril(seen + 1),
            "one key too many: the new token s stands at position seen + s, and the key after that is its future",
        ),
        Mistake(_ones, "everything is visible: within the chunk a token must still not see the tokens after it"),
        Mistake(
            lambda seen, new: torch.arange(seen + new).expand(new, -1) < seen,
            "the new tokens see the cache only: each also sees itself, and those new tokens that stand before it",
        ),
        Mistake(
            lambda seen, new: ~_ones(seen, new).tril(seen),
            "it is the wrong way round: True is to mean that the query may see the key",
        ),
        Mistake(
            lambda seen, new: _ones(seen, new).tril(seen).T,
            "the axes have changed places: rows are the new queries (s), columns all keys (t)",
        ),
        Mistake(
            lambda seen, new: _ones(0, new).tril(),
            "the keys in the cache have no columns: there are seen + new keys, the cached ones first",
        ),
    ],
)


# ---- write -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """Stands for a model with its cache: it remembers what it read, and the token it wants next depends on all of it."""

    vocab: int
    history: list[Tensor] = field(default_factory=list, compare=False)

    def __call__(self, tokens: Any) -> Tensor:
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
            what = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"read wants token ids [b s], at least one a row; it was given {what}")
        self.history.append(tokens.clone())
        text = torch.cat(self.history, dim=1)
        weight = torch.arange(1, text.shape[1] + 1).square()
        best = ((3 * text + 1) * weight).cumsum(1)[:, -tokens.shape[1] :] % self.vocab
        return -((torch.arange(self.vocab) - best[..., None]) % self.vocab).float()


def _prompts(b: int, s: int, new: int, vocab: int = 31) -> Callable[[torch.Generator], tuple[Any, ...]]:
    return lambda random: (Reader(vocab), torch.randint(0, vocab, (b, s), generator=random), new)


def _best(logits: Tensor, place: int = -1) -> Tensor:
    """[b 1]: the likeliest token after one place."""
    return logits[:, place].argmax(-1, keepdim=True)


def _reference_write(read: Reader, prompt: Tensor, new_tokens: int) -> Tensor:
    """Without a cache: for each token the whole text again, read by a reader that knows nothing."""
    text = prompt
    for _ in range(new_tokens):
        text = torch.cat([text, _best(Reader(read.vocab)(text))], dim=1)
    return text[:, prompt.shape[1] :]


def _loop(feed: Callable[[Tensor, Tensor], Tensor], first: int = -1) -> Callable[..., Tensor]:
    """A decode loop that reads `feed(prompt, all new tokens so far)` at each step after the prefill."""

    def write(read: Reader, prompt: Tensor, new_tokens: int) -> Tensor:
        new = _best(read(prompt), first)
        for _ in range(new_tokens - 1):
            new = torch.cat([new, _best(read(feed(prompt, new)))], dim=1)
        return new

    return write


_right_loop = _loop(lambda prompt, new: new[:, -1:])


def _drops_the_first(read: Reader, prompt: Tensor, new_tokens: int) -> Tensor:
    new = [_best(read(prompt))]
    for _ in range(new_tokens):
        new.append(_best(read(new[-1])))
    return torch.cat(new[1:], dim=1)


def _reads_the_last_of_the_prompt_twice(read: Reader, prompt: Tensor, new_tokens: int) -> Tensor:
    read(prompt)
    text = prompt
    for _ in range(new_tokens):
        text = torch.cat([text, _best(read(text[:, -1:]))], dim=1)
    return text[:, prompt.shape[1] :]


def _forgets_the_prompt(read: Reader, prompt: Tensor, new_tokens: int) -> Tensor:
    text = prompt
    for _ in range(new_tokens):
        text = torch.cat([text, _best(read(text[:, -1:]))], dim=1)
    return text[:, prompt.shape[1] :]


def _prefills_once_and_reads_each_token_once(answer: Callable[..., Any]) -> bool:
    reader, prompt = Reader(23), torch.arange(14).view(2, 7)
    answer(reader, prompt, 5)
    lengths = [tokens.shape[1] for tokens in reader.history]
    return lengths in ([7, 1, 1, 1, 1], [7, 1, 1, 1, 1, 1])  # the last new token need not be read


write = Exercise(
    name="write",
    reference=_reference_write,
    cases=[
        Case("one row, 4 tokens and 3 new ones", _prompts(1, 4, 3)),
        Case("3 rows, 5 tokens and 8 new ones", _prompts(3, 5, 8)),
        Case("a prompt of one token and 2 new ones", _prompts(2, 1, 2)),
        Case("one new token", _prompts(2, 6, 1)),
    ],
    mistakes=[
        Mistake(
            _loop(lambda prompt, new: torch.cat([prompt, new], dim=1)),
            "each step hands the whole text to read: it remembers what it has read, so the cache now holds all of it again "
            "and again. After the prompt, hand over the newest token only",
        ),
        Mistake(
            _loop(lambda prompt, new: new),
            "each step hands over all new tokens: those before the newest stand in the cache already. Hand over the newest "
            "only",
        ),
        Mistake(
            _loop(lambda prompt, new: prompt),
            "each step reads the prompt again, and no new token is ever read: after the prompt, read the token that was "
            "just chosen",
        ),
        Mistake(
            _reads_the_last_of_the_prompt_twice,
            "the last token of the prompt is read twice: the prefill's own logits already say which token comes next",
        ),
        Mistake(
            _forgets_the_prompt,
            "the model reads only the last token of the prompt: prefill first, read(prompt), so that the cache holds all of it",
        ),
        Mistake(
            _loop(lambda prompt, new: new[:, -1:], first=0),
            "after the prefill you take the logits of the first position: what comes next stands at the last, logits[:, -1]",
        ),
        Mistake(
            _drops_the_first,
            "the token that the prefill chose is missing: it is the first of the new ones",
        ),
        Mistake(
            lambda read, prompt, new: torch.cat([prompt, _right_loop(read, prompt, new)], dim=1),
            "the prompt stands in front: return the new tokens only",
        ),
        Mistake(
            lambda read, prompt, new: _right_loop(read, prompt, new + 1),
            "one token too many: the prefill gives the first, so new_tokens - 1 steps are left",
        ),
        Mistake(
            lambda read, prompt, new: _right_loop(read, prompt, new).T,
            "rows and tokens have changed places: put the new tokens side by side, [b new_tokens]",
        ),
    ],
    properties=[
        Property(
            "the prompt is read in one go, then one token at a time",
            _prefills_once_and_reads_each_token_once,
            "the tokens are right. But read the whole prompt in one call (prefill) and after that each new token once "
            "(decode)",
        )
    ],
)


# ---- absorbed ----------------------------------------------------------------------------------------------------------


def _absorbed_inputs(
    b: int, s: int, t: int, h: int, n: int, r: int, v: int, c: int, scale: float | None = None
) -> Callable[[torch.Generator], tuple[Any, ...]]:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random)

        return (
            numbers(b, s, h, n),
            numbers(b, s, h, r),
            numbers(b, t, c),
            numbers(b, t, r),
            numbers(h, n, c) / c**0.5,
            numbers(h, v, c) / c**0.5,
            (n + r) ** -0.5 if scale is None else scale,
            _reference_visible(t - s, s).expand(b, s, t),
        )

    return inputs


def _reference_absorbed(
    query_nope: Tensor, query_rope: Tensor, latent: Tensor, key_rope: Tensor, up_key: Tensor, up_value: Tensor,
    scale: float, mask: Tensor,
) -> Tensor:  # fmt: skip
    """The naive way: every head's keys and values, and torch's own attention."""
    key_nope = torch.matmul(latent[:, None], up_key.mT)  # b h t n
    key = torch.cat([key_nope, key_rope[:, None].expand(*key_nope.shape[:3], -1)], dim=-1)
    query = torch.cat([query_nope, query_rope], dim=-1).transpose(1, 2)
    value = torch.matmul(latent[:, None], up_value.mT)
    mixed = F.scaled_dot_product_attention(query, key, value, mask[:, None], scale=scale)
    return mixed.transpose(1, 2)


def _on_latents(
    weigh: Callable[[Tensor, Tensor, Tensor, float, Tensor], Tensor],
    out: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Callable[..., Tensor]:
    """Absorbed attention with weights of one's own: `weigh(content, position, latent, scale, mask)`."""

    def answer(
        query_nope: Tensor, query_rope: Tensor, latent: Tensor, key_rope: Tensor, up_key: Tensor, up_value: Tensor,
        scale: float, mask: Tensor,
    ) -> Tensor:  # fmt: skip
        query_latent = einsum(query_nope, up_key, "b s h n, h n c -> b s h c")
        content = einsum(query_latent, latent, "b s h c, b t c -> b h s t")
        position = einsum(query_rope, key_rope, "b s h r, b t r -> b h s t")
        share = weigh(content, position, latent, scale, mask[:, None])
        mixed = einsum(share, latent, "b h s t, b t c -> b s h c")
        if out is not None:
            return out(mixed, up_key, up_value)
        return einsum(mixed, up_value, "b s h c, h v c -> b s h v")

    return answer


def _shut(scores: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    return scores.masked_fill(~mask, -math.inf).softmax(dim)


def _right_weights(content: Tensor, position: Tensor, latent: Tensor, scale: float, mask: Tensor) -> Tensor:
    return _shut((content + position) * scale, mask)


def _values_unabsorbed(mixed: Tensor, up_key: Tensor, up_value: Tensor) -> Tensor:
    return mixed


def _few_products(answer: Callable[..., Any]) -> bool:
    """One query over 300 tokens: on the latents it is a tenth of the products that building keys and values takes."""
    b, s, t, h, n, r, v, c = 1, 1, 300, 4, 16, 8, 16, 32
    inputs = _absorbed_inputs(b, s, t, h, n, r, v, c)(torch.Generator().manual_seed(5))
    with FlopCounterMode(display=False) as counter:
        answer(*inputs)
    return counter.get_total_flops() <= 3 * _reference_flops(s, t, h, n, r, v, c)[1]


absorbed = Exercise(
    name="absorbed",
    reference=_reference_absorbed,
    cases=[
        Case("one query over 6 keys", _absorbed_inputs(1, 1, 6, 2, 4, 2, 4, 5)),
        Case("2 rows, 3 new tokens, 8 keys, 3 heads", _absorbed_inputs(2, 3, 8, 3, 4, 2, 4, 7)),
        Case("values wider than keys, a scale of its own", _absorbed_inputs(2, 2, 6, 2, 4, 6, 5, 9, scale=0.7)),
    ],
    mistakes=[
        Mistake(
            _on_latents(lambda a, p, latent, scale, mask: _shut((a + p) * latent.shape[-1] ** -0.5, mask)),
            "your scale is 1 / sqrt(c): the dot product only *looks* c wide now. It is the same number as before, so it keeps "
            "the scale it was given",
        ),
        Mistake(
            lambda qn, qr, latent, kr, uk, uv, scale, mask: _on_latents(_right_weights)(
                qn, qr, latent, kr, uk, uv, (latent.shape[-1] + kr.shape[-1]) ** -0.5, mask
            ),
            "your scale is 1 / sqrt(c + r): the query that meets the cache is c + r wide, but the dot product is the same "
            "number as the one of n + r numbers before, and keeps its scale",
        ),
        Mistake(
            _on_latents(lambda a, p, latent, scale, mask: _shut(a * scale, mask)),
            "the rope part is missing: the scores do not know how far apart two tokens are",
        ),
        Mistake(
            _on_latents(lambda a, p, latent, scale, mask: _shut(a * scale + p, mask)),
            "only the content part is scaled: there is one scale, for the sum of both parts",
        ),
        Mistake(
            _on_latents(lambda a, p, latent, scale, mask: _shut(a + p, mask)),
            "the scale is missing: multiply the sum of both parts by it before the softmax",
        ),
        Mistake(
            _on_latents(lambda a, p, latent, scale, mask: ((a + p) * scale).softmax(-1)),
            "the mask is not used: new tokens see the tokens after them",
        ),
        Mistake(
            _on_latents(lambda a, p, latent, scale, mask: ((a + p) * scale * mask).softmax(-1)),
            "masked scores become 0, and e^0 = 1: fill in -inf before the softmax",
        ),
        Mistake(
            _on_latents(lambda a, p, latent, scale, mask: _shut((a + p) * scale, ~mask)),
            "the mask is the wrong way round: True means that the query sees the key",
        ),
        Mistake(
            _on_latents(lambda a, p, latent, scale, mask: _shut((a + p) * scale, mask, dim=1)),
            "the softmax runs over the heads: each head's weights are to sum to 1 over the keys (t)",
        ),
        Mistake(
            _on_latents(_right_weights, _values_unabsorbed),
            "you return the mixed latents [b s h c]: each head's W_UV still has to turn its latent into a value",
        ),
        Mistake(
            _on_latents(
                _right_weights,
                lambda mixed, uk, uv: einsum(mixed, uk, "b s h c, h n c -> b s h n"),
            ),
            "the mixed latents go through W_UK: that is the keys' matrix, and values come from W_UV (up_value)",
        ),
        Mistake(
            _on_latents(
                _right_weights,
                lambda mixed, uk, uv: einsum(mixed.mean(2), uv, "b s c, h v c -> b s h v"),
            ),
            "the mixed latents are averaged over the heads: each head has its own weights, so its own mixed latent",
        ),
    ],
    properties=[
        Property(
            "no head's keys or values are built",
            _few_products,
            "the numbers are right, but a step over 300 tokens takes many times the products that it needs: keys and values "
            "are still built for every cached token. Multiply the query with W_UK first, and W_UV with the mixed latent last",
        )
    ],
)


# ---- count_flops -------------------------------------------------------------------------------------------------------

EXPANDED = (
    "t c, h n c -> t h n",
    "t c, h v c -> t h v",
    "s h n, t h n -> h s t",
    "s h r, t r -> h s t",
    "h s t, t h v -> s h v",
)
ABSORBED = (
    "s h n, h n c -> s h c",
    "s h c, t c -> h s t",
    "s h r, t r -> h s t",
    "h s t, t c -> s h c",
    "s h c, h v c -> s h v",
)


def _products(patterns: tuple[str, ...], sizes: dict[str, int]) -> int:
    """FLOPs of einsums: two for each combination of the letters that stand in a pattern."""
    return sum(2 * math.prod(sizes[letter] for letter in set(pattern) - set(" ,->")) for pattern in patterns)


def _reference_flops(s: int, t: int, h: int, n: int, r: int, v: int, c: int) -> tuple[int, int]:
    sizes = dict(s=s, t=t, h=h, n=n, r=r, v=v, c=c)
    return _products(EXPANDED, sizes), _products(ABSORBED, sizes)


def _counted(
    expanded: Callable[..., int] | None = None, absorbed: Callable[..., int] | None = None
) -> Callable[..., tuple[int, int]]:
    """A pair in which one side or both are counted in a way of one's own (multiplications, not doubled)."""

    def count(*sizes: int) -> tuple[int, int]:
        right = _reference_flops(*sizes)
        return (
            right[0] if expanded is None else 2 * expanded(*sizes),
            right[1] if absorbed is None else 2 * absorbed(*sizes),
        )

    return count


count_flops = Exercise(
    name="count_flops",
    reference=_reference_flops,
    cases=[
        Case("one new token over 10, 2 heads", lambda random: (1, 10, 2, 4, 3, 5, 6)),
        Case("7 new tokens over 50, 3 heads", lambda random: (7, 50, 3, 8, 4, 6, 11)),
        Case("the released widths, one new token over 4096", lambda random: (1, 4096, 128, 128, 64, 128, 512)),
    ],
    mistakes=[
        Mistake(
            lambda *sizes: tuple(flops // 2 for flops in _reference_flops(*sizes)),
            "a multiplication and the addition after it are two FLOPs: yours are half of what they should be",
        ),
        Mistake(
            lambda *sizes: _reference_flops(*sizes)[::-1],
            "the two have changed places: expanded first, then absorbed",
        ),
        Mistake(
            _counted(expanded=lambda s, t, h, n, r, v, c: s * t * h * (n + r + v)),
            "expanded: W_UK and W_UV are missing. The cache holds latents, so keys and values of all t tokens are built first",
        ),
        Mistake(
            _counted(expanded=lambda s, t, h, n, r, v, c: s * c * h * (n + v) + s * t * h * (n + r + v)),
            "expanded: you build keys and values of the s new tokens only. The older ones were not kept, the latents were: "
            "all t are built again",
        ),
        Mistake(
            _counted(expanded=lambda s, t, h, n, r, v, c: t * c * h * (n + r + v) + s * t * h * (n + r + v)),
            "expanded: the rope key is not built from the latent, it stands in the cache as it is: W_UK makes n numbers, "
            "not n + r",
        ),
        Mistake(
            _counted(expanded=lambda s, t, h, n, r, v, c: t * c * h * (n + v) + s * t * h * (n + v)),
            "expanded: the scores' rope part is missing: a query and a key meet in n + r numbers",
        ),
        Mistake(
            _counted(absorbed=lambda s, t, h, n, r, v, c: s * t * h * (2 * c + r)),
            "absorbed: the two folds are missing. Each query goes through W_UK, each mixed latent through W_UV",
        ),
        Mistake(
            _counted(absorbed=lambda s, t, h, n, r, v, c: t * c * h * (n + v) + s * t * h * (2 * c + r)),
            "absorbed: you fold once for each of the t keys. A fold belongs to a query: s times",
        ),
        Mistake(
            _counted(absorbed=lambda s, t, h, n, r, v, c: s * c * h * (n + v) + s * t * h * 2 * c),
            "absorbed: the scores' rope part is missing: a query meets a latent (c) and a rope key (r)",
        ),
        Mistake(
            _counted(absorbed=lambda s, t, h, n, r, v, c: s * c * h * (n + v) + s * t * h * 2 * (c + r)),
            "absorbed: the output mixes latents only, c numbers; the rope key stands in the scores alone",
        ),
        Mistake(
            _counted(absorbed=lambda s, t, h, n, r, v, c: s * c * h * (n + v) + s * t * (2 * c + r)),
            "absorbed: the heads are missing in the part over the cache. They share the latents, but each has its own query "
            "and its own weights",
        ),
        Mistake(
            _counted(absorbed=lambda s, t, h, n, r, v, c: s * c * h * (n + v) + s * t * h * (c + r)),
            "absorbed: the weighted sum of the latents is missing: c for the scores, and c again for the output",
        ),
    ],
)


# ---- batch_view (find the bug) -----------------------------------------------------------------------------------------


def _reference_view(lengths: Tensor, padded: int, new: int) -> tuple[Tensor, Tensor]:
    """Slot by slot."""
    mask = torch.zeros(len(lengths), new, padded + new, dtype=torch.bool)
    positions = torch.zeros(len(lengths), new, dtype=torch.long)
    for b, length in enumerate(lengths.tolist()):
        for s in range(new):
            mask[b, s, :length] = True
            mask[b, s, padded : padded + s + 1] = True
            positions[b, s] = length + s
    return mask, positions


def _view_of(
    see: Callable[[Tensor, Tensor, Tensor, int], Tensor] | None = None,
    place: Callable[[Tensor, Tensor, int], Tensor] | None = None,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A view with a mask `see(slots [t], step [s 1], lengths [b 1 1], padded)` or places of one's own."""

    def view(lengths: Tensor, padded: int, new: int) -> tuple[Tensor, Tensor]:
        mask, positions = _reference_view(lengths, padded, new)
        slots, step = torch.arange(padded + new), torch.arange(new)
        if see is not None:
            mask = see(slots, step[:, None], lengths[:, None, None], padded).expand(mask.shape)
        if place is not None:
            positions = place(lengths[:, None], step, padded).expand(positions.shape)
        return mask, positions

    return view


def _sees_padding(slots: Tensor, step: Tensor, lengths: Tensor, padded: int) -> Tensor:
    return slots <= padded + step


def _by_slot(lengths: Tensor, step: Tensor, padded: int) -> Tensor:
    return padded + step


def _lengths(*lengths: int, padded: int, new: int) -> Callable[[torch.Generator], tuple[Any, ...]]:
    return lambda random: (torch.tensor(lengths), padded, new)


batch_view = Exercise(
    name="batch_view",
    reference=_reference_view,
    cases=[
        Case("prompts of 3 and 5 tokens, 2 new ones", _lengths(3, 5, padded=5, new=2)),
        Case("prompts of 1, 6 and 4 tokens, padded to 8, 3 new ones", _lengths(1, 6, 4, padded=8, new=3)),
        Case("one row without padding, 4 new tokens", _lengths(7, padded=7, new=4)),
        Case("decode: one new token", _lengths(2, 9, padded=9, new=1)),
    ],
    mistakes=[
        Mistake(
            _view_of(_sees_padding, _by_slot),
            "this is still the bug: padding is treated as text. New tokens must not see it, and it does not count in their "
            "positions",
        ),
        Mistake(
            _view_of(None, _by_slot),
            "the mask is right; the positions still count the padding: the first new token of a row stands at position "
            "lengths[b], right after its prompt",
        ),
        Mistake(
            _view_of(_sees_padding, None),
            "the positions are right; the padding is still visible: of the first `padded` slots a row sees its own prompt only",
        ),
        Mistake(
            _view_of(lambda slots, step, lengths, padded: slots <= lengths + step, None),
            "slots and positions are mixed up: new tokens stand in the slots from `padded` on, not right behind the prompt",
        ),
        Mistake(
            _view_of(lambda slots, step, lengths, padded: slots < lengths, None),
            "the new tokens see the prompt only: each also sees itself, and the new tokens before it",
        ),
        Mistake(
            _view_of(lambda slots, step, lengths, padded: (slots < lengths) | (slots >= padded), None),
            "the new tokens see each other whatever their order: a token must not see those that come after it",
        ),
        Mistake(
            _view_of(
                lambda slots, step, lengths, padded: (slots < lengths) | ((slots >= padded) & (slots < padded + step)),
                None,
            ),
            "a new token does not see itself: up to its own slot, padded + s, included",
        ),
        Mistake(
            _view_of(
                lambda slots, step, lengths, padded: (
                    ~((slots < lengths) | ((slots >= padded) & (slots <= padded + step)))
                ),
                None,
            ),
            "the mask is the wrong way round: True means that the query may see the slot",
        ),
        Mistake(
            _view_of(lambda slots, step, lengths, padded: (slots >= padded) & (slots <= padded + step), None),
            "the prompts are gone: a row sees its own prompt, slots 0 to lengths[b] - 1, as well as the new tokens",
        ),
        Mistake(
            _view_of(None, lambda lengths, step, padded: lengths + step + 1),
            "all positions are one too high: a prompt of n tokens ends at position n - 1, and the next is n",
        ),
        Mistake(
            _view_of(None, lambda lengths, step, padded: lengths + 0 * step),
            "all new tokens of a row get the same position: they stand one after the other",
        ),
        Mistake(
            _view_of(None, lambda lengths, step, padded: step),
            "the new tokens count from 0: they go on where the row's own prompt ends",
        ),
    ],
)
