"""One side's process: set up, say how large it is, then step whenever told to.

Started by `race`, as `python -m dsv3_mini.bench.worker ORDER`, with an order in JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time

import torch

from dsv3_mini.bench.machine import forget_peak_memory, memory_now, peak_memory


def main(order: str) -> None:
    # The pipe is for our lines alone: what a library prints goes to the error stream.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(**values: float) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    wanted = json.loads(order)
    torch.set_num_threads(wanted["threads"])
    module, _, function = wanted["make"].partition(":")
    step = getattr(importlib.import_module(module), function)(**wanted["arguments"])
    forget_peak_memory()
    answer(before=memory_now())
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        value = step()
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - processor
        answer(seconds=seconds, cpu_seconds=cpu_seconds, value=value, peak=peak_memory())


if __name__ == "__main__":
    main(sys.argv[1])
