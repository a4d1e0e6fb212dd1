"""A service, event by event: requests wait for a prefill unit, are read, travel to a decode unit, and are answered.

Every prefill unit takes the requests that waited longest, as many as `prefill_tokens` allow, and reads them in one step,
which gives each its first token. The latents then travel to the decode unit with the most room. There a request gets room
for prompt and answer in the cache, all at once, or it waits, first come first served. All rows of a decode unit step together, and rows
come and go between two steps. Where we simplify:

- a decode unit's cache is one room: its groups of cards are even enough that only the whole counts
- a request holds its room from the end of its journey to its last token, and nobody is put out to make room
- a prefill unit is free as soon as its step is over, and latents travel over one card's network wire
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.serving.arrivals import Requests
from dsv3_mini.serving.cost import UnitCost
from dsv3_mini.serving.served import Pool, Served
from dsv3_mini.serving.unit import DECODE, PREFILL, Unit


def simulate(
    cfg: ModelConfig,
    requests: Requests,
    prefill: Unit = PREFILL,
    decode: Unit = DECODE,
    *,
    prefill_units: int = 1,
    decode_units: int = 1,
    prefill_tokens: int = 131_072,
    decode_rows: int | None = None,
    acceptance: float = 0.0,
    seed: int = 0,
) -> Served:
    """Serve all requests and say what happened.

    Args:
        prefill_tokens: read together by a unit in one step at most; a longer prompt is read alone.
        decode_rows: requests that a decode unit answers at a time, at most; None: as many as its cache holds.
        acceptance: above 0, each step also tries the token that multi-token prediction drafted, and keeps it with this
            probability (report section 5.4.3).
        seed: of what is accepted.

    Raises:
        ConfigError: a count is no whole number of at least 1, the acceptance is no share, a request is longer than the
            model's context or than a unit's cache, or a unit does not fit the model.
    """
    limits = {"prefill_units": prefill_units, "decode_units": decode_units, "prefill_tokens": prefill_tokens}
    for name, value in limits.items() if decode_rows is None else {**limits, "decode_rows": decode_rows}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} = {value!r} must be a whole number of at least 1")
    if not 0 <= acceptance <= 1:
        raise ConfigError(f"acceptance = {acceptance} must be a share, from 0 to 1")
    readers, writers = UnitCost(cfg, prefill), UnitCost(cfg, decode)
    longest = int((requests.prompt + requests.answer).max())
    if longest > cfg.max_position_embeddings:
        raise ConfigError(
            f"a request of {longest} tokens is longer than max_position_embeddings = {cfg.max_position_embeddings}"
        )
    if longest > writers.cache_tokens:
        raise ConfigError(
            f"a request of {longest} tokens does not fit the {writers.cache_tokens} that a decode unit caches"
        )
    return _Service(
        requests, readers, writers, prefill_units, decode_units, prefill_tokens, decode_rows, acceptance, seed
    ).run()


@dataclass
class _DecodeUnit:
    """The rows that a unit is answering: numbers of requests, tokens in their caches, tokens left to write."""

    free: int
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    cached: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    left: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    stepping: bool = False


class _Service:
    """The state between two events. `events` holds (time, number, what happens, with what)."""

    def __init__(
        self,
        requests: Requests,
        readers: UnitCost,
        writers: UnitCost,
        prefill_units: int,
        decode_units: int,
        prefill_tokens: int,
        decode_rows: int | None,
        acceptance: float,
        seed: int,
    ) -> None:
        self.requests, self.readers, self.writers = requests, readers, writers
        self.prefill_tokens, self.decode_rows, self.acceptance = prefill_tokens, decode_rows, acceptance
        self.random = np.random.default_rng(seed)
        self.idle_readers, self.prefill_units = prefill_units, prefill_units
        self.units = [_DecodeUnit(writers.cache_tokens) for _ in range(decode_units)]
        self.to_read: deque[int] = deque()
        self.to_write: deque[int] = deque()
        self.reading = self.travelling = 0
        n = len(requests)
        self.first, self.decoding, self.finished = (np.full(n, np.nan) for _ in range(3))
        self.written = np.zeros(n, dtype=np.int64)
        self.busy, self.steps = {"prefill": 0.0, "decode": 0.0}, {"prefill": 0, "decode": 0}
        self.reserved = self.peak = 0
        self.numbers = count()
        self.events: list[tuple[float, int, str, Any]] = []
        for request, time in enumerate(requests.arrival.tolist()):
            self._at(time, "arrived", request)

    def run(self) -> Served:
        now = waiting_seconds = 0.0
        while self.events:
            time, _, what, which = heapq.heappop(self.events)
            waiting_seconds += (time - now) * self._in_system()
            now = time
            getattr(self, f"_{what}")(now, which)
            if not self.events or self.events[0][0] > now:  # everything of this moment has happened: units may begin
                self._start_reading(now)
                self._start_writing(now)
        return Served(
            requests=self.requests,
            first_token=self.first,
            decoding=self.decoding,
            finished=self.finished,
            written=self.written,
            prefill=self._pool("prefill", self.prefill_units, self.readers.unit),
            decode=self._pool("decode", len(self.units), self.writers.unit),
            waiting_seconds=waiting_seconds,
            cache_tokens=len(self.units) * self.writers.cache_tokens,
            cache_peak=self.peak,
            cache_left=self.reserved,
        )

    def _at(self, time: float, what: str, which: Any) -> None:
        heapq.heappush(self.events, (time, next(self.numbers), what, which))

    def _in_system(self) -> int:
        """Everybody, counted where they stand."""
        queued = len(self.to_read) + len(self.to_write)
        return queued + self.reading + self.travelling + sum(len(unit.rows) for unit in self.units)

    # ---- what happens ----

    def _arrived(self, now: float, request: int) -> None:
        self.to_read.append(request)

    def _read(self, now: float, batch: list[int]) -> None:
        self.idle_readers += 1
        self.reading -= len(batch)
        for request in batch:
            self.first[request] = now
            self.written[request] = 1
            if self.requests.answer[request] == 1:
                self.finished[request] = now
                continue
            self.travelling += 1
            size = self.requests.prompt[request] * self.writers.cache_bytes_per_token
            self._at(now + size / self.readers.unit.card.network, "came_over", request)

    def _came_over(self, now: float, request: int) -> None:
        self.travelling -= 1
        self.to_write.append(request)

    def _stepped(self, now: float, unit: _DecodeUnit) -> None:
        unit.stepping = False
        gained = np.ones(len(unit.rows), dtype=np.int64)
        if self.acceptance:
            gained += self.random.random(len(gained)) < self.acceptance
        gained = np.minimum(gained, unit.left)
        self.written[unit.rows] += gained
        unit.cached, unit.left = unit.cached + gained, unit.left - gained
        done = unit.left == 0
        if done.any():
            self.finished[unit.rows[done]] = now
            self._reserve(unit, -int(self._room(unit.rows[done]).sum()))
            unit.rows, unit.cached, unit.left = unit.rows[~done], unit.cached[~done], unit.left[~done]

    # ---- what begins ----

    def _start_reading(self, now: float) -> None:
        while self.idle_readers and self.to_read:
            batch, tokens = [self.to_read.popleft()], 0
            tokens = int(self.requests.prompt[batch[0]])
            while self.to_read and tokens + self.requests.prompt[self.to_read[0]] <= self.prefill_tokens:
                batch.append(self.to_read.popleft())
                tokens += int(self.requests.prompt[batch[-1]])
            self.idle_readers -= 1
            self.reading += len(batch)
            seconds = self.readers.prefill(self.requests.prompt[batch].tolist())
            self._worked("prefill", seconds)
            self._at(now + seconds, "read", batch)

    def _start_writing(self, now: float) -> None:
        self._admit(now)
        for unit in self.units:
            if len(unit.rows) and not unit.stepping:
                new = 2 if self.acceptance else 1
                rows = len(unit.rows)
                seconds = self.writers.decode(rows, int(unit.cached.sum()) + new * rows, new)
                unit.stepping = True
                self._worked("decode", seconds)
                self._at(now + seconds, "stepped", unit)

    def _admit(self, now: float) -> None:
        """Whoever waited longest goes to the unit with the most room that is between two steps."""
        while self.to_write:
            request = self.to_write[0]
            room = int(self._room(request))
            open_units = [unit for unit in self.units if not unit.stepping and unit.free >= room]
            if self.decode_rows is not None:
                open_units = [unit for unit in open_units if len(unit.rows) < self.decode_rows]
            if not open_units:
                return
            self.to_write.popleft()
            unit = max(open_units, key=lambda unit: unit.free)
            self._reserve(unit, room)
            self.decoding[request] = now
            unit.rows = np.append(unit.rows, request)
            unit.cached = np.append(unit.cached, self.requests.prompt[request])
            unit.left = np.append(unit.left, self.requests.answer[request] - 1)

    def _room(self, requests: Any) -> Any:
        """Tokens of cache that requests need by their end: all but the last token are read back in."""
        return self.requests.prompt[requests] + self.requests.answer[requests] - 1

    def _reserve(self, unit: _DecodeUnit, tokens: int) -> None:
        unit.free -= tokens
        self.reserved += tokens
        self.peak = max(self.peak, self.reserved)

    def _pool(self, name: str, units: int, unit: Unit) -> Pool:
        return Pool(units, units * unit.nodes, units * unit.n_gpus, self.busy[name], self.steps[name])

    def _worked(self, pool: str, seconds: float) -> None:
        self.busy[pool] += seconds
        self.steps[pool] += 1
