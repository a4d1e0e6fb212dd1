"""Schedules against torch's schedulers, sums taken by hand, and what a function of tokens must satisfy."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_mini.errors import ConfigError
from dsv3_mini.train.schedules import Piece, Schedule, constant, steps, tokens_after

lengths = st.lists(st.integers(1, 10**6), min_size=1, max_size=6)
values = st.floats(-1e3, 1e3)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Chains of any shape; some pieces go on where the one before ended, others jump."""
    pieces, until = [], 0
    for length in draw(lengths):
        until += length
        start = pieces[-1].end if pieces and draw(st.booleans()) else draw(values)
        pieces.append(Piece(float(until), start, draw(values), draw(st.sampled_from(["linear", "cosine"]))))
    return Schedule("drawn", tuple(pieces))


@pytest.mark.parametrize("length", [1, 7, 100])
def test_cosine_piece_is_torchs_cosine_annealing(length: int) -> None:
    piece = Schedule("learning_rate", (Piece(50.0, 1.0, 1.0), Piece(50.0 + length, 3e-3, 2e-4, "cosine")))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=length, eta_min=2e-4)
    for done in range(length + 1):
        assert piece(50 + done) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        scheduler.step()


def test_linear_piece_is_torchs_linear_interpolation() -> None:
    ramp = Schedule("batch_size", (Piece(469.0, 3072, 15360),))
    for tokens, expected in zip(range(470), torch.linspace(3072, 15360, 470, dtype=torch.float64), strict=True):
        assert ramp(tokens) == pytest.approx(expected.item(), rel=1e-12)


@given(schedules(), st.integers(0, 10**9), st.randoms(use_true_random=False))
def test_a_value_depends_on_the_tokens_alone(schedule: Schedule, seed: int, order: random.Random) -> None:
    ends = [piece.until for piece in schedule.pieces]
    points = [0.0, *ends, *(end - 0.5 for end in ends), 2 * ends[-1], seed % (2 * ends[-1])]
    in_order = {tokens: schedule(tokens) for tokens in sorted(points)}
    order.shuffle(points)
    assert {tokens: schedule(tokens) for tokens in points} == in_order
    again = Schedule(schedule.name, schedule.pieces)
    assert {tokens: again(tokens) for tokens in points} == in_order


@given(schedules(), st.sampled_from([0.25, 0.5, 2.0, 1024.0]), st.floats(0, 1.5))
def test_stretched_has_the_same_values_later(schedule: Schedule, factor: float, share: float) -> None:
    # Powers of two scale without rounding, so that equality holds on the edges of pieces too.
    for tokens in [share * schedule.pieces[-1].until, *(piece.until for piece in schedule.pieces)]:
        assert schedule.stretched(factor)(tokens * factor) == schedule(tokens)


@given(schedules(), st.floats(0.01, 100.0), st.floats(0, 1))
def test_stretched_by_any_factor(schedule: Schedule, factor: float, share: float) -> None:
    stretched, begin = schedule.stretched(factor), 0.0
    for piece in schedule.pieces:
        inside = begin + (0.01 + 0.98 * share) * (piece.until - begin)
        assert stretched(inside * factor) == pytest.approx(schedule(inside), rel=1e-9, abs=1e-6)
        begin = piece.until


@given(schedules())
def test_values_meet_where_pieces_meet_and_stay_between_their_ends(schedule: Schedule) -> None:
    begin = 0.0
    for piece in schedule.pieces:
        low, high = sorted((piece.start, piece.end))
        inside = [schedule(begin + share * (piece.until - begin)) for share in (0.0, 0.1, 0.5, 0.9)]
        assert inside[0] == piece.start, "a piece begins with its start value"
        assert all(low - 1e-9 <= value <= high + 1e-9 for value in inside)
        before = schedule(math.nextafter(piece.until, 0.0))
        assert before == pytest.approx(piece.end, rel=1e-6, abs=1e-6), "and arrives at its end value"
        begin = piece.until
    assert schedule(begin) == schedule(begin * 10) == schedule.pieces[-1].end


def test_steps_change_on_the_token_they_name() -> None:
    gamma = steps("gamma", 0.01, (100, 0.003), (200, 0.0))
    assert [gamma(tokens) for tokens in (0, 99, 100, 199, 200, 10**15)] == [0.01, 0.01, 0.003, 0.003, 0.0, 0.0]
    assert constant("context", 64)(0) == constant("context", 64)(1e15) == 64
    assert gamma.stretched(2.0)(199) == 0.01 and gamma.stretched(2.0)(200) == 0.003


def test_tokens_after_takes_the_steps_one_by_one() -> None:
    batch, context = Schedule("batch_size", (Piece(1000, 2, 10),)), steps("context", 8, (200, 16))
    tokens = 0
    for done in range(30):
        assert tokens_after(done, batch, context) == tokens
        tokens += round(2 + 8 * min(tokens / 1000, 1)) * (8 if tokens < 200 else 16)


@pytest.mark.parametrize(
    "pieces, words",
    [
        ((), "has no pieces"),
        ((Piece(0, 1, 1),), "must end after 0"),
        ((Piece(10, 1, 1), Piece(10, 1, 0)), "must end after 10"),
        ((Piece(10, 1, 1), Piece(9, 1, 0)), "must end after 10"),
        ((Piece(math.nan, 1, 1),), "must end after 0"),
        ((Piece(10, 1, 0, "cubic"),), "'cubic'"),
        ((Piece(10, 1, math.nan),), "finite"),
        ((Piece(10, math.inf, 0),), "finite"),
    ],
)
def test_bad_pieces_are_named(pieces: tuple[Piece, ...], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Schedule("learning_rate", pieces)
    message = str(caught.value)
    assert message.startswith("learning_rate") and words in message and "\n" not in message
