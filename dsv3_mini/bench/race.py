"""Measuring two or more ways to do one thing: each in a process of its own, taking turns.

Speed on a shared machine drifts by a third within minutes, so numbers taken one after the other compare two moments
and not two programs. Here every side runs once in each round, and it is the rounds' ratios that are compared.

A process of its own is what makes peak memory a side's own: the system counts it for a process, and memory that an
earlier side gave back would still be there. What a side is, is named and not pickled: "package.module:function" and its
arguments; the function sets all up and returns the step to be timed. `worker` is what runs in the process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv3_mini.errors import UserError

Step = Callable[[], float]
"""Does the work once; returns a number (a loss, a checksum) by which the sides are held to the same result."""


class BenchError(UserError):
    """A side of a comparison could not run, or the sides do not compute the same."""


@dataclass(frozen=True)
class Side:
    """One way to do it: `make` names a function ("package.module:function") that returns a `Step`."""

    name: str
    make: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Lap:
    """What one side did. `seconds` and `cpu_seconds` hold one entry a round; memory in bytes.

    cpu_seconds: processor time of all threads together: what the step costs, whoever else uses the machine.
    before: the process's size with all set up, before the first step. peak: its largest size at any time since.
    """

    name: str
    seconds: list[float]
    cpu_seconds: list[float]
    values: list[float]
    before: int
    peak: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def above(self) -> int:
        """Peak memory above what was there before the first step: what the steps themselves need."""
        return self.peak - self.before


def speed_ratio(fast: Lap, slow: Lap) -> float:
    """How many times faster `fast` is: the median over the rounds of slow / fast, both taken in the same round."""
    return statistics.median(s / f for f, s in zip(fast.seconds, slow.seconds, strict=True))


def cpu_ratio(fast: Lap, slow: Lap) -> float:
    """The same by processor time."""
    return statistics.median(s / f for f, s in zip(fast.cpu_seconds, slow.cpu_seconds, strict=True))


def race(sides: Sequence[Side], rounds: int, threads: int, warm_up: int = 1) -> list[Lap]:
    """Run every side `warm_up` times untimed, then once in each of `rounds` rounds, in turn.

    Raises:
        BenchError: a side's process ended; the last line that it said is given.
    """
    if rounds < 1 or threads < 1:
        name, value = ("rounds", rounds) if rounds < 1 else ("threads", threads)
        raise BenchError(f"{name} = {value} must be at least 1")
    runners: list[_Runner] = []
    try:
        for side in sides:
            runners.append(_Runner(side, threads))
        replies = [[runner.step() for _ in range(warm_up)] for runner in runners]
        for _ in range(rounds):
            for runner, said in zip(runners, replies, strict=True):
                said.append(runner.step())
        return [runner.finish(said, warm_up) for runner, said in zip(runners, replies, strict=True)]
    finally:
        for runner in runners:
            runner.stop()


class _Runner:
    """A side's process, told to step by a line, answering with a line of JSON."""

    def __init__(self, side: Side, threads: int) -> None:
        self.side = side
        order = json.dumps({"make": side.make, "arguments": dict(side.arguments), "threads": threads})
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        # A file takes any amount, where a full pipe would block the side.
        self.complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dsv3_mini.bench.worker", order],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complaints, text=True, env=environment,
        )  # fmt: skip
        self.before = self._reply()["before"]

    def step(self) -> dict[str, Any]:
        try:
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died: reading says of what
        return self._reply()

    def finish(self, said: list[dict[str, Any]], warm_up: int) -> Lap:
        timed = said[warm_up:]
        return Lap(
            self.side.name,
            [reply["seconds"] for reply in timed],
            [reply["cpu_seconds"] for reply in timed],
            [reply["value"] for reply in said],
            self.before,
            said[-1]["peak"],
        )

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.complaints.close()

    def _reply(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.communicate()
        self.complaints.seek(0)
        said = self.complaints.read().strip().splitlines() or ["it said nothing"]
        raise BenchError(f"{self.side.name} stopped with code {self.process.returncode}: {said[-1]}")
