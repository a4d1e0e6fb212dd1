"""The GEMM interface: `exact` against FP64, the choice of a backend, and what each GPU backend hands to its library."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3_mini.errors import ConfigError
from dsv3_mini.fp8 import gemm as interface
from dsv3_mini.fp8.backends import deep_gemm as deep_gemm_backend
from dsv3_mini.fp8.backends.deep_gemm import DeepGemm, spread_out
from dsv3_mini.fp8.backends.exact import Exact
from dsv3_mini.fp8.backends.hopper import Hopper
from dsv3_mini.fp8.backends.scaled_mm import ScaledMM
from dsv3_mini.fp8.backends.triton_backend import Triton
from dsv3_mini.fp8.formats import E4M3, E5M2, E5M6
from dsv3_mini.fp8.gemm import Backend, backend, backends, gemm, grouped_gemm, grouped_wgrad, groups
from dsv3_mini.fp8.quantize import Quantized, quantize
from dsv3_mini.fp8.recipe import Fp8Recipe

ACTIVATIONS, WEIGHTS = (1, 128), (128, 128)
WHOLE = (2**20, 2**20)
LOADS = {"even": [4, 4, 4], "empty": [0, 7, 0, 0, 5, 0], "one": [9], "none": [0, 0], "large": [1, 130, 0, 140]}


def operands(m: int, n: int, k: int, b_tile: tuple[int, int] = WEIGHTS, seed: int = 0) -> tuple[Quantized, Quantized]:
    random = torch.Generator().manual_seed(seed)
    a = torch.randn(m, k, generator=random) * torch.exp2(torch.randint(-4, 5, (m, 1), generator=random).float())
    return quantize(a, ACTIVATIONS), quantize(torch.randn(n, k, generator=random), b_tile)


def experts(load: list[int], n: int, k: int) -> tuple[Quantized, Quantized, Tensor]:
    random = torch.Generator().manual_seed(sum(load) + n)
    a = quantize(torch.randn(sum(load), k, generator=random), ACTIVATIONS)
    b = quantize(torch.randn(len(load), n, k, generator=random), WEIGHTS)
    return a, b, torch.tensor(load).cumsum(0).to(torch.int32)


def close(ours: Tensor, theirs: Tensor, inner: int) -> None:
    """Equal but for the order in which FP32 adds up `inner` terms of their size."""
    bound = theirs.abs().max().item() if theirs.numel() else 0.0
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=bound * inner * 2.0**-24)


# ---- exact -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E5M6], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(
    "tiles", [(ACTIVATIONS, WEIGHTS), (ACTIVATIONS, ACTIVATIONS), (WEIGHTS, WEIGHTS), (WHOLE, WHOLE)], ids=str
)
@pytest.mark.parametrize("m, n, k", [(256, 128, 384), (5, 7, 9), (1, 192, 200)])
def test_exact_is_the_product_of_what_the_numbers_stand_for(m: int, n: int, k: int, tiles: Any, fmt: Any) -> None:
    a, b = quantize(torch.randn(m, k), tiles[0], fmt), quantize(torch.randn(n, k), tiles[1], fmt)
    expected = a.dequantize().double() @ b.dequantize().double().T
    out = gemm(a, b, "exact", torch.float32)
    assert out.dtype == torch.float32
    close(out, expected, k)
    assert torch.equal(gemm(a, b, "exact"), out.bfloat16())


class Loop(Exact):
    """`exact` with the loop that every backend inherits."""

    grouped_gemm = Backend.grouped_gemm
    grouped_wgrad = Backend.grouped_wgrad


@pytest.mark.parametrize("way", [Exact(), Loop()], ids=["exact", "loop"])
@pytest.mark.parametrize("load", LOADS.values(), ids=list(LOADS))
def test_each_expert_multiplies_its_own_rows(load: list[int], way: Backend) -> None:
    a, b, ends = experts(load, n=40, k=200)
    out = grouped_gemm(a, b, ends, way, torch.float32)
    assert out.shape == (sum(load), 40)
    owners = [expert for expert, rows in enumerate(load) for _ in range(rows)]
    rows, weights = a.dequantize().double(), b.dequantize().double()
    for row, expert in enumerate(owners):
        close(out[row], weights[expert] @ rows[row], 200)
    assert grouped_gemm(a, b, ends, way).dtype == torch.bfloat16


@pytest.mark.parametrize("in_fp32", [False, True])
@pytest.mark.parametrize("way", [Exact(), Loop()], ids=["exact", "loop"])
def test_each_expert_sums_over_its_own_tokens(way: Backend, in_fp32: bool) -> None:
    ends = torch.tensor([128, 128, 384], dtype=torch.int32)
    a, b = (quantize(torch.randn(384, n), (128, 1), in_fp32=in_fp32).transpose() for n in (40, 24))
    out = grouped_wgrad(a, b, ends, way)
    left, right = a.dequantize().double(), b.dequantize().double()
    close(out[0], left[:, :128] @ right[:, :128].T, 128)
    close(out[2], left[:, 128:] @ right[:, 128:].T, 256)
    assert out.shape == (3, 40, 24) and not out[1].any()
    with pytest.raises(ConfigError, match="with one T"):
        grouped_wgrad(a, b.along(0, 128), ends, way)


@pytest.mark.parametrize("chosen", ["exact", "hopper", "auto"])
def test_a_recipe_holds_operands_in_fp32_for_those_who_multiply_so(
    chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is kept never; nor anything where "auto" could take a tensor core."""
    x = torch.randn(130, 200)
    recipe = Fp8Recipe(backend=chosen)
    assert recipe.weight(x).in_fp32 and recipe.activation(x).in_fp32 and not recipe.activation(x, kept=True).in_fp32
    monkeypatch.setattr("dsv3_mini.fp8.gemm._present", lambda: (Triton(), Exact()))
    assert recipe.gradient(x).in_fp32 == (chosen != "auto")


