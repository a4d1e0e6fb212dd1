"""Ranks in one process: the program of a rank run by many, with nothing between them but messages.

    def program(me: Rank, x: Tensor) -> Tensor:
        me.send(x, to=(me.number + 1) % me.count)
        return me.receive((me.number - 1) % me.count)

    run(program, [torch.zeros(3), torch.ones(3)]).results

Every rank is a thread, and one at a time has its turn: a rank keeps it until it has to wait for a message. What ranks give
back does not depend on who comes first, as each of them names whom it hears. Where all that are left wait for each other,
`Stuck` says who waits for whom: on a cluster the same program would hang.

A clock goes with each rank, by the model "latency + bytes / speed": a rank has one way out and one way in, a message holds
both while its bytes pass, and sending takes no time of the sender's own. Arithmetic costs nothing.

`Rank` is what a program may use; `course/processes.py` has the same over real processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


class Stuck(RuntimeError):
    """Ranks wait for messages that nobody will send, or sent what nobody receives."""


class _Leave(BaseException):
    """Ends the threads of a run that is over. Not an Exception: a program's `except Exception` does not catch it."""


class Rank(ABC):
    """One of `count` ranks, `number` 0 to count - 1, as the program that it runs knows it."""

    number: int
    count: int

    @abstractmethod
    def send(self, x: Tensor, to: int) -> None:
        """Put x on its way to rank `to`, and go on. What is done to x afterwards, the other does not see."""

    @abstractmethod
    def receive(self, source: int) -> Tensor:
        """The next message of rank `source`; waits for it."""

    def among(self, members: Sequence[int]) -> Rank:
        """This rank in a group: numbered among `members`, its messages go to them only."""
        return Member(self, members)


class Member(Rank):
    """A rank's place in a group of ranks."""

    def __init__(self, whole: Rank, members: Sequence[int]) -> None:
        self.whole, self.members = whole, list(members)
        self.number, self.count = self.members.index(whole.number), len(self.members)

    def send(self, x: Tensor, to: int) -> None:
        self.whole.send(x, self.members[to])

    def receive(self, source: int) -> Tensor:
        return self.whole.receive(self.members[source])


@dataclass(frozen=True)
class Wires:
    """What a message costs: seconds before its first byte arrives, and bytes a second.

    Args:
        node: ranks of a node, numbered in a row; None: there are no nodes.
        inside: bytes a second between ranks of the same node.
    """

    latency: float = 0.0
    speed: float = float("inf")
    node: int | None = None
    inside: float = float("inf")

    def same_node(self, source: int, target: int) -> bool:
        return self.node is not None and source // self.node == target // self.node

    def seconds(self, source: int, target: int, size: int) -> float:
        """How long the bytes of a message hold the wire."""
        return size / (self.inside if self.same_node(source, target) else self.speed)


@dataclass(frozen=True, order=True)
class Message:
    """`round` counts what the sender sent before; `start` and `end` are when its bytes left and when they were all there."""

    source: int
    round: int
    target: int
    bytes: int
    start: float = field(compare=False)
    end: float = field(compare=False)


@dataclass(frozen=True)
class Ran:
    """What each rank gave back, every message, and the clock of the rank that was ready last."""

    results: list[Any]
    messages: list[Message]
    seconds: float

    @property
    def sent(self) -> list[int]:
        """Bytes that each rank sent."""
        return [sum(m.bytes for m in self.messages if m.source == r) for r in range(len(self.results))]

    @property
    def received(self) -> list[int]:
        return [sum(m.bytes for m in self.messages if m.target == r) for r in range(len(self.results))]


def run(program: Callable[..., Any], *columns: Sequence[Any], wires: Wires | None = None) -> Ran:
    """Let len(columns[0]) ranks run `program(me, *its own inputs)`; a column has one input for each rank.

    Raises:
        Stuck: nobody can go on, or a message was never received.
        Exception: what a rank's program raised; the first of them, if several did.
    """
    return _Run(program, list(zip(*columns, strict=True)), wires or Wires()).whole()


