"""Freed memory is kept: counted in the page faults that the system reports for a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

from dsv3_mini.train.allocator import keep_freed_memory

# Forty tensors of 8 MB, twenty of them held to the end: the heap grows and shrinks as in a forward pass.
STEPS = """
import resource
import torch
from dsv3_mini.train.allocator import keep_freed_memory

if {keep}:
    keep_freed_memory()

def step():
    x, held = torch.ones(2 * 1024**2), []
    for _ in range(20):
        x = x * 1.0
        held.append(x + 1)

for _ in range(5):
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
        assert 10 * kept < faults(keep=False)
    else:
        assert keep_freed_memory() is False