def test_grouped_takes_tiles_that_rows_share() -> None:
    """One scale for all activations, as in the per-tensor ablation."""
    a, b, ends = experts([3, 0, 5], n=16, k=130)
    whole = quantize(a.dequantize(), WHOLE)
    out = grouped_gemm(whole, b, ends, "exact", torch.float32)
    close(out[3:], whole.dequantize()[3:].double() @ b.dequantize()[2].double().T, 130)
    close(out[:3], whole.dequantize()[:3].double() @ b.dequantize()[0].double().T, 130)


def test_experts_without_rows_are_never_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, ends = experts([2, 0, 0, 3], n=16, k=128)
    taken: list[int] = []
    matrix = Quantized.matrix
    monkeypatch.setattr(Quantized, "matrix", lambda self, index: taken.append(index) or matrix(self, index))
    grouped_gemm(a, b, ends, "exact")
    assert taken == [0, 3] and list(groups(ends)) == [(0, 0, 2), (3, 2, 5)]


# ---- the choice --------------------------------------------------------------------------------------------------------


def test_backends_by_name() -> None:
    assert list(backends()) == ["deep_gemm", "scaled_mm", "triton", "exact", "hopper"]
    assert list(backends())[:4] == list(interface.AUTO)
    assert all(name == one.name for name, one in backends().items())
    assert backend("exact") is backends()["exact"] and backend("hopper").missing() is None
    with pytest.raises(
        ConfigError, match="'magic' is not known: choose one of auto, deep_gemm, scaled_mm, triton, exact, hopper"
    ):
        backend("magic")


def test_auto_is_exact_on_a_cpu() -> None:
    a, b = operands(8, 16, 256)
    assert torch.equal(gemm(a, b), gemm(a, b, "exact"))
    assert gemm(a, b).dtype == torch.bfloat16


class Fake(Exact):
    """Stands for a GPU backend: it can, or cannot, and counts what it is given."""

    def __init__(self, name: str, missing: str | None = None, refuses: str | None = None) -> None:
        self.name, self._missing, self._refuses, self.calls = name, missing, refuses, 0

    def missing(self) -> str | None:
        return self._missing

    def refuses(self, a: Quantized, b: Quantized) -> str | None:
        return self._refuses

    def gemm(self, a: Quantized, b: Quantized, out_dtype: torch.dtype) -> Tensor:
        self.calls += 1
        return super().gemm(a, b, out_dtype)


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Fake]]:
    """Four fakes in the places of the four that "auto" knows."""
    fakes = {name: Fake(name) for name in interface.AUTO}
    monkeypatch.setattr(interface, "backends", lambda: fakes)
    interface._present.cache_clear()
    yield fakes
    interface._present.cache_clear()


