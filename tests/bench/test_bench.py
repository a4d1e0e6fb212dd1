"""The benchmarks compare like with like, count what they say they count, and say so when they cannot."""

import re
import sys
import time

import pytest
import torch

from dsv3_mini.bench import attention, halves, loss, race, train
from dsv3_mini.bench.machine import gemm_limit
from dsv3_mini.bench.race import BenchError, Lap, Side, cpu_ratio, speed_ratio
from dsv3_mini.cli import main

BLOCK = 64 << 20


# ---- sides for the race, found by name in this file -------------------------------------------------------------------


def sleeper(seconds: float) -> race.Step:
    return lambda: time.sleep(seconds) or seconds


def spinner(seconds: float) -> race.Step:
    def step() -> float:
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass
        return 0.0

    return step


def taker(blocks: int, kept: int) -> race.Step:
    """Holds `kept` blocks from the start, and in each step `blocks` more, for its duration."""
    start = [b"x" * BLOCK for _ in range(kept)]

    def step() -> float:
        return float(len([b"y" * BLOCK for _ in range(blocks)]) + len(start))

    return step


def talker(dies_at: int) -> race.Step:
    steps = []

    def step() -> float:
        print("a library says something")
        steps.append(1)
        if len(steps) == dies_at:
            raise RuntimeError("the boiler burst")
        return float(len(steps))

    return step


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Lets the sides' processes import this file; returns its name."""
    monkeypatch.setenv("PYTHONPATH", str(request.path.parent))
    return request.path.stem


