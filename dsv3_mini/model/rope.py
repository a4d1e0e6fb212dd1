"""Rotary position embedding, and YaRN, which stretches it to a longer context.

A pair of neighbouring dimensions is one complex number. A token at position p turns pair i by the angle p * w_i, so a
query at p and a key at q meet with a relative angle (p - q) * w_i: attention sees distances. Wavelengths run from
2 pi positions (the first pair) to 2 pi * rope_theta (the last).

The pairs are *neighbours* (0, 1), (2, 3), ...: the layout of the released weights. (Some libraries pair i with i + r/2;
the two differ by a permutation, and mixing them up gives a model that runs and is wrong.)
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from dsv3_mini.config import ModelConfig, RopeScaling


def frequencies(cfg: ModelConfig) -> list[float]:
    """Angle in radians per position of each of the r/2 pairs, with YaRN where the configured length asks for it."""
    pairs = cfg.qk_rope_head_dim // 2
    plain = [cfg.rope_theta ** (-i / pairs) for i in range(pairs)]
    if not cfg.uses_yarn:
        return plain
    scaling = cfg.rope_scaling
    low, high = correction_range(cfg, scaling)
    ramp = [min(max((i - low) / max(high - low, 0.001), 0.0), 1.0) for i in range(pairs)]
    return [w * (1 - x) + w / scaling.factor * x for w, x in zip(plain, ramp, strict=True)]


def correction_range(cfg: ModelConfig, scaling: RopeScaling) -> tuple[int, int]:
    """The pairs between which YaRN's ramp runs (YaRN, section 3.2; report section 4.3).

    A pair that turns more than `beta_fast` times within the original context keeps its frequency (it tells neighbours
    apart), one that turns less than `beta_slow` times is slowed by `factor` (it would meet angles it never saw).
    The ramp is over wavelengths: which pair turns `beta` times follows from w = theta^(-i / pairs).
    """

    def pair_that_turns(beta: float) -> float:
        length = scaling.original_max_position_embeddings
        return cfg.qk_rope_head_dim / 2 * math.log(length / (beta * 2 * math.pi)) / math.log(cfg.rope_theta)

    low, high = math.floor(pair_that_turns(scaling.beta_fast)), math.ceil(pair_that_turns(scaling.beta_slow))
    # The upper clamp is the rope width, not the number of pairs: so it stands in the released code.
    return max(low, 0), min(high, cfg.qk_rope_head_dim - 1)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature 0.1 * mscale * ln(factor) + 1: attention over more keys has to be sharper to stay as sharp."""
    return 0.1 * mscale * math.log(factor) + 1.0


def rotation_scale(cfg: ModelConfig) -> float:
    """YaRN's first factor, on cos and sin: a ratio, 1 in the released model."""
    if not cfg.uses_yarn:
        return 1.0
    scaling = cfg.rope_scaling
    return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)


def softmax_scale(cfg: ModelConfig) -> float:
    """1/sqrt(n + r) for the whole dot product; YaRN's second factor multiplies it by mscale squared (1.87 at 671B)."""
    scale = cfg.qk_head_dim**-0.5
    return (
        scale * yarn_mscale(cfg.rope_scaling.factor, cfg.rope_scaling.mscale_all_dim) ** 2 if cfg.uses_yarn else scale
    )


def rotations(cfg: ModelConfig, positions: Int[Tensor, "*b s"]) -> Complex[Tensor, "*b s pairs"]:
    """e^(i * position * frequency) for every position and pair, in FP32: one BF16 step at position 4096 is 16 positions."""
    w = torch.tensor(frequencies(cfg), dtype=torch.float32, device=positions.device)
    angles = positions.float()[..., None] * w
    return torch.polar(torch.full_like(angles, rotation_scale(cfg)), angles)


def rotate(x: Float[Tensor, "b s *h r"], turn: Complex[Tensor, "*b s pairs"]) -> Float[Tensor, "b s *h r"]:
    """Turn each pair of neighbouring dimensions of x: one complex product."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    if x.ndim == 4:
        turn = turn[..., None, :]  # the same turn for every head
    return torch.view_as_real(pairs * turn).flatten(-2).type_as(x)
