"""Lesson 01, shapes and einops: the checks. References use torch's own methods or plain loops, never einops."""

from __future__ import annotations

import torch
from einops import einsum, rearrange, reduce
from torch import Generator, Tensor

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property

# ---- split heads -----------------------------------------------------------------------------------------------------


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _projected(b: int, s: int, heads: int, width: int) -> Case:
    return Case(
        f"{heads} heads of width {width}",
        lambda g: (torch.randn(b, s, heads * width, generator=g), heads),
    )


split_heads = Exercise(
    name="split_heads",
    reference=_split_heads,
    cases=[_projected(2, 5, 3, 4), _projected(1, 4, 4, 4), _projected(3, 1, 2, 6), _projected(2, 6, 1, 5)],
    mistakes=[
        Mistake(
            lambda x, heads: rearrange(x, "b s (q h) -> b h s q", h=heads),
            "your parentheses say (q h): the letter on the right runs fastest, so each head gets every h-th number. A head's "
            "numbers are neighbours in the projection: (h q).",
        ),
        Mistake(
            lambda x, heads: x.reshape(x.shape[0], heads, x.shape[1], -1),
            "the shape is right and the numbers are not: reshape (and view) only moves the brackets, memory order stays, so "
            "your heads are runs of tokens. Split the last axis first, then swap it with the sequence.",
        ),
        Mistake(
            lambda x, heads: rearrange(x, "b s (h q) -> b s h q", h=heads),
            "the heads are split as they should be, and stand behind the sequence: let h come before s on the right.",
        ),
        Mistake(
            lambda x, heads: rearrange(x, "b s (h q) -> h b s q", h=heads),
            "your heads stand before the batch: the batch stays the first axis.",
        ),
        Mistake(
            lambda x, heads: rearrange(x, "b s (h q) -> b h q s", h=heads),
            "your last two axes are swapped: a head's vector for one token stays the last axis, q.",
        ),
    ],
    properties=[
        Property(
            "merging the heads again gives the input",
            lambda answer: bool(
                torch.equal(
                    answer(torch.arange(60.0).reshape(2, 5, 6), 3).transpose(1, 2).reshape(2, 5, 6),
                    torch.arange(60.0).reshape(2, 5, 6),
                )
            ),
            "splitting only moves numbers: none may change, come twice or get lost.",
        )
    ],
)


# ---- rank groups -----------------------------------------------------------------------------------------------------


def _group_ranks(preference: Tensor, n_group: int) -> Tensor:
    out = torch.empty(*preference.shape[:-1], n_group)
    size = preference.shape[-1] // n_group
    for group in range(n_group):
        best = preference[..., group * size : (group + 1) * size].sort(dim=-1).values
        out[..., group] = best[..., -1] + best[..., -2]
    return out


def _members(preference: Tensor, n_group: int) -> Tensor:
    return rearrange(preference, "b s (g m) -> b s g m", g=n_group)


def _preferences(b: int, s: int, n_group: int, size: int) -> Case:
    return Case(
        f"{n_group} groups of {size} experts",
        lambda g: (torch.randn(b, s, n_group * size, generator=g), n_group),
    )


group_ranks = Exercise(
    name="group_ranks",
    reference=_group_ranks,
    cases=[_preferences(1, 3, 2, 4), _preferences(2, 5, 4, 4), _preferences(2, 3, 5, 3), _preferences(1, 2, 1, 6)],
    mistakes=[
        Mistake(
            lambda p, n: reduce(p, "b s (g m) -> b s g", "sum", g=n),
            "you sum all experts of a group: a token will use only the best few, so a group is ranked by its two best.",
        ),
        Mistake(
            lambda p, n: reduce(p, "b s (g m) -> b s g", "max", g=n),
            "you rank a group by its best expert alone: it is the sum of its *two* best.",
        ),
        Mistake(
            lambda p, n: rearrange(p, "b s (m g) -> b s g m", g=n).topk(2, dim=-1).values.sum(-1),
            "your parentheses say (m g): that makes a group of every g-th expert. A group is a run of neighbours, those that "
            "live on one machine: (g m).",
        ),
        Mistake(
            lambda p, n: reduce(_members(p, n).topk(2, dim=-1).values, "b s g two -> b s g", "mean"),
            "you take the mean of the two best. It ranks groups alike, and is half of what the rank is: their sum.",
        ),
        Mistake(
            lambda p, n: _members(p, n).topk(2, dim=-1, largest=False).values.sum(-1),
            "you sum the two smallest of each group: topk takes the largest if you let it.",
        ),
        Mistake(
            lambda p, n: _members(p, n).topk(2, dim=-1).values,
            "you have the two best of each group; one step is missing, which makes one number of them: reduce with 'sum'.",
        ),
        Mistake(
            lambda p, n: _members(p, n).abs().topk(2, dim=-1).values.sum(-1),
            "you rank by size without the sign: a preference below zero (the bias makes them) is a low one.",
        ),
    ],
)


