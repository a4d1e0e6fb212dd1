"""Lesson 15's checks: each right answer accepted, each wrong one refused with its own hint, a blank one only noted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lesson_answers import (  # noqa: F401
    test_blank_is_unsolved_and_every_exercise_knows_mistakes,
    test_right_answers_are_accepted,
    test_wrong_answers_get_their_own_hint,
)
from torch import Tensor

from dsv3_mini.course.checks import lesson_15 as check
from dsv3_mini.course.checks.framework import Exercise, exercises_of

FP8 = torch.float8_e4m3fn

# ---- right answers, each written in two ways ---------------------------------------------------------------------------


def all_numbers() -> list[float]:
    """From the definition of every code, without NaN: those of one sign, smallest first."""
    numbers = []
    for code in range(127):
        exponent, mantissa = divmod(code, 8)
        numbers.append(2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))
    return numbers


def rounded_by_search(x: Tensor) -> Tensor:
    """The nearest of all numbers; of two that are equally near, the one with the even code."""
    numbers = all_numbers()

    def nearest(number: float) -> float:
        code = min(range(127), key=lambda code: (abs(numbers[code] - abs(number)), code % 2))
        return math.copysign(numbers[code], number)

    return torch.tensor([nearest(number) for number in x.flatten().tolist()]).view(x.shape)


def rounded_by_adding(x: Tensor) -> Tensor:
    """Adding a large number pushes the low bits out, rounding as FP32 does, to even."""
    size = x.abs().clamp(max=448)
    exponent = torch.frexp(size).exponent.clamp(min=-5)
    large = torch.ldexp(torch.ones_like(size), exponent + 19)  # its last bit is worth 2^(exponent - 4), a step
    return torch.copysign((size + 1.5 * large) - 1.5 * large, x)


def tiles_with_views(x: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    tiles = x.unflatten(1, (-1, tile))
    scale = (tiles.abs().amax(-1) / 448).clamp(min=torch.finfo(torch.float32).tiny)
    return (tiles / scale[..., None]).to(FP8).flatten(1), scale


def tiles_one_by_one(x: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """A zero tile keeps a scale of 1."""
    qs, scales = [], []
    for part in x.split(tile, dim=1):
        largest = torch.linalg.vector_norm(part, ord=torch.inf, dim=1, keepdim=True)
        scales.append(torch.where(largest == 0, 1.0, largest / 448))
        qs.append(rounded_by_adding(part / scales[-1]))
    return torch.cat(qs, dim=1), torch.cat(scales, dim=1)


def gemm_in_loops(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, block: int) -> Tensor:
    out = torch.zeros(len(a), len(b))
    for i in range(len(a)):
        for j in range(len(b)):
            for n in range(a_scale.shape[1]):
                at = slice(n * block, (n + 1) * block)
                out[i, j] += a[i, at].float() @ b[j, at].float() * a_scale[i, n] * b_scale[j // block, n]
    return out


def gemm_of_dequantized(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, block: int) -> Tensor:
    left = (a.float().unflatten(1, (-1, block)) * a_scale[..., None]).flatten(1)
    right = b.float() * torch.kron(b_scale, torch.ones(block, block))
    return left @ right.mT


def grain(size: Tensor, bits: int) -> Tensor:
    """By a logarithm in FP64, which is exact enough for FP32 numbers that are no neighbours of a power of two."""
    exponent = torch.log2(size.double().clamp_min(2.0**-60)).floor()
    return torch.exp2(exponent + 1 - bits).float()


def step_by_concatenation(total: Tensor, products: Tensor, bits: int) -> Tensor:
    terms = torch.cat([total[None], products])
    unit = grain(terms.abs().amax(0), bits)
    added = ((terms / unit).trunc() * unit).sum(0)
    unit = grain(added.abs(), bits)
    return (added / unit).trunc() * unit


def step_in_whole_numbers(total: Tensor, products: Tensor, bits: int) -> Tensor:
    """As the chip may do it: integers, and shifts."""
    out = torch.zeros_like(total)
    for place in torch.cartesian_prod(torch.arange(total.shape[0]), torch.arange(total.shape[1])).tolist():
        i, j = place
        numbers = [float(total[i, j]), *products[:, i, j].tolist()]
        top = max(math.frexp(number)[1] for number in numbers if number or len(set(numbers)) == 1)
        count = sum(int(math.ldexp(number, bits - top)) for number in numbers)
        spill = max(abs(count).bit_length() - bits, 0)
        count = int(math.copysign(abs(count) >> spill << spill, count))
        out[i, j] = math.ldexp(count, top - bits)
    return out


def scale_by_frexp(amax: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp((amax / 448).clamp(min=2.0**-100))
    return torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())


def scale_by_doubling(amax: Tensor) -> Tensor:
    def one(number: float) -> float:
        scale = 2.0**-30
        while number > 448 * scale:
            scale *= 2
        return scale

    return torch.tensor([one(number) for number in amax.flatten().tolist()]).view(amax.shape)


RIGHT: list[tuple[Exercise, Callable[..., Any]]] = [
    (check.round_to_e4m3, rounded_by_search),
    (check.round_to_e4m3, rounded_by_adding),
    (check.quantize_tiles, tiles_with_views),
    (check.quantize_tiles, tiles_one_by_one),
    (check.blockwise_gemm, gemm_in_loops),
    (check.blockwise_gemm, gemm_of_dequantized),
    (check.tensor_core_step, step_by_concatenation),
    (check.tensor_core_step, step_in_whole_numbers),
    (check.power_of_two_scale, scale_by_frexp),
    (check.power_of_two_scale, scale_by_doubling),
]


# ---- wrong answers -----------------------------------------------------------------------------------------------------


def on_the_grid(
    rounding: Callable[[Tensor], Tensor] = torch.round, lowest: float = -6, steps: int = 8, top: float = 448
) -> Callable[[Tensor], Tensor]:
    """By a logarithm; `steps` from one power of two to the next."""

    def answer(x: Tensor) -> Tensor:
        step = torch.exp2(torch.log2(x.abs().clamp_min(1e-20)).floor().clamp(min=lowest)) / steps
        return (rounding(x / step) * step).clamp(-top, top)

    return answer


def beyond(value: float) -> Callable[[Tensor], Tensor]:
    def answer(x: Tensor) -> Tensor:
        r = on_the_grid(top=1e31)(x)
        return torch.where(r.abs() > 448, torch.copysign(torch.tensor(value), x), r)

    return answer


def away(z: Tensor) -> Tensor:
    return torch.copysign(torch.floor(z.abs() + 0.5), z)


def no_subnormals(x: Tensor) -> Tensor:
    return x.to(FP8).float() * (x.abs() >= 2.0**-6)


def made_of(
    sized: Callable[[Tensor], Tensor] = lambda t: t.abs().amax(-1, keepdim=True) / 448,
    q: Callable[[Tensor, Tensor], Tensor] = lambda t, s: (t / s).to(FP8).float(),
    kept: Callable[[Tensor], Tensor] = lambda s: s[..., 0],
) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    def answer(x: Tensor, tile: int) -> tuple[Tensor, Tensor]:
        t = x.unflatten(1, (-1, tile))
        scale = sized(t)
        return q(t, scale).flatten(1), kept(scale)

    return answer


def over(*axes: int, spelled: bool) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    def sized(t: Tensor) -> Tensor:
        scale = t.abs().amax(axes, keepdim=True) / 448
        return scale.repeat(*(size if axis in axes and axis < 2 else 1 for axis, size in enumerate(t.shape)))

    def plain(t: Tensor) -> Tensor:
        return t.abs().amax(axes, keepdim=True) / 448

    return made_of(sized if spelled else plain)


def every_nth(x: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    t = x.unflatten(1, (tile, -1)).mT
    scale = t.abs().amax(-1) / 448
    return (t / scale[..., None]).to(FP8).float().mT.flatten(1), scale


def blocks(
    of_a: Callable[[Tensor, int], Tensor] = lambda s, n: s[:, n],
    of_b: Callable[[Tensor, int], Tensor] = lambda s, n: s[:, n],
    spread: Callable[[Tensor, int], Tensor] = lambda s, block: s.repeat_interleave(block),
    join: Callable[[Tensor, Tensor], Tensor] = torch.mul,
    only: int | None = None,
) -> Callable[..., Tensor]:
    def answer(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, block: int) -> Tensor:
        total = torch.zeros(len(a), len(b))
        for n in range(a_scale.shape[1])[:only]:
            at = slice(n * block, (n + 1) * block)
            scale = torch.outer(of_a(a_scale, n), spread(of_b(b_scale, n), block))
            total += join(a[:, at].float() @ b[:, at].float().mT, scale)
        return total

    return answer


def ones(s: Tensor, _: int) -> Tensor:
    return torch.ones(len(s))


def scaled_at_last(which: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def answer(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, block: int) -> Tensor:
        return (a.float() @ b.float().mT) * torch.outer(which(a_scale), which(b_scale).repeat_interleave(block))

    return answer


def running_total_scaled(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, block: int) -> Tensor:
    total = torch.zeros(len(a), len(b))
    for n in range(a_scale.shape[1]):
        total += a[:, n * block : (n + 1) * block].float() @ b[:, n * block : (n + 1) * block].float().mT
        total *= torch.outer(a_scale[:, n], b_scale[:, n].repeat_interleave(block))
    return total


def cut_to(x: Tensor, unit: Tensor, how: Callable[[Tensor], Tensor] = torch.trunc) -> Tensor:
    return how(x / unit) * unit


def stepping(
    size: Callable[[Tensor, Tensor], Tensor] = lambda total, products: torch.cat([total[None], products]).abs().amax(0),
    how: Callable[[Tensor], Tensor] = torch.trunc,
    more: int = 0,
    last: bool = True,
    total_cut: bool = True,
) -> Callable[..., Tensor]:
    def answer(total: Tensor, products: Tensor, bits: int) -> Tensor:
        unit = grain(size(total, products), bits + more)
        added = cut_to(products, unit, how).sum(0) + (cut_to(total, unit, how) if total_cut else total)
        return cut_to(added, grain(added.abs(), bits + more), how) if last else added

    return answer


def own_bits(total: Tensor, products: Tensor, bits: int) -> Tensor:
    added = cut_to(total, grain(total.abs(), bits)) + cut_to(products, grain(products.abs(), bits)).sum(0)
    return cut_to(added, grain(added.abs(), bits))


def power(exponent: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda amax: 2.0 ** exponent(torch.log2(amax) - math.log2(448))


WRONG: list[tuple[Exercise, Callable[..., Any], str]] = [
    (check.round_to_e4m3, on_the_grid(steps=4), "twice too wide"),
    (check.round_to_e4m3, on_the_grid(steps=16), "twice too fine"),
    (check.round_to_e4m3, on_the_grid(away), "go away from zero"),
    (check.round_to_e4m3, on_the_grid(lambda z: torch.floor(z + 0.5)), "half-way cases go up"),
    (check.round_to_e4m3, on_the_grid(torch.trunc), "you cut towards zero"),
    (check.round_to_e4m3, on_the_grid(torch.floor), "you always go down"),
    (check.round_to_e4m3, lambda x: x.abs().to(FP8).float(), "the sign is lost"),
    (check.round_to_e4m3, no_subnormals, "everything below 2^-6 becomes zero"),
    (check.round_to_e4m3, on_the_grid(lowest=-100), "go on getting finer"),
    (check.round_to_e4m3, on_the_grid(lowest=-7), "your lowest exponent is -7"),
    (check.round_to_e4m3, on_the_grid(top=1e31), "numbers beyond 448 go on"),
    (check.round_to_e4m3, on_the_grid(top=480), "your largest number is 480"),
    (check.round_to_e4m3, on_the_grid(top=240), "your largest number is 240"),
    (check.round_to_e4m3, beyond(math.nan), "becomes NaN"),
    (check.round_to_e4m3, beyond(math.inf), "becomes infinity"),
    (check.quantize_tiles, made_of(lambda t: t.abs().amax(-1, keepdim=True)), "the largest magnitude itself"),
    (check.quantize_tiles, made_of(kept=lambda s: 1 / s[..., 0]), "the inverse of what is asked"),
    (check.quantize_tiles, made_of(q=lambda t, s: (t * s).to(FP8).float()), "you multiply by the scale"),
    (check.quantize_tiles, made_of(lambda t: t.amax(-1, keepdim=True) / 448), "not the largest magnitude"),
    (check.quantize_tiles, made_of(q=lambda t, s: t / s), "your q is not rounded"),
    (check.quantize_tiles, made_of(q=lambda t, s: (t / s).to(FP8).float() * s), "multiplied by the scale again"),
    (check.quantize_tiles, made_of(q=lambda t, s: (t / s).round()), "you round to whole numbers"),
    (check.quantize_tiles, made_of(lambda t: t.abs().amax(-1, keepdim=True) / 480), "you divide by 480"),
    (check.quantize_tiles, made_of(lambda t: t.abs().amax(-1, keepdim=True) / 57344), "you divide by 57344"),
    (check.quantize_tiles, over(0, 1, 2, spelled=False), "serves the whole matrix: here each token"),
    (check.quantize_tiles, over(0, 1, 2, spelled=True), "serves the whole matrix, written down"),
    (check.quantize_tiles, over(1, 2, spelled=False), "serves a whole token (row): here each token"),
    (check.quantize_tiles, over(1, 2, spelled=True), "serves a whole token (row), written down"),
    (check.quantize_tiles, over(0, 2, spelled=False), "shared by all tokens: here each token"),
    (check.quantize_tiles, over(0, 2, spelled=True), "shared by all tokens, written down"),
    (check.quantize_tiles, every_nth, "every n-th channel"),
    (check.blockwise_gemm, blocks(ones, ones), "the scales are missing"),
    (check.blockwise_gemm, blocks(of_b=ones), "the scales of b are missing"),
    (check.blockwise_gemm, blocks(of_a=ones), "the scales of a are missing"),
    (check.blockwise_gemm, blocks(join=torch.div), "you divide by the scales"),
    (check.blockwise_gemm, scaled_at_last(lambda s: s[:, 0]), "the first block's scales"),
    (check.blockwise_gemm, scaled_at_last(lambda s: s[:, -1]), "the last block's scales"),
    (check.blockwise_gemm, scaled_at_last(lambda s: s.mean(1)), "the mean scales"),
    (check.blockwise_gemm, running_total_scaled, "the running total is multiplied"),
    (check.blockwise_gemm, blocks(spread=lambda s, block: s.repeat(block)), "take the scales in turn"),
    (check.blockwise_gemm, blocks(of_b=lambda s, n: s[n]), "the wrong way round"),
    (check.blockwise_gemm, lambda *given: gemm_in_loops(*given).bfloat16(), "rounded to BF16"),
    (check.blockwise_gemm, blocks(only=1), "only the first block of K"),
    (check.tensor_core_step, stepping(how=torch.round), "you round to the nearest grain"),
    (check.tensor_core_step, stepping(how=torch.floor), "negative numbers go down"),
    (check.tensor_core_step, stepping(lambda total, products: total.abs()), "from the running sum alone"),
    (check.tensor_core_step, stepping(lambda total, products: products.abs().amax(0)), "from the products alone"),
    (check.tensor_core_step, own_bits, "cut to its own first bits"),
    (check.tensor_core_step, stepping(lambda t, p: torch.cat([t[None], p]).amax(0).abs()), "look for the largest number"),
    (check.tensor_core_step, stepping(lambda t, p: max(t.abs().max(), p.abs().max()).expand(t.shape)), "one grain serves"),
    (check.tensor_core_step, stepping(total_cut=False), "the running sum is not cut"),
    (check.tensor_core_step, stepping(last=False), "may have more bits than it is allowed"),
    (check.tensor_core_step, stepping(more=1), "one bit too many"),
    (check.tensor_core_step, stepping(more=-1), "one bit too few"),
    (check.tensor_core_step, lambda total, products, bits: products.sum(0) + total, "nothing is cut"),
    (check.tensor_core_step, lambda t, p, bits: step_by_concatenation(0 * t, p, bits), "the running sum is missing"),
    (check.power_of_two_scale, lambda amax: (amax / 448).to(torch.float8_e8m0fnu).float(), "this is still the bug"),
    (check.power_of_two_scale, power(torch.round), "nearly still the bug"),
    (check.power_of_two_scale, power(torch.floor), "you go down"),
    (check.power_of_two_scale, lambda amax: 2.0 ** torch.log2(amax).ceil(), "a power of two above amax itself"),
    (check.power_of_two_scale, lambda amax: 2.0 ** -power_exponent(amax), "this is the inverse"),
    (check.power_of_two_scale, lambda amax: 2.0 ** (1 + torch.log2(amax / 448).floor()), "a bit of range is wasted"),
    (check.power_of_two_scale, lambda amax: 2.0 ** (1 + torch.log2(amax / 448).ceil()), "not below amax / 448"),
    (check.power_of_two_scale, lambda amax: 2.0 ** torch.log2(amax / 448).ceil(), "the logarithm is rounded"),
]  # fmt: skip


def power_exponent(amax: Tensor) -> Tensor:
    return torch.log2(amax / 448).ceil()


def test_rounding_is_torchs_over_every_neighbourhood() -> None:
    """The reference is torch's cast; two answers written from the definition agree with it on and beside every midpoint."""
    numbers = torch.tensor(all_numbers())
    middles = (numbers[1:] + numbers[:-1]) / 2
    beside = torch.cat(
        [numbers, middles, torch.nextafter(middles, numbers[1:]), torch.nextafter(middles, numbers[:-1])]
    )
    for answer in (rounded_by_search, rounded_by_adding):
        assert torch.equal(answer(beside), check._reference_rounded(beside))
        assert torch.equal(answer(-beside), check._reference_rounded(-beside))


@pytest.mark.parametrize("change", [lambda q: q.nan_to_num(0.0), lambda q: q])
def test_a_tile_of_zeros_is_asked_about(change: Callable[[Tensor], Tensor]) -> None:
    """Without a guard a zero tile's scale is 0 and its q NaN; with q repaired and the scale 0 it would pass."""

    def answer(x: Tensor, tile: int) -> tuple[Tensor, Tensor]:
        q, scale = made_of()(x, tile)
        return change(q), scale

    result = check.quantize_tiles.run(answer)
    passes = not change(torch.tensor(math.nan)).isnan()
    assert result.passed == passes
    if not passes:
        assert "0 / 0 is NaN" in "\n".join(result.lines)


def test_a_zero_amax_is_asked_about() -> None:
    def answer(amax: Tensor) -> Tensor:
        return torch.where(amax == 0, 0.0, scale_by_frexp(amax))

    result = check.power_of_two_scale.run(answer)
    assert result.state == "wrong" and "amax may be 0" in "\n".join(result.lines)


def test_the_lessons_exercises_in_their_order() -> None:
    order = ["round_to_e4m3", "quantize_tiles", "blockwise_gemm", "tensor_core_step", "power_of_two_scale"]
    assert list(exercises_of(check)) == order
