"""Checks of lesson 16: re-tiling, three products in FP8, SwiGLU a second time, bytes kept, and weights that add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property

Inputs = Callable[[torch.Generator], tuple[Any, ...]]

LARGEST = 448.0  # of E4M3


def _round(x: Tensor) -> Tensor:
    """To E4M3, by torch's cast; what is too large becomes the largest."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()


# ---- retile_for_wgrad --------------------------------------------------------------------------------------------------


def _tiled_inputs(tokens: int, channels: int, w: int, powers: bool = False, spread: float = 1.5) -> Inputs:
    """Codes in 1 x w tiles, of tokens that are loud and quiet."""

    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        x = torch.randn(tokens, channels, generator=random)
        x = x * torch.exp(spread * torch.randn(tokens, 1, generator=random))
        amax = reduce(x.abs(), "T (j w) -> T j", "max", w=w)
        scale = amax / LARGEST
        if powers:
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        return _round(x / repeat(scale, "T j -> T (j w)", w=w)), scale, w

    return inputs


def _power_up(value: float) -> float:
    """The smallest power of two that is not below."""
    mantissa, exponent = math.frexp(value)  # mantissa in [1/2, 1)
    return math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)


def _reference_retile(q: Tensor, scale: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """One tile of w tokens at a time, its scale in Python's own numbers."""
    tokens, channels = q.shape
    values = torch.stack([q[:, c] * scale[:, c // w] for c in range(channels)], dim=1)
    codes, scales = torch.empty_like(q), torch.empty(tokens // w, channels)
    for n in range(tokens // w):
        for c in range(channels):
            tile = values[n * w : (n + 1) * w, c]
            scales[n, c] = _power_up(tile.abs().max().item() / LARGEST)
            codes[n * w : (n + 1) * w, c] = _round(tile / scales[n, c])
    return codes, scales


def _values(q: Tensor, scale: Tensor, w: int) -> Tensor:
    return q * repeat(scale, "T j -> T (j w)", w=w)


def _up(scale: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())


def _retiled(
    new_scale: Callable[[Tensor], Tensor] = lambda amax: _up(amax / LARGEST),
    measure: Callable[[Tensor, Tensor, int], Tensor] = _values,
    rounding: Callable[[Tensor], Tensor] = _round,
    shown: Callable[[Tensor], Tensor] = lambda scale: scale,
    cut: str = "(n w) i",
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The right answer with one part of one's own."""

    def answer(q: Tensor, scale: Tensor, w: int) -> tuple[Tensor, Tensor]:
        values = measure(q, scale, w)
        new = new_scale(reduce(values.abs(), f"{cut} -> n i", "max", w=w))
        return rounding(values / repeat(new, f"n i -> {cut}", w=w)), shown(new)

    return answer


def _along_the_row(q: Tensor, scale: Tensor, w: int) -> tuple[Tensor, Tensor]:
    values = _values(q, scale, w)
    new = _up(reduce(values.abs(), "T (j w) -> T j", "max", w=w) / LARGEST)
    return _round(values / repeat(new, "T j -> T (j w)", w=w)), new


def _mean_scale(q: Tensor, scale: Tensor, w: int) -> tuple[Tensor, Tensor]:
    by_number = repeat(scale, "T j -> T (j w)", w=w)
    return q, reduce(by_number, "(n w) i -> n i", "mean", w=w)


def _largest_old_scale(q: Tensor, scale: Tensor, w: int) -> tuple[Tensor, Tensor]:
    by_number = repeat(scale, "T j -> T (j w)", w=w)
    return q, reduce(by_number, "(n w) i -> n i", "max", w=w)


def _nothing_is_lost_but_what_is_small(answer: Callable[..., Any]) -> bool:
    """With powers of two on both sides, whatever is not subnormal in its new tile comes back to the bit."""
    q, scale, w = _tiled_inputs(32, 16, 8, powers=True, spread=1.0)(torch.Generator().manual_seed(5))
    codes, new = answer(q, scale, w)
    before, after = _values(q, scale, w), codes * repeat(new, "n i -> (n w) i", w=w)
    normal = before.abs() >= repeat(new, "n i -> (n w) i", w=w) * 2.0**-6
    return bool(normal.float().mean() > 0.9) and torch.equal(before[normal], after[normal])


retile_for_wgrad = Exercise(
    name="retile_for_wgrad",
    reference=_reference_retile,
    cases=[
        Case("4 tokens of 6 channels, tiles of 2", _tiled_inputs(4, 6, 2)),
        Case("24 tokens of 16 channels, tiles of 8", _tiled_inputs(24, 16, 8)),
        Case("scales that are powers of two already", _tiled_inputs(16, 8, 4, powers=True)),
    ],
    mistakes=[
        Mistake(
            _retiled(new_scale=lambda amax: amax / LARGEST),
            "the new scales are no powers of two: round them up (power_of_two_at_least), or every number is rounded a second "
            "time",
        ),
        Mistake(
            _retiled(new_scale=lambda amax: _up(amax / LARGEST) / 2),
            "the new scales are rounded *down*: the largest number of a tile then lies beyond 448 and is cut off",
        ),
        Mistake(
            _retiled(new_scale=_up),
            "448 is missing: the scale brings the largest number of a tile to 448 or less, not to 1",
        ),
        Mistake(
            _retiled(measure=lambda q, scale, w: q),
            "you look at the codes alone: tokens have scales of their own, so multiply them in before you compare tokens",
        ),
        Mistake(
            _retiled(measure=lambda q, scale, w: q / repeat(scale, "T j -> T (j w)", w=w)),
            "you divide by the old scales: a value is its code *times* its scale",
        ),
        Mistake(
            _retiled(measure=lambda q, scale, w: q * repeat(scale, "T j -> T (w j)", w=w)),
            "the old scales go to the wrong numbers: number c of a row belongs to tile c // w, so repeat them as (j w)",
        ),
        Mistake(
            _along_the_row,
            "your new tiles lie along the row again, w channels of one token: Wgrad sums over tokens, so a tile is w tokens "
            "of one channel",
        ),
        Mistake(
            _mean_scale,
            "the codes stay and the scales are averaged: a code means another value then. Go back to the values and round "
            "anew",
        ),
        Mistake(
            _largest_old_scale,
            "the codes stay and get their tile's largest scale: those of quieter tokens then mean too much. Go back to the "
            "values and round anew",
        ),
        Mistake(
            _retiled(rounding=lambda x: x),
            "the new codes are not rounded: what is kept and multiplied are numbers of E4M3, round_to(..., E4M3)",
        ),
        Mistake(
            _retiled(rounding=lambda x: x.round()),
            "you round to whole numbers: E4M3 has its own grid, finer near zero and coarser far from it. round_to(..., E4M3)",
        ),
        Mistake(
            _retiled(shown=lambda scale: 1 / scale),
            "the new scales are turned round: they multiply, value = code * scale",
        ),
        Mistake(
            _retiled(cut="(w n) i"),
            "a tile is made of every n-th token: it is w *neighbours*, so split the rows as (n w)",
        ),
    ],
    properties=[
        Property(
            "where all scales are powers of two, only what is small beside its new tile changes",
            _nothing_is_lost_but_what_is_small,
            "a change from one power of two to another moves the exponent and leaves the mantissa alone: somewhere your "
            "numbers are rounded again",
        )
    ],
)


# ---- three_products ----------------------------------------------------------------------------------------------------

TILE = 128


def _layer_inputs(tokens: int, inputs: int, outputs: int) -> Inputs:
    """Loud tokens, loud channels: whoever shares a scale with them shows it."""

    def make(random: torch.Generator) -> tuple[Any, ...]:
        x, g = torch.randn(tokens, inputs, generator=random), torch.randn(tokens, outputs, generator=random)
        for rows in (x, g):
            rows *= torch.exp(2 * torch.randn(tokens, 1, generator=random))
            rows *= torch.exp(torch.randn(1, rows.shape[1], generator=random))
        return x, torch.randn(outputs, inputs, generator=random) * inputs**-0.5, g

    return make


def _fake(x: Tensor, tile: tuple[int, int], power_of_two: bool = False) -> Tensor:
    """x as E4M3 keeps it, tile by tile. Ragged edges are filled with zeros, which are never a tile's largest."""
    rows, columns = x.shape
    p, q = min(tile[0], rows), min(tile[1], columns)
    parts = rearrange(F.pad(x, (0, -columns % q, 0, -rows % p)), "(a p) (b q) -> a p b q", p=p, q=q)
    scale = reduce(parts.abs(), "a p b q -> a 1 b 1", "max") / LARGEST
    scale = _up(scale) if power_of_two else scale
    return rearrange(_round(parts / scale) * scale, "a p b q -> (a p) (b q)")[:rows, :columns]


ROW, COLUMN, BLOCK, WHOLE = (1, TILE), (TILE, 1), (TILE, TILE), (2**20, 2**20)


def _products(
    rows: tuple[int, int] = ROW,
    block: tuple[int, int] = BLOCK,
    gradient: Callable[[Tensor], Tensor] = lambda g: _fake(g, ROW),
    gradient_columns: Callable[[Tensor], Tensor] = lambda g: _fake(g, COLUMN),
    columns: Callable[[Tensor, Tensor], Tensor] = lambda x, kept: _fake(kept, COLUMN, power_of_two=True),
    turned: bool = False,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The three results, with one operand quantised in a way of one's own. `columns` is given x and what was kept of it."""

    def answer(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept, weight = _fake(x, rows), _fake(w, block)
        y, dx = kept.double() @ weight.double().T, gradient(g).double() @ weight.double()
        dw = gradient_columns(g).double().T @ columns(x, kept).double()
        return y.float(), dx.float(), (dw.T if turned else dw).float()

    return answer


three_products = Exercise(
    name="three_products",
    reference=_products(),
    cases=[
        Case("128 tokens, 128 inputs, 128 outputs", _layer_inputs(128, 128, 128)),
        Case("256 tokens, 384 inputs, 128 outputs", _layer_inputs(256, 384, 128)),
        Case("ragged: 150 tokens, 200 inputs, 140 outputs", _layer_inputs(150, 200, 140)),
    ],
    mistakes=[
        Mistake(
            _products(columns=lambda x, kept: kept),
            "dw uses the x of Fprop in its old tiles, 128 inputs of a token: `exact` multiplies that all the same, but a "
            "tensor core sums over tokens, whose scales differ. Re-tile it: retile(kept_x, (128, 1))",
        ),
        Mistake(
            _products(columns=lambda x, kept: _fake(x, COLUMN)),
            "dw reads x itself, which is to be kept in 8 bits only: by the time of the backward pass there is kept_x and "
            "nothing else. retile(kept_x, (128, 1))",
        ),
        Mistake(
            _products(columns=lambda x, kept: _fake(x, COLUMN, power_of_two=True)),
            "dw reads x itself, if with power-of-two scales: by the time of the backward pass there is kept_x and nothing "
            "else. retile(kept_x, (128, 1))",
        ),
        Mistake(
            _products(columns=lambda x, kept: _fake(kept, COLUMN)),
            "kept_x is re-tiled under scales that are no powers of two, and so rounded once more than need be: leave retile "
            "its power_of_two=True",
        ),
        Mistake(
            _products(gradient_columns=lambda g: _fake(g, ROW)),
            "dw uses g in the tiles of Dgrad, 128 outputs of a token: it sums over tokens, so it needs g in tiles of 128 "
            "tokens, (128, 1)",
        ),
        Mistake(
            _products(gradient_columns=lambda g: _fake(_fake(g, ROW), COLUMN, power_of_two=True)),
            "g is rounded twice for dw: it is still there in full, so quantise it from there, in tiles of (128, 1)",
        ),
        Mistake(
            _products(gradient=lambda g: _fake(g, COLUMN)),
            "dx uses g in tiles of 128 tokens: Dgrad sums over the outputs, so a scale is shared by 128 outputs of one "
            "token, (1, 128)",
        ),
        Mistake(
            _products(gradient=lambda g: _fake(g, BLOCK)),
            "dx uses g in square blocks: a loud token then takes the range from 127 others. This is the block-wise variant "
            "that diverged in the report; use (1, 128)",
        ),
        Mistake(
            _products(gradient=lambda g: g),
            "g is not quantised for dx: all three products multiply 8-bit numbers",
        ),
        Mistake(
            _products(gradient=lambda g: g, gradient_columns=lambda g: g),
            "g is not quantised at all: all three products multiply 8-bit numbers",
        ),
        Mistake(
            _products(gradient=lambda g: _fake(g, WHOLE), gradient_columns=lambda g: _fake(g, WHOLE)),
            "g has one scale for the whole matrix: 128 numbers share one, (1, 128) for dx and (128, 1) for dw",
        ),
        Mistake(
            _products(turned=True),
            "dw comes out turned over: it has the shape of w, [o i], so g's columns stand on the left",
        ),
    ],
)


# ---- swiglu_again ------------------------------------------------------------------------------------------------------


def _swiglu_inputs(tokens: int, inner: int, w: int) -> Inputs:
    """Codes of gate and up side by side, [T 2f], and a gradient for what SwiGLU wrote, [T f]."""

    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        q, scale, _ = _tiled_inputs(tokens, 2 * inner, w, spread=0.4)(random)
        return q, scale, w, torch.randn(tokens, inner, generator=random)

    return inputs


def _reference_again(q: Tensor, scale: Tensor, w: int, dh: Tensor) -> tuple[Tensor, Tensor]:
    """torch's own silu and its derivative, in FP64."""
    values = torch.stack([q[:, c].double() * scale[:, c // w].double() for c in range(q.shape[1])], dim=1)
    values.requires_grad_()
    gate, up = values.chunk(2, dim=-1)
    hidden = F.silu(gate) * up
    (gradient,) = torch.autograd.grad(hidden, values, dh.double())
    return hidden.detach().float(), gradient.float()


def _again(
    hidden: Callable[[Tensor, Tensor], Tensor] = lambda gate, up: F.silu(gate) * up,
    d_gate: Callable[[Tensor, Tensor], Tensor] = lambda gate, up: (
        up * gate.sigmoid() * (1 + gate * (1 - gate.sigmoid()))
    ),
    d_up: Callable[[Tensor, Tensor], Tensor] = lambda gate, up: F.silu(gate),
    measure: Callable[[Tensor, Tensor, int], Tensor] = _values,
    up_first: bool = False,
    turned: bool = False,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The right answer with one part of one's own; d_gate and d_up are what dh is multiplied with."""

    def answer(q: Tensor, scale: Tensor, w: int, dh: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = measure(q, scale, w).chunk(2, dim=-1)[:: -1 if up_first else 1]
        halves = [dh * d_gate(gate, up), dh * d_up(gate, up)]
        return hidden(gate, up), torch.cat(halves[:: -1 if up_first != turned else 1], dim=-1)

    return answer


swiglu_again = Exercise(
    name="swiglu_again",
    reference=_reference_again,
    cases=[
        Case("2 tokens, gate and up of 4, tiles of 4", _swiglu_inputs(2, 4, 4)),
        Case("12 tokens, gate and up of 16, tiles of 8", _swiglu_inputs(12, 16, 8)),
    ],
    mistakes=[
        Mistake(
            _again(d_gate=lambda gate, up: up * gate.sigmoid() * (1 - gate.sigmoid())),
            "gate's half has the derivative of the *sigmoid*: silu(gate) = gate * sigmoid(gate) is a product, and its "
            "derivative has two terms",
        ),
        Mistake(
            _again(d_gate=lambda gate, up: up * gate.sigmoid()),
            "gate's half treats the sigmoid as a constant: it moves with gate, which gives a second term, "
            "gate * sigmoid * (1 - sigmoid)",
        ),
        Mistake(
            _again(d_gate=lambda gate, up: gate.sigmoid() * (1 + gate * (1 - gate.sigmoid()))),
            "gate's half is not multiplied by up: hidden = silu(gate) * up",
        ),
        Mistake(
            _again(d_gate=lambda gate, up: up),
            "gate's half leaves silu's derivative out: dh * up * silu'(gate)",
        ),
        Mistake(
            _again(d_up=lambda gate, up: torch.ones_like(gate)),
            "up's half is dh alone: hidden = silu(gate) * up, so it is multiplied by silu(gate)",
        ),
        Mistake(
            _again(d_up=lambda gate, up: gate),
            "up's half is multiplied by gate: by silu(gate) it should be",
        ),
        Mistake(
            _again(up_first=True),
            "gate and up are exchanged: the first half of the columns is the gate, the one that goes through silu",
        ),
        Mistake(
            _again(turned=True),
            "the two halves of the gradient are exchanged: gate's comes first, as in the columns",
        ),
        Mistake(
            _again(hidden=lambda gate, up: gate * up),
            "hidden has no silu: it is silu(gate) * up",
        ),
        Mistake(
            _again(measure=lambda q, scale, w: q),
            "you compute with the codes: go back to values first, each code times the scale of its tile",
        ),
        Mistake(
            _again(measure=lambda q, scale, w: q * repeat(scale, "T j -> T (w j)", w=w)),
            "the scales go to the wrong numbers: number c of a row belongs to tile c // w, so repeat them as (j w)",
        ),
    ],
)


# ---- kept_bytes --------------------------------------------------------------------------------------------------------


def _two_layers(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return (x @ weights[0]).relu() @ weights[1]


def _squared(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    hidden = x @ weights[0]
    return (hidden * hidden).sum()


def _half_of_it(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Of what the first product makes, the second one reads a part."""
    return (x @ weights[0])[:, :2] @ weights[1][:2]


def _glu(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    gate, up = (x @ weights[0]).chunk(2, dim=-1)
    return (torch.sigmoid(gate) * up) @ weights[1][: gate.shape[-1]]


def _kept_inputs(forward: Callable[..., Tensor], rows: int, width: int, inner: int, dtype: torch.dtype) -> Inputs:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        shapes = ((rows, width), (width, inner), (inner, width))
        x, *weights = (torch.randn(*shape, generator=random).to(dtype).requires_grad_() for shape in shapes)
        return forward, x, weights

    return inputs


def _walk(result: Tensor) -> list[Tensor]:
    """Every tensor that the nodes of a graph have saved, read off their attributes; twice where two of them have it."""
    found, nodes, seen = [], [result.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for name in dir(node):
            if name.startswith("_saved_") and isinstance(tensor := getattr(node, name), Tensor):
                found.append(tensor)
        nodes += [before for before, _ in node.next_functions]
    return found


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _reference_kept(forward: Callable[..., Tensor], x: Tensor, weights: Sequence[Tensor]) -> int:
    result = forward(x, weights)
    own = {_place(weight) for weight in weights}
    storages = {_place(tensor): tensor.untyped_storage().nbytes() for tensor in _walk(result)}
    return sum(size for place, size in storages.items() if place not in own)


def _counted(
    size: Callable[[Tensor], int] = lambda tensor: tensor.untyped_storage().nbytes(),
    once: bool = True,
    parameters: bool = False,
    input_too: bool = True,
) -> Callable[..., int]:
    """A count with an opinion of its own on what counts, and how much."""

    def answer(forward: Callable[..., Tensor], x: Tensor, weights: Sequence[Tensor]) -> int:
        result = forward(x, weights)
        own = set() if parameters else {_place(weight) for weight in weights}
        own |= set() if input_too else {_place(x)}
        saved = [tensor for tensor in _walk(result) if _place(tensor) not in own]
        if once:
            saved = list({_place(tensor): tensor for tensor in saved}.values())
        return sum(size(tensor) for tensor in saved)

    return answer


kept_bytes = Exercise(
    name="kept_bytes",
    reference=_reference_kept,
    cases=[
        Case("two layers with a ReLU between", _kept_inputs(_two_layers, 4, 3, 5, torch.float32)),
        Case("a square, which saves one tensor twice", _kept_inputs(_squared, 4, 3, 5, torch.float32)),
        Case("a layer of which half is read on", _kept_inputs(_half_of_it, 6, 3, 4, torch.float32)),
        Case("a gated layer in BF16", _kept_inputs(_glu, 5, 4, 6, torch.bfloat16)),
    ],
    mistakes=[
        Mistake(
            _counted(once=False),
            "a tensor that two operations save is counted twice: it lies in memory once. Remember where each storage begins "
            "(untyped_storage().data_ptr())",
        ),
        Mistake(
            _counted(parameters=True),
            "the weights are counted: they are in memory whether there is a backward pass or not",
        ),
        Mistake(
            _counted(parameters=True, once=False),
            "the weights are counted, and what is saved twice is counted twice: leave the weights out, and count every "
            "storage once",
        ),
        Mistake(
            _counted(size=lambda tensor: tensor.untyped_storage().nbytes() // tensor.element_size()),
            "you count numbers: a number in FP32 is four bytes, in BF16 two, in FP8 one",
        ),
        Mistake(
            _counted(size=lambda tensor: tensor.nbytes),
            "a view is counted by its own size: as long as it lives, all of the storage it looks into lives "
            "(untyped_storage().nbytes())",
        ),
        Mistake(
            _counted(size=lambda tensor: 4 * tensor.untyped_storage().nbytes() // tensor.element_size()),
            "every number counts four bytes here: BF16 has two and FP8 one. untyped_storage().nbytes() knows",
        ),
        Mistake(
            _counted(input_too=False),
            "x is left out: it is no weight, and the first layer's gradient needs it, so that it is kept",
        ),
    ],
)


# ---- weights_to_multiply (find the bug) --------------------------------------------------------------------------------


def _on_a_grid(x: Tensor) -> Tensor:
    """Whole multiples of 2^-16, of which FP32 holds every sum exactly: in whichever order somebody adds them."""
    return torch.round(x * 2.0**16) * 2.0**-16


def _update_inputs(rows: int, columns: int, steps: int, size: float) -> Inputs:
    """Updates as Adam makes them: all about as large, and each weight is always pulled to its own side."""

    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        weight, side = (torch.randn(rows, columns, generator=random) for _ in range(2))
        updates = [size * side.sign() * (1 + 0.3 * torch.rand(rows, columns, generator=random)) for _ in range(steps)]
        return _on_a_grid(weight), [_on_a_grid(update) for update in updates]

    return inputs


def _growing_inputs(random: torch.Generator) -> tuple[Any, ...]:
    """One weight outgrows all others, and with them the scale of the first step."""
    weight, update = _on_a_grid(torch.randn(64, 64, generator=random)), torch.randn(64, 64, generator=random)
    update = _on_a_grid(0.01 * update)
    update[5, 7] = -2.0
    return weight, [update.clone() for _ in range(4)]


def _reference_weights(weight: Tensor, updates: Sequence[Tensor]) -> list[Tensor]:
    """Every step anew from the first weights."""
    return [_fake(master, BLOCK) for master in _masters(weight, updates)]


def _with_masters(
    keep: Callable[[Tensor], Tensor] = lambda master: master,
    read: Callable[[Tensor], Tensor] = lambda master: _fake(master, BLOCK),
    sign: float = -1.0,
    late: bool = False,
) -> Callable[..., list[Tensor]]:
    """Steps in which the master is kept, and read, in ways of one's own."""

    def answer(weight: Tensor, updates: Sequence[Tensor]) -> list[Tensor]:
        master, seen = keep(weight), []
        for update in updates:
            before, master = master, keep(master + sign * update)
            seen.append(read(before if late else master))
        return seen

    return answer


def _first_scale(weight: Tensor, updates: Sequence[Tensor]) -> list[Tensor]:
    """The scales of the step before the first update, for all steps. For matrices of one block."""
    if max(weight.shape) > TILE:
        raise ValueError("more than one block")
    scale = weight.abs().max() / LARGEST
    return [_round(master / scale) * scale for master in _masters(weight, updates)]


def _masters(weight: Tensor, updates: Sequence[Tensor]) -> list[Tensor]:
    return [weight - torch.stack(list(updates[: n + 1])).sum(0) for n in range(len(updates))]


def _in_bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


weights_to_multiply = Exercise(
    name="weights_to_multiply",
    reference=_reference_weights,
    cases=[
        Case("40 small updates", _update_inputs(128, 64, 40, 0.003)),
        Case("several blocks, ragged", _update_inputs(150, 200, 3, 0.02)),
        Case("a weight that outgrows the others", _growing_inputs),
    ],
    mistakes=[
        Mistake(
            _with_masters(keep=lambda master: _fake(master, BLOCK)),
            "this is still the bug: what is carried from step to step are 8-bit numbers, and an update smaller than half a "
            "step of their grid leaves no trace. Carry the weights in FP32, and quantise a copy for each step",
        ),
        Mistake(
            _with_masters(keep=_in_bf16),
            "the masters are BF16: neighbours lie a 128th to a 256th of the weight apart, and an update of less than half of "
            "that leaves no trace. The report keeps masters in FP32",
        ),
        Mistake(
            _with_masters(read=lambda master: master),
            "what the products read is not quantised: they multiply 8-bit numbers, made anew from the masters in each step",
        ),
        Mistake(
            _with_masters(late=True),
            "the products read the weights from before the update: quantise after the master has moved",
        ),
        Mistake(
            _with_masters(sign=1.0),
            "the updates are added: weights move by minus the update",
        ),
        Mistake(
            _first_scale,
            "the scales are those of the first weights, for good: a weight that outgrows them is cut off at 448. Measure the "
            "largest number anew in each step",
        ),
        Mistake(
            _with_masters(read=lambda master: _fake(master, WHOLE)),
            "one scale for the whole matrix: weights have one for each block of 128 x 128",
        ),
        Mistake(
            _with_masters(read=lambda master: _fake(master, ROW)),
            "weights in tiles of 1 x 128: they are quantised in blocks of 128 x 128, which serve Fprop and Dgrad alike",
        ),
    ],
)
