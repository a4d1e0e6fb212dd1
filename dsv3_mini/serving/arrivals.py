"""What a service is asked for: when requests come, how long their prompts are, and how long their answers get."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dsv3_mini.errors import ConfigError


@dataclass(frozen=True)
class Lengths:
    """Whole numbers of tokens around `mean`, log-normally spread: `spread` is the standard deviation over the mean, 0 for
    lengths that are all the same. At least 1 token.

    Raises:
        ConfigError: `mean` below 1, or a spread below 0.
    """

    mean: float
    spread: float = 0.0

    def __post_init__(self) -> None:
        _require("mean", self.mean, self.mean >= 1, "at least 1")
        _require("spread", self.spread, self.spread >= 0, "at least 0")

    def draw(self, count: int, generator: np.random.Generator) -> Int[np.ndarray, " n"]:
        sigma = math.sqrt(math.log1p(self.spread**2))
        drawn = self.mean * np.exp(sigma * generator.standard_normal(count) - sigma**2 / 2)
        return np.maximum(np.rint(drawn), 1).astype(np.int64)


@dataclass(frozen=True)
class Requests:
    """Requests in the order in which they come: seconds, tokens to read, tokens to write.

    Raises:
        ConfigError: not one of each for each request, times that run backwards, or a length below 1.
    """

    arrival: Float[np.ndarray, " n"]
    prompt: Int[np.ndarray, " n"]
    answer: Int[np.ndarray, " n"]

    def __post_init__(self) -> None:
        counts = {len(self.arrival), len(self.prompt), len(self.answer)}
        if len(counts) != 1 or not len(self.arrival):
            raise ConfigError(
                f"requests with {sorted(counts)} arrivals, prompts and answers: give one of each, for at least one"
            )
        if not np.isfinite(self.arrival).all() or self.arrival[0] < 0 or (np.diff(self.arrival) < 0).any():
            raise ConfigError("arrival must be seconds from 0 on, in order: sort the requests by it")
        if min(self.prompt.min(), self.answer.min()) < 1:
            raise ConfigError("prompt and answer must be at least 1 token each")

    def __len__(self) -> int:
        return len(self.arrival)

    def cut(self, longest: int) -> Requests:
        """The same, but that no prompt and answer together are longer: answers have at most half, prompts what is left.

        Raises:
            ConfigError: `longest` is below 2.
        """
        answer = np.minimum(self.answer, longest // 2)
        return Requests(self.arrival, np.minimum(self.prompt, longest - answer), answer)


def poisson(rate: float, count: int, prompt: Lengths, answer: Lengths, seed: int = 0) -> Requests:
    """`count` requests that come independently of each other, `rate` a second on average.

    Raises:
        ConfigError: a rate that is not above 0, or no requests.
    """
    _require("rate", rate, rate > 0, "above 0")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(f"count = {count!r} must be a whole number of at least 1")
    generator = np.random.default_rng(seed)
    arrival = np.cumsum(generator.exponential(1 / rate, count))
    return Requests(arrival, prompt.draw(count, generator), answer.draw(count, generator))


def _require(name: str, value: float, holds: bool, rule: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not holds:
        raise ConfigError(f"{name} = {value!r} must be a number, {rule}")
