"""The memory of a training step, kept for the next one.

A step on a CPU asks for some hundred MB in pieces of a few MB, gives them back, and the next step asks for the same again. In
between glibc returns the free end of its heap to the system, which hands out zeroed pages anew: one page fault for every
4 KB touched. Kept instead, the next step finds its pages where the last one left them. `dsv3 bench train` measures the step
with memory kept, as `dsv3 train` keeps it.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST_IN_HEAP = 32 * 1024**2  # bytes; the most that glibc takes: pieces above it are mapped and given back one by one
NEVER = 2**31 - 1  # bytes free at the heap's end before they are returned


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, until it ends. False where the C library is not glibc: nothing changes there."""
    try:
        library = ctypes.CDLL(None)
        mallopt = library.mallopt
        library.gnu_get_libc_version  # noqa: B018  (other libraries have a mallopt that means something else)
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_IN_HEAP)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
