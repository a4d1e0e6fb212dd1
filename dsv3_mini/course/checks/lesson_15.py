"""Checks of lesson 15: rounding to E4M3, a scale per tile, partial sums with their scales, a short sum, scales that round up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import einsum, rearrange, reduce, repeat
from torch import Generator, Tensor

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property

LARGEST = 448.0
E4M3 = torch.float8_e4m3fn


def power_of_two(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones(exponent.shape), exponent)


# ---- round_to_e4m3 -----------------------------------------------------------------------------------------------------


def _between(low: float, high: float, *shape: int) -> Callable[[Generator], tuple[Any, ...]]:
    """Numbers of both signs whose sizes are spread evenly over the powers of two from `low` to `high`."""

    def inputs(random: Generator) -> tuple[Any, ...]:
        exponent = math.log2(low) + (math.log2(high) - math.log2(low)) * torch.rand(*shape, generator=random)
        return (torch.where(torch.rand(*shape, generator=random) < 0.5, -1.0, 1.0) * torch.exp2(exponent),)

    return inputs


def _half_way(_: Generator) -> tuple[Any, ...]:
    """Exactly between two neighbours, both signs, in two powers of two."""
    middles = torch.tensor([8.5, 9.5, 10.5, 11.5, 12.5, 13.5, 14.5, 15.5])
    return (torch.stack([middles / 8, -middles / 8, middles / 2, -middles / 2]),)


def _tiny_numbers(random: Generator) -> tuple[Any, ...]:
    """Below 2^-6, down to what is nearer to zero than to 2^-9, with a zero and half-way cases."""
    grid = 2.0**-9 * torch.tensor([0.0, 0.25, 0.5, 1.5, 2.5, -0.5, -1.5, -6.5, 7.9, 8.1])
    return (torch.cat([grid, 2.0**-6 * (2 * torch.rand(20, generator=random) - 1)]),)


def _too_large(_: Generator) -> tuple[Any, ...]:
    return (torch.tensor([[440.0, 448.0, 449.0, 463.0], [465.0, 500.0, 1e4, 3e5], [-447.0, -470.0, -1e6, -512.0]]),)


def _reference_rounded(x: Tensor) -> Tensor:
    """torch's own cast; the clamp in front says that what is too large becomes the largest."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3).float()


def _away_from_zero(z: Tensor) -> Tensor:
    return z.sign() * (z.abs() + 0.5).floor()


def _rounded(
    rounding: Callable[[Tensor], Tensor] = torch.round,
    lowest: int | None = -6,
    mantissa: int = 3,
    shift: int = 0,
    after: Callable[[Tensor], Tensor] = lambda r: r.clamp(-LARGEST, LARGEST),
) -> Callable[[Tensor], Tensor]:
    """The right steps, one of them done another way."""

    def answer(x: Tensor) -> Tensor:
        exponent = torch.frexp(x).exponent - 1 + shift
        exponent = exponent if lowest is None else exponent.clamp(min=lowest)
        step = power_of_two(exponent - mantissa)
        return after(rounding(x / step) * step)

    return answer


def _flushed(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 2.0**-6, 0.0, _reference_rounded(x))


def _all_finite_numbers() -> Tensor:
    """The definition, written as two grids: 8 numbers in the lowest power of two, and 8 in every one from 2^-6 to 2^8."""
    numbers = [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 3) for e in range(-6, 9) for m in range(8)]
    numbers = [number for number in numbers if number <= LARGEST]
    return torch.tensor(numbers + [-number for number in numbers])


