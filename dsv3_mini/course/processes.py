"""The ranks of `course/ranks.py` as processes of this machine, which meet over gloo and wait for work.

    team = Processes(4)
    team.run(all_gather, pieces)        # each runs all_gather(me, its own piece); what they give back, in a list
    team.close()

A process needs seconds to start, a piece of work milliseconds: so they are started once. A function of a module is found
there by its name. One that was written in a notebook travels as its source text, and so can use, besides what it is given,
only torch, einops, the ring's collectives and Rank.

Simplifications: a message between two of them is an FP32 tensor of at most four dimensions, and one process that fails ends
them all.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import multiprocessing
import os
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor

from dsv3_mini.course import ring
from dsv3_mini.course.checks.framework import SECONDS, TOLERANCE, difference
from dsv3_mini.course.checks.guard import Problem, Unsolved, call
from dsv3_mini.course.ranks import Rank, run
from dsv3_mini.errors import UserError

PATIENCE = datetime.timedelta(seconds=60)  # a process that waits longer for another fails
DIMENSIONS = 4
# Imported once, by the process that all others are copied from; the second is what `fully_shard` imports when it first runs.
WORK = ["dsv3_mini.course.shared_training", "torch._dynamo"]
KNOWN = {
    f.__name__: f for f in (ring.all_gather, ring.reduce_scatter, ring.all_reduce, einsum, rearrange, reduce, repeat)
}
KNOWN |= {"torch": torch, "Tensor": Tensor, "Float": Float, "Rank": Rank, "dist": dist}


class Process(Rank):
    """This process among those that have met."""

    def __init__(self) -> None:
        self.number, self.count = dist.get_rank(), dist.get_world_size()
        self.leaving: list[tuple[dist.Work, Tensor]] = []  # a message is kept until it has left

    def send(self, x: Tensor, to: int) -> None:
        shape = torch.tensor([x.ndim, *x.shape, *[0] * (DIMENSIONS - x.ndim)])
        for each in (shape, x.detach().float().contiguous().clone()):
            self.leaving.append((dist.isend(each, to), each))

    def receive(self, source: int) -> Tensor:
        shape = torch.empty(1 + DIMENSIONS, dtype=torch.long)
        dist.recv(shape, source)
        ndim, *sizes = shape.tolist()
        x = torch.empty(sizes[:ndim])
        dist.recv(x, source)
        return x

    def finish(self) -> None:
        for work, _ in self.leaving:
            work.wait()
        self.leaving.clear()


class Processes:
    """`count` processes that have met. Also a context manager, which closes them at its end.

    Raises:
        UserError: they could not be started.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.ends: list[Connection] = []
        self.processes: list[BaseProcess] = []
        self.start()

    def start(self) -> None:
        """Start them, at first or again after one has failed."""
        kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(kind)
        if kind == "forkserver":
            context.set_forkserver_preload(WORK)
        self.folder = tempfile.TemporaryDirectory(prefix="dsv3-ranks-", ignore_cleanup_errors=True)
        meeting = (Path(self.folder.name) / "meeting").as_uri()
        for number in range(self.count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(number, self.count, meeting, there), daemon=True)
            process.start()
            there.close()
            self.ends.append(here)
            self.processes.append(process)
        self._collect()

    def run(self, work: Callable[..., Any], *columns: Sequence[Any]) -> list[Any]:
        """`work(me, *its own inputs)` in every process; a column has one input for each. Returns what each gave back.

        Raises:
            NotImplementedError: a notebook's function is still blank.
            UserError: one of them failed; the message names it and says why. All are ended then.
        """
        if not self.processes:
            raise UserError("these processes have ended: start them again, team.start()")
        sent = _packed(work)
        for number, end in enumerate(self.ends):
            end.send((sent, tuple(column[number] for column in columns)))
        return self._collect()

    def close(self) -> None:
        for end in self.ends:
            end.close()  # they leave when nobody is there to give them work
        for process in self.processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
        self.ends, self.processes = [], []
        self.folder.cleanup()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _collect(self) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < len(self.ends):
            for end in wait([e for number, e in enumerate(self.ends) if number not in results]):
                number = self.ends.index(end)
                try:
                    failed, results[number] = end.recv()
                except (EOFError, ConnectionError):
                    failed, results[number] = "it ended without a word", None
                if failed:
                    for process in self.processes:
                        process.kill()
                    self.close()
                    if failed == NotImplementedError.__name__:
                        raise NotImplementedError
                    raise UserError(f"rank {number} of {self.count} failed: {failed}")
        return [_tensors(results[number]) for number in range(len(self.ends))]


def same_on(team: Processes, mine: Callable[..., Any], theirs: Callable[..., Any], *columns: Sequence[Any]) -> None:
    """Print whether these processes, running `mine`, get what simulated ranks get with `theirs`; one line if it is blank.

    `mine` is run by simulated ranks first: what waits for ever there is not given to processes.
    """
    try:
        wanted = run(theirs, *columns).results
        for got in (call(run, (mine, *columns), SECONDS, blame=mine).results, team.run(mine, *columns)):
            if wrong := difference(got, wanted, TOLERANCE):
                print(f"✗ {wrong}")
                return
        print(f"✓ {len(wanted)} processes ran {mine.__name__} and have the right numbers")
    except (Unsolved, NotImplementedError):
        print(f"○ {mine.__name__} is still blank: nothing to run yet")
    except (Problem, UserError) as problem:
        print(f"✗ {problem}")
        if not team.processes:
            team.start()


def _packed(work: Callable[..., Any]) -> Callable[..., Any] | tuple[str, str]:
    """A function as it travels: itself where the others can import it, else its name and source."""
    if work.__module__ != "__main__":
        return work
    return work.__name__, "from __future__ import annotations\n" + textwrap.dedent(inspect.getsource(work))


def _unpacked(sent: Callable[..., Any] | tuple[str, str]) -> Callable[..., Any]:
    if callable(sent):
        return sent
    name, source = sent
    namespace = dict(KNOWN)
    exec(compile(source, f"<{name}>", "exec"), namespace)
    return namespace[name]


def _plain(value: Any) -> Any:
    """Tensors as arrays, which travel through a pipe by value."""
    if isinstance(value, Tensor):
        return value.detach().numpy()
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return type(value)(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _tensors(value: Any) -> Any:
    if type(value).__module__ == "numpy":
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {key: _tensors(each) for key, each in value.items()}
    return type(value)(map(_tensors, value)) if isinstance(value, (list, tuple)) else value


def _serve(number: int, count: int, meeting: str, work: Connection) -> None:
    """What a process does: meet the others, then run what comes, until nobody is there to send it."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", meeting, rank=number, world_size=count, timeout=PATIENCE)
    except Exception as error:
        work.send((f"it could not meet the others: {type(error).__name__}: {error}", None))
        return
    me = Process()
    work.send(("", None))
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            sent, inputs = work.recv()
            try:
                torch.manual_seed(0)
                result = _unpacked(sent)(me, *inputs)
                me.finish()
                work.send(("", _plain(result)))
            except NotImplementedError:
                work.send((NotImplementedError.__name__, None))
            except Exception as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                work.send((f"{type(error).__name__}: {error} ({frame.name}, line {frame.lineno})", None))