@pytest.mark.parametrize("name", interface.AUTO)
def test_auto_takes_the_first_that_is_there_and_can(name: str, others: dict[str, Fake]) -> None:
    before = list(interface.AUTO[: interface.AUTO.index(name)])
    for position, other in enumerate(before):
        if position % 2:
            others[other]._missing = "it is not there"
        else:
            others[other]._refuses = "not these"
    a, b = operands(2, 3, 4)
    gemm(a, b)
    assert {other: fake.calls for other, fake in others.items()} == {other: int(other == name) for other in others}


def test_one_that_is_asked_for_by_name_says_why_it_cannot(others: dict[str, Fake]) -> None:
    a, b = operands(2, 3, 4)
    others["triton"]._missing = "there is no GPU: use 'exact'"
    with pytest.raises(ConfigError, match="^FP8 backend 'triton' cannot run here: there is no GPU: use 'exact'$"):
        gemm(a, b, "triton")
    others["scaled_mm"]._refuses = "it takes no such tiles"
    with pytest.raises(
        ConfigError, match="'scaled_mm' cannot multiply these: it takes no such tiles; backend='exact' takes all"
    ):
        gemm(a, b, "scaled_mm")


def test_a_backend_made_by_hand_is_used() -> None:
    one = Fake("mine")
    gemm(*operands(2, 3, 4), backend=one)
    assert one.calls == 1
    one._refuses = "no"
    with pytest.raises(ConfigError, match="'mine' cannot multiply these: no"):
        gemm(*operands(2, 3, 4), backend=one)


def test_shapes_must_fit() -> None:
    a, b = operands(8, 16, 256)
    for left, right in (
        (a, b.transpose()),
        (a, quantize(torch.ones(2, 16, 256))),
        (quantize(torch.ones(1, 8, 256)), b),
    ):
        with pytest.raises(ConfigError, match=r"must be \[m k\] and \[n k\]"):
            gemm(left, right)
    rows, weights, ends = experts([2, 3], 16, 256)
    for wrong in ((rows, weights, ends[:1]), (rows, b, ends), (rows.transpose(), weights, ends)):
        with pytest.raises(ConfigError, match=r"must be \[T k\], \[e n k\] and \[e\]"):
            grouped_gemm(*wrong)


def test_tensor_cores_refuse_other_tiles_formats_and_devices() -> None:
    a, b = operands(128, 128, 128)
    for name in ("scaled_mm", "deep_gemm"):
        one = backends()[name]
        assert "CUDA device, not cpu" in one.refuses(a, b)
        assert "(128, 128)" in one.refuses(quantize(torch.ones(128, 128), WEIGHTS), b)
        assert "E5M6" in one.refuses(quantize(torch.ones(128, 128), ACTIVATIONS, E5M6), b)
    both = quantize(torch.ones(16, 128), ACTIVATIONS, E5M2), quantize(torch.ones(128, 128), WEIGHTS, E5M2)
    assert "E5M2" in ScaledMM().refuses(*both) and "E5M2" in DeepGemm().refuses(*both)
    assert "not 130 and 128" in DeepGemm().refuses(*operands(8, 128, 130))
    assert "not 128 and 96" in DeepGemm().refuses(*operands(8, 96, 128))
    assert "(1, 128)" in DeepGemm().refuses(*operands(8, 128, 128, b_tile=ACTIVATIONS))


def machine(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, cuda: str | None = "13.0") -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Something")


