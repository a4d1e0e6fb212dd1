"""Formats against torch's own casts, bit for bit, and against the definition in Python's numbers where torch has no type."""

import bisect
import math

import pytest
import torch
from torch import Tensor

from dsv3_mini.fp8.formats import (
    E4M3,
    E5M2,
    E5M6,
    E8M0,
    FloatFormat,
    decode,
    decode_e5m6,
    encode,
    encode_e5m6,
    pack_e5m6,
    power_of_two_at_least,
    round_in_place,
    round_to,
    unpack_e5m6,
)

TORCHS = [E4M3, E5M2, E8M0]
SIGNED = [E4M3, E5M2, E5M6]


def names(fmt: FloatFormat) -> str:
    return fmt.name


def same_bits(ours: Tensor, theirs: Tensor) -> None:
    """Equal FP32 numbers, zeros of either sign apart; NaN where the other has NaN."""
    assert torch.equal(ours.isnan(), theirs.isnan())
    known = ~theirs.isnan()
    assert torch.equal(ours[known].view(torch.int32), theirs[known].view(torch.int32))


def every_code(fmt: FloatFormat) -> Tensor:
    codes = torch.arange(2**fmt.bits)
    return codes.to(torch.uint8) if fmt.bits == 8 else codes.to(torch.int16)


def finite_by_definition(fmt: FloatFormat) -> list[float]:
    """All numbers >= 0 of a format, ascending, so that an index is a code: the docstring's two lines in Python."""
    step = 2**fmt.mantissa_bits
    numbers = []
    for exponent in range(2**fmt.exponent_bits):
        for mantissa in range(step):
            if exponent == 0:
                numbers.append(2.0 ** (1 - fmt.bias) * mantissa / step)
            else:
                numbers.append(2.0 ** (exponent - fmt.bias) * (1 + mantissa / step))
    return numbers[:-1] if fmt.finite_only else numbers[:-step]


@pytest.mark.parametrize("fmt", TORCHS, ids=names)
def test_every_code_point_is_torchs(fmt: FloatFormat) -> None:
    codes = every_code(fmt)
    theirs = codes.view(fmt.dtype).float()
    same_bits(decode(codes, fmt), theirs)
    known = ~theirs.isnan()
    assert known.sum() == {"E4M3": 254, "E5M2": 250, "E8M0": 255}[fmt.name]
    assert torch.equal(encode(theirs, fmt)[known], codes[known])


def test_every_code_point_of_e5m6_is_half_precision_less_four_bits() -> None:
    codes = every_code(E5M6)
    halves = (codes.int() << 4).to(torch.int16).view(torch.float16).float()
    same_bits(decode(codes, E5M6), halves)
    known = ~halves.isnan()
    assert known.sum() == 4096 - 2 * 63
    assert torch.equal(encode(halves, E5M6)[known], codes[known])


def hard_floats(fmt: FloatFormat) -> Tensor:
    """A million: any bits at all; numbers of the format's range; half-way cases, their neighbours, and what is too large."""
    random = torch.Generator().manual_seed(1)
    any_bits = torch.randint(-(2**31), 2**31, (400_000,), generator=random).to(torch.int32).view(torch.float32)
    low, high = math.log2(fmt.smallest) - 3, math.log2(fmt.largest) + 3
    ranged = torch.exp2(torch.empty(300_000).uniform_(low, min(high, 127.9), generator=random))
    numbers = finite_by_definition(fmt) if fmt.mantissa_bits else [2.0**e for e in range(-127, 128)]
    following = 2 * numbers[-1] - numbers[-2]
    numbers = torch.tensor([*numbers, following, 1.9 * fmt.largest], dtype=torch.float64)
    half_way = ((numbers[1:] + numbers[:-1]) / 2).float()
    picked = half_way[torch.randint(0, len(half_way), (100_000,), generator=random)]
    infinity = torch.tensor(torch.inf)
    ties = torch.cat([picked, torch.nextafter(picked, infinity), torch.nextafter(picked, -infinity)])
    positive = torch.cat([ranged, ties])
    sign = torch.randint(0, 2, positive.shape, generator=random) * 2.0 - 1
    return torch.cat([any_bits, positive * sign])


