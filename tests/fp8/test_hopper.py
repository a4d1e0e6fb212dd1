"""The emulated tensor core: against the same arithmetic in Python's fractions, and the report's numbers at K = 4096."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from dsv3_mini.errors import ConfigError
from dsv3_mini.fp8.backends.exact import Exact
from dsv3_mini.fp8.backends.hopper import Hopper
from dsv3_mini.fp8.formats import E4M3, E5M2, FloatFormat
from dsv3_mini.fp8.gemm import gemm, grouped_gemm
from dsv3_mini.fp8.quantize import Quantized, quantize


def unscaled(numbers: Tensor, fmt: FloatFormat = E4M3) -> Quantized:
    """Numbers as they are, under a scale of 1."""
    return Quantized(numbers.to(fmt.dtype), torch.ones(1, 1), (2**20, 2**20), fmt, numbers.shape[-1])


def floor_log2(x: Fraction) -> int:
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if x >= Fraction(2) ** e else e - 1


def cut(x: Fraction, grain: Fraction) -> Fraction:
    return math.trunc(x / grain) * grain


def tensor_core(left: list[Fraction], right: list[Fraction], bits: int, products: int) -> Fraction:
    """The docstring's three lines, in numbers that never round."""
    total = Fraction(0)
    for start in range(0, len(left), products):
        terms = [x * y for x, y in zip(left[start : start + products], right[start : start + products], strict=True)]
        largest = max(abs(x) for x in [*terms, total])
        if largest == 0:
            continue
        grain = Fraction(2) ** (floor_log2(largest) - (bits - 1))
        total = cut(total, grain) + sum(cut(x, grain) for x in terms)
        if total:
            total = cut(total, Fraction(2) ** (floor_log2(abs(total)) - (bits - 1)))
    return total


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("bits, products", [(14, 32), (10, 32), (14, 8), (6, 5)])
@pytest.mark.parametrize("every", [None, 128, 64, 96])
def test_every_bit_is_that_of_the_definition(every: int | None, bits: int, products: int, fmt: FloatFormat) -> None:
    m, n, k = 3, 4, 200  # 200 is no multiple of any of them
    a, b = unscaled(torch.randn(m, k) * 8, fmt), unscaled(torch.randn(n, k) * 8, fmt)
    a.q[1, :100] = 0  # a first step of nothing
    out = Hopper(every, bits, products).gemm(a, b, torch.float32)
    length = every or k
    for i in range(m):
        left = [Fraction(x) for x in a.numbers()[i].tolist()]
        for j in range(n):
            right = [Fraction(x) for x in b.numbers()[j].tolist()]
            promoted = torch.zeros(())
            for start in range(0, k, length):
                interval = slice(start, start + length)
                promoted += float(tensor_core(left[interval], right[interval], bits, products))
            assert out[i, j].item() == promoted.item()


def errors(k: int, every: int | None, bits: int = 14, size: int = 64) -> tuple[float, float]:
    """Of [size size] sums over K of random normal numbers, under one scale, against the exact sums of the same FP8 numbers:

    - the largest relative error, |error| / |true|, of sums at least a quarter as large as they typically are (root mean
      square). A sum that happens to cancel is near zero, and relative to that any error is large.
    - the root mean square of all errors over that of the true sums.
    """
    random = torch.Generator().manual_seed(0)
    a, b = (quantize(torch.randn(size, k, generator=random), (2**20, 2**20)) for _ in range(2))
    true = a.dequantize().double() @ b.dequantize().double().T
    error = Hopper(every, bits).gemm(a, b, torch.float32).double() - true
    typical = true.square().mean().sqrt()
    large = true.abs() >= typical / 4
    return (error / true)[large].abs().max().item(), (error.square().mean().sqrt() / typical).item()


def test_the_error_of_the_report_and_its_cure() -> None:
    """Section 3.3.2: at K = 4096 a largest relative error of nearly 2%, and promotion every 128 elements against it."""
    (largest, typical), (largest_promoted, typical_promoted) = (errors(4096, every, size=256) for every in (None, 128))
    assert 0.015 < largest < 0.03
    assert largest > 8 * largest_promoted and typical > 8 * typical_promoted


