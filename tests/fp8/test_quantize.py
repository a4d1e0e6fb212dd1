"""Quantisation against the definition, tile by tile in a loop, and against an independent dequantisation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3_mini.errors import ConfigError
from dsv3_mini.fp8.formats import E4M3, E5M2, E5M6, E8M0, FloatFormat, decode
from dsv3_mini.fp8.quantize import Quantized, quantize, retile
from dsv3_mini.hub import Fp8Weight

TILES = [(1, 128), (128, 128), (128, 1), (3, 5), (2**20, 2**20)]
FORMATS = [E4M3, E5M2, E5M6]


def numbers_of(fmt: FloatFormat) -> Tensor:
    """All finite numbers of a format, sorted."""
    if fmt.dtype:
        all_of_them = torch.arange(256).to(torch.uint8).view(fmt.dtype).float()
    else:
        all_of_them = decode(torch.arange(4096), fmt)
    return all_of_them[all_of_them.isfinite()].unique()


def normal_with_outliers(rows: int, columns: int, seed: int, power: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=random) * 2.0**power
    x[:: max(rows // 3, 1), :: max(columns // 3, 1)] *= 1000
    return x


def per_number(scale: Tensor, tile: tuple[int, int], shape: torch.Size) -> Tensor:
    """The scale of every number by its definition: that of place (i // tile_rows, j // tile_columns)."""
    i, j = torch.arange(shape[-2]) // tile[0], torch.arange(shape[-1]) // tile[1]
    return scale[..., i[:, None], j[None, :]]


@settings(max_examples=40)
@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 200),
    tile=st.sampled_from(TILES),
    fmt=st.sampled_from(FORMATS),
    power_of_two=st.booleans(),
    power=st.integers(-30, 30),
    seed=st.integers(0, 10**6),
)
def test_numbers_are_the_nearest_under_the_largest_of_each_tile(
    rows: int, columns: int, tile: tuple[int, int], fmt: FloatFormat, power_of_two: bool, power: int, seed: int
) -> None:
    x = normal_with_outliers(rows, columns, seed, power)
    quantized = quantize(x, tile, fmt, power_of_two)
    assert quantized.shape == x.shape and quantized.scale.dtype == torch.float32
    assert quantized.scale.shape == (math.ceil(rows / tile[0]), math.ceil(columns / tile[1]))
    for i in range(quantized.scale.shape[0]):
        for j in range(quantized.scale.shape[1]):
            block = x[i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
            scale, fits = quantized.scale[i, j].item(), block.abs().max().item() / fmt.largest
            if power_of_two:
                assert math.frexp(scale)[0] == 0.5 and fits * (1 - 1e-6) <= scale < 2 * fits * (1 + 1e-6)
            else:
                assert scale == pytest.approx(fits, rel=1e-6)
    wanted = x.double() / per_number(quantized.scale, tile, x.shape).double()
    got, numbers = quantized.numbers().double(), numbers_of(fmt).double()
    assert torch.isin(got, numbers).all()
    above = torch.searchsorted(numbers, wanted.contiguous()).clamp(1, len(numbers) - 1)
    nearest = torch.minimum((numbers[above] - wanted).abs(), (numbers[above - 1] - wanted).abs())
    # The division by the scale is rounded to FP32, so that a near half-way case may fall on the other side.
    assert ((got - wanted).abs() <= nearest + wanted.abs() * 2.0**-23).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", [(256, 384), (200, 192), (1, 1), (129, 257), (3, 130, 77)], ids=str)
def test_dequantisation_is_the_number_times_its_scale(
    shape: tuple[int, ...], tile: tuple[int, int], fmt: FloatFormat
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    quantized = quantize(x, tile, fmt)
    expected = quantized.numbers() * per_number(quantized.scale, tile, x.shape)
    assert torch.equal(quantized.dequantize(), expected)
    assert torch.equal(quantized.dequantize(torch.bfloat16), expected.bfloat16())
    # Against x: half a step of the format, 2^-(M+1), or of its subnormal numbers.
    step = torch.maximum(x.abs() * 2.0**-fmt.mantissa_bits, per_number(quantized.scale, tile, x.shape) * fmt.smallest)
    assert ((expected - x).abs() <= step / 2 * (1 + 1e-5)).all()


def test_weights_are_dequantised_as_the_hub_does() -> None:
    weight = normal_with_outliers(300, 200, seed=5)
    quantized = quantize(weight, (128, 128))
    assert torch.equal(quantized.dequantize(), Fp8Weight(quantized.q, quantized.scale).dequantise())


def test_a_stack_is_each_of_its_matrices() -> None:
    stack = torch.randn(4, 130, 200)
    quantized = quantize(stack, (128, 128))
    for e in range(4):
        one = quantize(stack[e], (128, 128))
        assert (
            torch.equal(quantized.matrix(e).dequantize(), one.dequantize()) and quantized.matrix(e).shape == one.shape
        )
        assert torch.equal(quantized.matrix(e).scale, one.scale)


def test_rows_are_taken_with_their_scales() -> None:
    x = torch.randn(10, 200)
    quantized = quantize(x)
    assert torch.equal(quantized.rows(3, 7).dequantize(), quantize(x[3:7]).dequantize())
    assert torch.equal(quantized.rows(4, 4).dequantize(), torch.zeros(0, 200))
    with pytest.raises(ConfigError, match=r"tiles \(128, 128\) cannot be taken apart"):
        quantize(x, (128, 128)).rows(3, 7)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_tiles_of_zeros_stay_zero(power_of_two: bool) -> None:
    x = torch.zeros(3, 300)
    x[1, 200] = 2.5
    for fmt in FORMATS:
        quantized = quantize(x, (1, 128), fmt, power_of_two)
        assert quantized.scale.isfinite().all() and (quantized.scale > 0).all()
        same = quantized.dequantize()
        assert torch.equal(same != 0, x != 0) and same[1, 200] == pytest.approx(2.5, rel=2.0**-6)


@pytest.mark.parametrize("shape", [(0, 200), (5, 0), (3, 0, 128)], ids=str)
def test_nothing_is_quantised_to_nothing(shape: tuple[int, ...]) -> None:
    for fmt in FORMATS:
        quantized = quantize(torch.zeros(shape), (1, 128), fmt)
        assert quantized.shape == shape and quantized.dequantize().shape == shape
        assert quantized.transpose().dequantize().shape == torch.zeros(shape).mT.shape


def test_an_outlier_spoils_its_own_tile_only() -> None:
    calm = torch.randn(4, 384) * 0.02
    wild = calm.clone()
    wild[2, 130] = 5000.0
    before, after = quantize(calm).dequantize(), quantize(wild).dequantize()
    spoilt = torch.zeros(4, 384, dtype=torch.bool)
    spoilt[2, 128:256] = True
    assert torch.equal(before[~spoilt], after[~spoilt])
    # 5000 / 448 is the scale now, and its smallest number 2^-9 of that: 0.02 is nothing.
    spoilt[2, 130] = False
    assert (after[spoilt] == 0).float().mean() > 0.3
    # Under one scale for the whole matrix nearly everything suffers.
    whole = quantize(wild, (4, 384)).dequantize()
    error = ((whole - wild).norm(), (after - wild).norm())
    assert error[0] > 1.5 * error[1] and (whole == 0).float().mean() > 0.3


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_shows_in_its_tile(bad: float) -> None:
    for fmt in FORMATS:
        for power_of_two in (False, True):
            x = torch.ones(2, 300)
            x[1, 140] = bad
            back = quantize(x, (1, 128), fmt, power_of_two).dequantize()
            assert back[1, 128:256].isnan().all() and back[0].isfinite().all() and back[1, 256:].isfinite().all()


def test_bf16_is_quantised_as_the_same_number_in_fp32() -> None:
    x = torch.randn(20, 200).bfloat16()
    assert torch.equal(quantize(x).dequantize(), quantize(x.float()).dequantize())


# ---- other layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("shape", [(130, 65), (65, 131), (2, 64, 200)], ids=str)
def test_transposed_are_the_same_numbers(fmt: FloatFormat, shape: tuple[int, ...]) -> None:
    quantized = quantize(torch.randn(shape), (1, 128), fmt)
    turned = quantized.transpose()
    assert turned.tile == (128, 1) and turned.q.is_contiguous() and turned.scale.is_contiguous()
    assert turned.shape == torch.zeros(shape).mT.shape
    assert torch.equal(turned.dequantize(), quantized.dequantize().mT)
    assert torch.equal(turned.transpose().q.view(torch.uint8), quantized.q.view(torch.uint8))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("tile", TILES[:3], ids=str)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_numbers_held_in_fp32_are_those_held_in_bytes(
    fmt: FloatFormat, tile: tuple[int, int], power_of_two: bool
) -> None:
    x = normal_with_outliers(300, 200, seed=5)
    x[7, 9], x[140, 150] = torch.nan, torch.inf
    small, large = quantize(x, tile, fmt, power_of_two), quantize(x, tile, fmt, power_of_two, in_fp32=True)
    assert large.in_fp32 and not small.in_fp32
    for a, b in ((small, large), (small.transpose(), large.transpose())):
        assert a.tile == b.tile and a.shape == b.shape
        torch.testing.assert_close(a.scale, b.scale, rtol=0, atol=0, equal_nan=True)
        for _ in range(2):  # twice: to dequantise changes nothing in it
            torch.testing.assert_close(a.dequantize(), b.dequantize(), rtol=0, atol=0, equal_nan=True)


def test_e5m6_takes_one_and_a_half_bytes() -> None:
    quantized = quantize(torch.randn(64, 256), (1, 128), E5M6, power_of_two=True)
    assert quantized.q.dtype == torch.uint8 and quantized.q.nbytes == 1.5 * 64 * 256
    assert quantized.nbytes == quantized.q.nbytes + 64 * 2 * 4
    assert quantize(torch.randn(64, 255), (1, 128), E5M6).q.nbytes == 1.5 * 64 * 256
    assert quantize(torch.randn(64, 256)).q.nbytes == 64 * 256


def lost_in(change: Quantized, values: Tensor) -> Tensor:
    return change.dequantize() - values


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_retiling_with_powers_of_two_rounds_nothing_but_what_underflows(fmt: FloatFormat) -> None:
    random = torch.Generator().manual_seed(6)
    x = torch.randn(200, 300, generator=random) * torch.exp2(torch.randint(-6, 7, (200, 1), generator=random).float())
    first = quantize(x, (1, 128), fmt, power_of_two=True)
    values = first.dequantize()
    second = retile(first, (128, 1))
    assert second.tile == (128, 1) and second.fmt == fmt
    scale = per_number(second.scale, (128, 1), x.shape)
    normal = values.abs() >= scale * fmt.smallest_normal
    lost = lost_in(second, values)
    assert (lost[normal] == 0).all() and normal.float().mean() > 0.5
    assert (lost.abs() <= scale * fmt.smallest / 2).all()
    if fmt == E4M3:
        assert (lost[~normal] != 0).any()  # underflow is real, and the docstring says so
    # With scales as they come, a second rounding takes its share of nearly every number.
    plain = quantize(x, (1, 128), fmt)
    assert (lost_in(retile(plain, (128, 1), power_of_two=False), plain.dequantize()) != 0).float().mean() > 0.5


def test_what_was_kept_in_e5m6_becomes_e4m3_with_one_rounding() -> None:
    x = torch.randn(150, 100) * 3
    kept = quantize(x, (1, 128), E5M6, power_of_two=True)
    moved = retile(kept, (128, 1), fmt=E4M3)
    assert moved.fmt == E4M3 and moved.q.dtype == torch.float8_e4m3fn
    assert torch.equal(moved.dequantize(), quantize(kept.dequantize(), (128, 1), E4M3, power_of_two=True).dequantize())
    # 2^-7 for E5M6, 2^-4 for E4M3, and their product, of numbers that are not subnormal in either.
    clear = x.abs() > 0.2
    assert ((moved.dequantize() - x).abs() <= x.abs() * (2.0**-7 + 2.0**-4 + 2.0**-11))[clear].all()


@pytest.mark.parametrize("tile", [(0, 128), (1, 0), (-1, 1)])
def test_a_tile_holds_numbers(tile: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="cannot hold numbers"):
        quantize(torch.ones(2, 2), tile)


def test_a_scale_is_no_format_for_numbers() -> None:
    with pytest.raises(ConfigError, match="in E8M0 cannot hold numbers"):
        quantize(torch.ones(2, 2), (1, 128), E8M0)


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(
    ("tile", "start", "end"), [((1, 8), 8, 24), ((1, 8), 16, 29), ((4, 40), 3, 17), ((8, 1), 5, 6)]
)
def test_columns_of_a_matrix_are_those_of_its_numbers(
    tile: tuple[int, int], start: int, end: int, fmt: FloatFormat
) -> None:
    x = quantize(torch.randn(13, 29, generator=torch.Generator().manual_seed(1)), tile, fmt)
    part = x.along(start, end)
    assert part.shape == (13, end - start)
    assert torch.equal(part.dequantize(), x.dequantize()[:, start:end])


@pytest.mark.parametrize(("start", "end"), [(3, 24), (8, 20), (7, 9)])
def test_columns_that_cut_through_tiles_are_refused(start: int, end: int) -> None:
    with pytest.raises(ConfigError, match=rf"columns {start}:{end} of E4M3 cut through tiles 8 wide"):
        quantize(torch.randn(4, 29), (1, 8)).along(start, end)