# ---- latent scores ---------------------------------------------------------------------------------------------------


def _latent_scores(query_latent: Tensor, query_rope: Tensor, latent: Tensor, key_rope: Tensor, scale: float) -> Tensor:
    content = query_latent.transpose(1, 2) @ latent[:, None].transpose(-1, -2)
    position = query_rope.transpose(1, 2) @ key_rope[:, None].transpose(-1, -2)
    return (content + position) * scale


def _queries_and_cache(b: int, s: int, t: int, h: int, c: int, r: int) -> Case:
    def inputs(g: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        shapes = ((b, s, h, c), (b, s, h, r), (b, t, c), (b, t, r))
        return (*(torch.randn(shape, generator=g) for shape in shapes), 0.3)

    return Case(f"{s} queries and {t} keys in {h} heads", inputs)


def _content(query_latent: Tensor, latent: Tensor) -> Tensor:
    return einsum(query_latent, latent, "b s h c, b t c -> b h s t")


latent_scores = Exercise(
    name="latent_scores",
    reference=_latent_scores,
    # As many keys as queries first: swapped axes then have the right shape, and only the numbers can tell.
    cases=[
        _queries_and_cache(2, 4, 4, 3, 6, 2),
        _queries_and_cache(1, 1, 7, 2, 5, 4),
        _queries_and_cache(3, 3, 5, 4, 4, 4),
    ],
    mistakes=[
        Mistake(
            lambda ql, qr, c, kr, scale: _latent_scores(ql, qr, c, kr, 1.0),
            "the scale is missing: without it the scores grow with the width, and softmax sees one key only.",
        ),
        Mistake(
            lambda ql, qr, c, kr, scale: _content(ql, c) + _content(qr, kr) * scale,
            "the scale reaches the rope part alone: the two parts are one dot product, cut in two, so scale their sum.",
        ),
        Mistake(
            lambda ql, qr, c, kr, scale: _content(ql, c) * scale + _content(qr, kr),
            "the scale reaches the latent part alone: the two parts are one dot product, cut in two, so scale their sum.",
        ),
        Mistake(
            lambda ql, qr, c, kr, scale: _latent_scores(ql, qr, c, kr, scale).transpose(-1, -2),
            "queries and keys are swapped: a row belongs to a query s, a column to a key t, so end in 's t'.",
        ),
        Mistake(
            lambda ql, qr, c, kr, scale: _content(ql, c) * scale,
            "the rope part is missing: these scores know what a key says and not where it stands.",
        ),
        Mistake(
            lambda ql, qr, c, kr, scale: _content(qr, kr) * scale,
            "the latent part is missing: these scores know where a key stands and not what it says.",
        ),
        Mistake(
            lambda ql, qr, c, kr, scale: _latent_scores(ql, qr, c, kr, scale).sum(1),
            "h stands in your inputs and not in your output: einsum then sums over the heads. Keep h on the right.",
        ),
        Mistake(
            lambda ql, qr, c, kr, scale: _latent_scores(ql, qr, c, kr, scale).transpose(1, 2),
            "the numbers are right, the axes stand in another order: heads come before queries, 'b h s t'.",
        ),
        Mistake(
            lambda ql, qr, c, kr, scale: _latent_scores(ql, qr, c, kr, scale).softmax(-1),
            "you went one step too far: these are already shares (each row sums to 1); the scores are what softmax is given.",
        ),
    ],
)


# ---- combine the experts ---------------------------------------------------------------------------------------------


def _combine(outputs: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    out = torch.zeros(outputs.shape[1:])
    for token in range(chosen.shape[0]):
        for expert, gate in zip(chosen[token].tolist(), gates[token].tolist(), strict=True):
            out[token] += gate * outputs[expert, token]
    return out


def _picked(outputs: Tensor, chosen: Tensor) -> Tensor:
    return outputs[chosen, torch.arange(chosen.shape[0])[:, None]]  # [T k d]


def _expert_outputs(experts: int, tokens: int, width: int, k: int) -> Case:
    def inputs(g: Generator) -> tuple[Tensor, Tensor, Tensor]:
        preference = torch.rand(tokens, experts, generator=g)
        gates = torch.rand(tokens, k, generator=g) + 0.1
        gates = 2.5 * gates / gates.sum(-1, keepdim=True)
        return torch.randn(experts, tokens, width, generator=g), preference.topk(k).indices, gates

    return Case(f"{tokens} tokens that visit {k} of {experts} experts", inputs)


combine = Exercise(
    name="combine",
    reference=_combine,
    cases=[_expert_outputs(4, 3, 5, 2), _expert_outputs(6, 6, 4, 3), _expert_outputs(8, 5, 2, 4)],
    mistakes=[
        Mistake(
            lambda y, chosen, gates: _picked(y, chosen).sum(1),
            "the gate values are missing: every chosen expert counts the same in your sum.",
        ),
        Mistake(
            lambda y, chosen, gates: _combine(y, chosen, gates / gates.sum(-1, keepdim=True)),
            "you divide the gate values by their sum: the router has normalised them already, and scaled them by 2.5 after. "
            "Use them as they come.",
        ),
        Mistake(
            lambda y, chosen, gates: _combine(y, torch.arange(gates.shape[1]).expand_as(chosen), gates),
            "you weigh experts 0 to k-1: slot j of a token belongs to expert chosen[token, j], not to expert j.",
        ),
        Mistake(
            lambda y, chosen, gates: _combine(y, chosen, gates) / chosen.shape[1],
            "you take a mean over the chosen experts: it is a weighted *sum*, the weights are in the gates.",
        ),
        Mistake(
            lambda y, chosen, gates: _combine(y, chosen.sort(dim=-1).values, gates),
            "your experts are sorted by number and the gates are still sorted best first: a gate belongs to the expert in "
            "its own slot.",
        ),
        Mistake(
            lambda y, chosen, gates: reduce(y, "e T d -> T d", "sum"),
            "you sum over all experts, chosen or not: the ones that a token does not visit have weight zero.",
        ),
        Mistake(
            lambda y, chosen, gates: _picked(y, chosen) * gates[..., None],
            "each chosen output is weighed as it should be; one step is missing: the sum over k.",
        ),
    ],
)


# ---- the bug ---------------------------------------------------------------------------------------------------------


def _keys_and_values(key_value: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    width = key_value.shape[-1] // heads
    each = [key_value[..., head * width : (head + 1) * width] for head in range(heads)]
    return torch.stack([x[..., :nope] for x in each], dim=2), torch.stack([x[..., nope:] for x in each], dim=2)


def _by_halves(key_value: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    key, value = key_value.split([heads * nope, key_value.shape[-1] - heads * nope], dim=-1)
    return rearrange(key, "b t (h n) -> b t h n", h=heads), rearrange(value, "b t (h v) -> b t h v", h=heads)


def _fastest_heads(key_value: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    per_head = rearrange(key_value, "b t (nv h) -> b t h nv", h=heads)
    return per_head[..., :nope], per_head[..., nope:]


def _projected_latents(heads: int, nope: int, value: int) -> Case:
    return Case(
        f"{heads} heads, keys {nope} wide and values {value}",
        lambda g: (torch.randn(2, 5, heads * (nope + value), generator=g), heads, nope),
    )


keys_and_values = Exercise(
    name="keys_and_values",
    reference=_keys_and_values,
    # Unequal widths first: with equal ones "value first" and "swapped" give the same numbers, and have different reasons.
    cases=[_projected_latents(2, 2, 5), _projected_latents(3, 4, 4), _projected_latents(4, 6, 3)],
    mistakes=[
        Mistake(
            _by_halves,
            "this is the bug itself: the first half of the numbers is taken for the keys of all heads. In the projection each "
            "head's key stands beside its own value: split into heads first, and each head into key and value after.",
        ),
        Mistake(
            lambda kv, heads, nope: _keys_and_values(kv, heads, nope)[::-1],
            "the right two tensors in the wrong order: the keys come first.",
        ),
        Mistake(
            lambda kv, heads, nope: (
                _keys_and_values(kv, heads, kv.shape[-1] // heads - nope)[1],
                _keys_and_values(kv, heads, kv.shape[-1] // heads - nope)[0],
            ),
            "within a head you take the value first: its first `nope` numbers are the key, the rest is the value.",
        ),
        Mistake(
            _fastest_heads,
            "your parentheses let the heads run fastest: a head's numbers are neighbours, so h stands on the left in (h nv).",
        ),
    ],
)
