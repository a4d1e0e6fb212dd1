"""RoPE and YaRN against complex numbers written out, against transformers, and against the published figures."""

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import YARN, nano
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

from dsv3_mini.config import ModelConfig, RopeScaling
from dsv3_mini.model.rope import (
    correction_range,
    frequencies,
    rotate,
    rotation_scale,
    rotations,
    softmax_scale,
    yarn_mscale,
)

RELEASED = ModelConfig.preset("671b")
YARNS = {
    "released": RELEASED,
    "nano": nano(**YARN),
    "both factors": nano(
        max_position_embeddings=512,
        rope_scaling=RopeScaling(factor=8, original_max_position_embeddings=64, mscale=0.9, mscale_all_dim=0.6),
    ),
    "a ramp cut off at both ends": nano(
        max_position_embeddings=512,
        rope_scaling=RopeScaling(factor=2, original_max_position_embeddings=4, beta_fast=64, beta_slow=1e-9),
    ),
    "ends that round the other way": RELEASED.replace(rope_scaling=RopeScaling(beta_fast=30.0, beta_slow=1.1)),
    "a ramp of no width": nano(
        max_position_embeddings=512,
        rope_theta=1e30,
        rope_scaling=RopeScaling(factor=2, original_max_position_embeddings=7, beta_fast=1.1, beta_slow=1.05),
    ),
}


# ---- rotation --------------------------------------------------------------------------------------------------------


def test_rotate_is_multiplication_of_neighbouring_pairs_by_a_complex_number() -> None:
    cfg = nano(rope_theta=100.0)
    x = torch.randn(2, 5, 3, 8)
    positions = torch.tensor([0, 1, 7, 30, 200])
    turned = rotate(x, rotations(cfg, positions))
    for b in range(2):
        for s, position in enumerate(positions.tolist()):
            for h in range(3):
                for pair in range(4):
                    w = 100.0 ** (-2 * pair / 8)
                    z = complex(x[b, s, h, 2 * pair], x[b, s, h, 2 * pair + 1]) * cmath.exp(1j * position * w)
                    got = complex(turned[b, s, h, 2 * pair], turned[b, s, h, 2 * pair + 1])
                    assert abs(got - z) < 2e-5


def test_keys_without_heads_turn_as_those_with() -> None:
    cfg = nano()
    x, turn = torch.randn(2, 9, 8), rotations(cfg, torch.arange(9))
    assert torch.equal(rotate(x, turn), rotate(x[:, :, None], turn)[:, :, 0])


@settings(max_examples=50)
@given(shift=st.integers(0, 200), distance=st.integers(0, 40), seed=st.integers(0, 1000))
def test_scores_depend_on_distance_alone(shift: int, distance: int, seed: int) -> None:
    cfg = nano(rope_theta=50.0)
    query, key = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(seed))

    def score(p: int, q: int) -> float:
        return (
            rotate(query[None], rotations(cfg, torch.tensor([p])))
            .mul(rotate(key[None], rotations(cfg, torch.tensor([q]))))
            .sum()
            .item()
        )

    assert score(shift + distance, shift) == pytest.approx(score(distance, 0), abs=2e-4)


