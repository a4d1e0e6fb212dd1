"""Packing against conservation laws, an exhaustive search for the best packing, and attention over lone documents."""

import math
from functools import cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv3_mini.data.packing import inputs_and_targets, pack
from dsv3_mini.errors import DataError
from dsv3_mini.model.transformer import same_document

EOS, PAD = 0, 1
lengths = st.lists(st.integers(0, 40), min_size=1, max_size=40).filter(any)


def numbered(sizes: list[int]) -> list[list[int]]:
    """Documents in which no token occurs twice, so that each token tells where it came from."""
    ids = iter(range(10, 10 + sum(sizes)))
    return [[next(ids) for _ in range(size)] for size in sizes]


def documents_of(block) -> list[list[list[int]]]:
    """The documents of each row, as `document_ids` tells them apart, without the eos that begins the row."""
    found = []
    for tokens, owners in zip(block.tokens.tolist(), block.document_ids.tolist(), strict=True):
        assert tokens[0] == EOS and owners[0] == 0
        filled = sum(owner >= 0 for owner in owners)
        assert owners[:filled] == sorted(owners[:filled]) and set(owners[:filled]) == set(range(max(owners) + 1))
        assert tokens[filled:] == [PAD] * (len(tokens) - filled)  # padding only at the end, and only there
        assert PAD not in tokens[:filled]
        row = [[] for _ in range(max(owners) + 1)]
        for token, owner in zip(tokens[1:filled], owners[1:filled], strict=True):
            row[owner].append(token)
        found.append(row)
    return found


@given(lengths, st.integers(1, 50))
@settings(max_examples=150, deadline=None)
def test_nothing_is_lost_torn_or_invented(sizes, seq_len):
    documents = numbered(sizes)
    block = pack(documents, seq_len, EOS, PAD)
    assert block.tokens.shape == block.document_ids.shape and block.tokens.shape[1] == seq_len + 1
    pieces = [piece for row in documents_of(block) for piece in row]
    expected = [d[i : i + seq_len] for d in documents for i in range(0, len(d), seq_len)]
    assert sorted(pieces) == sorted(expected)  # a document that fits is one piece, hence whole and contiguous
    for row in documents_of(block):
        assert row == sorted(row)  # in the order in which they came
    assert block.fill == pytest.approx((sum(sizes) + len(block.tokens)) / block.tokens.numel())


@given(lengths, st.integers(1, 50))
def test_no_two_rows_could_be_one(sizes, seq_len):
    used = sorted(sum(map(len, row)) for row in documents_of(pack(numbered(sizes), seq_len, EOS, PAD)))
    assert len(used) < 2 or used[0] + used[1] > seq_len


@given(st.lists(st.integers(1, 10), min_size=1, max_size=8))
@example([4, 4, 4, 4, 6, 6, 6, 6])  # taken in this order, sixes would find no room beside the fours
@settings(max_examples=60, deadline=None)
def test_close_to_the_best_that_an_exhaustive_search_finds(sizes):
    capacity = 10

    @cache
    def fewest(rest: int) -> int:  # rows for the set of documents in the bits of `rest`
        if not rest:
            return 0
        first = rest & -rest
        others, best = rest & ~first, math.inf
        subset = others
        while True:
            row = subset | first
            if sum(size for i, size in enumerate(sizes) if row >> i & 1) <= capacity:
                best = min(best, 1 + fewest(rest & ~row))
            if not subset:
                return best
            subset = (subset - 1) & others

    rows = len(pack(numbered(sizes), capacity, EOS, PAD).tokens)
    # The proven bound of best-fit decreasing (Johnson 1973; 6/9 by Dosa 2007 for first-fit decreasing).
    assert rows <= 11 / 9 * fewest((1 << len(sizes)) - 1) + 6 / 9


def test_targets_are_the_next_token_and_padding_costs_nothing():
    torch.manual_seed(0)
    rows = pack(numbered([5, 3, 7, 2]), 9, EOS, PAD).tokens
    inputs, targets = inputs_and_targets(rows, PAD)
    logits = torch.randn(*inputs.shape, 40)
    losses = [
        -logits[r, i].log_softmax(-1)[rows[r, i + 1]]
        for r in range(rows.shape[0])
        for i in range(rows.shape[1] - 1)
        if rows[r, i + 1] != PAD
    ]
    assert len(losses) == 5 + 3 + 7 + 2
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert torch.equal(inputs, rows[:, :-1])


def test_masked_attention_is_attention_over_each_document_alone():
    torch.manual_seed(0)
    block = pack(numbered([4, 6, 3, 9, 1]), 12, EOS, PAD)
    b, s = block.tokens.shape
    q, k, v = torch.randn(3, b, 1, s, 8, dtype=torch.float64)
    attend = torch.nn.functional.scaled_dot_product_attention
    packed = attend(q, k, v, attn_mask=same_document(block.document_ids)[:, None])
    for r in range(b):
        for document in block.document_ids[r].unique().tolist():
            if document >= 0:
                at = (block.document_ids[r] == document).nonzero().flatten()
                alone = attend(q[r, :, at], k[r, :, at], v[r, :, at], is_causal=True)
                torch.testing.assert_close(packed[r, :, at], alone)
    scores = torch.zeros(b, s, s).masked_fill(~same_document(block.document_ids), -torch.inf)
    assert scores.softmax(-1).isfinite().all()  # padding too


@pytest.mark.parametrize(
    ("documents", "seq_len", "message"),
    [([[5]], 0, "seq_len = 0 must be at least 1"), ([], 8, "nothing to pack"), ([[], []], 8, "nothing to pack")],
)
def test_mistakes_are_named(documents, seq_len, message):
    with pytest.raises(DataError, match=message):
        pack(documents, seq_len, EOS, PAD)