def test_a_machine_that_cannot_is_told_why_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled, deep = ScaledMM(), DeepGemm()
    machine(monkeypatch, None)
    assert scaled.missing() == deep.missing() == "torch finds no CUDA device here: use 'exact'"
    machine(monkeypatch, (8, 9))
    assert scaled.missing() == deep.missing()
    assert scaled.missing() == "NVIDIA Something is no Hopper GPU (compute capability 9.0): use 'exact'"
    machine(monkeypatch, (9, 0), cuda="12.6")
    assert scaled.missing() == "this torch is built for CUDA 12.6, tiles need 12.9 or newer: use 'triton'"
    for version in ("12.9", "13.0", "12.10"):
        machine(monkeypatch, (9, 0), version)
        assert scaled.missing() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "deep_gemm is not installed: use 'scaled_mm'" in deep.missing()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(deep_gemm_backend, "_package", lambda: SimpleNamespace(fp8_gemm_nt=None))
    assert "has no m_grouped_fp8_gemm_nt_contiguous: install its newest version" in deep.missing()
    monkeypatch.setattr(
        deep_gemm_backend, "_package", lambda: SimpleNamespace(**dict.fromkeys(deep_gemm_backend.NEEDS))
    )
    assert deep.missing() is None


# ---- scaled_mm: its rules, as cuBLAS has them ----------------------------------------------------------------------------


