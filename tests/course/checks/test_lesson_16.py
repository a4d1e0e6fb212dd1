"""Lesson 16's checks: each right answer accepted, each wrong one refused with its own hint, a blank one only noted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import rearrange, reduce, repeat
from lesson_answers import (  # noqa: F401
    test_blank_is_unsolved_and_every_exercise_knows_mistakes,
    test_right_answers_are_accepted,
    test_wrong_answers_get_their_own_hint,
)
from torch import Tensor

from dsv3_mini.course.checks import lesson_16 as check
from dsv3_mini.course.checks.framework import Exercise, exercises_of
from dsv3_mini.fp8.formats import E4M3, power_of_two_at_least, round_to
from dsv3_mini.fp8.kept import bytes_kept
from dsv3_mini.fp8.linear import FP8Linear
from dsv3_mini.fp8.quantize import Quantized, quantize, retile
from dsv3_mini.model.feed_forward import swiglu

Answer = Callable[..., Any]

# ---- right answers, each written in two ways ---------------------------------------------------------------------------


def as_tiles(codes: Tensor, scale: Tensor) -> Quantized:
    width = codes.shape[1] // scale.shape[1]
    return Quantized(codes.to(torch.float8_e4m3fn), scale, (1, width), E4M3, codes.shape[1])


def package_retile(q: Tensor, scale: Tensor, w: int) -> tuple[Tensor, Tensor]:
    new = retile(as_tiles(q, scale), (w, 1))
    return new.numbers(), new.scale


def retile_through_rows(q: Tensor, scale: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """Turned over, tiled as rows are, turned back."""
    values = rearrange(q * scale.repeat_interleave(w, 1), "(n w) i -> i n w", w=w)
    new = power_of_two_at_least(values.abs().amax(-1) / 448)
    codes = (values / new[..., None]).to(torch.float8_e4m3fn).float()
    return rearrange(codes, "i n w -> (n w) i"), new.T


def package_layer(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    layer = FP8Linear(w.shape[1], w.shape[0])
    layer.weight.data = w
    x = x.clone().requires_grad_()
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, [x, layer.weight], g)


def products_of_values(x: Tensor, w: Tensor, g: Tensor) -> list[Tensor]:
    """Dequantised and multiplied in FP32, as `exact` does."""
    kept, weight = quantize(x, (1, 128)), quantize(w, (128, 128)).dequantize()
    columns = quantize(g.T.contiguous(), (1, 128)).dequantize()
    again = quantize(kept.dequantize().T.contiguous(), (1, 128), power_of_two=True).dequantize()
    return [kept.dequantize() @ weight.T, quantize(g, (1, 128)).dequantize() @ weight, columns @ again.T]


def package_again(q: Tensor, scale: Tensor, w: int, dh: Tensor) -> tuple[Tensor, Tensor]:
    """Autograd through the package's own, from the dequantised numbers."""
    gate_up = as_tiles(q, scale).dequantize().requires_grad_()
    hidden = swiglu(gate_up)
    (gradient,) = torch.autograd.grad(hidden, gate_up, dh)
    return hidden.detach(), gradient


