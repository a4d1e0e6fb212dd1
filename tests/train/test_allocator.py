"""Freed memory is kept: counted in the page faults that the system reports for a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

from dsv3_mini.train.allocator import keep_freed_memory

# Four pieces of 16 MB, held together and freed, ten times: 16,384 pages each time, had they to be handed out anew.
STEPS = """
import resource
import torch
from dsv3_mini.train.allocator import keep_freed_memory

if {keep}:
    keep_freed_memory()

def step():
    pieces = [torch.ones(4 * 1024**2) for _ in range(4)]

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    done = subprocess.run(
        [sys.executable, "-c", STEPS.format(keep=keep)], capture_output=True, text=True, check=True, timeout=120
    )
    return int(done.stdout)


def test_steps_after_the_first_ask_the_system_for_nothing() -> None:
    """Where it cannot be done it says so, and the process runs as before."""
    kept = faults(keep=True)
    if platform.libc_ver()[0] == "glibc":
        # 100 pages are what Python itself may need meanwhile.
        assert kept < 100 < faults(keep=False)
    else:
        assert keep_freed_memory() is False
