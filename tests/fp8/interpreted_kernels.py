"""Runs this package's Triton kernels in Triton's interpreter, in a process of its own.

Triton decides whether it interprets when it is imported, for the whole process and for good. So the tests write down
what they want computed, this file computes all of it in one other process, and the tests judge what comes back.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from dsv3_mini.errors import ConfigError

Job = tuple[str, tuple[Any, ...]]
"""What to call, and with what: ("gemm", (a, b, torch.float32))."""


def interpret(jobs: dict[str, Job], folder: Path) -> dict[str, Any]:
    """Each job's result by name, or its ConfigError; under "brought", whether importing the backend imported triton."""
    torch.save(jobs, folder / "jobs.pt")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__, str(folder)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt", weights_only=False)


def work(folder: Path) -> None:
    from dsv3_mini.fp8.backends.triton_backend import Triton
    from dsv3_mini.fp8.gemm import gemm, grouped_gemm

    brought = "triton" in sys.modules
    assert Triton().missing() is None

    from dsv3_mini.fp8.kernels.act_quant import quantize_activations
    from dsv3_mini.fp8.kernels.weight_dequant import dequantize_weight

    calls = {
        "gemm": lambda a, b, dtype: gemm(a, b, "triton", dtype),
        "grouped_gemm": lambda a, b, ends, dtype: grouped_gemm(a, b, ends, "triton", dtype),
        "quantize_activations": quantize_activations,
        "dequantize_weight": dequantize_weight,
    }

    def result(call: str, arguments: tuple[Any, ...]) -> Any:
        try:
            return calls[call](*arguments)
        except ConfigError as error:
            return error

    jobs = torch.load(folder / "jobs.pt", weights_only=False)
    results = {name: result(*job) for name, job in jobs.items()}
    torch.save(results | {"brought": brought}, folder / "results.pt")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
