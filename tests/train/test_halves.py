"""Two halves of the rows at one time, against all rows at once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from nano_runs import NANO, nano_recipe, small_tokenizer

from dsv3_mini.train.halves import LEAST, Halves
from dsv3_mini.train.trainer import Trainer


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def run(folder: Path, steps: int = 4) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer = Trainer(folder, NANO, nano_recipe(batch=5), small_tokenizer())
    reports = [trainer.train_step() for _ in range(steps)]
    numbers = [x for r in reports for x in (r.loss, r.mtp_loss, r.balance_loss, r.grad_norm)]
    return numbers, {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def test_halves_take_the_steps_of_the_whole(tmp_path: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows: halves of three and two. Sums come in another order, so FP32 rounds them another way; Adam divides small
    gradients by themselves, so weights may part by a thousandth of a step of 3e-3 each time."""
    monkeypatch.setattr("dsv3_mini.train.halves.LEAST", 1)  # a test's rows are few
    numbers, weights = run(tmp_path / "halves")
    again = run(tmp_path / "again")
    assert numbers == again[0], "whoever comes first, the same numbers to the bit"
    assert all(torch.equal(weights[name], again[1][name]) for name in weights)
    monkeypatch.setattr("dsv3_mini.train.trainer.Halves", lambda threads, width: Halves(1, 1))
    whole_numbers, whole_weights = run(tmp_path / "whole")
    assert numbers == pytest.approx(whole_numbers, rel=1e-4) and numbers != whole_numbers
    for name, weight in weights.items():
        torch.testing.assert_close(weight, whole_weights[name], atol=1e-4, rtol=1e-3, msg=name)


def test_each_half_has_its_share_of_the_threads_and_both_run_at_one_time() -> None:
    before, meeting = torch.get_num_threads(), threading.Barrier(2, timeout=20)

    def work(rows: torch.Tensor) -> tuple[list[int], int]:
        meeting.wait()  # passed only when the other half is here too
        return rows[:, 0].tolist(), torch.get_num_threads()

    assert Halves(5, LEAST).map(work, torch.arange(10).reshape(5, 2)) == [([0, 2, 4], 2), ([6, 8], 2)]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("threads", "rows", "width"), [(1, 4, LEAST), (8, 1, LEAST), (8, 4, LEAST // 6 - 1)])
def test_what_cannot_be_halved_or_is_small_is_done_whole(threads: int, rows: int, width: int) -> None:
    assert Halves(threads, width).map(len, torch.zeros(rows, 3)) == [rows]
    assert Halves(2, LEAST // 6 + 1).map(len, torch.zeros(4, 3)) == [2, 2]


def test_what_one_half_raises_is_raised_when_both_have_ended() -> None:
    ended = threading.Event()

    def work(rows: torch.Tensor) -> None:
        if rows[0, 0] == 0:
            raise ValueError("the first half")
        ended.wait(0.2)
        ended.set()

    with pytest.raises(ValueError, match="the first half"):
        Halves(2, LEAST).map(work, torch.arange(4).reshape(2, 2))
    assert ended.is_set()
