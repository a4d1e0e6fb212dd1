"""The racing models: what they predict, that they differ in their feed-forward alone, and that they learn."""

from __future__ import annotations

import math

import pytest
import torch

from dsv3_mini.course import next_byte
from dsv3_mini.course.next_byte import (
    CONTEXT,
    LADDER,
    Arrangement,
    NextByte,
    bits_per_byte,
    byte_batches,
    byte_losses,
    domain_bytes,
    train_bytes,
)
from dsv3_mini.data.corpora import DOMAINS
from dsv3_mini.errors import ConfigError
from dsv3_mini.model.router import Router

each_rung = pytest.mark.parametrize("arrangement", LADDER, ids=lambda a: a.name)


def test_the_ladder_activates_alike() -> None:
    dense, *mixtures = LADDER
    assert {a.activated for a in LADDER} == {dense.total}
    assert {a.total for a in mixtures} == {4 * dense.total}
    assert [a.combinations for a in LADDER] == [1, 28, 10_518_300, math.comb(31, 7)]


@each_rung
def test_parameters_are_what_the_arrangement_says(arrangement: Arrangement) -> None:
    model = NextByte(arrangement, width=16, layers=3)
    router = 16 * arrangement.routed
    assert model.feed_forward_parameters() == 3 * (3 * 16 * arrangement.total + router)


@each_rung
def test_a_byte_is_predicted_from_the_eight_before_it(arrangement: Arrangement) -> None:
    model = NextByte(arrangement, width=16)
    rows = torch.randint(0, 256, (2, CONTEXT + 5))
    logits, routings = model(rows)
    assert logits.shape == (2, 5, 256) and len(routings) == (2 if arrangement.routed else 0)
    one, _ = model(rows[:, 2 : 2 + CONTEXT + 1])  # the window of the third prediction alone
    torch.testing.assert_close(one[:, 0], logits[:, 2], rtol=1e-4, atol=1e-5)
    other = rows.clone()
    other[:, 2 + CONTEXT :] = 7  # what is predicted, and what comes later
    torch.testing.assert_close(model(other)[0][:, 2], logits[:, 2], rtol=1e-4, atol=1e-5)
    other[:, 2] = (rows[:, 2] + 1) % 256  # the first of the eight
    assert not torch.allclose(model(other)[0][:, 2], logits[:, 2], atol=1e-3)
    assert not torch.allclose(model(rows.flip(1))[0], logits, atol=1e-3), "places count"


def test_losses_are_bits_of_the_byte_that_came() -> None:
    rows = torch.randint(0, 256, (1, CONTEXT + 3))
    logits = torch.randn(1, 3, 256)
    expected = [-math.log2(logits[0, i].softmax(-1)[rows[0, CONTEXT + i]].item()) for i in range(3)]
    assert byte_losses(logits, rows).tolist() == pytest.approx(expected, rel=1e-5)
    assert byte_losses(torch.zeros(1, 3, 256), rows).tolist() == pytest.approx([8.0] * 3)


def test_training_lowers_the_loss_moves_the_biases_and_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    text = torch.tensor(list(b"the lamp is under the bench. " * 40))
    monkeypatch.setattr(next_byte, "domain_bytes", lambda *_: text)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = NextByte(Arrangement("small", expert=4, routed=6, k=2, shared=1), width=16)
        runs.append(train_bytes(model, byte_batches(rows=4, length=16), steps=40, warmup=5))
    assert runs[0] == runs[1] and len(runs[0]) == 40
    assert runs[0][-1] < 0.6 * runs[0][0] and runs[0][0] > 7
    biases = [m.e_score_correction_bias for m in model.modules() if isinstance(m, Router)]
    assert len(biases) == 2 and all(bias.abs().max() > 0 for bias in biases)
    assert 0 < bits_per_byte(model, "any") < runs[0][0]


def test_batches_take_a_quarter_from_each_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {domain: torch.full((500,), i) for i, domain in enumerate(DOMAINS)}
    monkeypatch.setattr(next_byte, "domain_bytes", lambda domain, *_: texts[domain])
    batch = next(byte_batches(rows=8, length=20))
    assert batch.shape == (8, 20 + CONTEXT)
    assert sorted(batch[:, 0].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_text_of_a_domain_is_its_documents_in_order() -> None:
    text = bytes(domain_bytes("sums", "train", 3000).tolist())
    assert len(text) == 3000 and b"answer: " in text and text.count(b"\0") > 5
    assert bytes(domain_bytes("sums", "held_out", 500).tolist()) not in text


@pytest.mark.parametrize("values", [(4, 2, 3, 0), (0, 2, 1, 0), (4, 0, 0, 0), (4, 3, -1, 1)])
def test_an_arrangement_that_makes_no_sense_is_refused(values: tuple[int, int, int, int]) -> None:
    with pytest.raises(ConfigError):
        Arrangement("odd", *values)