@pytest.mark.parametrize("fmt", TORCHS, ids=names)
def test_a_million_floats_are_encoded_as_torch_casts_them(fmt: FloatFormat) -> None:
    x = hard_floats(fmt)
    assert len(x) == 10**6 and x.isnan().any() and x.isinf().sum() < 10
    x = torch.cat([x, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, fmt.largest, -fmt.largest])])
    ours, theirs = encode(x, fmt), x.to(fmt.dtype).view(torch.uint8)
    assert torch.equal(ours, theirs), [
        (x[i].item(), ours[i].item(), theirs[i].item()) for i in (ours != theirs).nonzero()[:5]
    ]
    # The cases that were meant are there: ties, subnormal results, too large ones.
    finite = theirs.view(fmt.dtype).float().abs()
    assert (finite == fmt.largest).sum() > 1000
    if fmt.mantissa_bits:
        assert ((finite < fmt.smallest_normal) & (finite > 0)).sum() > 10_000


@pytest.mark.parametrize("fmt", SIGNED, ids=names)
def test_rounding_is_to_the_nearest_of_all_numbers_of_the_format(fmt: FloatFormat) -> None:
    """For E5M6, too, which torch cannot cast to: a search among all numbers, in Python."""
    numbers = finite_by_definition(fmt)
    x = hard_floats(fmt)[400_000::150]
    for given, code in zip(x.tolist(), encode(x, fmt).tolist(), strict=True):
        sign, magnitude = int(given < 0), abs(given)
        above = bisect.bisect_left(numbers, magnitude)
        if above == len(numbers):
            # As if one more number followed: nearer to it is too large. It is even, so half-way goes there, too.
            last, following = numbers[-1], 2 * numbers[-1] - numbers[-2]
            nearest = above if magnitude >= (last + following) / 2 and not fmt.finite_only else above - 1
        else:
            nearest = min((above - 1, above), key=lambda i: (abs(numbers[i] - magnitude), i % 2)) if above else 0
        assert code == nearest + (sign << (fmt.bits - 1)), given


@pytest.mark.parametrize("fmt", SIGNED, ids=names)
def test_round_to_gives_numbers_of_the_format_and_saturates(fmt: FloatFormat) -> None:
    x = hard_floats(fmt)
    rounded = round_to(x, fmt)
    assert torch.equal(rounded.isnan(), x.isnan()) and not rounded.isinf().any()
    assert (rounded[x > fmt.largest] == fmt.largest).all() and (rounded[x < -fmt.largest] == -fmt.largest).all()
    same_bits(round_to(rounded, fmt), rounded)
    inside = x.abs() <= fmt.largest
    # Half a step: 2^-(M+1) of a normal number, half the smallest one below.
    half_step = torch.maximum(x.abs() * 2.0 ** -(fmt.mantissa_bits + 1), torch.tensor(fmt.smallest / 2))
    assert ((rounded - x).abs() <= half_step)[inside].all()


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=names)
def test_the_limits_are_torchs(fmt: FloatFormat) -> None:
    info = torch.finfo(fmt.dtype)
    assert (fmt.largest, fmt.smallest_normal, fmt.bits) == (info.max, info.smallest_normal, info.bits)
    assert fmt.smallest == torch.tensor([1], dtype=torch.uint8).view(fmt.dtype).float().item()


def test_the_limits_of_the_others_are_those_of_the_table() -> None:
    assert (E5M6.bits, E5M6.largest, E5M6.smallest_normal, E5M6.smallest) == (12, 65024.0, 2.0**-14, 2.0**-20)
    assert (E8M0.bits, E8M0.largest, E8M0.smallest) == (8, 2.0**127, 2.0**-127)
    assert decode(torch.tensor([[0b11110111111]], dtype=torch.int16), E5M6).item() == E5M6.largest