round_to_e4m3 = Exercise(
    name="round_to_e4m3",
    reference=_reference_rounded,
    cases=[
        Case("numbers from 1 to 16", _between(1, 16, 4, 8)),
        Case("numbers half-way between two", _half_way),
        Case("numbers below 2^-6", _tiny_numbers),
        Case("numbers from 16 to 448", _between(16, 448, 40)),
        Case("numbers beyond 448", _too_large),
    ],
    mistakes=[
        Mistake(
            _rounded(shift=1),
            "your steps are twice too wide, as if two bits of mantissa were left: torch.frexp gives a mantissa between 1/2 and "
            "1, so its exponent is one more than that of the power of two below x",
        ),
        Mistake(
            _rounded(lowest=-7),
            "your lowest exponent is -7, the bias: an exponent field of 0 means 1 - 7, the same as a field of 1, only without "
            "the leading one",
        ),
        Mistake(
            _rounded(mantissa=4),
            "your steps are twice too fine: three bits of mantissa are 8 steps from one power of two to the next, so a step is "
            "2^(exponent - 3)",
        ),
        Mistake(
            _rounded(_away_from_zero),
            "half-way cases go away from zero: they go to the neighbour whose last bit is 0 (an even number of steps), or sums "
            "of many rounded numbers drift. torch.round does that",
        ),
        Mistake(
            _rounded(lambda z: (z + 0.5).floor()),
            "half-way cases go up: they go to the neighbour whose last bit is 0 (an even number of steps). torch.round does "
            "that",
        ),
        Mistake(
            _rounded(torch.trunc),
            "you cut towards zero: the nearest number is wanted, which may be the one above",
        ),
        Mistake(
            _rounded(torch.floor),
            "you always go down: the nearest number is wanted, which may be the one above",
        ),
        Mistake(
            lambda x: _reference_rounded(x).abs(),
            "the sign is lost: the grid is the same on both sides of zero, and a number stays on its side",
        ),
        Mistake(
            _flushed,
            "everything below 2^-6 becomes zero: there are 7 numbers left between zero and 2^-6, the subnormal ones, a step of "
            "2^-9 apart",
        ),
        Mistake(
            _rounded(lowest=None),
            "below 2^-6 your steps go on getting finer: the exponent is at its lowest there, so the steps stay at 2^-9 down "
            "to zero. Clamp the exponent at -6",
        ),
        Mistake(
            _rounded(after=lambda r: r),
            "numbers beyond 448 go on: E4M3 has none there. What is too large becomes 448",
        ),
        Mistake(
            _rounded(after=lambda r: r.clamp(-480, 480)),
            "your largest number is 480: that code, all ones, is NaN in E4M3, so 448 is the last",
        ),
        Mistake(
            _rounded(after=lambda r: r.clamp(-240, 240)),
            "your largest number is 240, as if the top exponent were kept for infinity: E4M3 gives it to numbers, up to 448",
        ),
        Mistake(
            _rounded(after=lambda r: torch.where(r.abs() > LARGEST, torch.nan, r)),
            "what is too large becomes NaN: then one number ruins a whole product. Let it become 448",
        ),
        Mistake(
            _rounded(after=lambda r: torch.where(r.abs() > LARGEST, r.sign() * torch.inf, r)),
            "what is too large becomes infinity, which E4M3 does not have: let it become 448",
        ),
    ],
    properties=[
        Property(
            "each of the 253 numbers that E4M3 has stays as it is",
            lambda answer: torch.equal(answer(_all_finite_numbers()).abs(), _all_finite_numbers().abs()),
            "a number that is on the grid is its own nearest",
        )
    ],
)


# ---- quantize_tiles ----------------------------------------------------------------------------------------------------


def _tile_inputs(tokens: int, tiles: int, tile: int) -> Callable[[Generator], tuple[Any, ...]]:
    """Each tile has a size of its own, and the largest number of some is negative."""

    def inputs(random: Generator) -> tuple[Any, ...]:
        sizes = torch.exp2(6 * torch.rand(tokens, tiles, 1, generator=random) - 3)
        x = torch.randn(tokens, tiles, tile, generator=random) * sizes
        x[0, 0, 0], x[-1, -1, -1] = -9.0, 5.0
        return x.flatten(1), tile

    return inputs


