"""Lesson 17's checks: each right answer accepted, each wrong one refused with its own hint, a blank one only noted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lesson_answers import (  # noqa: F401
    test_blank_is_unsolved_and_every_exercise_knows_mistakes,
    test_right_answers_are_accepted,
    test_wrong_answers_get_their_own_hint,
)
from torch import Tensor

from dsv3_mini.config import ModelConfig, RopeScaling
from dsv3_mini.course.checks import lesson_17 as check
from dsv3_mini.course.checks.framework import Exercise
from dsv3_mini.model import rope

# ---- right answers, each written in two ways ---------------------------------------------------------------------------


def turns_by_wavelength(w: Tensor, context: int) -> Tensor:
    return context / (math.tau / w)


def turns_in_numpy(w: Tensor, context: int) -> Any:
    return (w.numpy() * context / np.pi / 2).astype(np.float32)


def stretched_config(
    width: int, theta: float, trained: int, fast: float, slow: float, factor: float = 2.0
) -> ModelConfig:
    scaling = RopeScaling(factor=factor, original_max_position_embeddings=trained, beta_fast=fast, beta_slow=slow)
    return ModelConfig.preset("nano", qk_rope_head_dim=width, rope_theta=theta, rope_scaling=scaling)


def ends_of_the_package(width: int, theta: float, trained: int, fast: float, slow: float) -> tuple[int, int]:
    cfg = stretched_config(width, theta, trained, fast, slow)
    return rope.correction_range(cfg, cfg.rope_scaling)


def ends_in_base_ten(width: int, theta: float, trained: int, fast: float, slow: float) -> list[int]:
    ends = [width * math.log10(trained / k / math.tau) / 2 / math.log10(theta) for k in (fast, slow)]
    return [int(max(math.floor(ends[0]), 0)), int(min(math.ceil(ends[1]), width - 1))]


def yarn_in_one_factor(w: Tensor, low: int, high: int, factor: float) -> Tensor:
    x = torch.clamp((torch.arange(w.numel()) - low) / (high - low), min=0, max=1)
    return w * (1 - x * (1 - 1 / factor))


def yarn_by_lerp(w: Tensor, low: int, high: int, factor: float) -> Tensor:
    ramp = torch.tensor([min(max((j - low) / (high - low), 0.0), 1.0) for j in range(len(w))])
    return torch.lerp(w, w / factor, ramp)


def scales_of_the_package(width: int, factor: float, mscale: float, mscale_all_dim: float) -> tuple[float, float]:
    m, a = rope.yarn_mscale(factor, mscale), rope.yarn_mscale(factor, mscale_all_dim)
    return m / a, a * a * width**-0.5


def scales_by_power(width: int, factor: float, mscale: float, mscale_all_dim: float) -> list[float]:
    m, a = (math.log(math.e * factor ** (0.1 * x)) for x in (mscale, mscale_all_dim))
    return [m / a, math.pow(a, 2) / math.sqrt(width)]


def turned(positions: Tensor, w: Tensor) -> Tensor:
    angles = positions.float()[:, None] * w
    return torch.polar(torch.ones_like(angles), angles)


def for_configured(positions: Tensor, plain: Tensor, stretched: Tensor, trained: int, longest: int) -> Tensor:
    return turned(positions, plain) if trained >= longest else turned(positions, stretched)


def for_each_pair(positions: Tensor, plain: Tensor, stretched: Tensor, trained: int, longest: int) -> Tensor:
    w = [(s if longest > trained else p).item() for p, s in zip(plain, stretched, strict=True)]
    return torch.stack([torch.exp(1j * positions * one) for one in w], dim=-1)


RIGHT: list[tuple[Exercise, Callable[..., Any]]] = [
    (check.turns_within, turns_by_wavelength),
    (check.turns_within, turns_in_numpy),
    (check.ramp_ends, ends_of_the_package),
    (check.ramp_ends, ends_in_base_ten),
    (check.yarn_frequencies, yarn_in_one_factor),
    (check.yarn_frequencies, yarn_by_lerp),
    (check.yarn_scales, scales_of_the_package),
    (check.yarn_scales, scales_by_power),
    (check.turns_for, for_configured),
    (check.turns_for, for_each_pair),
]


# ---- wrong answers -----------------------------------------------------------------------------------------------------


def ends_of(
    fast_first: bool = True, half: float = 2.0, circle: float = math.tau, round_to: Any = (math.floor, math.ceil)
) -> Callable[..., Any]:
    def answer(width: int, theta: float, trained: int, fast: float, slow: float) -> tuple[Any, Any]:
        first, second = (fast, slow) if fast_first else (slow, fast)
        low, high = (width / half * math.log(trained / k / circle, theta) for k in (first, second))
        return max(round_to[0](low), 0), min(round_to[1](high), width - 1)

    return answer


def no_clamp(width: int, theta: float, trained: int, fast: float, slow: float) -> tuple[int, int]:
    low, high = (width / 2 * math.log(trained / k / math.tau, theta) for k in (fast, slow))
    return math.floor(low), math.ceil(high)


def tidy_clamp(width: int, theta: float, trained: int, fast: float, slow: float) -> tuple[int, int]:
    low, high = no_clamp(width, theta, trained, fast, slow)
    return max(low, 0), min(high, width // 2 - 1)


def ramp(w: Tensor, low: int, high: int) -> Tensor:
    return torch.tensor([min(max((j - low) / (high - low), 0.0), 1.0) for j in range(len(w))])


def by_length(positions: Tensor, plain: Tensor, stretched: Tensor, trained: int, longest: int) -> Tensor:
    return turned(positions, stretched if positions[-1] >= trained else plain)


def by_position(positions: Tensor, plain: Tensor, stretched: Tensor, trained: int, longest: int) -> Tensor:
    return torch.stack([turned(p[None], plain if p < trained else stretched)[0] for p in positions])


def m(factor: float, x: float) -> float:
    return 0.1 * x * math.log(factor) + 1


WRONG: list[tuple[Exercise, Callable[..., Any], str]] = [
    (check.turns_within, lambda w, context: context * w, "these are radians"),
    (check.turns_within, lambda w, context: math.tau / (w * context), "upside down"),
    (check.turns_within, lambda w, context: math.tau / w, "this is the wavelength"),
    (check.turns_within, lambda w, context: torch.floor(context * w / math.tau), "keep the parts"),
    (check.turns_within, lambda w, context: context * w / 360, "not in degrees"),
    (check.ramp_ends, ends_of(fast_first=False), "your ends are swapped"),
    (check.ramp_ends, ends_of(half=1.0), "two of them are a pair"),
    (check.ramp_ends, ends_of(circle=1.0), "radians as turns"),
    (check.ramp_ends, ends_of(round_to=(round, round)), "to the nearest pair"),
    (check.ramp_ends, ends_of(round_to=(math.ceil, math.floor)), "round the ramp narrower"),
    (check.ramp_ends, ends_of(round_to=(float, float)), "the ends are whole pairs"),
    (check.ramp_ends, no_clamp, "an end may lie outside"),
    (check.ramp_ends, tidy_clamp, "the released code ends at width - 1"),
    (check.yarn_frequencies, lambda w, low, high, s: torch.lerp(w / s, w, ramp(w, low, high)), "the wrong way"),
    (check.yarn_frequencies, lambda w, low, high, s: w / s, "this is position interpolation"),
    (check.yarn_frequencies, lambda w, low, high, s: w / (1 + (s - 1) * ramp(w, low, high)), "you blend wavelengths"),
    (
        check.yarn_frequencies,
        lambda w, low, high, s: torch.cat([w[: low + 1], w[low + 1 :] / s]),
        "there is no ramp",
    ),
    (
        check.yarn_frequencies,
        lambda w, low, high, s: w + (w / s - w) * (torch.arange(len(w)) - low) / (high - low),
        "keep x between 0 and 1",
    ),
    (check.yarn_frequencies, lambda w, low, high, s: torch.lerp(w, w * s, ramp(w, low, high)), "become faster"),
    (
        check.yarn_frequencies,
        lambda w, low, high, s: torch.lerp(w, w / s, torch.linspace(0, 1, len(w))),
        "begins at low and ends at high",
    ),
    (check.yarn_scales, lambda d, s, x, y: (m(s, x) / m(s, y), m(s, y) / d**0.5), "takes the factor squared"),
    (check.yarn_scales, lambda d, s, x, y: (m(s, x) / m(s, y), d**-0.5), "stays as it was"),
    (check.yarn_scales, lambda d, s, x, y: (m(s, x), m(s, y) ** 2 / d**0.5), "multiplied by a ratio"),
    (check.yarn_scales, lambda d, s, x, y: (m(s, x) / m(s, y), m(s, x) ** 2 / d**0.5), "follows mscale_all_dim"),
    (check.yarn_scales, lambda d, s, x, y: (m(s, x) / m(s, y), m(s, y) ** -2 / d**0.5), "upside down"),
    (check.yarn_scales, lambda d, s, x, y: (m(s, x) / m(s, y), m(s, y) ** 2), "the usual scale is missing"),
    (check.turns_for, by_length, "you still go by what is read now"),
    (check.turns_for, lambda p, plain, stretched, trained, longest: turned(p, stretched), "you always stretch"),
    (check.turns_for, lambda p, plain, stretched, trained, longest: turned(p, plain), "you never stretch"),
    (check.turns_for, by_position, "you choose for each position"),
    (
        check.turns_for,
        lambda p, plain, stretched, trained, longest: turned(p, plain if longest < trained else stretched),
        "as long as in training is not longer",
    ),
]


def test_the_released_ramp_is_the_facts() -> None:
    """The ramp of the released model runs from pair 10 to pair 23, and its softmax scale is 1.87385 times the usual one."""
    assert check.ramp_ends.reference(64, 1e4, 4096, 32.0, 1.0) == (10, 23)
    on_turns, on_all = check.yarn_scales.reference(192, 40.0, 1.0, 1.0)
    assert on_turns == 1.0 and on_all * 192**0.5 == pytest.approx(1.87385, abs=1e-5)


def test_the_references_are_the_package() -> None:
    cfg = stretched_config(16, 1e4, 64, 32.0, 1.0, factor=4.0)
    plain = torch.tensor(rope.frequencies(cfg.replace(rope_scaling=None)))
    low, high = rope.correction_range(cfg, cfg.rope_scaling)
    torch.testing.assert_close(
        check.yarn_frequencies.reference(plain, low, high, 4.0), torch.tensor(rope.frequencies(cfg))
    )
