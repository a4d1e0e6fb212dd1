"""`dsv3 bench generate`: the same tokens on every side, or no numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from random_models import nano, random_model

from dsv3_mini import save_pretrained
from dsv3_mini.bench import generate
from dsv3_mini.bench.generate import STEPS, Case, DraftCost, Result
from dsv3_mini.bench.race import BenchError, Lap, Side
from dsv3_mini.cli import main
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.ledger import cache_per_token


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pretrained(random_model(nano(vocab_size=4096)), tmp_path / "nano", dtype=torch.float32)
    return tmp_path / "nano"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sides run in this process, once each; returns what ran."""
    ran: list[str] = []

    def race(sides: list[Side], rounds: int, threads: int) -> list[Lap]:
        laps = []
        for side in sides:
            ran.append(side.name)
            value = getattr(generate, side.make.partition(":")[2])(**side.arguments)()
            laps.append(Lap(side.name, [0.5], [0.5], [value], 0, 1))
        return laps

    monkeypatch.setattr(generate, "race", race)
    return ran


def test_all_sides_write_the_same_tokens(folder: Path, here: list[str]) -> None:
    result = generate.run(folder, prompt=6, new=10, drafts=2, rounds=1, batches=(1, 3), contexts=(8, 64))
    drafting = ["a token", "drafts and one more", "drafting"]
    assert here == ["dsv3_mini", "with MTP", "transformers"] * 2 + drafting + ["8 tokens", "64 tokens"]
    assert [case.batch for case in result.cases] == [1, 3]
    for case in result.cases:
        assert case.plain.values == case.mtp.values == case.theirs.values
    assert result.token_bytes == cache_per_token(nano(), dtype="fp32").bytes("mla") == 4 * 24 * 3
    text = generate.render(result)
    assert re.search(r"batch 1: 1\.00x transformers' tokens/s   bar 4x NOT met", text)
    assert "MTP 1.00x that without   bar 1.5x NOT met" in text and "the cache's bytes grow 8x" in text


def test_other_tokens_are_refused(folder: Path, here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "their_step", lambda **_: lambda: 1.0)
    with pytest.raises(BenchError, match="batch 1: transformers writes other tokens than dsv3_mini does"):
        generate.run(folder, prompt=6, new=4, rounds=1, batches=(1,), contexts=(8,))


def test_every_token_and_its_place_count() -> None:
    tokens = torch.arange(12).view(3, 4)
    sums = {generate.checksum(tokens, 4), generate.checksum(tokens.flip(0), 4), generate.checksum(tokens + 1, 4)}
    assert len(sums) == 3 and generate.checksum(tokens.int(), 4) in sums
    with pytest.raises(BenchError, match="rows of 4 tokens were written instead of 5"):
        generate.checksum(tokens, 5)


def test_ratios_say_who_is_faster() -> None:
    def lap(seconds: float) -> Lap:
        return Lap("", [seconds] * 3, [seconds] * 3, [0.0], 0, 1)

    case = Case(16, plain=lap(2.0), mtp=lap(1.0), theirs=lap(10.0), acceptance=0.9, tokens_per_pass=1.9)
    assert (case.speed, case.gain) == (5.0, 2.0)
    cost = DraftCost(1, lap(1.0), lap(1.2), lap(0.7))
    assert cost.verifying == 1.2 and cost.drafting == 0.7
    result = Result("here", "m", 24, 128, [case], cost, {256: lap(1.0), 8192: lap(4.0)}, 1280)
    assert result.growth == 4.0
    text = generate.render(result)
    assert "costs 1.20 of reading one token, drafting 0.70" in text and "1.90 tokens a pass come 1.00x" in text
    assert "1,024" in text and "2,048" in text and "205" in text  # 16 x 128 tokens in 2, 1 and 10 seconds
    assert f"{4e3 / STEPS:,.2f} ms" in text and "10.49 MB" in text and "bar: no more met" in text


def test_openings_begin_held_out_stories() -> None:
    rows, tokenizer = generate.openings(5, 12), Tokenizer.shipped()
    assert (
        rows.shape == (5, 12) and (rows[:, 0] == tokenizer.eos_id).all() and len({tuple(r) for r in rows.tolist()}) == 5
    )
    assert tokenizer.eos_id not in rows[:, 1:]


def test_a_context_is_left_as_it_was(folder: Path) -> None:
    """Each step decodes beside the same cache: it would grow with each round otherwise."""
    step = generate.step_beside(str(folder), context=300)  # beyond the model's own 256
    assert step() == step()


def test_drafts_are_made_behind_the_same_text_each_time(folder: Path) -> None:
    """Each round does the same work: what was read in the one before is forgotten."""
    for drafts in (1, 3):
        step = generate.step_drafting(str(folder), prompt=6, drafts=drafts)
        assert step() == step()
    step = generate.step_over(str(folder), prompt=6, tokens=2)
    assert step() == step()


def test_the_command(folder: Path, here: list[str], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    given = []
    run = generate.run
    monkeypatch.setattr(
        generate, "run", lambda *arguments: given.append(arguments) or run(*arguments, batches=(1,), contexts=(8, 16))
    )
    assert main(["bench", "generate", "--model", str(folder), "--new", "5", "--prompt", "4", "--drafts", "3"]) == 0
    assert given == [(str(folder), 4, 5, 3, 7, None)]
    assert "Greedy decoding, model nano, FP32: 5 tokens after openings of 4" in capsys.readouterr().out
