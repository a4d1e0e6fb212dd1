"""Processes that meet over gloo on this machine, for tests: one start runs many cases, as a start costs seconds."""

from __future__ import annotations

import datetime
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

IMPORTED = ["torch._dynamo", "torch.distributed.fsdp", "dsv3_mini.parallel.pipeline_team", "dsv3_mini.train.trainer"]
PATIENCE = datetime.timedelta(seconds=60)  # a process that waits longer for the others fails, and with it the test


def together(count: int, work: Callable[..., None], folder: Path, *arguments: object) -> None:
    """Run work(rank, folder, *arguments) in `count` processes that have met. What one raises is raised here."""
    meeting = folder / "meeting"
    # They are copies of a server that has imported all this once: torch's parts for it take seconds of each process.
    torch.multiprocessing.set_forkserver_preload(IMPORTED)
    start = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")
    start(_begin, (count, work, meeting, folder, arguments), nprocs=count)


def _begin(rank: int, count: int, work: Callable[..., None], meeting: Path, folder: Path, arguments: tuple) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=count, timeout=PATIENCE)
    try:
        work(rank, folder, *arguments)
    finally:
        dist.destroy_process_group()