def cublas(
    a: Tensor, b: Tensor, scale_a: Tensor, recipe_a: Any, scale_b: Tensor, recipe_b: Any, output_dtype: torch.dtype
) -> Tensor:
    """What torch hands on to cuBLAS, with the rules of its documentation, computed from the layout alone."""
    (m, k), n = a.shape, b.shape[1]
    depth, tall = -(-k // 128), -(-n // 128)
    assert m % 4 == 0 and n % 16 == 0 and k % 16 == 0 and m and n and k
    assert a.dtype == b.dtype == torch.float8_e4m3fn and a.stride() == (k, 1) and b.stride() == (1, k)
    assert recipe_a == F.ScalingType.BlockWise1x128
    assert scale_a.shape == (m, depth) and scale_a.stride() == (1, m) and scale_a.dtype == torch.float32
    left = a.float() * scale_a.repeat_interleave(128, 1)[:, :k]
    if recipe_b == F.ScalingType.BlockWise128x128:
        fours = -(-depth // 4) * 4
        assert scale_b.shape == (fours, tall) and scale_b.stride() == (1, fours)
        spread = scale_b[:depth].repeat_interleave(128, 0)[:k].repeat_interleave(128, 1)[:, :n]
    else:
        assert recipe_b == F.ScalingType.BlockWise1x128
        assert scale_b.shape == (n, depth) and scale_b.stride() == (1, n)
        spread = scale_b.T.repeat_interleave(128, 0)[:k]
    return (left @ (b.float() * spread)).to(output_dtype)


@settings(max_examples=30)
@given(
    m=st.integers(1, 140), n=st.integers(1, 300), k=st.integers(1, 700), tile=st.sampled_from([WEIGHTS, ACTIVATIONS])
)
def test_scaled_mm_is_given_what_it_asks_for(m: int, n: int, k: int, tile: tuple[int, int]) -> None:
    a, b = operands(m, n, k, tile)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_mm", cublas)
        out = ScaledMM().gemm(a, b, torch.float32)
    assert out.shape == (m, n)
    close(out, Exact().gemm(a, b, torch.float32), 2 * k)


@pytest.mark.parametrize("tile", [WEIGHTS, ACTIVATIONS], ids=str)
@pytest.mark.parametrize("m, n, k", [(128, 256, 512), (64, 128, 128), (5, 384, 896)])
def test_torch_itself_accepts_shapes_and_strides(m: int, n: int, k: int, tile: tuple[int, int]) -> None:
    """On meta, torch checks what it would on a GPU; its rule there knows whole tiles only."""
    a, b = (Quantized(x.q.to("meta"), x.scale.to("meta"), x.tile, x.fmt, x.columns) for x in operands(m, n, k, tile))
    out = ScaledMM().gemm(a, b, torch.bfloat16)
    assert out.shape == (m, n) and out.dtype == torch.bfloat16 and out.is_meta
    with pytest.raises(RuntimeError, match="blockwise scaling"):
        F.scaled_mm(a.q, b.q.T, a.scale[:-1], F.ScalingType.BlockWise1x128, b.scale.T, F.ScalingType.BlockWise1x128)


def test_nothing_is_copied_but_scales_where_sizes_are_right() -> None:
    a, b = operands(128, 128, 256)
    seen: list[int] = []

    def look(left: Tensor, right: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.extend((left.data_ptr(), right.data_ptr()))
        return cublas(left, right, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_mm", look)
        ScaledMM().gemm(a, b, torch.bfloat16)
    assert seen == [a.q.data_ptr(), b.q.data_ptr()]


# ---- deep_gemm: a package that keeps its documented rules ------------------------------------------------------------------


def fake_package() -> SimpleNamespace:
    """DeepGEMM's two functions by its documentation: results written into `out`, every block of one expert or of nobody."""
    block = 128

    def values(numbers: Tensor, scale: Tensor, tile: tuple[int, int]) -> Tensor:
        assert numbers.is_contiguous() and scale.dtype == torch.float32
        return Quantized(numbers, scale, tile, E4M3, numbers.shape[-1]).dequantize()

    def dense(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], out: Tensor) -> None:
        assert out.dtype in (torch.bfloat16, torch.float32)
        out.copy_(values(*a, (1, 128)) @ values(*b, (128, 128)).T)

    def grouped(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], out: Tensor, owner: Tensor) -> None:
        assert out.dtype == torch.bfloat16 and owner.dtype == torch.int32 and len(owner) == len(out) == len(a[0])
        assert len(owner) % block == 0
        rows, weights = values(*a, (1, 128)), values(*b, (128, 128))
        out.fill_(torch.nan)  # rows of nobody hold anything
        for start in range(0, len(owner), block):
            here = owner[start : start + block]
            first = here[0].item()
            if first < 0:
                assert (here == -1).all()
                continue
            assert set(here.tolist()) <= {first, -1}
            out[start : start + block] = (rows[start : start + block] @ weights[first].T).masked_fill(
                (here < 0)[:, None], torch.nan
            )

    return SimpleNamespace(
        fp8_gemm_nt=dense,
        m_grouped_fp8_gemm_nt_contiguous=grouped,
        get_mk_alignment_for_contiguous_layout=lambda: block,
    )


@pytest.fixture
def deep(monkeypatch: pytest.MonkeyPatch) -> DeepGemm:
    monkeypatch.setattr(deep_gemm_backend, "_package", fake_package)
    return DeepGemm()


def test_deep_gemm_is_given_what_it_asks_for(deep: DeepGemm) -> None:
    a, b = operands(70, 192, 384)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(deep.gemm(a, b, dtype), Exact().gemm(a, b, torch.float32).to(dtype))


@pytest.mark.parametrize("load", [*LOADS.values(), [128, 256], [127, 0, 129, 1]], ids=str)
def test_deep_gemm_gets_every_expert_in_whole_blocks(load: list[int], deep: DeepGemm) -> None:
    a, b, ends = experts(load, n=64, k=256)
    out = deep.grouped_gemm(a, b, ends, torch.bfloat16)
    assert torch.equal(out.isfinite(), torch.ones_like(out, dtype=torch.bool))
    # The same numbers, multiplied in other blocks of rows: FP32 may add them up in another order, then BF16 rounds.
    torch.testing.assert_close(out, Exact().grouped_gemm(a, b, ends, torch.bfloat16), rtol=2.0**-7, atol=1e-3)


@given(load=st.lists(st.integers(0, 9), min_size=1, max_size=8), block=st.integers(1, 6))
def test_rows_are_spread_out_to_whole_blocks(load: list[int], block: int) -> None:
    ends = torch.tensor(load).cumsum(0).to(torch.int32)
    group, place = spread_out(ends, sum(load), block)
    expected, begin = [], 0
    for expert, rows in enumerate(load):
        expected += [(expert, begin + i) for i in range(rows)]
        begin += -(-rows // block) * block
    assert list(zip(group.tolist(), place.tolist(), strict=True)) == expected


def test_hopper_is_never_chosen_by_itself() -> None:
    assert "hopper" not in interface.AUTO and isinstance(backends()["hopper"], Hopper)
