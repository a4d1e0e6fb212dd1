"""Bits per byte against float64 softmax written out, and against what closed formulas say."""

from __future__ import annotations

import math

import pytest
import torch
from nano_runs import small_tokenizer
from random_models import nano, random_model

from dsv3_mini.data.stream import held_out_rows
from dsv3_mini.evaluate.bits_per_byte import bits_per_byte
from dsv3_mini.model import DeepSeekV3


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return random_model(nano(vocab_size=512))


@pytest.mark.parametrize("domain", ["stories", "sums"])
@torch.no_grad()
def test_it_is_the_summed_surprise_over_the_bytes(domain: str, model: DeepSeekV3) -> None:
    tokenizer = small_tokenizer()
    held_out = held_out_rows(domain, tokenizer, 48, 5)
    bits, text = 0.0, b""
    for row in held_out.tokens:
        share = model(row[None, :-1]).logits[0].double().softmax(-1)
        for i, target in enumerate(row[1:].tolist()):
            if target != tokenizer.pad_id:
                bits -= math.log2(share[i, target])
            if target not in (tokenizer.pad_id, tokenizer.eos_id):
                text += tokenizer.token_bytes(target)
    assert len(text) == held_out.n_bytes > 200
    measured = bits_per_byte(model, held_out.tokens, held_out.n_bytes, tokenizer.pad_id)
    assert measured == pytest.approx(bits / len(text), rel=1e-5)


def test_a_model_that_knows_nothing_pays_the_same_for_every_token() -> None:
    model = random_model(nano(vocab_size=512))
    torch.nn.init.zeros_(model.lm_head.weight)
    tokenizer = small_tokenizer()
    held_out = held_out_rows("stories", tokenizer, 48, 4)
    targets = (held_out.tokens[:, 1:] != tokenizer.pad_id).sum().item()
    measured = bits_per_byte(model, held_out.tokens, held_out.n_bytes, tokenizer.pad_id)
    assert measured == pytest.approx(9 * targets / held_out.n_bytes, rel=1e-6)  # 512 tokens are 9 bits


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_batches_change_nothing(batch: int, model: DeepSeekV3) -> None:
    tokenizer = small_tokenizer()
    rows = held_out_rows("sums", tokenizer, 40, 7)
    whole = bits_per_byte(model, rows.tokens, rows.n_bytes, tokenizer.pad_id)
    assert bits_per_byte(model, rows.tokens, rows.n_bytes, tokenizer.pad_id, batch) == pytest.approx(whole, rel=1e-6)


def test_padding_costs_nothing_and_measuring_keeps_no_graph(model: DeepSeekV3) -> None:
    tokenizer = small_tokenizer()
    rows = held_out_rows("sums", tokenizer, 40, 3)
    longer = torch.cat([rows.tokens, torch.full((3, 9), tokenizer.pad_id)], dim=1)
    expected = bits_per_byte(model, rows.tokens, rows.n_bytes, tokenizer.pad_id)
    assert bits_per_byte(model, longer, rows.n_bytes, tokenizer.pad_id) == pytest.approx(expected, rel=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())