def test_the_error_grows_with_k_and_not_where_sums_are_promoted() -> None:
    never = [errors(k, None)[1] for k in (256, 1024, 4096)]
    promoted = [errors(k, 128)[1] for k in (256, 1024, 4096)]
    assert never[0] < never[1] < never[2] and never[2] > 3 * never[0]
    assert max(promoted) < 1.5 * min(promoted)


def test_a_cut_goes_towards_zero() -> None:
    a, b = unscaled(torch.rand(16, 1024) * 3), unscaled(torch.rand(16, 1024) * 3)
    true = Exact().gemm(a, b, torch.float32).double()
    error = Hopper(None).gemm(a, b, torch.float32).double() - true
    assert (error < 0).all()
    assert (Hopper(None).gemm(a, unscaled(-b.numbers()), torch.float32).double() + true > 0).all()


def test_two_bits_less_make_it_four_times_worse_or_more() -> None:
    """Each bit halves the grain; and of numbers of 8 bits, such as products are, a finer grain cuts fewer."""
    typical = [errors(1024, None, bits)[1] for bits in (8, 10, 12, 14, 16)]
    for coarse, fine in zip(typical, typical[1:], strict=False):
        assert 3 < coarse / fine < 9


@pytest.mark.parametrize("every", [None, 32, 128, 200])
@pytest.mark.parametrize("tile", [(128, 128), (1, 128), (2**20, 2**20)], ids=str)
def test_scales_reach_the_partial_sums_that_they_belong_to(tile: tuple[int, int], every: int | None) -> None:
    random = torch.Generator().manual_seed(7)
    sizes = torch.exp2(torch.arange(300) // 128 * 4.0)  # the tiles along K differ by powers of 16
    a = torch.randn(40, 300, generator=random) * sizes
    b = torch.randn(150, 300, generator=random) / sizes
    left, right = quantize(a, (1, 128)), quantize(b, tile)
    exact = gemm(left, right, "exact", torch.float32)
    out = gemm(left, right, Hopper(every), torch.float32)
    # 14 bits, cut off some ten times: far below what a wrong scale does, which is a factor of two at the least.
    assert (out - exact).norm() < 2e-3 * exact.norm()
    assert (out - exact).norm() > 0


def test_a_promoted_interval_within_a_tile_sees_the_bare_numbers() -> None:
    """Scales then come after the tensor core, as on the chip: they change no bit of what it does."""
    a, b = quantize(torch.randn(5, 256)), quantize(torch.randn(6, 256), (128, 128))
    out = Hopper(128).gemm(a, b, torch.float32)
    bare = [
        Hopper(128).gemm(unscaled(a.numbers()[:, part]), unscaled(b.numbers()[:, part]), torch.float32)
        for part in (slice(0, 128), slice(128, 256))
    ]
    expected = torch.zeros(5, 6)
    for i, partial in enumerate(bare):
        expected += partial * (a.scale[:, i : i + 1] * b.scale[0, i])
    assert torch.equal(out, expected)


def test_grouped_is_each_expert_by_itself() -> None:
    load = [3, 0, 5, 0]
    a = quantize(torch.randn(8, 200))
    b = quantize(torch.randn(4, 24, 200), (128, 128))
    ends = torch.tensor(load).cumsum(0).to(torch.int32)
    out = grouped_gemm(a, b, ends, "hopper", torch.float32)
    assert torch.equal(out[:3], gemm(a.rows(0, 3), b.matrix(0), "hopper", torch.float32))
    assert torch.equal(out[3:], gemm(a.rows(3, 8), b.matrix(2), "hopper", torch.float32))


def test_blocks_of_rows_do_not_show() -> None:
    a, b = quantize(torch.randn(300, 128)), quantize(torch.randn(128, 128), (128, 128))
    whole = Hopper().gemm(a, b, torch.float32)
    assert torch.equal(whole[290:], Hopper().gemm(a.rows(290, 300), b, torch.float32))


def test_what_is_not_finite_stays_so() -> None:
    a, b = quantize(torch.full((2, 64), torch.nan)), quantize(torch.ones(3, 64), (128, 128))
    assert Hopper().gemm(a, b, torch.float32).isnan().all()


@pytest.mark.parametrize("wrong", [{"promote_every": 0}, {"bits": 0}, {"bits": 19}, {"products": 0}], ids=str)
def test_a_tensor_core_that_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} = {next(iter(wrong.values()))}"):
        Hopper(**wrong)
