"""The latent cache: the report's bytes, rows of any lengths, and that what it gives back is what a whole forward pass sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import YARN, nano, random_model, random_tokens

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.inference import LatentCache
from dsv3_mini.inference.settings import Settings
from dsv3_mini.inference.writing import Writing
from dsv3_mini.ledger import cache_per_token

CPU = torch.device("cpu")


def test_bytes_of_the_released_model() -> None:
    cfg = ModelConfig.preset("671b")
    layers = LatentCache.for_model(cfg, 1, 1, torch.bfloat16, torch.device("meta"))
    assert len(layers) == 61
    assert sum(cache.bytes_per_token for cache in layers) == 70_272  # (512 + 64) x 61 numbers of 2 bytes
    allocated = sum(tensor.nbytes for cache in layers for tensor in (cache.latent, cache.key_rope))
    assert allocated == 70_272


@pytest.mark.parametrize("dtype, name", [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
def test_generation_allocates_what_the_ledger_counts(dtype: torch.dtype, name: str) -> None:
    """Three rows of up to 7 + 20 tokens: so much is taken once, and no more comes."""
    model = random_model(nano()).to(dtype)
    taken: list[int] = []
    original = LatentCache.for_model.__func__

    def watched(cls: type[LatentCache], *arguments: Any) -> list[LatentCache]:
        layers.extend(original(cls, *arguments))
        return layers

    layers: list[LatentCache] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentCache, "for_model", classmethod(watched))
        writing = Writing(model, [[1] * 7, [2] * 3, [3] * 5], Settings(max_new_tokens=20))
        for _ in writing:
            taken.append(sum(layer.kept.untyped_storage().nbytes() for layer in layers))
    assert set(taken) == {3 * 27 * cache_per_token(model.cfg, dtype=name).bytes("mla")}


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


@settings(max_examples=60)
@given(st.data())
def test_it_does_what_lists_do(data: st.DataObject) -> None:
    """Rows as Python lists, through any sequence of extending, cutting each row elsewhere, and choosing rows."""
    cfg, number = nano(), 0
    cache, rows = LatentCache(cfg, 3, 1, torch.float32, CPU), [[], [], []]
    for _ in range(data.draw(st.integers(1, 8))):
        match data.draw(st.sampled_from(["extend", "extend", "truncate", "select"])):
            case "extend":
                new = data.draw(st.integers(1, 4))
                numbers = torch.arange(number, number + len(rows) * new).view(len(rows), new)
                number += len(rows) * new
                assert cache.positions(new).expand(len(rows), new).tolist() == [
                    [len(row) + i for i in range(new)] for row in rows
                ]
                rows = [row + added for row, added in zip(rows, numbers.tolist(), strict=True)]
                wide = numbers[..., None].float()
                latent, key_rope = cache.extend(
                    wide.expand(-1, -1, cfg.kv_lora_rank), -wide.expand(-1, -1, cfg.qk_rope_head_dim)
                )
                assert latent.shape[1] == key_rope.shape[1] == max(map(len, rows)) <= cache.capacity
            case "truncate":
                lengths = [data.draw(st.integers(0, len(row))) for row in rows]
                cache.truncate(lengths)
                rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
            case "select":
                chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
                before, cache = cache, cache.select(chosen)
                before.latent.fill_(torch.nan)  # memory of its own
                before.key_rope.fill_(torch.nan)
                rows = [rows[row] for row in chosen]
        assert cache.lengths == [len(row) for row in rows]
        for b, row in enumerate(rows):
            assert cache.latent[b, : len(row)].tolist() == [[float(x)] * cfg.kv_lora_rank for x in row]
            assert cache.key_rope[b, : len(row)].tolist() == [[-float(x)] * cfg.qk_rope_head_dim for x in row]


def test_memory_doubles_when_it_is_full() -> None:
    cfg = nano()
    cache, sizes = LatentCache(cfg, 1, 4, torch.float32, CPU), []
    for _ in range(17):
        cache.extend(torch.randn(1, 1, cfg.kv_lora_rank), torch.randn(1, 1, cfg.qk_rope_head_dim))
        sizes.append(cache.capacity)
    assert sizes == [4] * 4 + [8] * 4 + [16] * 8 + [32]
    cache.extend(torch.randn(1, 50, cfg.kv_lora_rank), torch.randn(1, 50, cfg.qk_rope_head_dim))
    assert cache.capacity == 67  # twice would not do


def test_rows_cannot_be_cut_to_more_than_they_hold() -> None:
    cache = LatentCache(nano(), 2, 4, torch.float32, CPU)
    cache.extend(torch.randn(2, 3, 16), torch.randn(2, 3, 8))
    for lengths, words in (([3, 4], "row 1 holds 3 tokens"), ([-1, 3], "row 0 holds 3"), ([3], "1 lengths for 2 rows")):
        with pytest.raises(ConfigError, match=words):
            cache.truncate(lengths)
    assert cache.lengths == [3, 3]


# ---- the model beside it ---------------------------------------------------------------------------------------------


WIDE = {"kv_lora_rank": 64}  # nano's own latent is so narrow that absorbing is never dearer; here it is, for long steps


@pytest.mark.parametrize("cut", [[1] * 12, [12], [5, 7], [1, 11], [6, 1, 1, 4], [3, 3, 3, 3]])
@pytest.mark.parametrize("changes", [{}, YARN, {"q_lora_rank": None}, WIDE], ids=["plain", "yarn", "no q_lora", "wide"])
@torch.no_grad()
def test_any_cut_through_a_text_gives_the_logits_of_the_whole(cut: list[int], changes: dict) -> None:
    """Short steps take the absorbed path, longer ones the expanded one: both must meet."""
    model = random_model(nano(**changes))
    tokens = random_tokens(model.cfg, rows=3, length=12)
    whole = model(tokens).logits
    cache = LatentCache.for_model(model.cfg, 3, 12, torch.float32, CPU)
    parts = [model(part, cache=cache).logits for part in tokens.split(cut, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-5 * whole.abs().max().item())
    assert all(layer.length == 12 for layer in cache)


@pytest.mark.parametrize("changes", [{}, YARN, WIDE], ids=["plain", "yarn", "wide"])
@torch.no_grad()
def test_rows_of_unequal_lengths_are_as_if_read_alone(changes: dict) -> None:
    """Prompts padded at the end, then windows of which each row keeps another part, as after refuted drafts."""
    model = random_model(nano(**changes))
    texts = random_tokens(model.cfg, rows=3, length=64)
    whole = model(texts).logits
    cache = LatentCache.for_model(model.cfg, 3, 2, torch.float32, CPU)
    done = [4, 11, 7]
    padded = texts[:, :11].clone()
    for row, length in enumerate(done):
        padded[row, length:] = 0
    model(padded, cache=cache)
    ways = set()
    layer = model.layers[0].self_attn
    for width, kept in (
        (3, [3, 1, 2]),
        (3, [1, 3, 3]),
        (20, [20, 9, 14]),
        (2, [0, 2, 1]),
        (1, [1, 0, 1]),
        (3, [3, 3, 3]),
    ):
        ways.add(layer.absorbs(width, max(done) + width))
        for kept_by_layer in cache:
            kept_by_layer.truncate(done)
            for row, length in enumerate(done):  # whatever lies there is seen by nobody
                kept_by_layer.latent[row, length:] = kept_by_layer.key_rope[row, length:] = 1e4
        window = torch.stack([texts[row, n : n + width] for row, n in enumerate(done)])
        for row, n in enumerate(kept):
            window[row, n:] = 5  # drafts that will be refuted
        logits = model(window, cache=cache).logits
        for row, (n, k) in enumerate(zip(done, kept, strict=True)):
            expected = whole[row, n : n + k]
            torch.testing.assert_close(logits[row, :k], expected, rtol=0, atol=2e-5 * whole.abs().max().item())
        done = [n + k for n, k in zip(done, kept, strict=True)]
    assert ways == ({True, False} if changes is WIDE else {True}), "both ways beside rows of unequal lengths"
