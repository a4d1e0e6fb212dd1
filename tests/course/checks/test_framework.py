"""The framework of the checks: what it accepts, what it says, what it survives."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property, Result, difference, show
from dsv3_mini.course.lesson import same


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


EXERCISE = Exercise(
    name="rms",
    reference=rms,
    cases=[
        Case("one row", lambda g: (torch.randn(1, 4, generator=g), 0.1)),
        Case("a batch", lambda g: (torch.randn(2, 3, 5, generator=g), 0.1)),
    ],
    mistakes=[
        Mistake(lambda x, eps: x / x.std(-1, keepdim=True), "no mean is taken off here"),
        Mistake(lambda x, eps: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps), "eps belongs under the root"),
        Mistake(lambda x, eps: x / (x.pow(2).mean(0, keepdim=True) + eps).sqrt(), "the mean is over the last axis"),
    ],
    properties=[Property("zeros stay zeros", lambda f: not f(torch.zeros(2, 4), 1e-6).any(), "eps keeps 0 / 0 away")],
    seconds=1.0,
)


def test_right_answers_are_right_however_they_are_written() -> None:
    def loops(x: Tensor, eps: float) -> Tensor:
        rows = [row / math.sqrt(sum(float(v) ** 2 for v in row) / len(row) + eps) for row in x.reshape(-1, x.shape[-1])]
        return torch.stack(rows).reshape(x.shape)

    for answer in (rms, loops, lambda x, eps: torch.nn.functional.rms_norm(x, x.shape[-1:], eps=eps)):
        result = EXERCISE.run(answer)
        assert result.passed, str(result)
    assert "one row" in str(result) and "zeros stay zeros" in str(result)


@pytest.mark.parametrize("mistake", EXERCISE.mistakes, ids=lambda m: m.hint)
def test_a_known_mistake_gets_its_own_hint(mistake: Mistake) -> None:
    result = EXERCISE.run(mistake.wrong)
    assert result.state == "wrong"
    assert [m.hint for m in EXERCISE.mistakes if m.hint in str(result)] == [mistake.hint]


def wrong(answer: Any) -> str:
    result = EXERCISE.run(answer)
    assert result.state == "wrong"
    return str(result)


def test_an_unknown_mistake_is_told_by_shape_place_and_number() -> None:
    assert "its shape is (1, 1), and (1, 4) is right" in wrong(lambda x, eps: x.mean(-1, keepdim=True))
    said = wrong(lambda x, eps: rms(x, eps) + torch.tensor([0.0, 0, 0, 1])[: x.shape[-1]])
    assert "at [0, 3] it gave" in said and "25% of the numbers are off" in said
    assert "returned nothing (None): is there a `return`?" in wrong(lambda x, eps: None)
    assert "it gave a list, and a tensor of shape (1, 4) is wanted" in wrong(lambda x, eps: x.tolist())
    assert "changes its input number 1 in place" in wrong(lambda x, eps: x.div_(2))
    assert "give the function itself" in str(EXERCISE.run(torch.zeros(3)))
    assert "zeros stay zeros: this does not hold.\n  eps keeps" in wrong(lambda x, eps: rms(x, eps) + (x == 0).float())


def test_a_blank_is_one_line_and_its_place_is_free() -> None:
    def blank(x: Tensor, eps: float) -> Tensor:
        raise NotImplementedError

    result = EXERCISE.run(blank)
    assert result.state == "unsolved" and "\n" not in str(result)


def test_an_exception_is_short_and_shows_the_readers_line() -> None:
    def broken(x: Tensor, eps: float) -> Tensor:
        y = x * 2
        return y.mean(dim=7)

    said = wrong(broken)
    assert "IndexError: Dimension out of range" in said and "line 3 of your function: return y.mean(dim=7)" in said
    assert "Traceback" not in said and said.count("\n") <= 3
    for error, words in {
        SystemExit: "it calls exit()",
        RecursionError: "calls itself without end",
        MemoryError: "more memory",
    }.items():

        def raises(x: Tensor, eps: float, error: type[BaseException] = error) -> Tensor:
            raise error

        assert words in wrong(raises)


def test_an_endless_answer_is_stopped_with_a_word_even_one_that_catches_everything_once() -> None:
    def endless(x: Tensor, eps: float) -> Tensor:
        while True:
            pass

    def stubborn(x: Tensor, eps: float) -> Tensor:
        try:
            while True:
                pass
        except:  # noqa: E722
            while True:
                pass

    for answer in (endless, stubborn):
        began = time.monotonic()
        assert "had not returned after 1 seconds" in wrong(answer)
        assert time.monotonic() - began < 10


def test_outside_the_main_thread_too() -> None:
    said: list[str] = []

    def endless(x: Tensor, eps: float) -> Tensor:
        while True:
            time.sleep(0.01)

    thread = threading.Thread(target=lambda: said.extend([str(EXERCISE.run(endless)), str(EXERCISE.run(rms))]))
    thread.start()
    thread.join(20)
    assert "had not returned" in said[0] and "right" in said[1]


def test_checking_leaves_the_random_state_as_it_was() -> None:
    before = torch.get_rng_state()
    EXERCISE.run(lambda x, eps: torch.randn_like(x))
    assert torch.equal(torch.get_rng_state(), before)


SAME = [
    (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 1e-6])),
    (torch.tensor([1.0, float("-inf")]), torch.tensor([1.0, float("-inf")])),
    (torch.tensor([float("nan")]), torch.tensor([float("nan")])),
    (np.array([1, 2]), torch.tensor([1, 2])),
    (torch.tensor(3.0), 3.0),
    ((1, "a"), [1, "a"]),
    ({"a": torch.ones(2)}, {"a": torch.ones(2)}),
    (True, True),
    (math.inf, math.inf),
    (torch.polar(torch.ones(2), torch.ones(2)), torch.polar(torch.ones(2), torch.ones(2))),
]
OTHER = [
    (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1])),
    (torch.tensor([1.0, 0.0]), torch.tensor([1.0, float("-inf")])),
    (torch.tensor([0.0, float("inf")]), torch.tensor([0.0, float("-inf")])),
    (torch.tensor([float("nan")]), torch.tensor([1.0])),
    (torch.tensor([1.0]), torch.tensor([float("nan")])),
    (torch.ones(2, 1), torch.ones(2)),
    (torch.tensor([1, 0]), torch.tensor([True, False])),
    (3.1, 3.0),
    (1.0, math.inf),
    (-math.inf, math.inf),
    (math.inf, 1.0),
    (torch.polar(torch.ones(2), torch.zeros(2)), torch.ones(2)),
    ("3", 3.0),
    ((1, "b"), (1, "a")),
    ((1,), (1, 2)),
    ({"a": 1}, {"b": 1}),
    (None, 1),
    (True, False),
    ("b", "a"),
]


def test_what_is_the_same_and_what_is_not() -> None:
    for got, expected in SAME:
        assert difference(got, expected, 1e-5) == "", (got, expected)
    for got, expected in OTHER:
        said = difference(got, expected, 1e-5)
        assert said and "\n" not in said, (got, expected)


def test_a_result_is_lines_in_a_terminal_and_a_box_in_a_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    result = Result("rms", "wrong", ("it gave 1 < 2", "a hint"))
    show(result)
    assert capsys.readouterr().out == "✗ rms: not yet\n  it gave 1 < 2\n  a hint\n"
    page = result._repr_mimebundle_()
    assert page["text/plain"] == str(result) and "1 &lt; 2" in page["text/html"]


def test_same_compares_two_functions_or_says_that_one_is_blank(capsys: pytest.CaptureFixture[str]) -> None:
    def blank(x: Tensor) -> Tensor:
        raise NotImplementedError

    same(torch.relu, lambda x: x.clamp(min=0), (torch.tensor([-1.0, 2.0]),), (torch.zeros(2, 2),))
    same(blank, torch.relu, (torch.ones(2),))
    same(torch.abs, torch.relu, (torch.tensor([-1.0]),))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "✓ the same on 2 inputs"
    assert lines[1] == "○ blank is still blank: nothing to compare yet"
    assert lines[2].startswith("✗ input 1: at [0] it gave 1, and 0 is right")