def _reference_tiles(x: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """One tile after the other."""
    q, scale = torch.zeros_like(x), torch.zeros(len(x), x.shape[1] // tile)
    for t, row in enumerate(x):
        for n, numbers in enumerate(row.split(tile)):
            scale[t, n] = max(abs(number) for number in numbers.tolist()) / LARGEST
            q[t, n * tile : (n + 1) * tile] = (numbers / scale[t, n]).to(E4M3).float()
    return q, scale


def _tiles(
    amax: Callable[[Tensor], Tensor] = lambda tiles: reduce(tiles.abs(), "T n tile -> T n", "max"),
    scale: Callable[[Tensor], Tensor] = lambda amax: amax / LARGEST,
    q: Callable[[Tensor, Tensor], Tensor] = lambda x, scale: (x / scale).to(E4M3).float(),
    returned: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda q, scale: (q, scale),
    pattern: str = "T (n tile) -> T n tile",
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The right steps, one of them done another way."""

    def answer(x: Tensor, tile: int) -> tuple[Tensor, Tensor]:
        tiles = rearrange(x, pattern, tile=tile)
        scales = scale(amax(tiles))
        made = q(tiles, rearrange(scales, "T n -> T n 1"))
        before, after = pattern.split(" -> ")
        return returned(rearrange(made, f"{after} -> {before}"), scales)

    return answer


def _shared(over: tuple[int, ...], keep: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """Scales shared over axes of [T n tile]; `keep`: given back once per tile all the same."""

    def answer(x: Tensor, tile: int) -> tuple[Tensor, Tensor]:
        tiles = rearrange(x, "T (n tile) -> T n tile", tile=tile)
        scale = tiles.abs().amax(over, keepdim=True) / LARGEST
        q = (tiles / scale).to(E4M3).float().flatten(1)
        scale = scale[..., 0]
        return q, scale.expand(tiles.shape[:2]).clone() if keep else scale

    return answer


def _zeros_stay_zeros(answer: Callable[..., Any]) -> bool:
    x = torch.ones(2, 8)
    x[1, 4:] = 0
    q, scale = (part.float() for part in answer(x, 4))
    return (
        bool(q.isfinite().all() and scale.isfinite().all()) and not q[1, 4:].any() and bool((q[0].abs() == 448).all())
    )


quantize_tiles = Exercise(
    name="quantize_tiles",
    reference=_reference_tiles,
    cases=[
        Case("3 tokens, 2 tiles of 4 channels", _tile_inputs(3, 2, 4)),
        Case("5 tokens, 3 tiles of 8", _tile_inputs(5, 3, 8)),
        Case("2 tokens, one tile each", _tile_inputs(2, 1, 16)),
    ],
    mistakes=[
        Mistake(
            _tiles(scale=lambda amax: amax),
            "your scale is the largest magnitude itself, so that the largest number becomes 1: then all numbers between 1 and "
            "448 are unused, and what is small falls among the subnormal ones. Divide it by 448",
        ),
        Mistake(
            _tiles(returned=lambda q, scale: (q, 1 / scale)),
            "your q is right, and your scale is the inverse of what is asked for: value = q * scale",
        ),
        Mistake(
            _tiles(q=lambda x, scale: (x * scale).to(E4M3).float()),
            "you multiply by the scale: divide by it, so that the largest number becomes 448",
        ),
        Mistake(
            _tiles(amax=lambda tiles: reduce(tiles, "T n tile -> T n", "max")),
            "you take the largest number, not the largest magnitude: where the largest one is negative, it overflows",
        ),
        Mistake(
            _tiles(q=lambda x, scale: x / scale),
            "your q is not rounded: these numbers are no E4M3 numbers yet. .to(torch.float8_e4m3fn)",
        ),
        Mistake(
            _tiles(q=lambda x, scale: (x / scale).to(E4M3).float() * scale),
            "your q has been multiplied by the scale again: that is what a reader of q and scale does later",
        ),
        Mistake(
            _tiles(q=lambda x, scale: (x / scale).round()),
            "you round to whole numbers: E4M3's grid is finer for small numbers and coarser for large ones",
        ),
        Mistake(
            _tiles(scale=lambda amax: amax / 480),
            "you divide by 480: that code is NaN. The largest number is 448",
        ),
        Mistake(
            _tiles(scale=lambda amax: amax / 57344),
            "you divide by 57344, the largest number of E5M2: that of E4M3 is 448, and all beyond is cut to it",
        ),
        *[
            Mistake(_shared(over, keep), hint + spelling)
            for over, hint in (
                ((0, 1, 2), "one scale serves the whole matrix"),
                ((1, 2), "one scale serves a whole token (row)"),
                ((0, 2), "a scale is shared by all tokens"),
            )
            for keep, spelling in (
                (False, ": here each token has a scale for each run of `tile` channels, [T n]"),
                (True, ", written down once per tile: the largest magnitude is to be taken over the tile alone"),
            )
        ],
        Mistake(
            _tiles(pattern="T (tile n) -> T n tile"),
            "your parentheses say (tile n): then a tile is every n-th channel. A tile is a run of neighbours, (n tile)",
        ),
    ],
    properties=[
        Property(
            "a tile of zeros stays zeros, and beside it nothing changes",
            _zeros_stay_zeros,
            "0 / 0 is NaN: keep the scale above zero, for example with clamp_min(1e-30)",
        )
    ],
)


# ---- blockwise_gemm ----------------------------------------------------------------------------------------------------


def _gemm_inputs(m: int, columns: int, inner: int, block: int) -> Callable[[Generator], tuple[Any, ...]]:
    """`columns` and `inner` count blocks. Scales are spread over two powers of two."""

    def inputs(random: Generator) -> tuple[Any, ...]:
        a, b = (100 * torch.randn(rows, inner * block, generator=random) for rows in (m, columns * block))
        scales = (torch.exp2(2 * torch.rand(rows, inner, generator=random) - 8) for rows in (m, columns))
        return a.to(E4M3), next(scales), b.to(E4M3), next(scales), block

    return inputs


def _reference_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, block: int) -> Tensor:
    """Every number with its scale, in FP64, one product."""
    left = a.double() * a_scale.double().repeat_interleave(block, 1)
    right = b.double() * b_scale.double().repeat_interleave(block, 0).repeat_interleave(block, 1)
    return (left @ right.T).float()


def _partials(a: Tensor, b: Tensor, block: int) -> Tensor:
    """The sums of each block of K, [blocks m n]."""
    left, right = (rearrange(x.float(), "r (kb block) -> kb r block", block=block) for x in (a, b))
    return einsum(left, right, "kb m block, kb n block -> kb m n")


def _gemm(
    weigh: Callable[[Tensor, Tensor, Tensor], Tensor], rows: str = "nb kb -> kb (nb block)"
) -> Callable[..., Tensor]:
    """`weigh(partials [kb m n], a_scale [kb m 1], b_scale [kb 1 n])` makes [m n] of them."""

    def answer(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, block: int) -> Tensor:
        left = rearrange(a_scale, "m kb -> kb m 1")
        right = rearrange(repeat(b_scale, rows, block=block), "kb n -> kb 1 n")
        return weigh(_partials(a, b, block), left, right)

    return answer


def _again_and_again(partials: Tensor, left: Tensor, right: Tensor) -> Tensor:
    total = torch.zeros_like(partials[0])
    for partial, scale in zip(partials, left * right, strict=True):
        total = (total + partial) * scale
    return total


def _a_block_of_zeros_does_not_count(answer: Callable[..., Any]) -> bool:
    a, a_scale, b, b_scale, block = _gemm_inputs(2, 1, 3, 4)(Generator().manual_seed(4))
    a, a_scale = a.float(), a_scale.clone()
    a[:, 4:8], a_scale[:, 1] = 0, 1e6
    got = answer(a.to(E4M3), a_scale, b, b_scale, block)
    return torch.allclose(got, _reference_gemm(a, a_scale, b, b_scale, block), rtol=1e-3)


blockwise_gemm = Exercise(
    name="blockwise_gemm",
    reference=_reference_gemm,
    cases=[
        Case("as many blocks of n as of k", _gemm_inputs(4, 3, 3, 2)),  # b_scale read the wrong way round fits in shape
        Case("m = 3, 2 blocks of n, 3 of k", _gemm_inputs(3, 2, 3, 4)),
        Case("one block of n, 5 of k", _gemm_inputs(6, 1, 5, 4)),
    ],
    mistakes=[
        Mistake(
            _gemm(lambda p, left, right: p.sum(0)),
            "the scales are missing: what you have summed are the stored numbers. Each partial sum is multiplied by the scale "
            "of its tile of a and of its block of b",
        ),
        Mistake(
            _gemm(lambda p, left, right: (p * left).sum(0)),
            "the scales of b are missing: a partial sum is multiplied by both, a's and b's",
        ),
        Mistake(
            _gemm(lambda p, left, right: (p * right).sum(0)),
            "the scales of a are missing: a partial sum is multiplied by both, a's and b's",
        ),
        Mistake(
            _gemm(lambda p, left, right: (p / (left * right)).sum(0)),
            "you divide by the scales: they were divided by when the numbers were stored, so multiply",
        ),
        Mistake(
            _gemm(lambda p, left, right: p.sum(0) * left[0] * right[0]),
            "the first block's scales are used for all: they change along K, so each partial sum needs its own before it is "
            "added",
        ),
        Mistake(
            _gemm(lambda p, left, right: p.sum(0) * left[-1] * right[-1]),
            "all is summed first and scaled once, with the last block's scales: they change along K, so each partial sum needs "
            "its own before it is added",
        ),
        Mistake(
            _gemm(lambda p, left, right: p.sum(0) * left.mean(0) * right.mean(0)),
            "all is summed first and scaled once, with the mean scales: a sum of products is not the product of sums. Scale "
            "each partial sum before it is added",
        ),
        Mistake(
            _gemm(_again_and_again),
            "the running total is multiplied by the scales too, again at each block: multiply the partial sum, then add",
        ),
        Mistake(
            _gemm(lambda p, left, right: (p * left * right).sum(0), rows="nb kb -> kb (block nb)"),
            "your rows of b take the scales in turn: a block is a run of neighbouring rows, (nb block)",
        ),
        Mistake(
            _gemm(lambda p, left, right: (p * left * right).sum(0), rows="kb nb -> kb (nb block)"),
            "you read b_scale the wrong way round: its first axis goes along n (rows of b), its second along k",
        ),
        Mistake(
            _gemm(lambda p, left, right: (p * left * right).sum(0).bfloat16().float()),
            "your result has been rounded to BF16: add up in FP32",
        ),
        Mistake(
            _gemm(lambda p, left, right: p[0] * left[0] * right[0]),
            "only the first block of K is there: the sum runs over all of them",
        ),
    ],
    properties=[
        Property(
            "a block of zeros adds nothing, whatever its scale",
            _a_block_of_zeros_does_not_count,
            "a block's scale must not reach the partial sums of other blocks",
        )
    ],
)


# ---- tensor_core_step --------------------------------------------------------------------------------------------------


def _step_inputs(products: int, m: int, n: int, bits: int, size: float) -> Callable[[Generator], tuple[Any, ...]]:
    """`size`: of the running sum, beside products of size one."""

    def inputs(random: Generator) -> tuple[Any, ...]:
        return size * torch.randn(m, n, generator=random), torch.randn(products, m, n, generator=random), bits

    return inputs


def _no_sum_yet(random: Generator) -> tuple[Any, ...]:
    return torch.zeros(2, 3), torch.randn(8, 2, 3, generator=random), 6


def _cut(number: float, largest: float, bits: int) -> float:
    """The first `bits` bits, counted from the leading one of `largest`."""
    grain = 2.0 ** (math.frexp(largest)[1] - bits) if largest else 1.0
    return math.trunc(number / grain) * grain


def _reference_step(total: Tensor, products: Tensor, bits: int) -> Tensor:
    """One output after the other, in Python's own arithmetic."""
    out = torch.zeros_like(total)
    for i in range(total.shape[0]):
        for j in range(total.shape[1]):
            numbers = [float(total[i, j]), *products[:, i, j].tolist()]
            added = sum(_cut(number, max(map(abs, numbers)), bits) for number in numbers)
            out[i, j] = _cut(added, abs(added), bits)
    return out


def _largest_of_all(total: Tensor, products: Tensor) -> Tensor:
    return torch.maximum(total.abs(), products.abs().amax(0))


def _step(
    largest: Callable[[Tensor, Tensor], Tensor] = _largest_of_all,
    rounding: Callable[[Tensor], Tensor] = torch.trunc,
    leading: int = 0,
    cut_total: bool = True,
    again: bool = True,
) -> Callable[..., Tensor]:
    """The right steps, one of them done another way. `leading`: bits counted too many."""

    def cut(x: Tensor, size: Tensor, bits: int) -> Tensor:
        grain = power_of_two(torch.frexp(size).exponent - bits - leading)
        return rounding(x / grain) * grain

    def answer(total: Tensor, products: Tensor, bits: int) -> Tensor:
        size = largest(total, products)
        added = (cut(total, size, bits) if cut_total else total) + cut(products, size, bits).sum(0)
        return cut(added, added.abs(), bits) if again else added

    return answer


def _each_its_own(total: Tensor, products: Tensor, bits: int) -> Tensor:
    def cut(x: Tensor) -> Tensor:
        grain = power_of_two(torch.frexp(x).exponent - bits)
        return torch.trunc(x / grain) * grain

    return cut(cut(total) + cut(products).sum(0))


def _small_products_vanish(answer: Callable[..., Any]) -> bool:
    """A thousand in six bits has a grain of 16: products of 10 do not reach it, not even 32 of them."""
    total = torch.full((1, 1), 1008.0)
    return (
        answer(total, torch.full((32, 1, 1), 10.0), 6).item() == 1008 == answer(total, torch.zeros(32, 1, 1), 6).item()
    )


tensor_core_step = Exercise(
    name="tensor_core_step",
    reference=_reference_step,
    cases=[
        Case("a sum larger than its products, 5 bits", _step_inputs(4, 3, 2, 5, 8.0)),
        Case("products larger than the sum, 6 bits", _step_inputs(6, 2, 4, 6, 0.1)),
        Case("nothing summed yet", _no_sum_yet),
        Case("32 products, 14 bits", _step_inputs(32, 3, 3, 14, 30.0)),
    ],
    mistakes=[
        Mistake(
            _step(rounding=torch.round),
            "you round to the nearest grain: the tensor core cuts off what lies below it, torch.trunc",
        ),
        Mistake(
            _step(rounding=torch.floor),
            "negative numbers go down: cut towards zero, torch.trunc, so that both signs lose alike",
        ),
        Mistake(
            _step(largest=lambda total, products: total.abs()),
            "your grain comes from the running sum alone: a product may be larger, and then all is aligned to the product",
        ),
        Mistake(
            _step(largest=lambda total, products: products.abs().amax(0)),
            "your grain comes from the products alone: the running sum is in the same addition, and once it is the largest, it "
            "sets the grain",
        ),
        Mistake(
            _each_its_own,
            "each number is cut to its own first bits: they are aligned first, so that *one* grain, that of the largest, "
            "holds for all of them",
        ),
        Mistake(
            _step(largest=lambda total, products: torch.maximum(total, products.amax(0)).abs()),
            "you look for the largest number: it is the largest magnitude that sets the grain, so abs() comes first",
        ),
        Mistake(
            _step(largest=lambda total, products: _largest_of_all(total, products).max().expand(total.shape)),
            "one grain serves the whole matrix: each of its sums [m n] is a sum of its own, with its own largest number",
        ),
        Mistake(
            _step(cut_total=False),
            "the running sum is not cut: it is shifted into the same grid as the products",
        ),
        Mistake(
            _step(again=False),
            "what you return may have more bits than it is allowed: the new sum, too, keeps its first `bits` bits only",
        ),
        Mistake(
            _step(leading=1),
            "you keep one bit too many: the leading one counts, so behind it there are bits - 1",
        ),
        Mistake(
            _step(leading=-1),
            "you keep one bit too few: torch.frexp's exponent is already one more than that of the leading bit, so the grain "
            "is 2^(that exponent - bits)",
        ),
        Mistake(
            lambda total, products, bits: total + products.sum(0),
            "nothing is cut: this is the exact sum",
        ),
        Mistake(
            lambda total, products, bits: _step()(torch.zeros_like(total), products, bits),
            "the running sum is missing: the products are added to it",
        ),
    ],
    properties=[
        Property(
            "what is smaller than the grain is lost, however often it comes",
            _small_products_vanish,
            "each product is cut before it is added, so 32 that are cut to zero add up to zero",
        )
    ],
)


# ---- power_of_two_scale (find the bug) ---------------------------------------------------------------------------------


def _spread_magnitudes(*shape: int) -> Callable[[Generator], tuple[Any, ...]]:
    return lambda random: (torch.exp2(20 * torch.rand(*shape, generator=random) - 12),)


def _exact_powers(_: Generator) -> tuple[Any, ...]:
    return (LARGEST * torch.exp2(torch.tensor([-10.0, -3.0, 0.0, 1.0, 4.0])),)


def _just_above(_: Generator) -> tuple[Any, ...]:
    """The next FP32 number above 448 * 2^10: log2 of a 448th of it, in FP32, is 10 exactly."""
    return (torch.nextafter(torch.tensor([LARGEST * 2**10]), torch.tensor([torch.inf])),)


def _reference_scale(amax: Tensor) -> Tensor:
    """By trial, in FP64: the first power of two that is large enough."""
    powers = torch.exp2(torch.arange(-60, 60, dtype=torch.float64))
    fits = amax.double()[..., None] <= LARGEST * powers
    return powers[fits.double().argmax(-1)].float()


def _by_log2(rounding: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda amax: torch.exp2(rounding(torch.log2(amax / LARGEST)))


def _nothing_overflows(answer: Callable[..., Any]) -> bool:
    amax = torch.exp2(torch.linspace(-14, 14, 5000))
    return bool((amax <= LARGEST * answer(amax)).all())


def _zero_is_harmless(answer: Callable[..., Any]) -> bool:
    scale = answer(torch.tensor([0.0, 1.0]))
    return bool((scale.isfinite() & (scale > 0)).all())


power_of_two_scale = Exercise(
    name="power_of_two_scale",
    reference=_reference_scale,
    cases=[
        Case("magnitudes of all sizes", _spread_magnitudes(4, 12)),
        Case("448 times a power of two", _exact_powers),
        Case("one just above", _just_above),
    ],
    mistakes=[
        Mistake(
            _by_log2(torch.ceil),
            "the logarithm is rounded: just above a power of two, log2 in FP32 gives a whole number, and ceil leaves it there. "
            "Read the exponent itself: torch.frexp is exact",
        ),
        Mistake(
            lambda amax: (amax / LARGEST).to(torch.float8_e8m0fnu).float(),
            "this is still the bug: torch's cast to E8M0 goes to the *nearest* power of two, which may be below amax / 448, and "
            "then the largest number does not fit. Go up",
        ),
        Mistake(
            _by_log2(torch.round),
            "this is nearly still the bug: the exponent is rounded to the nearest, so half of the scales come out below "
            "amax / 448 and the largest numbers do not fit. Go up",
        ),
        Mistake(
            _by_log2(torch.floor),
            "you go down: then the largest number of nearly every tile is beyond 448 and is cut. Go up",
        ),
        Mistake(
            lambda amax: torch.exp2(torch.ceil(torch.log2(amax))),
            "this is a power of two above amax itself: the largest number would become 1 or less. Divide by 448 first",
        ),
        Mistake(
            lambda amax: torch.exp2(torch.floor(torch.log2(LARGEST / amax))),
            "this is the inverse: what numbers would be multiplied by. The scale is what they are divided by, near amax / 448",
        ),
        Mistake(
            _by_log2(lambda exponent: torch.floor(exponent) + 1),
            "where amax / 448 is a power of two already, yours is twice as large as it need be, and a bit of range is wasted: "
            "take the *smallest* power of two that is not below",
        ),
        Mistake(
            _by_log2(lambda exponent: torch.ceil(exponent) + 1),
            "yours is twice as large as it need be: take the *smallest* power of two that is not below amax / 448",
        ),
    ],
    properties=[
        Property(
            "no largest magnitude is beyond 448 scales",
            _nothing_overflows,
            "amax / scale must not exceed 448: where the next power of two is below amax / 448, take the one above",
        ),
        Property(
            "a tile of zeros gets a scale that one can divide by",
            _zero_is_harmless,
            "amax may be 0: keep it above zero, for example with clamp_min(1e-30)",
        ),
    ],
)