def test_times_and_memory_are_those_of_the_steps_and_sides_take_turns(
    here: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = []
    step = race._Runner.step
    monkeypatch.setattr(race._Runner, "step", lambda self: turns.append(self.side.name) or step(self))
    sides = [
        Side("sleep", f"{here}:sleeper", {"seconds": 0.05}),
        Side("work", f"{here}:spinner", {"seconds": 0.05}),
        Side("blocks", f"{here}:taker", {"blocks": 3, "kept": 4}),
    ]
    sleep, work, blocks = laps = race.race(sides, rounds=2, threads=1, warm_up=1)
    assert turns == ["sleep", "work", "blocks"] * 3
    assert all(len(lap.seconds) == 2 and len(lap.values) == 3 for lap in laps)
    assert sleep.best >= 0.05 and max(sleep.cpu_seconds) < 0.03
    assert 0.05 <= min(work.cpu_seconds) < 0.08
    # Blocks held before the steps are in `before` and `peak`, and not in `above`.
    assert blocks.before - sleep.before == pytest.approx(4 * BLOCK, rel=0.05)
    assert blocks.above == blocks.peak - blocks.before == pytest.approx(3 * BLOCK, rel=0.05)


def test_a_side_that_dies_is_named_with_its_last_words(here: str) -> None:
    with pytest.raises(BenchError, match=r"^talker stopped with code 1: RuntimeError: the boiler burst$"):
        race.race([Side("talker", f"{here}:talker", {"dies_at": 3})], rounds=5, threads=1)


def test_ratios_are_of_the_same_round() -> None:
    """A machine that slows to a third in the middle changes every time, and no ratio."""
    fast = Lap("fast", [1.0, 1.0, 3.0, 3.0, 3.0], [1.0] * 5, [0.0], 0, 0)
    slow = Lap("slow", [2.0, 2.0, 6.0, 6.0, 6.0], [4.0] * 5, [0.0], 0, 0)
    assert speed_ratio(fast, slow) == 2.0 and cpu_ratio(fast, slow) == 4.0


def test_the_gemm_limit_is_a_rate_that_a_gemm_reaches() -> None:
    limit = gemm_limit(rounds=1)
    a, b = torch.randn(2, 1024, 1024).unbind()
    a @ b
    began = time.perf_counter()
    a @ b
    rate = 2 * 1024**3 / (time.perf_counter() - began)
    assert 0.3 * rate < limit < 30 * rate  # a unit wrong by a thousand, or a factor of 2 n^3 forgotten, is seen


def test_bench_train_trains_the_same_model_on_the_same_batches() -> None:
    result = train.run("nano", batch=2, context=32, rounds=2, threads=1, settings=False)
    ours, theirs = result.laps
    assert ours.values[0] == pytest.approx(theirs.values[0], rel=1e-5)
    # Nothing decays or balances alike on both sides, so later losses drift; other batches would part at once.
    assert ours.values[1] == pytest.approx(theirs.values[1], abs=0.05)
    assert result.tokens_per_second(ours) == pytest.approx(2 * 32 / ours.median)
    text = train.render(result)
    assert re.search(r"speed +[\d.]+x transformers", text) and "bar 1.6x" in text and "bar 0.8x" in text


def test_bench_train_refuses_two_different_models(monkeypatch: pytest.MonkeyPatch) -> None:
    laps = [Lap(name, [1.0], [1.0], [value], 0, 1) for name, value in (("dsv3_mini", 6.2), ("transformers", 6.3))]
    monkeypatch.setattr(train, "race", lambda *_: laps)
    with pytest.raises(BenchError, match="the first loss is 6.2000000 here and 6.3000000 with transformers"):
        train.run("nano", batch=1, context=8, rounds=1, threads=1)


def test_bench_train_without_transformers_says_what_to_install(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert main(["bench", "train"]) == 2
    assert "pip install transformers" in capsys.readouterr().err


def test_the_bench_of_the_loss_compares_equal_losses() -> None:
    result = loss.run(shapes=((4000, 16, 6000),), rounds=1, threads=1)
    (case,) = result.cases
    assert case.chunked.values == pytest.approx(case.plain.values, rel=1e-5)
    assert case.logits_bytes == 4 * 4000 * 6000
    assert case.plain.above > case.logits_bytes > case.chunked.above  # the plain way holds them all, ours does not
    assert "96 MB" in loss.render(result)


def test_the_bench_of_halves_takes_the_same_steps_both_ways() -> None:
    (case,) = halves.run(cases=(("nano", 8, 256),), rounds=2, threads=2).cases
    assert case.halves.values == pytest.approx(case.whole.values, rel=1e-4)
    assert case.halves.values != case.whole.values, "the order of sums tells the two apart"
    with pytest.raises(BenchError, match="threads = 1: halves need two threads"):
        halves.run(threads=1)


def test_the_bench_of_attention_compares_equal_outputs_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_this_process(sides: list[Side], rounds: int, threads: int) -> list[Lap]:
        values = [attention.step(**side.arguments)() for side in sides]
        return [Lap(side.name, [0.5], [0.5], [v], 0, 1) for side, v in zip(sides, values, strict=True)]

    monkeypatch.setattr(attention, "race", in_this_process)
    (case,) = attention.run(shapes=((2, 96, 2, 24, 16),), rounds=1, threads=1).cases
    assert [lap.name for lap in case.laps] == ["padded", "unequal", "explicit"]
    for lap in case.laps[1:]:
        assert lap.values == pytest.approx(case.laps[0].values, rel=1e-5)
    padded = case.laps[0].values[0]
    monkeypatch.setattr(
        attention, "race", lambda *_: [Lap(w, [1], [1], [v], 0, 1) for w, v in (("a", padded), ("b", 0))]
    )
    with pytest.raises(BenchError, match="^b gives 0 and a "):
        attention.run(shapes=((2, 96, 2, 24, 16),), rounds=1, threads=1)


def test_a_context_longer_than_the_model_is_one_line(capsys) -> None:
    assert main(["bench", "train", "--preset", "nano", "--context", "300"]) == 2
    assert capsys.readouterr().err == (
        "dsv3 bench: batch = 16, context = 300: batch must be at least 1, context between 2 and 256 "
        "(max_position_embeddings of nano)\n"
    )
