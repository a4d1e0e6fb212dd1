"""The kernels compiled for Hopper on a machine with no GPU: E4M3 on the tensor core, promoted every 128.

In one other process, whatever this one's environment says: Triton compiles nothing once it was imported to interpret.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dsv3_mini.fp8.kernels.ptx import TensorCoreSum, tensor_core_sums

GEMMS = ["gemm", "gemm_of_tiles", "grouped_gemm"]
OTHERS = ["act_quant", "weight_dequant"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """PTX by kernel, of what `python -m dsv3_mini.fp8.kernels.compile` writes and of the counter-example."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    folder = tmp_path_factory.mktemp("compiled")
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("never_promoted.py")
    done = subprocess.run([sys.executable, str(script), str(folder)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in folder.glob("*.cubin"):
        assert path.read_bytes().startswith(b"\x7fELF")
    return {path.stem: path.read_text() for path in folder.glob("*.ptx")}


@pytest.mark.parametrize("name", GEMMS + OTHERS)
def test_every_kernel_is_compiled_for_hopper(compiled: dict[str, str], name: str) -> None:
    assert ".target sm_90a" in compiled[name]


@pytest.mark.parametrize("name", GEMMS)
def test_e4m3_is_multiplied_by_the_tensor_core(compiled: dict[str, str], name: str) -> None:
    instructions = [line for line in compiled[name].splitlines() if "wgmma.mma_async" in line]
    assert instructions and all(".f32.e4m3.e4m3 " in line for line in instructions)
    assert "mma.sync" not in compiled[name]  # the older instruction would take FP16, to which FP8 is widened first


@pytest.mark.parametrize("name", GEMMS)
def test_sums_end_after_128_products_and_go_on_in_fp32(compiled: dict[str, str], name: str) -> None:
    """Each of the tensor core's sums begins at 0, has 128 products, and is then multiplied and added in FP32: a thread
    holds 64 * 128 / 128 = 64 of the block's numbers, and adds each up."""
    found = tensor_core_sums(compiled[name])
    assert found
    for one in found:
        assert (one.operands, one.products, one.from_zero) == ("e4m3.e4m3", 128, True)
        assert one.promoted >= 64


def test_a_kernel_that_never_promotes_is_found_out(compiled: dict[str, str]) -> None:
    found = tensor_core_sums(compiled["never_promoted"])
    assert found and {one.operands for one in found} == {"e4m3.e4m3"}
    assert not any(one.from_zero and one.promoted for one in found)


@pytest.mark.parametrize("name", GEMMS)
def test_operands_are_fetched_sixteen_bytes_at_a_time(compiled: dict[str, str], name: str) -> None:
    """Asynchronously, so that the next steps' operands arrive while the tensor core works. A kernel in which the compiler
    lost sight of what is aligned would load byte by byte: right, and slow."""
    assert "cp.async.cg.shared.global" in compiled[name]
    assert "ld.global.b8" not in compiled[name]


@pytest.mark.parametrize("name", OTHERS)
def test_quantizing_needs_no_tensor_core(compiled: dict[str, str], name: str) -> None:
    assert tensor_core_sums(compiled[name]) == []


def test_activations_are_divided_exactly_and_cast_by_hoppers_own_instruction(compiled: dict[str, str]) -> None:
    assert "cvt.rn.satfinite.e4m3x2.f32" in compiled["act_quant"]
    assert "div.rn.f32" in compiled["act_quant"] and "div.full.f32" not in compiled["act_quant"]


# ---- the reader of PTX, on PTX written by hand ---------------------------------------------------------------------------


def wgmma(keep: str, operands: str = "e4m3.e4m3") -> str:
    return f"wgmma.mma_async.sync.aligned.m64n128k32.f32.{operands} {{%r1, %r2}}, %rd1, %rd2, {keep}, 1, 1;"


START = "mov.pred %p1, 0;\nmov.pred %p2, -1;\nsetp.lt.s32 %p3, %r9, 5;\n$L__BB0_2:\n"
WAIT = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
AGAIN = "@%p3 bra $L__BB0_2;\n"
FMA = "\tfma.rn.f32 \t%r5, %r1, %r6, %r5;\n"
MUL, ADD = "\tmul.rn.f32 \t%r4, %r1, %r6;\n", "\tadd.rn.f32 \t%r5, %r4, %r5;\n"


@pytest.mark.parametrize(
    ("ptx", "expected"),
    [
        # promoted after 64, with two numbers a thread
        (
            START + "\n".join([wgmma("%p1"), wgmma("%p2"), WAIT]) + 2 * FMA + AGAIN,
            [TensorCoreSum("e4m3.e4m3", 64, True, 2)],
        ),
        # the same with the predicates as numbers, and the product and the sum rounded on their own
        ("\n".join([wgmma("0"), wgmma("1"), WAIT]) + MUL + ADD, [TensorCoreSum("e4m3.e4m3", 64, True, 1)]),
        # two blocks of rows, each with its own sum, promoted together: the multiply-adds are counted with the second
        (
            "\n".join([wgmma("0"), wgmma("1"), wgmma("0"), wgmma("1"), WAIT]) + 4 * FMA,
            [TensorCoreSum("e4m3.e4m3", 64, True), TensorCoreSum("e4m3.e4m3", 64, True, 4)],
        ),
        # goes on from what was there: the multiply-add comes once, after the loop
        (
            START + "\n".join([wgmma("%p2"), wgmma("%p2"), WAIT]) + AGAIN + FMA,
            [TensorCoreSum("e4m3.e4m3", 64, False, 0)],
        ),
        # decided while it runs
        (START + wgmma("%p3") + "\n" + WAIT + FMA, [TensorCoreSum("e4m3.e4m3", 32, False, 1)]),
        # a multiply-add before the wait has nothing to do with the sum
        (START + wgmma("%p1", "e5m2.e4m3") + "\n" + FMA + WAIT, [TensorCoreSum("e5m2.e4m3", 32, True, 0)]),
        ("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%r1}, {%r2}, {%r3}, {%r1};", []),
    ],
)
def test_reading_ptx(ptx: str, expected: list[TensorCoreSum]) -> None:
    assert tensor_core_sums(ptx) == expected
