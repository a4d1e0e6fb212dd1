"""The Triton kernels in Triton's interpreter: against `exact`, and against their definitions in FP64 and torch's casts."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from interpreted_kernels import Job, interpret
from torch import Tensor

from dsv3_mini.errors import ConfigError
from dsv3_mini.fp8.backends import triton_backend
from dsv3_mini.fp8.backends.triton_backend import Triton
from dsv3_mini.fp8.formats import E4M3, E5M2, E5M6, FloatFormat
from dsv3_mini.fp8.gemm import gemm, grouped_gemm
from dsv3_mini.fp8.quantize import Quantized, quantize

BLOCK = (128, 128)
TILE = (1, 128)

# name -> m, n, k, tile of b, format of a. Blocks of the kernel: 64 rows, 128 columns, 128 along k.
GEMMS = {
    "one block": (64, 128, 128, BLOCK, E4M3),
    "a number": (1, 1, 1, BLOCK, E4M3),
    "ragged everywhere": (70, 200, 300, BLOCK, E4M3),
    "one row, long": (1, 130, 2049, BLOCK, E4M3),
    "one past a block": (65, 129, 129, BLOCK, E4M3),
    "tiles by tiles": (70, 200, 300, TILE, E4M3),
    "E5M2 by E4M3": (33, 65, 257, TILE, E5M2),
}
# name -> rows of each expert, n, k, rows that belong to none
GROUPS = {
    "uneven, one empty": ([5, 0, 130, 3], 200, 300, 0),
    "the first and the last are empty": ([0, 64, 1, 0], 130, 128, 0),
    "one takes all, of three": ([0, 129, 0], 65, 257, 0),
    "one expert": ([70], 40, 130, 0),
    "nobody": ([0, 0], 40, 130, 0),
    "rows past the last end": ([3, 66], 40, 130, 7),
}


def numbers(*shape: int, seed: int) -> Tensor:
    """Random numbers whose 128-wide tiles differ in size by powers of ten, so that a scale taken from elsewhere shows."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=random)
    tiles = [-(-side // 128) for side in shape[-2:]]
    size = torch.randn(*shape[:-2], *tiles, generator=random).mul(2).exp()
    size = size.repeat_interleave(128, -2)[..., : shape[-2], :].repeat_interleave(128, -1)[..., : shape[-1]]
    rows = torch.randn(*shape[:-1], 1, generator=random).exp()  # rows of one block differ too
    return x * size * rows


def operands(name: str) -> tuple[Quantized, Quantized]:
    m, n, k, tile, fmt = GEMMS[name]
    return quantize(numbers(m, k, seed=1), TILE, fmt), quantize(numbers(n, k, seed=2), tile, E4M3)


def broken_operands() -> tuple[Quantized, Quantized]:
    """Row 1 of a has the NaN that a GPU makes, all of its bits ones."""
    a, b = operands("one past a block")
    a.scale[1, 0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    return a, b


def groups(name: str) -> tuple[Quantized, Quantized, Tensor]:
    sizes, n, k, more = GROUPS[name]
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    rows = numbers(sum(sizes) + more, k, seed=3)
    return quantize(rows, TILE, E4M3), quantize(numbers(len(sizes), n, k, seed=4), BLOCK, E4M3), ends


def by_definition(x: Quantized) -> Tensor:
    """q * scale in FP64, with each number's scale looked up by division: independent of `dequantize`."""
    rows, columns = (torch.arange(side) // tile for side, tile in zip(x.q.shape[-2:], x.tile, strict=True))
    return x.q.double() * x.scale.double()[..., rows[:, None], columns[None, :]]


# Every positive E4M3 number, the middle between each two, and what lies a hair beside it. The 448 makes the scale 1.
POINTS = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
MIDDLES = (POINTS[1:] + POINTS[:-1]) / 2
HARD = torch.cat([POINTS, MIDDLES, MIDDLES * (1 + 2**-20), MIDDLES * (1 - 2**-20), torch.tensor([124.3, 2.0**-20])])


def activations() -> dict[str, Tensor]:
    hard = torch.cat([HARD, -HARD])
    hard = torch.cat([hard, hard.new_zeros(-len(hard) % 127)]).view(-1, 127)
    mixed = numbers(37, 300, seed=5)
    mixed[3, 128:256] = 0  # a tile of zeros
    mixed[4, 7] = 3e7  # an outlier: all that shares its tile becomes small
    mixed[5] *= 1e-30
    return {
        "every number and every tie": torch.cat([hard, torch.full((len(hard), 1), 448.0)], dim=1),
        "ragged": mixed,
        "BF16": mixed.bfloat16(),
        "batch and sequence": numbers(2, 5, 130, seed=6),
        "nothing": torch.empty(0, 130),
    }


BROKEN = {"Inf": torch.inf, "NaN": torch.nan}
WEIGHTS = {"ragged": (130, 300), "one block": (128, 128), "a layer's experts": (3, 65, 257)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that the interpreter is asked for in this file: one process, as starting it is most of the time."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    jobs: dict[str, Job] = {}
    for name in GEMMS:
        a, b = operands(name)
        jobs[f"gemm, {name}, bf16"] = ("gemm", (a, b, torch.bfloat16))
        jobs[f"gemm, {name}, fp32"] = ("gemm", (a, b, torch.float32))
    jobs["gemm, broken"] = ("gemm", (*broken_operands(), torch.bfloat16))
    for name in GROUPS:
        a, b, ends = groups(name)
        jobs[f"grouped, {name}, bf16"] = ("grouped_gemm", (a, b, ends, torch.bfloat16))
        jobs[f"grouped, {name}, fp32"] = ("grouped_gemm", (a, b, ends, torch.float32))
    for name, x in activations().items():
        for power_of_two in (False, True):
            jobs[f"quantize, {name}, {power_of_two}"] = ("quantize_activations", (x, power_of_two))
    for name, value in BROKEN.items():
        x = numbers(3, 300, seed=8)
        x[1, 130] = value
        jobs[f"quantize, {name}"] = ("quantize_activations", (x, True))
    for name, shape in WEIGHTS.items():
        weight = quantize(numbers(*shape, seed=7), BLOCK, E4M3)
        for dtype in (torch.bfloat16, torch.float32):
            jobs[f"dequantize, {name}, {dtype}"] = ("dequantize_weight", (weight, dtype))
    jobs["dequantize, refused"] = ("dequantize_weight", (quantize(torch.ones(4, 128), TILE, E4M3),))
    return interpret(jobs, tmp_path_factory.mktemp("interpreted"))


# ---- multiplying -----------------------------------------------------------------------------------------------------


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number."""
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def assert_same_bf16(got: Tensor, expected: Tensor) -> None:
    """FP32 sums in another order lie now and then on two sides of a BF16 rounding edge: there, in fewer than one of a
    thousand numbers, the results differ by a BF16 step, up to 0.8% of the number. The others are equal."""
    assert relative_error(got, expected) <= 1e-3
    differs = got != expected
    assert differs.sum() <= 1e-3 * got.numel()
    torch.testing.assert_close(got[differs], expected[differs], rtol=2**-7, atol=0)


def assert_is_definition(got: Tensor, a: Tensor, b: Tensor) -> None:
    """FP32 sums of k products are off by at most about k * 2^-24 of the sum of the products' sizes, and by far less as
    errors cancel; k here is up to 2049, so 2^-18 of that sum is ample. One product with a wrong scale is far more."""
    assert ((got.double() - a @ b.T).abs() <= 2**-18 * (a.abs() @ b.abs().T)).all()


@pytest.mark.parametrize("name", GEMMS)
def test_gemm_is_exact(results: dict[str, Any], name: str) -> None:
    a, b = operands(name)
    bf16, fp32 = results[f"gemm, {name}, bf16"], results[f"gemm, {name}, fp32"]
    assert (bf16.dtype, fp32.dtype) == (torch.bfloat16, torch.float32)
    assert_same_bf16(bf16, gemm(a, b, "exact", torch.bfloat16))
    assert relative_error(fp32, gemm(a, b, "exact", torch.float32)) <= 1e-6
    assert_is_definition(fp32, by_definition(a), by_definition(b))
    assert torch.equal(bf16, fp32.bfloat16())  # rounded once, to nearest even


def test_nan_stays_nan_in_bf16(results: dict[str, Any]) -> None:
    out = results["gemm, broken"]
    assert out[1].isnan().all() and out.isnan().sum() == out.shape[1]


@pytest.mark.parametrize("name", GROUPS)
def test_grouped_gemm_is_each_experts_gemm(results: dict[str, Any], name: str) -> None:
    a, b, ends = groups(name)
    bf16, fp32 = results[f"grouped, {name}, bf16"], results[f"grouped, {name}, fp32"]
    rows, weights = by_definition(a), by_definition(b)
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        assert_is_definition(fp32[begin:end], rows[begin:end], weights[expert])
        begin = end
    assert not fp32[begin:].any()  # rows of no expert
    assert torch.equal(bf16, fp32.bfloat16())
    if begin:
        assert_same_bf16(bf16[:begin], grouped_gemm(a, b, ends, "exact", torch.bfloat16)[:begin])


# ---- quantising ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("name", activations())
def test_activations_are_quantized_by_definition(results: dict[str, Any], name: str, power_of_two: bool) -> None:
    x, got = activations()[name], results[f"quantize, {name}, {power_of_two}"]
    assert (got.tile, got.columns, got.fmt) == (TILE, x.shape[-1], E4M3)
    assert got.q.shape == x.shape and got.q.dtype == torch.float8_e4m3fn
    for tile, columns in enumerate(x.float().split(128, dim=-1)):
        least = columns.abs().amax(-1) / 448
        scale = got.scale[..., tile]
        if power_of_two:
            mantissa, _ = torch.frexp(scale)
            assert (mantissa == 0.5).all() and (scale >= least).all()
            assert ((scale / 2 < least) | (least == 0)).all()
        else:
            assert torch.equal(scale[least > 0], least[least > 0])
        expected = (columns / scale[..., None]).to(torch.float8_e4m3fn)  # torch's cast rounds to nearest even
        assert torch.equal(got.q[..., tile * 128 : tile * 128 + 128].float(), expected.float())


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("name", activations())
def test_activations_are_quantized_as_quantize_does(results: dict[str, Any], name: str, power_of_two: bool) -> None:
    got = results[f"quantize, {name}, {power_of_two}"]
    expected = quantize(activations()[name], TILE, E4M3, power_of_two)
    assert torch.equal(got.q.float(), expected.q.float())
    assert torch.equal(got.scale, expected.scale)


@pytest.mark.parametrize("name", BROKEN)
def test_what_went_wrong_spoils_its_tile_and_no_other(results: dict[str, Any], name: str) -> None:
    values = results[f"quantize, {name}"].dequantize()
    assert values[1, 128:256].isnan().all()
    assert values.isnan().sum() == 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_dequantized_by_definition(results: dict[str, Any], name: str, dtype: torch.dtype) -> None:
    weight = quantize(numbers(*WEIGHTS[name], seed=7), BLOCK, E4M3)
    # A product of 4 and 24 bits is exact in FP64: rounding that to FP32, then to `dtype`, is the definition.
    assert torch.equal(results[f"dequantize, {name}, {dtype}"], by_definition(weight).float().to(dtype))


def test_weights_of_other_tiles_are_refused(results: dict[str, Any]) -> None:
    error = results["dequantize, refused"]
    assert isinstance(error, ConfigError) and "E4M3 with tiles (1, 128)" in str(error) and "\n" not in str(error)


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_asking_for_the_backend_imports_no_triton(results: dict[str, Any]) -> None:
    assert results["brought"] is False


@pytest.mark.parametrize(
    ("installed", "interpret", "capability", "said"),
    [
        (False, "1", None, "triton is not installed"),
        (True, "", None, "torch finds no CUDA device"),
        (True, "0", None, "torch finds no CUDA device"),
        (True, "", (8, 0), "this GPU's compute capability is (8, 0), and FP8 begins with (8, 9)"),
        (True, "", (8, 9), None),
        (True, "", (9, 0), None),
        (True, "", (10, 0), None),
        (True, "1", None, None),
    ],
)
def test_what_is_missing_is_one_line_that_names_a_way_out(
    monkeypatch: pytest.MonkeyPatch,
    installed: bool,
    interpret: str,
    capability: tuple[int, int] | None,
    said: str | None,
) -> None:
    monkeypatch.setattr(triton_backend, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    reason = Triton().missing()
    if said is None:
        assert reason is None
    else:
        assert reason.startswith(said) and "'exact'" in reason and "\n" not in reason


@pytest.mark.parametrize(
    ("interpret", "tile_a", "tile_b", "format_a", "said"),
    [
        ("", TILE, BLOCK, E4M3, "not cpu by cpu"),
        ("1", TILE, BLOCK, E4M3, None),
        ("1", TILE, TILE, E5M2, None),
        ("1", BLOCK, BLOCK, E4M3, "not (128, 128) by (128, 128)"),
        ("1", TILE, (256, 256), E4M3, "not (1, 128) by (256, 256)"),
        ("1", TILE, BLOCK, E5M6, "not E5M6 by E4M3"),
    ],
)
def test_what_it_cannot_multiply_it_refuses(
    monkeypatch: pytest.MonkeyPatch,
    interpret: str,
    tile_a: tuple,
    tile_b: tuple,
    format_a: FloatFormat,
    said: str | None,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    a, b = quantize(torch.ones(256, 256), tile_a, format_a), quantize(torch.ones(256, 256), tile_b, E4M3)
    reason = Triton().refuses(a, b)
    assert (reason is None) if said is None else (said in reason and "\n" not in reason)
