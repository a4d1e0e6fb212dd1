"""Joining the processes that torchrun started, on a CPU (gloo) or on CUDA (NCCL, for what lies there), and leaving them.

torchrun tells each process by its environment who it is: RANK of WORLD_SIZE, on this machine LOCAL_RANK, and where all meet.
What it starts again after a failure (`--max-restarts`) meets in the same store as before, so a life's keys stand under its
number; torch's own would read addresses of the dead.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from dsv3_mini.errors import UserError
from dsv3_mini.parallel.watch import Watch
from dsv3_mini.train.replicas import ALONE, PATIENCE, Replicas

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # what lies on the CPU travels by gloo in any case
INTERRUPTED = 130


def own_device(device: str) -> str:
    """`cuda` is, for a process among others, the GPU of its number on this machine."""
    if device != "cuda" or not dist.is_torchelastic_launched():
        return device
    return f"cuda:{os.environ['LOCAL_RANK']}"


@contextmanager
def joined(device: str, patience: float) -> Iterator[Replicas]:
    """This process among those that torchrun started, or alone if it did not start this one.

    When one fails, all end: each says which one it was, and with exit code 1. What torch would tidy up is left to the system,
    as it may wait for those that are gone.

    Args:
        device: where this process computes: cpu, or cuda:N.
        patience: seconds after which a machine that does not answer is lost.
    """
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(device)
    store, rank, count = next(dist.rendezvous("env://", timeout=PATIENCE))
    life = f"life {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} of {count}"
    speaking = threading.Lock()

    def leave(said: str, code: int) -> None:
        """Say it once, whichever thread comes first, and be gone."""
        if speaking.acquire(blocking=False):
            print(said, file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(code)
        threading.Event().wait()  # until the other thread ends the process

    def follow(cause: str) -> None:
        leave(f"dsv3 train: {cause}; process {rank} ends, too: the same command goes on from the last checkpoint", 1)

    watch = Watch(dist.PrefixStore(f"{life}, watch", store), rank, count, patience, follow)
    try:
        meeting = dist.PrefixStore(life, store)
        dist.init_process_group(BACKENDS[kind], store=meeting, rank=rank, world_size=count, timeout=PATIENCE)
        yield Replicas(rank, count)
    except KeyboardInterrupt:
        leave("dsv3 train: interrupted", INTERRUPTED)
    except Exception as error:
        cause = watch.cause_of(error)
        if isinstance(error, (UserError, OSError)):
            leave(f"dsv3 train: {' '.join(str(error).split())}", 2)
        if cause is None:
            leave("".join(traceback.format_exception(error)).rstrip(), 1)
        follow(cause)
    watch.leave()
    dist.destroy_process_group()
