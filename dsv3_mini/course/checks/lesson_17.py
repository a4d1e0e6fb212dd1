"""Checks of lesson 17: turns within a context, the ends of YaRN's ramp, its frequencies, its two factors, and who chooses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property

# ---- turns_within ------------------------------------------------------------------------------------------------------


def _fixed(*inputs: Any) -> Callable[[torch.Generator], tuple[Any, ...]]:
    """The same inputs each time, tensors copied."""
    return lambda random: tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)


def _plain(width: int, theta: float) -> Tensor:
    return torch.tensor([theta ** (-j / (width // 2)) for j in range(width // 2)])


def _reference_turns(w: Tensor, context: int) -> Tensor:
    """Wavelengths that fit into the context."""
    return torch.tensor([context / (2 * math.pi / one) for one in w.tolist()])


turns_within = Exercise(
    name="turns_within",
    reference=_reference_turns,
    cases=[
        Case("eight pairs, theta 10,000, in 208 tokens", _fixed(_plain(16, 1e4), 208)),
        Case("four pairs, theta 100, in 1,000 tokens", _fixed(_plain(8, 100.0), 1000)),
    ],
    mistakes=[
        Mistake(
            lambda w, context: w * context,
            "these are radians: a whole turn has 2 pi of them",
        ),
        Mistake(
            lambda w, context: 2 * math.pi / w / context,
            "this is upside down, contexts in a wavelength: a fast pair, with a large w, makes many turns",
        ),
        Mistake(
            lambda w, context: 2 * math.pi / w,
            "this is the wavelength, the tokens of one turn: how many of them fit into the context?",
        ),
        Mistake(
            lambda w, context: (w * context / (2 * math.pi)).floor(),
            "you count whole turns alone: a pair that makes 0.3 of a turn is what this lesson is about, keep the parts",
        ),
        Mistake(
            lambda w, context: w * context / 360,
            "w is in radians per position, not in degrees: a turn is 2 pi",
        ),
    ],
)


# ---- ramp_ends ---------------------------------------------------------------------------------------------------------


def _pair_by_search(width: int, theta: float, trained: int, turns: float) -> float:
    """The pair, as a real number, that turns so often: found by halving, for turns fall as pairs go on."""
    left, right = -1000.0, 1000.0
    for _ in range(80):
        middle = (left + right) / 2
        exponent = -middle / (width / 2) * math.log(theta)
        if math.log(trained / (2 * math.pi)) + exponent > math.log(turns):
            left = middle
        else:
            right = middle
    return right


def _reference_ends(width: int, theta: float, trained: int, fast: float, slow: float) -> tuple[int, int]:
    low = math.floor(_pair_by_search(width, theta, trained, fast))
    high = math.ceil(_pair_by_search(width, theta, trained, slow))
    return max(low, 0), min(high, width - 1)


def _ends(
    low: Callable[[float], Any] = math.floor,
    high: Callable[[float], Any] = math.ceil,
    pairs: Callable[[int], float] = lambda width: width / 2,
    circle: float = 2 * math.pi,
    last: Callable[[int], int] = lambda width: width - 1,
    log_theta: Callable[[float], float] = math.log,
) -> Callable[..., tuple[Any, Any]]:
    """The formula, with one thing changed."""

    def answer(width: int, theta: float, trained: int, fast: float, slow: float) -> tuple[Any, Any]:
        first, second = (pairs(width) * math.log(trained / (k * circle)) / log_theta(theta) for k in (fast, slow))
        return max(low(first), 0), min(high(second), last(width))

    return answer


def _unclamped(width: int, theta: float, trained: int, fast: float, slow: float) -> tuple[int, int]:
    first, second = (width / 2 * math.log(trained / (k * 2 * math.pi)) / math.log(theta) for k in (fast, slow))
    return math.floor(first), math.ceil(second)


ramp_ends = Exercise(
    name="ramp_ends",
    reference=_reference_ends,
    cases=[
        Case("the released model: 64 dimensions, 4,096 tokens, 32 turns and 1", _fixed(64, 1e4, 4096, 32.0, 1.0)),
        Case("the tiny model: 16 dimensions, 208 tokens", _fixed(16, 1e4, 208, 32.0, 1.0)),
        Case("a context so short that no pair turns 32 times", _fixed(16, 1e4, 40, 32.0, 1.0)),
        Case("a context so long that all do", _fixed(8, 100.0, 10**7, 64.0, 0.5)),
        Case("8 and a quarter turns, theta 500", _fixed(32, 500.0, 700, 8.0, 0.25)),
    ],
    mistakes=[
        Mistake(
            lambda width, theta, trained, fast, slow: _reference_ends(width, theta, trained, slow, fast),
            "your ends are swapped: the pair that turns `fast` times comes first (low), for pair 0 is the fastest",
        ),
        Mistake(
            _ends(pairs=lambda width: float(width)),
            "you count dimensions: two of them are a pair, so it is width / 2 in front of the logarithms",
        ),
        Mistake(
            _ends(circle=1.0),
            "you count radians as turns: k turns are 2 pi k radians, so it is ln(trained / (2 pi k))",
        ),
        Mistake(
            _ends(low=round, high=round),
            "you round to the nearest pair: low is rounded down and high up, so that the ramp holds both",
        ),
        Mistake(
            _ends(low=math.ceil, high=math.floor),
            "you round the ramp narrower: low goes down to a whole pair, and high up",
        ),
        Mistake(
            _ends(low=lambda x: x, high=lambda x: x),
            "the ends are whole pairs: low rounded down, high rounded up (the exact formula is right)",
        ),
        Mistake(
            _unclamped,
            "an end may lie outside: low is at least 0, and high at most width - 1 (that is what the released code does)",
        ),
        Mistake(
            _ends(last=lambda width: width // 2 - 1),
            "you end at the last pair, width/2 - 1. That would be tidy; the released code ends at width - 1, and a checkpoint "
            "is only itself with the frequencies that it was trained with",
        ),
        Mistake(
            _ends(log_theta=math.log10),
            "two kinds of logarithm are mixed: both natural, or both to the base 10",
        ),
    ],
)


# ---- yarn_frequencies --------------------------------------------------------------------------------------------------


def _reference_yarn(w: Tensor, low: int, high: int, factor: float) -> Tensor:
    """Pair by pair, in three cases."""
    out = []
    for j, one in enumerate(w.tolist()):
        if j <= low:
            out.append(one)
        elif j >= high:
            out.append(one / factor)
        else:
            out.append(one + (one / factor - one) * (j - low) / (high - low))
    return torch.tensor(out)


def _blend(w: Tensor, low: int, high: int) -> Tensor:
    return ((torch.arange(len(w)) - low) / (high - low)).clamp(0, 1)


yarn_frequencies = Exercise(
    name="yarn_frequencies",
    reference=_reference_yarn,
    cases=[
        Case("8 pairs, a ramp from pair 0 to pair 4, factor 4", _fixed(_plain(16, 1e4), 0, 4, 4.0)),
        Case("32 pairs, a ramp from 10 to 23, factor 40", _fixed(_plain(64, 1e4), 10, 23, 40.0)),
        Case("a ramp that goes on behind the last pair", _fixed(_plain(12, 100.0), 2, 9, 8.0)),
    ],
    mistakes=[
        Mistake(
            lambda w, low, high, factor: w * _blend(w, low, high) + w / factor * (1 - _blend(w, low, high)),
            "your ramp runs the wrong way: it slows the fast pairs, which tell neighbours apart, and leaves the slow ones to "
            "angles that they never saw",
        ),
        Mistake(
            lambda w, low, high, factor: w / factor,
            "this is position interpolation: every pair is slowed. Pairs up to low stay as they are",
        ),
        Mistake(
            lambda w, low, high, factor: w / (1 + (factor - 1) * _blend(w, low, high)),
            "you blend wavelengths: along the ramp it is the frequencies that are mixed, (1 - x) w + x w / factor",
        ),
        Mistake(
            lambda w, low, high, factor: torch.where(torch.arange(len(w)) > low, w / factor, w),
            "there is no ramp: between low and high each pair is a little slower than the one before, in even steps",
        ),
        Mistake(
            lambda w, low, high, factor: w * (1 - _blend_free(w, low, high)) + w / factor * _blend_free(w, low, high),
            "your ramp goes on beyond its ends: keep x between 0 and 1 (clamp)",
        ),
        Mistake(
            lambda w, low, high, factor: w * (1 - _blend(w, low, high)) + w * factor * _blend(w, low, high),
            "your slow pairs become faster: to reach further they are divided by the factor",
        ),
        Mistake(
            lambda w, low, high, factor: (
                w * (1 - torch.linspace(0, 1, len(w))) + w / factor * torch.linspace(0, 1, len(w))
            ),
            "your ramp runs over all pairs: it begins at low and ends at high",
        ),
    ],
)


def _blend_free(w: Tensor, low: int, high: int) -> Tensor:
    return (torch.arange(len(w)) - low) / (high - low)


# ---- yarn_scales -------------------------------------------------------------------------------------------------------


def _reference_scales(width: int, factor: float, mscale: float, mscale_all_dim: float) -> tuple[float, float]:
    on_turns, on_all = (1 + math.log(factor) * x / 10 for x in (mscale, mscale_all_dim))
    return on_turns / on_all, on_all * on_all / math.sqrt(width)


def _scales(
    turns: Callable[[float, float], float] = lambda m, a: m / a,
    softmax: Callable[[float, float], float] = lambda m, a: a**2,
    log: Callable[[float], float] = math.log,
) -> Callable[..., tuple[float, float]]:
    def answer(width: int, factor: float, mscale: float, mscale_all_dim: float) -> tuple[float, float]:
        m, a = (0.1 * x * log(factor) + 1 for x in (mscale, mscale_all_dim))
        return turns(m, a), width**-0.5 * softmax(m, a)

    return answer


yarn_scales = Exercise(
    name="yarn_scales",
    reference=_reference_scales,
    cases=[
        Case("the released model: width 192, factor 40, both 1", _fixed(192, 40.0, 1.0, 1.0)),
        Case("width 48, factor 4, mscale 0.7 and mscale_all_dim 1.2", _fixed(48, 4.0, 0.7, 1.2)),
        Case("a config without the two: mscale 1, mscale_all_dim 0", _fixed(48, 16.0, 1.0, 0.0)),
    ],
    mistakes=[
        Mistake(
            _scales(softmax=lambda m, a: a),
            "the softmax scale takes the factor squared: query and key would each have been made longer by it",
        ),
        Mistake(
            _scales(softmax=lambda m, a: 1.0),
            "the softmax scale stays as it was: at 671B its factor 1.87 is all that YaRN's temperature does",
        ),
        Mistake(
            _scales(turns=lambda m, a: m),
            "the turns are multiplied by a ratio, m(mscale) / m(mscale_all_dim), which is 1 in the released model. With "
            "m(mscale) alone the temperature counts twice",
        ),
        Mistake(
            _scales(softmax=lambda m, a: m**2),
            "the softmax scale follows mscale_all_dim, the one for the whole product; mscale is for the turned part",
        ),
        Mistake(
            _scales(softmax=lambda m, a: 1 / a**2),
            "it is upside down: over more keys the softmax has to become sharper, so the scale grows",
        ),
        Mistake(
            _scales(log=math.log10),
            "YaRN's logarithm is the natural one",
        ),
        Mistake(
            lambda width, factor, mscale, mscale_all_dim: _scales()(1, factor, mscale, mscale_all_dim),
            "the usual scale is missing: the factor multiplies 1 / sqrt(width)",
        ),
    ],
)


# ---- turns_for (find the bug) ------------------------------------------------------------------------------------------


def _turned(positions: Tensor, w: Tensor) -> Tensor:
    return torch.exp(1j * positions[:, None] * w)


def _reference_for(positions: Tensor, plain: Tensor, stretched: Tensor, trained: int, longest: int) -> Tensor:
    return _turned(positions, plain if longest <= trained else stretched)


def _by_position(positions: Tensor, plain: Tensor, stretched: Tensor, trained: int, longest: int) -> Tensor:
    return torch.where((positions < trained)[:, None], _turned(positions, plain), _turned(positions, stretched))


def _reading(first: int, count: int, trained: int, longest: int) -> Callable[[torch.Generator], tuple[Any, ...]]:
    w = _plain(8, 100.0)
    return _fixed(torch.arange(first, first + count), w, _reference_yarn(w, 0, 2, 4.0), trained, longest)


def _cached_as_whole(answer: Callable[..., Any]) -> bool:
    """A key's turn is the same when it is read early, alone, as when the whole text is read at once."""
    w = _plain(8, 100.0)
    stretched = _reference_yarn(w, 0, 2, 4.0)
    whole = answer(torch.arange(20), w, stretched, 10, 40)
    parts = [answer(torch.arange(first, first + 5), w, stretched, 10, 40) for first in range(0, 20, 5)]
    return torch.allclose(whole, torch.cat(parts), atol=1e-4)


