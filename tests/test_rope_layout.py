"""Weights in the half layout, against transformers' rotation of halves; and the way back."""

from __future__ import annotations

import pytest
import torch
from random_models import nano
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dsv3_mini.errors import CheckpointError
from dsv3_mini.hub.rope_layout import halves_to_neighbours, neighbours_to_halves
from dsv3_mini.model.rope import frequencies, rotate, rotations

HEADS, NOPE, ROPE, WIDTH, LENGTH = 3, 6, 8, 16, 20


def test_scores_with_reordered_weights_are_those_of_a_library_that_rotates_halves() -> None:
    cfg = nano(qk_rope_head_dim=ROPE)
    x = torch.randn(1, LENGTH, WIDTH)
    query_weight, key_weight = torch.randn(HEADS * (NOPE + ROPE), WIDTH), torch.randn(ROPE, WIDTH)
    turn = rotations(cfg, torch.arange(LENGTH))
    query = (x @ query_weight.T).view(1, LENGTH, HEADS, NOPE + ROPE)
    ours = torch.einsum("bshr,btr->bhst", rotate(query[..., NOPE:], turn), rotate(x @ key_weight.T, turn))

    theirs = (x @ neighbours_to_halves(query_weight, HEADS, ROPE).T).view(1, LENGTH, HEADS, NOPE + ROPE)
    assert torch.equal(theirs[..., :NOPE], query[..., :NOPE]), "rows without position stay"
    angles = torch.arange(LENGTH)[:, None] * torch.tensor(frequencies(cfg)).repeat(2)
    q, k = apply_rotary_pos_emb(
        theirs[..., NOPE:].transpose(1, 2),
        (x @ neighbours_to_halves(key_weight, 1, ROPE).T)[:, None],
        angles.cos()[None],
        angles.sin()[None],
    )
    torch.testing.assert_close(ours, q @ k.transpose(-1, -2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads, rope, rows", [(1, 8, 8), (3, 8, 13 * 3), (4, 2, 20)])
def test_there_and_back(heads: int, rope: int, rows: int) -> None:
    weight = torch.randn(rows, 4)
    halves = neighbours_to_halves(weight, heads, rope)
    assert halves.shape == weight.shape
    assert torch.equal(halves_to_neighbours(halves, heads, rope), weight)
    assert torch.equal(halves, weight) == (rope == 2), "one pair is both layouts"
    assert torch.equal(halves.sort(dim=0).values, weight.sort(dim=0).values), "rows only move"


@pytest.mark.parametrize(
    "shape, heads, rope", [((10, 4), 3, 2), ((12,), 3, 2), ((12, 4), 3, 3), ((12, 4), 3, 6), ((12, 4), 0, 2)]
)
def test_what_cannot_be_reordered_is_said(shape: tuple[int, ...], heads: int, rope: int) -> None:
    with pytest.raises(CheckpointError, match="heads of rows|must be even"):
        neighbours_to_halves(torch.randn(shape), heads, rope)
