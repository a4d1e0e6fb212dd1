"""The latent cache: the report's bytes, and that what it gives back is what a whole forward pass sees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import YARN, nano, random_model, random_tokens

from dsv3_mini.config import ModelConfig
from dsv3_mini.inference import LatentCache

CPU = torch.device("cpu")


def test_bytes_of_the_released_model() -> None:
    cfg = ModelConfig.preset("671b")
    layers = LatentCache.for_model(cfg, 1, 1, torch.bfloat16, torch.device("meta"))
    assert len(layers) == 61
    assert sum(cache.bytes_per_token for cache in layers) == 70_272  # (512 + 64) x 61 numbers of 2 bytes
    allocated = sum(tensor.nbytes for cache in layers for tensor in (cache.latent, cache.key_rope))
    assert allocated == 70_272


@settings(max_examples=25)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_extending_gives_back_all_there_was(lengths: list[int]) -> None:
    cfg = nano()
    cache = LatentCache(cfg, 3, sum(lengths), torch.float32, CPU)
    latents, ropes = [], []
    for length in lengths:
        latents.append(torch.randn(3, length, cfg.kv_lora_rank))
        ropes.append(torch.randn(3, length, cfg.qk_rope_head_dim))
        latent, key_rope = cache.extend(latents[-1], ropes[-1])
        assert torch.equal(latent, torch.cat(latents, 1)) and torch.equal(key_rope, torch.cat(ropes, 1))
        assert cache.length == latent.shape[1]


@pytest.mark.parametrize("cut", [[1] * 12, [12], [5, 7], [1, 11], [6, 1, 1, 4], [3, 3, 3, 3]])
@pytest.mark.parametrize("changes", [{}, YARN, {"q_lora_rank": None}], ids=["plain", "yarn", "no q_lora"])
@torch.no_grad()
def test_any_cut_through_a_text_gives_the_logits_of_the_whole(cut: list[int], changes: dict) -> None:
    """Steps of one token take the absorbed path, longer ones the expanded one: both must meet."""
    model = random_model(nano(**changes))
    tokens = random_tokens(model.cfg, rows=3, length=12)
    whole = model(tokens).logits
    cache = LatentCache.for_model(model.cfg, 3, 12, torch.float32, CPU)
    parts = [model(part, cache=cache).logits for part in tokens.split(cut, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-5 * whole.abs().max().item())
    assert all(layer.length == 12 for layer in cache)