def again(
    hidden: Answer = lambda gate, up: gate / (1 + torch.exp(-gate)) * up,
    d_gate: Answer = lambda gate, up, s: up * (s + gate * s - gate * s * s),
    d_up: Answer = lambda gate, up, s: gate * s,
    measure: Answer = lambda q, scale, w: q * scale.repeat_interleave(w, 1),
    order: tuple[int, int] = (0, 1),
) -> Answer:
    """By the formula. With a part of one's own it is a wrong answer."""

    def answer(q: Tensor, scale: Tensor, w: int, dh: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = measure(q, scale, w).split(dh.shape[1], dim=1)
        s = torch.sigmoid(gate)
        halves = dh * d_gate(gate, up, s), dh * d_up(gate, up, s)
        return hidden(gate, up), torch.cat([halves[place] for place in order], dim=1)

    return answer


def exchanged(q: Tensor, scale: Tensor, w: int, dh: Tensor) -> tuple[Tensor, Tensor]:
    f = dh.shape[1]
    hidden, gradient = package_again(q.roll(f, 1), scale.roll(f // w, 1), w, dh)
    return hidden, gradient.roll(f, 1)


def package_kept(forward: Answer, x: Tensor, weights: list[Tensor]) -> int:
    return sum(bytes_kept(lambda: forward(x, weights), weights).values())


def saved(forward: Answer, x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """All that is saved, in the order of saving; twice where two operations save it."""
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        forward(x, weights)
    return found


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def kept_by_a_set(forward: Answer, x: Tensor, weights: list[Tensor]) -> int:
    tensors, own = saved(forward, x, weights), {place(weight) for weight in weights}
    return sum(size for at, size in {(place(t), t.untyped_storage().nbytes()) for t in tensors} if at not in own)


def weights_by_sums(weight: Tensor, updates: list[Tensor]) -> list[Tensor]:
    return [quantize(weight - sum(updates[:n]), (128, 128)).dequantize() for n in range(1, len(updates) + 1)]


def weights_in_fp64(weight: Tensor, updates: list[Tensor]) -> list[Tensor]:
    master, read = weight.double().clone(), []
    for update in updates:
        master -= update.double()
        read.append(quantize(master.float(), (128, 128)).dequantize())
    return read


RIGHT: list[tuple[Exercise, Answer]] = [
    (check.retile_for_wgrad, package_retile),
    (check.retile_for_wgrad, retile_through_rows),
    (check.three_products, package_layer),
    (check.three_products, products_of_values),
    (check.swiglu_again, package_again),
    (check.swiglu_again, again()),
    (check.kept_bytes, package_kept),
    (check.kept_bytes, kept_by_a_set),
    (check.weights_to_multiply, weights_by_sums),
    (check.weights_to_multiply, weights_in_fp64),
]


# ---- wrong answers -----------------------------------------------------------------------------------------------------


def values_of(q: Tensor, scale: Tensor, w: int) -> Tensor:
    return q * scale.repeat_interleave(w, 1)


def retiled(
    values: Answer = values_of,
    scale_of: Callable[[Tensor], Tensor] = lambda largest: power_of_two_at_least(largest / 448),
    rounding: Callable[[Tensor], Tensor] = lambda x: round_to(x, E4M3),
    cut: str = "(n w) i",
) -> Answer:
    def answer(q: Tensor, scale: Tensor, w: int) -> tuple[Tensor, Tensor]:
        numbers = values(q, scale, w)
        new = scale_of(reduce(numbers.abs(), f"{cut} -> n i", "max", w=w))
        return rounding(numbers / repeat(new, f"n i -> {cut}", w=w)), new

    return answer


def same_tiles_again(q: Tensor, scale: Tensor, w: int) -> tuple[Tensor, Tensor]:
    again = quantize(values_of(q, scale, w), (1, w), power_of_two=True)
    return again.numbers(), again.scale


def codes_stay(how: str) -> Answer:
    return lambda q, scale, w: (q, reduce(scale.repeat_interleave(w, 1), "(n w) i -> n i", how, w=w))


def turned_scales(q: Tensor, scale: Tensor, w: int) -> tuple[Tensor, Tensor]:
    codes, new = package_retile(q, scale, w)
    return codes, new.reciprocal()


def layer_with(
    dx: Callable[[Tensor], Any] = lambda g: quantize(g, (1, 128)),
    dw_g: Callable[[Tensor], Any] = lambda g: quantize(g, (128, 1)),
    dw_x: Callable[[Tensor, Quantized], Any] = lambda x, kept: retile(kept, (128, 1)),
) -> Answer:
    """One operand of one's own; whatever it is, its values are multiplied."""

    def values(operand: Any) -> Tensor:
        return operand.dequantize() if isinstance(operand, Quantized) else operand

    def answer(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept, weight = quantize(x, (1, 128)), quantize(w, (128, 128)).dequantize()
        y = kept.dequantize() @ weight.T
        return y, values(dx(g)) @ weight, values(dw_g(g)).T @ values(dw_x(x, kept))

    return answer


def turned_over(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, dx, dw = package_layer(x, w, g)
    return y, dx, dw.T


def counted(size: Callable[[Tensor], int], leave_out: Callable[..., set[int]], once: bool = True) -> Answer:
    def answer(forward: Answer, x: Tensor, weights: list[Tensor]) -> int:
        own = leave_out(x, weights)
        tensors = [t for t in saved(forward, x, weights) if place(t) not in own]
        return sum(size(t) for t in ({place(t): t for t in tensors}.values() if once else tensors))

    return answer


def whole(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def the_weights(x: Tensor, weights: list[Tensor]) -> set[int]:
    return {place(weight) for weight in weights}


def numbers_in(tensor: Tensor) -> int:
    return whole(tensor) // tensor.element_size()


def stepping(
    keep: Callable[[Tensor], Tensor] = lambda w: w,
    read: Callable[[Tensor], Tensor] = lambda w: quantize(w, (128, 128)).dequantize(),
    sign: float = -1.0,
) -> Answer:
    def answer(weight: Tensor, updates: list[Tensor]) -> list[Tensor]:
        master, seen = keep(weight), []
        for update in updates:
            master = keep(master + sign * update)
            seen.append(read(master))
        return seen

    return answer


def in_8_bits(weight: Tensor, updates: list[Tensor]) -> list[Tensor]:
    stored, seen = quantize(weight, (128, 128)), []
    for update in updates:
        stored = quantize(stored.dequantize() - update, (128, 128))
        seen.append(stored.dequantize())
    return seen


def one_step_late(weight: Tensor, updates: list[Tensor]) -> list[Tensor]:
    return [quantize(weight, (128, 128)).dequantize(), *weights_by_sums(weight, updates)[:-1]]


def scale_of_the_start(weight: Tensor, updates: list[Tensor]) -> list[Tensor]:
    scale = weight.abs().max() / 448
    return [round_to((weight - sum(updates[:n])) / scale, E4M3) * scale for n in range(1, len(updates) + 1)]


WRONG: list[tuple[Exercise, Answer, str]] = [
    (check.retile_for_wgrad, retiled(scale_of=lambda largest: largest / 448), "no powers of two"),
    (check.retile_for_wgrad, retiled(scale_of=lambda m: power_of_two_at_least(m / 448) / 2), "rounded *down*"),
    (check.retile_for_wgrad, retiled(scale_of=power_of_two_at_least), "448 is missing"),
    (check.retile_for_wgrad, retiled(values=lambda q, scale, w: q), "look at the codes alone"),
    (check.retile_for_wgrad, retiled(values=lambda q, s, w: q / s.repeat_interleave(w, 1)), "divide by the old scales"),
    (check.retile_for_wgrad, retiled(values=lambda q, s, w: q * s.repeat(1, w)), "the old scales go to the wrong"),
    (check.retile_for_wgrad, same_tiles_again, "along the row again"),
    (check.retile_for_wgrad, codes_stay("mean"), "the scales are averaged"),
    (check.retile_for_wgrad, codes_stay("max"), "their tile's largest scale"),
    (check.retile_for_wgrad, retiled(rounding=lambda x: x), "are not rounded"),
    (check.retile_for_wgrad, retiled(rounding=torch.round), "to whole numbers"),
    (check.retile_for_wgrad, turned_scales, "are turned round"),
    (check.retile_for_wgrad, retiled(cut="(w n) i"), "every n-th token"),
    (check.three_products, layer_with(dw_x=lambda x, kept: kept), "in its old tiles"),
    (check.three_products, layer_with(dw_x=lambda x, kept: quantize(x, (128, 1))), "dw reads x itself, which"),
    (check.three_products, layer_with(dw_x=lambda x, kept: quantize(x, (128, 1), power_of_two=True)), "x itself, if with"),
    (check.three_products, layer_with(dw_x=lambda x, kept: retile(kept, (128, 1), power_of_two=False)), "leave retile"),
    (check.three_products, layer_with(dw_g=lambda g: quantize(g, (1, 128))), "in the tiles of Dgrad"),
    (check.three_products, layer_with(dw_g=lambda g: retile(quantize(g, (1, 128)), (128, 1))), "g is rounded twice"),
    (check.three_products, layer_with(dx=lambda g: quantize(g, (128, 1))), "in tiles of 128 tokens: Dgrad"),
    (check.three_products, layer_with(dx=lambda g: quantize(g, (128, 128))), "that diverged in the report"),
    (check.three_products, layer_with(dx=lambda g: g), "not quantised for dx"),
    (check.three_products, layer_with(dx=lambda g: g, dw_g=lambda g: g), "not quantised at all"),
    (check.three_products, layer_with(*[lambda g: quantize(g, (2**30, 2**30))] * 2), "one scale for the whole matrix: 128"),
    (check.three_products, turned_over, "comes out turned over"),
    (check.swiglu_again, again(d_gate=lambda gate, up, s: up * s * (1 - s)), "derivative of the *sigmoid*"),
    (check.swiglu_again, again(d_gate=lambda gate, up, s: up * s), "the sigmoid as a constant"),
    (check.swiglu_again, again(d_gate=lambda gate, up, s: s + gate * s * (1 - s)), "is not multiplied by up"),
    (check.swiglu_again, again(d_gate=lambda gate, up, s: up), "silu's derivative out"),
    (check.swiglu_again, again(d_up=lambda gate, up, s: 1.0), "is dh alone"),
    (check.swiglu_again, again(d_up=lambda gate, up, s: gate), "is multiplied by gate:"),
    (check.swiglu_again, exchanged, "gate and up are exchanged"),
    (check.swiglu_again, again(order=(1, 0)), "halves of the gradient are exchanged"),
    (check.swiglu_again, again(hidden=lambda gate, up: gate * up), "hidden has no silu"),
    (check.swiglu_again, again(measure=lambda q, scale, w: q), "compute with the codes"),
    (check.swiglu_again, again(measure=lambda q, scale, w: q * scale.repeat(1, w)), "so repeat them as (j w)"),
    (check.kept_bytes, counted(whole, the_weights, once=False), "counted twice: it lies in memory once"),
    (check.kept_bytes, counted(whole, lambda *_: set()), "whether there is a backward pass or not"),
    (check.kept_bytes, counted(whole, lambda *_: set(), once=False), "leave the weights out, and count"),
    (check.kept_bytes, counted(numbers_in, the_weights), "you count numbers"),
    (check.kept_bytes, counted(lambda t: t.nbytes, the_weights), "by its own size"),
    (check.kept_bytes, counted(lambda t: 4 * numbers_in(t), the_weights), "counts four bytes here"),
    (check.kept_bytes, counted(whole, lambda x, weights: the_weights(x, weights) | {place(x)}), "x is left out"),
    (check.weights_to_multiply, in_8_bits, "still the bug"),
    (check.weights_to_multiply, stepping(keep=lambda w: w.bfloat16().float()), "the masters are BF16"),
    (check.weights_to_multiply, stepping(read=lambda w: w), "is not quantised: they multiply"),
    (check.weights_to_multiply, one_step_late, "from before the update"),
    (check.weights_to_multiply, stepping(sign=1.0), "the updates are added"),
    (check.weights_to_multiply, scale_of_the_start, "cut off at 448"),
    (check.weights_to_multiply, stepping(read=lambda w: quantize(w, (2**30, 2**30)).dequantize()), "have one for each block"),
    (check.weights_to_multiply, stepping(read=lambda w: quantize(w, (1, 128)).dequantize()), "in tiles of 1 x 128"),
]  # fmt: skip


# ---- and more ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "exercise, hint", [(e, hint) for e, _, hint in WRONG], ids=[f"{e.name}: {h}" for e, _, h in WRONG]
)
def test_no_two_hints_have_the_same_words(exercise: Exercise, hint: str) -> None:
    known = [each.hint for each in (*exercise.mistakes, *exercise.properties)]
    assert sum(hint in each for each in known) == 1


def test_every_mistake_is_tried() -> None:
    for exercise in exercises_of(check).values():
        tried = [hint for e, _, hint in WRONG if e is exercise]
        assert len(tried) == len(exercise.mistakes)


def test_the_lessons_exercises_in_their_order() -> None:
    names = ["retile_for_wgrad", "three_products", "swiglu_again", "kept_bytes", "weights_to_multiply"]
    assert list(exercises_of(check)) == names


@pytest.mark.parametrize(
    "name, bytes_of_4", [("_two_layers", 4 * 3 + 4 * 5), ("_squared", 4 * 3 + 4 * 5), ("_half_of_it", 4 * 3 + 4 * 5)]
)
def test_what_is_kept_is_what_one_counts_by_hand(name: str, bytes_of_4: int) -> None:
    """x [4 3] for the first weight's gradient, and the hidden [4 5]: as ReLU leaves it, squared, or seen in part. FP32."""
    forward, x = getattr(check, name), torch.randn(4, 3, requires_grad=True)
    weights = [torch.randn(3, 5, requires_grad=True), torch.randn(5, 3, requires_grad=True)]
    assert check.kept_bytes.reference(forward, x, weights) == 4 * bytes_of_4


def test_re_tiling_is_exact_only_between_powers_of_two() -> None:
    """An answer that is right on plain scales and rounds once more on others is found out by the property alone."""
    wobble = torch.tensor(1.0 + 2.0**-4)

    def almost(q: Tensor, scale: Tensor, w: int) -> tuple[Tensor, Tensor]:
        codes, new = package_retile(q, scale, w)
        loud = q.shape == (32, 16)  # the property's own inputs
        return (round_to(codes * wobble, E4M3) if loud else codes), new

    lines = "\n".join(check.retile_for_wgrad.run(almost).lines)
    assert "only what is small beside its new tile changes" in lines and "rounded again" in lines
