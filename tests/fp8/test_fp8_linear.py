"""FP8Linear against its three products written out with tiles quantised by hand, and against FP32 within what E4M3 predicts."""

from __future__ import annotations

import pytest
import torch
from by_the_tile import E4M3, E5M2, RMS, error, rounded
from torch import Tensor

from dsv3_mini.errors import ConfigError
from dsv3_mini.fp8.formats import E4M3 as E4M3_FORMAT
from dsv3_mini.fp8.formats import E5M2 as E5M2_FORMAT
from dsv3_mini.fp8.formats import E5M6
from dsv3_mini.fp8.kept import bytes_kept
from dsv3_mini.fp8.linear import FP8Linear
from dsv3_mini.fp8.recipe import ABLATIONS, Fp8Recipe

# Tokens, inputs, outputs: whole tiles, one more and one less, a single token, and the tiny model's own ragged widths.
SHAPES = [(256, 256, 128), (129, 257, 127), (1, 128, 128), (300, 192, 80), (5, 7, 3)]

EXACT = Fp8Recipe(backend="exact")


def problem(tokens: int, inputs: int, outputs: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """x, W and dy. Channels and tokens differ in size by `spread` powers of two, as they do in a model."""
    random = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        sizes = [(spread * torch.randn(n, generator=random)).exp2() for n in (rows, columns)]
        return std * torch.randn(rows, columns, generator=random) * sizes[0][:, None] * sizes[1]

    return normal(tokens, inputs, 1.0), normal(outputs, inputs, inputs**-0.5), normal(tokens, outputs, 1e-4)


def make(weight: Tensor, recipe: Fp8Recipe = EXACT, after_attention: bool = False) -> FP8Linear:
    linear = FP8Linear(weight.shape[1], weight.shape[0])
    linear.recipe, linear.after_attention = recipe, after_attention
    with torch.no_grad():
        linear.weight.copy_(weight)
    return linear


def run(linear: FP8Linear, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = linear(x)
    y.backward(dy)
    return y.detach(), x.grad, linear.weight.grad


def by_hand(x: Tensor, weight: Tensor, dy: Tensor, recipe: Fp8Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Fprop, Dgrad, Wgrad in FP64 on numbers rounded tile by tile."""
    dtype = {E4M3_FORMAT: E4M3, E5M2_FORMAT: E5M2}[recipe.gradient_format]
    along_tokens = recipe.activation_tile and recipe.activation_tile[::-1]
    x8, w8 = rounded(x, recipe.activation_tile), rounded(weight, recipe.weight_tile)
    y = x8.double() @ w8.double().T
    dx = rounded(dy, recipe.gradient_tile, dtype).double() @ w8.double()
    x_columns = rounded(x8, along_tokens, power_of_two=True)
    return y, dx, rounded(dy, along_tokens, dtype).double().T @ x_columns.double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [name for name in ABLATIONS if name != "no promotion"])
def test_the_three_products_are_those_of_tiles_quantised_by_hand(shape: tuple[int, int, int], name: str) -> None:
    x, weight, dy = problem(*shape)
    recipe = ABLATIONS[name]
    got = run(make(weight, recipe), x, dy)
    for product, mine, expected in zip(("y", "dx", "dW"), got, by_hand(x, weight, dy, recipe), strict=True):
        # The operands are equal bit for bit; what is left is FP32 adding up (2^-24 a step), far below one FP8 rounding.
        assert error(mine, expected) < 1e-5, product


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if min(shape) > 64])
@pytest.mark.parametrize("after_attention", [False, True])
def test_gradients_are_as_far_from_fp32_as_the_formats_predict(
    shape: tuple[int, int, int], after_attention: bool
) -> None:
    """Errors of operands are independent, so their squares add up: two roundings in y and dx, three in dW.

    Behind attention the kept x is E5M6 (2^-7 at most: nothing beside E4M3) and is rounded to E4M3 once for Wgrad. The lower
    bound fails a product that skips a rounding (1 instead of sqrt(2)), the upper one a rounding too many or a scale too large.
    Numbers are of one size here: a tile's largest becomes 448 exactly, and where few numbers are all that counts, errors shrink.
    """
    x, weight, dy = problem(*shape, spread=0.0)
    got = run(make(weight, after_attention=after_attention), x, dy)
    exact = (x @ weight.T, dy @ weight, dy.T @ x)
    roundings = (2, 2, 2 if after_attention else 3)
    for product, mine, expected, count in zip(("y", "dx", "dW"), got, exact, roundings, strict=True):
        assert 0.85 < error(mine, expected) / (RMS * count**0.5) < 1.15, product


def test_the_linear_behind_attention_keeps_twelve_bits() -> None:
    """Three mantissa bits more than E4M3, so an eighth of its error, in one and a half bytes a number."""
    x, weight, _ = problem(256, 256, 128)
    kept = bytes_kept(lambda: make(weight, after_attention=True)(x.requires_grad_()), [])
    weights = 4 * weight.numel()
    assert kept == {torch.uint8: 256 * 256 * 3 // 2, torch.float32: 256 * 2 * 4 + weights}
    recipe = Fp8Recipe(backend="exact")
    once = recipe.after_attention(x.detach())
    assert once.fmt == E5M6 and 0.85 < error(once.dequantize(), x) / (RMS / 8) < 1.15  # three bits more
    scales = once.scale.log2()
    assert torch.equal(scales, scales.round())


def test_what_is_kept_is_one_byte_a_number() -> None:
    x, weight, _ = problem(300, 192, 80)
    linear = make(weight).bfloat16()
    kept = bytes_kept(lambda: linear(x.bfloat16().requires_grad_()), linear.parameters())
    assert kept == {torch.float8_e4m3fn: 300 * 192, torch.float32: 300 * 2 * 4}


def test_weights_and_their_gradients_stay_fp32() -> None:
    x, weight, dy = problem(64, 96, 40)
    linear = make(weight).bfloat16()
    assert linear.weight.dtype == torch.float32 and torch.equal(linear.weight.detach(), weight)
    parts = []
    for rows in (slice(0, 40), slice(40, 64)):
        y = linear(x[rows].bfloat16())
        assert y.dtype == torch.bfloat16
        y.backward(dy[rows].bfloat16())
        parts.append(linear.weight.grad.clone())
    assert parts[1].dtype == torch.float32
    later = run(make(weight), x[40:].bfloat16().float(), dy[40:].bfloat16().float())[2]
    assert torch.equal(parts[1], parts[0] + later), "micro-batches add up in FP32"


def test_bf16_in_gives_the_fp32_products_rounded_once() -> None:
    x, weight, dy = (tensor.bfloat16() for tensor in problem(130, 140, 150))
    wide = run(make(weight.float()), x.float(), dy.float())
    narrow = run(make(weight.float()).bfloat16(), x, dy)
    assert torch.equal(narrow[0], wide[0].bfloat16()) and torch.equal(narrow[1], wide[1].bfloat16())
    assert torch.equal(narrow[2], wide[2])


def test_leading_dimensions_are_tokens() -> None:
    x, weight, dy = problem(24, 96, 40)
    flat = run(make(weight), x, dy)
    deep = run(make(weight), x.view(2, 3, 4, 96), dy.view(2, 3, 4, 40))
    assert deep[0].shape == (2, 3, 4, 40) and deep[1].shape == (2, 3, 4, 96)
    for one, other in zip(flat, deep, strict=True):
        assert torch.equal(one, other.view_as(one))


def test_a_gradient_that_is_one_number_expanded_is_read() -> None:
    x, weight, _ = problem(20, 96, 40)
    linear = make(weight)
    linear(x).sum().backward()
    # Ones are exact in E4M3, so dW is the sum over tokens of the kept x, the same for every output.
    columns = rounded(rounded(x, (1, 128)), (128, 1), power_of_two=True).sum(0)
    torch.testing.assert_close(linear.weight.grad, columns.expand(40, 96), rtol=1e-5, atol=1e-4)


def test_one_outlier_costs_its_own_tile_and_not_the_tensor() -> None:
    """A scale of 1e6 / 448 puts numbers around 1 below half the smallest number of E4M3, 2^-9: they become zero."""
    x, weight = torch.randn(128, 256), torch.randn(64, 256)
    x[0, 0] = 1e6
    per_tensor = Fp8Recipe(activation_tile=None, backend="exact")
    expected = (x @ weight.T)[1:]
    assert error(make(weight)(x)[1:], expected) < 1.15 * RMS * 2**0.5
    assert error(make(weight, per_tensor)(x)[1:], expected) > 0.9


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(activation_tile=(1, 0)), "activation_tile = (1, 0)"),
        (dict(weight_tile=128), "weight_tile = 128"),
        (dict(gradient_tile=(128,)), "gradient_tile = (128,)"),
        (dict(gradient_format=E5M6), "must be E4M3 or E5M2"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Fp8Recipe(**changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)