class _Here(Rank):
    """A rank whose messages are lists in this process."""

    def __init__(self, number: int, run: _Run) -> None:
        self.number, self.count, self.run = number, run.count, run
        self.clock = self.out_free = self.in_free = 0.0
        self.sent = 0

    def send(self, x: Tensor, to: int) -> None:
        self._check(to)
        size = x.numel() * x.element_size()
        start = max(self.clock, self.out_free)
        self.out_free = start + self.run.wires.seconds(self.number, to, size)
        self.run.put(self.number, to, (x.detach().clone(), self.sent, size, start))
        self.sent += 1

    def receive(self, source: int) -> Tensor:
        self._check(source)
        x, number, size, start = self.run.take(self.number, source)
        wires = self.run.wires
        begins = max(start + wires.latency, self.in_free)
        self.in_free = begins + wires.seconds(source, self.number, size)
        self.clock = max(self.clock, self.in_free)
        self.run.messages.append(Message(source, number, self.number, size, start, self.in_free))
        return x

    def _check(self, other: int) -> None:
        if not 0 <= other < self.count or other == self.number:
            rule = "itself" if other == self.number else f"rank {other}: there are ranks 0 to {self.count - 1}"
            raise ValueError(f"rank {self.number} cannot exchange messages with {rule}")


class _Run:
    def __init__(self, program: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], wires: Wires) -> None:
        self.program, self.inputs, self.wires, self.count = program, inputs, wires, len(inputs)
        self.turn = threading.Condition()  # who holds it runs
        self.boxes: dict[tuple[int, int], deque[Any]] = defaultdict(deque)  # (from, to): messages on their way
        self.waits: dict[int, int] = {}  # rank: whom it waits for
        self.ended: set[int] = set()
        self.results: dict[int, Any] = {}
        self.messages: list[Message] = []
        self.error: BaseException | None = None
        self.has_turn: int | None = None
        self.over = False

    def whole(self) -> Ran:
        ranks = [_Here(number, self) for number in range(self.count)]
        threads = [threading.Thread(target=self._work, args=(rank,), daemon=True) for rank in ranks]
        with self._end_of(threads):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if self.error is not None:
            raise self.error
        left = sorted((source, to, len(box)) for (source, to), box in self.boxes.items() if box)
        if left:
            raise Stuck(f"rank {left[0][0]} sent rank {left[0][1]} a message that it never received")
        return Ran([self.results[r] for r in range(self.count)], sorted(self.messages), max(r.clock for r in ranks))

    @contextlib.contextmanager
    def _end_of(self, threads: Sequence[threading.Thread]) -> Iterator[None]:
        """However it ends (a time limit may strike here), no thread is left running."""
        try:
            yield
        finally:
            self.over = True
            # The others see that it is over when their turn comes. A loop without end never gives it up: only this reaches it.
            if self.has_turn is not None and self.has_turn not in self.ended:
                thread = ctypes.c_ulong(threads[self.has_turn].ident or 0)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_Leave))

    def _work(self, me: _Here) -> None:
        with contextlib.suppress(_Leave), self.turn:
            self.has_turn = me.number
            try:
                if not self.over:
                    self.results[me.number] = self.program(me, *self.inputs[me.number])
            except _Leave:
                raise
            except BaseException as error:
                self.error, self.over = self.error or error, True
            finally:
                self.ended.add(me.number)
                self._look()
                self.turn.notify_all()

    def put(self, source: int, to: int, message: Any) -> None:
        self.boxes[source, to].append(message)
        self.turn.notify_all()

    def take(self, me: int, source: int) -> Any:
        box = self.boxes[source, me]
        self.waits[me] = source
        self._look()
        while not box and not self.over:
            self.turn.wait()
        self.has_turn = me
        if self.over:
            raise _Leave
        del self.waits[me]
        return box.popleft()

    def _look(self) -> None:
        """Is there anybody who can go on?"""
        left = [rank for rank in range(self.count) if rank not in self.ended]
        if left and not self.over and all(r in self.waits and not self.boxes[self.waits[r], r] for r in left):
            each = [
                f"rank {r} waits for rank {(o := self.waits[r])}" + ", which has ended" * (o in self.ended)
                for r in left
            ]
            said = "; ".join(each[:4]) + "; ..." * (len(each) > 4)
            self.error, self.over = Stuck(f"nobody can go on: {said}"), True
            self.turn.notify_all()


def on_ranks(program: Callable[..., Any]) -> Callable[..., list[Any]]:
    """A program of one rank as a function of columns, which gives back what all ranks do, in a list."""

    @functools.wraps(program)
    def results(*columns: Sequence[Any]) -> list[Any]:
        return run(program, *columns).results

    return results