def test_codes_keep_shape_and_type() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16)[:, ::2]
    assert encode(x, E4M3).dtype == encode(x, E5M2).dtype == encode(x, E8M0).dtype == torch.uint8
    assert encode(x, E5M6).dtype == torch.int16 and encode(x, E5M6).shape == x.shape
    assert torch.equal(decode(encode(x, E5M6), E5M6)[0, 1], round_to(x[0, 1], E5M6))


def test_the_short_ways_of_e5m6_are_the_definition() -> None:
    codes = every_code(E5M6)
    same_bits(decode_e5m6(codes), decode(codes, E5M6))
    x = hard_floats(E5M6).clamp(-E5M6.largest, E5M6.largest)
    short, long = decode(encode_e5m6(x), E5M6), decode(encode(x, E5M6), E5M6)
    same_bits(short + 0.0, long + 0.0)  # -0 + 0 is 0: a zero may have lost its sign
    assert encode_e5m6(x).dtype == torch.int16 and x.isnan().any()


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E5M6], ids=lambda fmt: fmt.name)
def test_rounding_without_codes_is_rounding_with_them(fmt: FloatFormat) -> None:
    x = hard_floats(fmt).clamp(-fmt.largest, fmt.largest)
    same_bits(round_in_place(x.clone(), fmt) + 0.0, round_to(x, fmt) + 0.0)  # a zero may have lost its sign


# ---- power-of-two scales -----------------------------------------------------------------------------------------------


def test_powers_of_two_round_up_exactly() -> None:
    random = torch.Generator().manual_seed(2)
    powers = torch.tensor([2.0**e for e in range(-126, 128)])
    infinity = torch.tensor(torch.inf)
    x = torch.cat(
        [
            powers,
            torch.nextafter(powers, infinity)[:-1],  # above 2^127 there is no other
            torch.nextafter(powers, -infinity)[1:],
            torch.exp2(torch.empty(50_000).uniform_(-126, 126.9, generator=random)),
        ]
    )
    expected = []
    for value in x.tolist():
        fraction, exponent = math.frexp(value)  # value = fraction * 2^exponent, 1/2 <= fraction < 1
        expected.append(2.0 ** (exponent - 1) if fraction == 0.5 else 2.0**exponent)
    assert power_of_two_at_least(x).tolist() == expected


def test_powers_of_two_at_the_ends() -> None:
    x = torch.tensor([1e-45, 2.0**-127, torch.inf, torch.nan])
    out = power_of_two_at_least(x)
    assert out[:3].tolist() == [2.0**-126, 2.0**-126, math.inf] and out[3].isnan()
    # torch's cast rounds to the nearest: a scale of 1.25 would become 1, and 448 * 1.25 would not fit under it.
    assert (
        torch.tensor(1.25).to(torch.float8_e8m0fnu).float() == 1.0 and power_of_two_at_least(torch.tensor(1.25)) == 2.0
    )


def test_a_power_of_two_is_one_byte_of_e8m0() -> None:
    scale = power_of_two_at_least(torch.rand(1000) * 100)
    assert torch.equal(decode(encode(scale, E8M0), E8M0), scale)


# ---- packing -----------------------------------------------------------------------------------------------------------


def test_two_codes_of_twelve_bits_take_three_bytes() -> None:
    packed = pack_e5m6(torch.tensor([0xABC, 0x123], dtype=torch.int16))
    assert packed.dtype == torch.uint8 and packed.tolist() == [0xBC, 0x3A, 0x12]
    codes = torch.randint(0, 4096, (3, 5, 64), generator=torch.Generator().manual_seed(3)).to(torch.int16)
    packed = pack_e5m6(codes)
    assert packed.nbytes == 1.5 * codes.numel() and packed.shape == (3, 5, 96)
    assert torch.equal(unpack_e5m6(packed), codes)
    every = every_code(E5M6)
    assert torch.equal(unpack_e5m6(pack_e5m6(every)), every)