@pytest.mark.parametrize("name", YARNS)
def test_scores_of_rotated_queries_and_keys_equal_transformers(name: str) -> None:
    """transformers hands the turned dimensions on in another order, the same for queries and keys: scores are equal."""
    cfg = YARNS[name]
    width, length = cfg.qk_rope_head_dim, 50
    query, key = torch.randn(2, 1, length, 1, width)
    turn = rotations(cfg, torch.arange(length))
    ours = torch.einsum("bshr,bthr->bhst", rotate(query, turn), rotate(key, turn))
    inv, factor = ROPE_INIT_FUNCTIONS["yarn"](DeepseekV3Config(**cfg.to_hf()), "cpu")
    angles = torch.arange(length)[:, None] * torch.cat([inv, inv])
    cos, sin = (angles.cos() * factor)[None], (angles.sin() * factor)[None]
    q, k = apply_rotary_pos_emb_interleave(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    torch.testing.assert_close(ours, q @ k.transpose(-1, -2), rtol=1e-4, atol=1e-4)


def test_angles_are_fp32_even_for_a_bf16_model() -> None:
    """At position 4095 a BF16 angle would be up to 8 radians off."""
    cfg = RELEASED.replace(rope_scaling=None)
    turn = rotations(cfg, torch.tensor([4095]))
    assert turn.dtype == torch.complex64
    for pair, z in enumerate(turn[0].tolist()):
        assert abs(z - cmath.exp(1j * 4095 * 10000.0 ** (-pair / 32))) < 1e-3
    x = torch.randn(1, 1, 64).bfloat16()
    assert rotate(x, turn).dtype == torch.bfloat16
    torch.testing.assert_close(rotate(x, turn).float(), rotate(x.float(), turn), rtol=2**-8, atol=1e-6)


# ---- YaRN ------------------------------------------------------------------------------------------------------------


def test_the_published_figures() -> None:
    """Report section 4.3 with the released config: the ramp runs from 10.47 to 22.51, rounded outwards; 1.36889, 1.87385."""
    turns = [4096 / (2 * math.pi * 10000.0 ** (pair / 32)) for pair in range(32)]  # of each pair, in 4096 positions

    def pair_that_turns(beta: float) -> float:
        low = max(pair for pair in range(32) if turns[pair] >= beta)
        return low + math.log(turns[low] / beta) / math.log(turns[low] / turns[low + 1])

    assert (round(pair_that_turns(32), 2), round(pair_that_turns(1), 2)) == (10.47, 22.51)
    assert correction_range(RELEASED, RELEASED.rope_scaling) == (10, 23)
    # Outwards, not to the nearest: here 10.69 and 22.18.
    assert correction_range(RELEASED, RopeScaling(beta_fast=30.0, beta_slow=1.1)) == (10, 23)
    assert round(yarn_mscale(40.0, 1.0), 5) == 1.36889
    assert round(softmax_scale(RELEASED) * math.sqrt(192), 5) == 1.87385
    assert rotation_scale(RELEASED) == 1.0


def test_fast_pairs_keep_their_frequency_and_slow_ones_lose_the_factor() -> None:
    stretched, plain = frequencies(RELEASED), frequencies(RELEASED.replace(rope_scaling=None))
    ratio = [plain[pair] / stretched[pair] for pair in range(32)]
    assert ratio[:11] == [1.0] * 11
    assert ratio[23:] == pytest.approx([40.0] * 9)
    assert all(a < b for a, b in zip(ratio[10:24], ratio[11:24], strict=False))
    # Halfway up the ramp (pair 16.5) half of the frequency is interpolated: the ramp is linear in the pair's number.
    assert stretched[16] / plain[16] == pytest.approx(1 - 6 / 13 * (1 - 1 / 40))


@pytest.mark.parametrize("name", YARNS)
def test_yarn_equals_transformers(name: str) -> None:
    cfg = YARNS[name]
    inv, factor = ROPE_INIT_FUNCTIONS["yarn"](DeepseekV3Config(**cfg.to_hf()), "cpu")
    assert frequencies(cfg) == pytest.approx(inv.tolist(), rel=1e-5, abs=1e-35)
    assert rotation_scale(cfg) == pytest.approx(factor)


def test_the_configured_length_switches_yarn_on_and_an_inputs_length_never_does() -> None:
    cfg = nano(**YARN)  # 64 positions, stretched to 256
    turn = rotations(cfg, torch.arange(256))
    assert torch.equal(turn[:10], rotations(cfg, torch.arange(10)))
    unstretched = cfg.replace(max_position_embeddings=64)
    assert not unstretched.uses_yarn
    assert frequencies(unstretched) == frequencies(cfg.replace(rope_scaling=None)) != frequencies(cfg)
    assert softmax_scale(unstretched) == 24**-0.5 and rotation_scale(unstretched) == 1.0
    assert softmax_scale(cfg) == pytest.approx(24**-0.5 * (0.1 * math.log(4) + 1) ** 2)