turns_for = Exercise(
    name="turns_for",
    reference=_reference_for,
    cases=[
        Case("a model that reads 40: 6 tokens that begin within the trained 10 and end beyond", _reading(7, 6, 10, 40)),
        Case("6 tokens of a model that reads 40, trained on 10", _reading(0, 6, 10, 40)),
        Case("a model that reads fewer than it was trained on", _reading(0, 4, 10, 8)),
        Case("a model that reads 10, as many as it was trained on", _reading(0, 10, 10, 10)),
    ],
    mistakes=[
        Mistake(
            lambda positions, plain, stretched, trained, longest: _turned(
                positions, stretched if int(positions.max()) >= trained else plain
            ),
            "you still go by what is read now: a key that was kept from a short text has plain turns, and a query that comes "
            "later has stretched ones. Go by the longest text that the model is configured for",
        ),
        Mistake(
            _by_position,
            "you choose for each position: then a key before the border and a query behind it turn at different speeds, and "
            "their product is no longer about their distance",
        ),
        Mistake(
            lambda positions, plain, stretched, trained, longest: _turned(
                positions, stretched if longest >= trained else plain
            ),
            "as long as in training is not longer: at longest = trained nothing is stretched",
        ),
        Mistake(
            lambda positions, plain, stretched, trained, longest: _turned(positions, stretched),
            "you always stretch: a model that is configured for no more than it was trained on keeps its plain frequencies",
        ),
        Mistake(
            lambda positions, plain, stretched, trained, longest: _turned(positions, plain),
            "you never stretch: a model that is configured for more than it was trained on has the stretched frequencies",
        ),
    ],
    properties=[
        Property(
            "in pieces, a text gets the turns that it gets in one",
            _cached_as_whole,
            "what is kept of early tokens must fit what comes later: let nothing depend on which tokens are read now",
        )
    ],
    tolerance=5e-5,
)
