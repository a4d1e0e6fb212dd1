"""Pass by pass: the passes together are the text, and what is said of each draft is what the text says of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_models import nano, random_model, random_tokens

from dsv3_mini.inference import complete
from dsv3_mini.inference.settings import Settings
from dsv3_mini.inference.watching import Pass, watch
from dsv3_mini.inference.writing import Writing
from dsv3_mini.model import DeepSeekV3


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return random_model(nano(vocab_size=6, num_nextn_predict_layers=2), seed=1)


@pytest.mark.parametrize("more", [{}, dict(use_mtp=True), dict(use_mtp=True, drafts=3)], ids=["plain", "two", "three"])
def test_the_passes_are_the_text(model: DeepSeekV3, more: dict[str, Any]) -> None:
    prompt = random_tokens(model.cfg, 1, 7)[0].tolist()
    watched = watch(model, prompt, max_new_tokens=40, **more)
    passes = list(watched)
    (plain,) = complete(model, [prompt], 40)
    assert [token for each in passes for token in each.written] == plain
    assert watched.counts == Writing(model, [prompt], Settings(max_new_tokens=40, **more)).finish().counts
    assert passes[0].drafts == [] and len(passes[0].written) == 1
    at = 0
    for each in passes:
        # Greedy: drafts hold as far as they are the text that plain decoding writes.
        following = plain[at : at + len(each.drafts)]
        held = next((i for i, (d, t) in enumerate(zip(each.drafts, following, strict=False)) if d != t), len(following))
        assert each.from_drafts == min(held, len(each.written))
        assert each.refused == (each.drafts[held] if held < len(following) else None)
        at += len(each.written)
    if more:
        assert any(each.refused is not None for each in passes) and any(each.from_drafts for each in passes)


def test_drawn_passes_are_those_of_the_same_seed(model: DeepSeekV3) -> None:
    settings = dict(max_new_tokens=40, temperature=1.0, use_mtp=True)
    passes = list(watch(model, [1, 2, 3], generator=torch.Generator().manual_seed(3), **settings))
    (row,) = complete(model, [[1, 2, 3]], generator=torch.Generator().manual_seed(3), **settings)
    assert [token for each in passes for token in each.written] == row


def test_a_draft_behind_the_end_was_neither_taken_nor_refused() -> None:
    ended = Pass(drafts=[4, 5, 6], held=2, written=[4])  # 4 was a stop token
    assert (ended.from_drafts, ended.refused) == (1, None)
    assert Pass(drafts=[4, 5], held=1, written=[4, 7]).refused == 5
    assert Pass(drafts=[4, 5], held=2, written=[4, 5, 7]).refused is None
