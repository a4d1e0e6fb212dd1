"""What came of a simulated service: per request, per pool, and the books that must balance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dsv3_mini.serving.arrivals import Requests


@dataclass(frozen=True)
class Pool:
    """What the units of one pool did: their nodes and GPUs, seconds at work (all units together), and steps."""

    units: int
    nodes: int
    gpus: int
    busy: float
    steps: int


@dataclass(frozen=True)
class Served:
    """A service from the first arrival until the last answer is complete. Times are seconds on the same clock as `arrival`.

    Args:
        first_token: when each prompt was read, which gives the first token of its answer. decoding: when its first decode
            step began; not a number for answers of one token. finished: when the answer was complete.
        written: tokens that each request was given, the first included.
        waiting_seconds: the number of requests in the system, summed over time as the simulator counted it.
        cache_peak, cache_left: tokens reserved in the decode pool at most and at the end; cache_tokens: what it holds.
    """

    requests: Requests
    first_token: Float[np.ndarray, " n"]
    decoding: Float[np.ndarray, " n"]
    finished: Float[np.ndarray, " n"]
    written: Int[np.ndarray, " n"]
    prefill: Pool
    decode: Pool
    waiting_seconds: float
    cache_tokens: int
    cache_peak: int
    cache_left: int

    @property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        return float(self.finished.max() - self.requests.arrival[0])

    @property
    def time_to_first_token(self) -> Float[np.ndarray, " n"]:
        """Seconds from a request's arrival to its first token."""
        return self.first_token - self.requests.arrival

    @property
    def time_per_output_token(self) -> Float[np.ndarray, " m"]:
        """Seconds between tokens after the first one, for each request that has more than one."""
        several = self.written > 1
        return (self.finished - self.first_token)[several] / (self.written[several] - 1)

    @property
    def output_tokens_per_second(self) -> float:
        return float(self.written.sum()) / self.seconds

    @property
    def input_per_node_second(self) -> float:
        """Tokens read in a second of prefill work, by each node: what the pool can do when it is not idle."""
        pool = self.prefill
        return float(self.requests.prompt.sum()) / (pool.busy * pool.nodes / pool.units)

    @property
    def output_per_node_second(self) -> float:
        """Tokens written in a second of decode work, by each node, with as many rows as there were."""
        pool = self.decode
        if not pool.busy:
            return 0.0
        return float((self.written - 1).sum()) / (pool.busy * pool.nodes / pool.units)

    @property
    def mean_in_system(self) -> float:
        """Requests that were waiting or being served, on average over the whole time."""
        return self.waiting_seconds / self.seconds
