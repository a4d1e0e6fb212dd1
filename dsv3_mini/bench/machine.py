"""What the machine under a benchmark can do, and what a process takes of it: GEMM rate and memory."""

from __future__ import annotations

import platform
import re
import resource
import sys
import time
from pathlib import Path

import torch

GEMM_SIZES = ((4096, 1024, 1024), (4096, 2048, 2048), (2048, 2048, 2048), (4096, 4096, 192))
"""Rows, inner, columns: large enough that memory does not limit any of them, in different proportions."""


def gemm_limit(dtype: torch.dtype = torch.float32, rounds: int = 5) -> float:
    """FLOP/s of the best matrix product found, with torch's present number of threads.

    No model reaches it: it is the ceiling that the share "of the GEMM limit" refers to.
    """
    best = 0.0
    for rows, inner, columns in GEMM_SIZES:
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype)
        for _ in range(rounds + 1):
            began = time.perf_counter()
            torch.mm(a, b, out=out)
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - began))
    return best


def memory_now() -> int:
    """Bytes of this process that are in memory; where the system does not say, the most that ever was."""
    return _status("VmRSS") or peak_memory()


def peak_memory() -> int:
    """The most bytes of this process that were in memory at a time, since its start or `forget_peak_memory`."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak_memory() -> None:
    """Count the peak anew from here, where the system can (Linux); elsewhere it stays that of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def describe(threads: int) -> str:
    """One line: processor, threads, torch."""
    return f"{_processor()}, {threads} {'thread' if threads == 1 else 'threads'}, torch {torch.__version__}"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _status(key: str) -> int | None:
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
