"""The card race: its budget is one, its attention is plain attention, and readers learn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dsv3_mini.course.card_race import (
    CARDS,
    FIELDS,
    HEAD_WIDTH,
    NAMES,
    RACE,
    VALUES,
    WIDTH,
    CacheShape,
    CardReader,
    deal,
    race,
    share_right,
    train,
)
from dsv3_mini.errors import ConfigError


@pytest.mark.parametrize("shape", RACE, ids=lambda shape: shape.name)
def test_a_shape_counts_what_its_reader_has(shape: CacheShape) -> None:
    reader = CardReader(shape)
    matrices = [m.weight for part in (reader.query, reader.key_value, reader.out) for m in part.modules()
                if isinstance(m, nn.Linear)]  # fmt: skip
    assert shape.weights == sum(weight.numel() for weight in matrices)
    assert abs(shape.weights / (4 * WIDTH * WIDTH) - 1) < 0.01, "one budget for all"
    last_kept = reader.key_value if shape.latent is None else reader.key_value[0]
    assert shape.cached == last_kept.out_features


def test_names_of_shapes_and_what_is_refused() -> None:
    assert [shape.name for shape in RACE[:4]] == ["MHA, 4 heads", "GQA-2, 6 heads", "MQA, 7 heads", "MLA, 4 heads"]
    assert [shape.cached for shape in RACE] == [128, 64, 32, 42, 27, 16]
    for wrong in ({}, {"groups": 2, "latent": 8}, {"groups": 3}):
        with pytest.raises(ConfigError):
            CacheShape(4, **wrong)


def test_a_table_has_different_names_and_the_same_seed_deals_the_same() -> None:
    names, facts = deal(torch.Generator().manual_seed(3), 50)
    assert names.shape == (50, CARDS) and facts.shape == (50, CARDS, FIELDS)
    assert all(len(set(row)) == CARDS for row in names.tolist())
    assert names.min() >= 0 and names.max() < NAMES and facts.min() >= 0 and facts.max() < VALUES
    again, _ = deal(torch.Generator().manual_seed(3), 50)
    assert torch.equal(names, again)


@pytest.mark.parametrize("shape", [RACE[0], RACE[1], RACE[2], RACE[4]], ids=lambda shape: shape.name)
@torch.no_grad()
def test_attention_is_head_by_head_what_it_should_be(shape: CacheShape) -> None:
    reader = CardReader(shape)
    asked, cards = torch.randn(2, 3, WIDTH), torch.randn(2, 5, WIDTH)
    query = reader.query(asked).view(2, 3, shape.heads, HEAD_WIDTH)
    pairs = reader.key_value(cards).view(2, 5, -1, 2, HEAD_WIDTH)
    each = shape.heads // pairs.shape[2]
    heads = []
    for head in range(shape.heads):
        key, value = pairs[:, :, head // each, 0], pairs[:, :, head // each, 1]
        heads.append((query[:, :, head] @ key.mT / math.sqrt(HEAD_WIDTH)).softmax(-1) @ value)
    torch.testing.assert_close(reader.attend(asked, cards), reader.out(torch.cat(heads, -1)), rtol=1e-4, atol=1e-5)


def test_a_fresh_reader_guesses_and_a_trained_one_does_not_and_random_numbers_stay() -> None:
    state = torch.get_rng_state()
    short = train(RACE[0], steps=60)
    assert torch.equal(torch.get_rng_state(), state)
    fresh = share_right(train(RACE[0], steps=0))
    assert abs(fresh - 1 / VALUES) < 0.02
    assert share_right(short) > fresh + 0.05
    (finish,) = race([RACE[0]], steps=60)
    assert finish.shape is RACE[0] and finish.right == share_right(short), "the same seed, the same race"
