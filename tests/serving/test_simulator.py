"""The simulator's books balance, and where queueing theory has a formula it agrees with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.serving import DECODE, H800_CARD, PREFILL, Lengths, Requests, Served, Unit, UnitCost, poisson, simulate

CFG, LARGE = ModelConfig.preset("nano"), ModelConfig.preset("671b")
SLOW = replace(H800_CARD, fp8=1e9, bf16=1e9, memory_rate=1e9, network=1e8, inside=1e9)
READER = Unit("reader", nodes=1, gpus=2, tp=1, slots=2 * CFG.n_routed_experts, card=SLOW)


def roomy(tokens: int) -> Unit:
    """A decode unit of one card whose cache holds about so many tokens."""
    whole = replace(READER, gpus=1)
    cost = UnitCost(CFG, whole)
    memory = (cost.weights_per_gpu + (tokens + 0.5) * cost.cache_bytes_per_token) / SLOW.usable
    return replace(whole, card=replace(SLOW, memory=memory))


def assert_the_books_balance(served: Served) -> None:
    asked = served.requests
    assert (served.written == asked.answer).all()  # every token once
    assert served.cache_left == 0 and served.cache_peak <= served.cache_tokens
    assert (served.first_token > asked.arrival).all() and (served.finished >= served.first_token).all()
    several = asked.answer > 1
    assert (served.decoding[several] > served.first_token[several]).all()  # its latents had to travel
    assert np.isnan(served.decoding[~several]).all()
    # Little's law over the whole run: what was counted in the system, against how long each one stayed.
    stayed = float((served.finished - asked.arrival).sum())
    assert served.waiting_seconds == pytest.approx(stayed, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rate=st.sampled_from([0.5, 20.0, 1e4]),
    units=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    rows=st.none() | st.integers(1, 4),
    acceptance=st.sampled_from([0.0, 0.5, 1.0]),
    room=st.sampled_from([130, 400, 5000]),
    spread=st.sampled_from([0.0, 1.0]),
)
def test_every_token_is_served_once_and_no_place_is_lost(
    seed: int, rate: float, units: tuple[int, int], rows: int | None, acceptance: float, room: int, spread: float
) -> None:
    asked = poisson(rate, 40, Lengths(20, spread), Lengths(5, spread), seed).cut(120)
    served = simulate(
        CFG, asked, READER, roomy(room), prefill_units=units[0], decode_units=units[1], prefill_tokens=100,
        decode_rows=rows, acceptance=acceptance, seed=seed,
    )  # fmt: skip
    assert_the_books_balance(served)
    assert served.cache_tokens == pytest.approx(units[1] * room, abs=2 * units[1])


def test_one_request_takes_the_sum_of_its_steps() -> None:
    asked = Requests(np.array([2.0]), np.array([50]), np.array([4]))
    served = simulate(CFG, asked, READER, roomy(200))
    reader, writer = UnitCost(CFG, READER), UnitCost(CFG, roomy(200))
    journey = 50 * writer.cache_bytes_per_token / SLOW.network
    steps = [writer.decode(1, context) for context in (51, 52, 53)]  # the new token counts in the context
    assert served.first_token[0] == pytest.approx(2.0 + reader.prefill([50]))
    assert served.finished[0] == pytest.approx(2.0 + reader.prefill([50]) + journey + sum(steps))
    assert served.time_per_output_token[0] == pytest.approx((journey + sum(steps)) / 3)
    assert served.decode.steps == 3 and served.seconds == pytest.approx(served.finished[0] - 2.0)


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_the_wait_before_one_reader_is_that_of_queueing_theory(load: float) -> None:
    """One server, equal work, arrivals by chance: the mean wait is rho s / (2 (1 - rho))."""
    service = UnitCost(CFG, READER).prefill([64])
    asked = poisson(load / service, 20_000, Lengths(64), Lengths(1), seed=5)
    served = simulate(CFG, asked, READER, roomy(200), prefill_tokens=64)
    waits, free = [], 0.0
    for arrival in asked.arrival:  # the same queue, written in a line: exactly the same waits
        waits.append(max(free - arrival, 0.0))
        free = max(free, arrival) + service
    assert served.time_to_first_token == pytest.approx(np.array(waits) + service, rel=1e-6)
    # A mean over 20,000 waits that depend on each other is still chance by some percent.
    assert np.mean(waits) == pytest.approx(load * service / (2 * (1 - load)), rel=0.06)
    assert served.prefill.busy / served.seconds == pytest.approx(load, rel=0.03)


def test_littles_law_with_the_rate_that_was_asked_for() -> None:
    """Not the identity: the mean number in the system against rate times mean stay, ends of the run included."""
    asked = poisson(50.0, 4000, Lengths(30, 0.5), Lengths(6, 0.5), seed=2)
    served = simulate(CFG, asked, READER, roomy(5000), prefill_units=2)
    stay = float((served.finished - asked.arrival).mean())
    assert served.mean_in_system == pytest.approx(50.0 * stay, rel=0.05)


def test_a_full_decode_unit_writes_what_its_step_says() -> None:
    asked = Requests(np.zeros(64), np.full(64, 40), np.full(64, 30))
    served = simulate(CFG, asked, READER, roomy(100_000), prefill_tokens=100_000)
    writer = UnitCost(CFG, roomy(100_000))
    whole = sum(writer.decode(64, 64 * context) for context in range(41, 70))
    assert served.decode.busy == pytest.approx(whole) and served.decode.steps == 29
    assert served.output_per_node_second == pytest.approx(64 * 29 / whole)


def test_drafted_tokens_save_steps() -> None:
    asked = Requests(np.zeros(200), np.full(200, 10), np.full(200, 41))
    steps = [
        simulate(CFG, asked, READER, roomy(100_000), acceptance=a, prefill_tokens=10**6).decode.steps
        for a in (0.0, 1.0)
    ]
    assert steps == [40, 20]
    rows = simulate(CFG, asked, READER, roomy(100_000), acceptance=0.85, prefill_tokens=10**6, decode_rows=1)
    assert 200 * 40 / rows.decode.steps == pytest.approx(1.85, rel=0.03)  # the last step of an answer may draft in vain


def test_first_come_first_served() -> None:
    asked = poisson(200.0, 300, Lengths(30, 0.5), Lengths(40), seed=3)
    served = simulate(CFG, asked, READER, roomy(200), prefill_tokens=64)
    assert (np.diff(served.first_token) >= 0).all()
    assert served.cache_peak > 150  # the cache was full, and they waited for it
    waits = served.decoding - served.first_token
    assert np.median(waits) > 10 * waits.min()


def test_more_units_never_keep_anybody_waiting_longer_on_average() -> None:
    asked = poisson(300.0, 400, Lengths(30, 0.5), Lengths(6), seed=4)
    means = [simulate(CFG, asked, READER, roomy(5000), prefill_units=n).time_to_first_token.mean() for n in (1, 2, 4)]
    assert means[0] > means[1] > means[2]


def test_the_reports_deployment_under_load() -> None:
    """One decode unit of 320 GPUs with the prefill units that feed it, for five seconds."""
    asked = poisson(1200.0, 6_000, Lengths(3600, 0.3), Lengths(400, 0.3), seed=6)
    served = simulate(LARGE, asked, PREFILL, DECODE, prefill_units=14)
    assert_the_books_balance(served)
    assert 1 < served.input_per_node_second / 73_700 < 1.5
    assert np.median(served.time_per_output_token) < 0.05


def test_arrivals_and_lengths_are_what_was_asked_for() -> None:
    asked = poisson(7.0, 20_000, Lengths(900, 0.6), Lengths(40), seed=1)
    gaps = np.diff(asked.arrival)
    assert gaps.mean() == pytest.approx(1 / 7, rel=0.03) and gaps.std() == pytest.approx(1 / 7, rel=0.05)
    assert asked.prompt.mean() == pytest.approx(900, rel=0.02)
    assert asked.prompt.std() == pytest.approx(540, rel=0.05)
    assert set(asked.answer) == {40}
    again, other = (poisson(7.0, 20_000, Lengths(900, 0.6), Lengths(40), seed=seed) for seed in (1, 2))
    assert (again.prompt == asked.prompt).all() and (other.prompt != asked.prompt).any()


def test_requests_are_cut_to_what_a_model_reads() -> None:
    asked = poisson(1.0, 500, Lengths(60, 1.0), Lengths(30, 1.0), seed=1)
    short = asked.cut(64)
    assert (short.prompt + short.answer).max() == 64 and short.answer.max() == 32
    fits = (asked.prompt + asked.answer <= 64) & (asked.answer <= 32)
    assert fits.any() and (short.prompt == asked.prompt)[fits].all() and (short.answer == asked.answer)[fits].all()
    with pytest.raises(ConfigError, match="at least 1 token"):
        asked.cut(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefill_units": 0}, "prefill_units = 0"),
        ({"decode_units": 1.5}, "decode_units = 1.5"),
        ({"prefill_tokens": 0}, "prefill_tokens = 0"),
        ({"decode_rows": 0}, "decode_rows = 0"),
        ({"acceptance": 1.2}, "acceptance = 1.2 must be a share"),
        ({"decode": roomy(20)}, "does not fit the 20"),
    ],
)
def test_a_service_that_cannot_be_is_refused(arguments: dict, message: str) -> None:
    asked = Requests(np.array([0.0]), np.array([30]), np.array([4]))
    with pytest.raises(ConfigError, match=message):
        simulate(CFG, asked, **{"prefill": READER, "decode": roomy(200), **arguments})


@pytest.mark.parametrize(
    ("arrival", "prompt", "answer", "message"),
    [
        ([], [], [], "at least one"),
        ([0.0], [3, 4], [1], "one of each"),
        ([1.0, 0.5], [3, 3], [1, 1], "in order"),
        ([0.0], [0], [1], "at least 1 token"),
    ],
)
def test_requests_that_cannot_be_are_refused(arrival: list, prompt: list, answer: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Requests(np.array(arrival, dtype=float), np.array(prompt, dtype=int), np.array(answer, dtype=int))


def test_a_request_longer_than_the_context_is_refused() -> None:
    asked = Requests(np.array([0.0]), np.array([CFG.max_position_embeddings]), np.array([4]))
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        simulate(CFG, asked, READER, roomy(10**6))
    for wrong in ({"mean": 0.5}, {"mean": 10, "spread": -1}, {"mean": float("nan")}):
        with pytest.raises(ConfigError, match="must be a number"):
            Lengths(**wrong)
    with pytest.raises(ConfigError, match="rate = 0"):
        poisson(0, 3, Lengths(3), Lengths(3))
    with pytest.raises(ConfigError, match="count = 0"):
        poisson(1.0, 0, Lengths(3), Lengths(3))
