"""Processes that meet over gloo on this machine, for tests: one start runs many cases, as a start costs seconds."""

from __future__ import annotations

import datetime
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

# One server imports torch's slow parts once, and every process of a test is a copy that it forks.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "dsv3_mini.parallel.pipeline_team", "dsv3_mini.train.trainer"]
)
PATIENCE = datetime.timedelta(seconds=60)  # a process that waits longer for the others fails, and with it the test


def together(count: int, work: Callable[..., None], folder: Path, *arguments: object) -> None:
    """Run work(rank, folder, *arguments) in `count` processes that have met. What one raises is raised here."""
    meeting = folder / "meeting"
    arguments = (count, work, meeting, folder, arguments)
    torch.multiprocessing.start_processes(_begin, arguments, nprocs=count, start_method="forkserver")


def _begin(rank: int, count: int, work: Callable[..., None], meeting: Path, folder: Path, arguments: tuple) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=count, timeout=PATIENCE)
    try:
        work(rank, folder, *arguments)
    finally:
        dist.destroy_process_group()
