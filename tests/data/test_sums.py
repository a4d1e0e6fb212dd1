"""The sums against Python's own arithmetic, and their judge against sums that are damaged."""

from __future__ import annotations

import operator
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_mini.data.sums import (
    KIND_SHARES,
    TRAIN_SEED,
    Sum,
    generate_sum,
    held_out_count,
    held_out_sum,
    is_held_out,
    is_right,
    judge_sum,
    samples,
)

OPERATORS = {"+": operator.add, "-": operator.sub, "x": operator.mul}


@pytest.fixture(scope="module")
def some() -> list[Sum]:
    return list(samples(6000))


def test_a_sum_depends_on_seed_and_index_alone(some: list[Sum]) -> None:
    random.seed(3)
    before = random.getstate()
    assert [generate_sum(TRAIN_SEED, index) for index in (7, 2)] == [some[7], some[2]]
    assert random.getstate() == before


def test_every_equation_and_answer_holds(some: list[Sum]) -> None:
    for problem in [*some, *map(held_out_sum, range(held_out_count()))]:
        assert problem.answer == OPERATORS[problem.operator](problem.a, problem.b) >= 0
        assert problem.text.endswith(f"\nanswer: {problem.answer}")
        for left, right in re.findall(r"([\dx+\- ]+) = (\d+)", problem.text):
            assert eval(left.strip().replace("x", "*"), {}) == int(right), problem.text


def test_the_digits_written_are_the_answer(some: list[Sum]) -> None:
    for problem in some:
        written = re.findall(r"write (\d+)", problem.text)
        assert int("".join(reversed(written))) == problem.answer, problem.text


def test_prompt_is_the_question(some: list[Sum]) -> None:
    for problem in some:
        assert problem.text.startswith(problem.prompt) and problem.prompt.count("\n") == 1
        assert problem.prompt.endswith("?\n") and str(problem.a) in problem.prompt and str(problem.b) in problem.prompt
        assert is_right(problem, problem.text.removeprefix(problem.prompt))
        assert is_right(problem, f"answer: {problem.answer}\n7 + 8 = ?\nanswer: 15")
        assert not is_right(problem, f"answer: {problem.answer + 1}\nanswer: {problem.answer}")
        assert not is_right(problem, str(problem.answer))


def test_shares_are_those_of_the_table(some: list[Sum]) -> None:
    assert sum(KIND_SHARES.values()) == 100
    counts = Counter(problem.kind for problem in some)
    for kind, share in KIND_SHARES.items():
        assert counts[kind] / len(some) == pytest.approx(share / 100, abs=0.02)


def test_held_out_pairs_never_occur_in_training() -> None:
    held_out = {tuple(sorted((problem.a, problem.b))) for problem in map(held_out_sum, range(held_out_count()))}
    assert 0.08 < held_out_count() / 8100 < 0.12
    for problem in samples(20_000):
        for a, b in re.findall(r"(\d+)\D+?(\d+)", problem.prompt):
            assert tuple(sorted((int(a), int(b)))) not in held_out, problem.text


def test_held_out_sums_are_additions_each_once_and_of_every_digit() -> None:
    problems = [held_out_sum(index) for index in range(held_out_count())]
    assert len({(problem.a, problem.b) for problem in problems}) == len(problems)
    assert all(problem.operator == "+" and is_held_out(problem.a, problem.b) for problem in problems)
    assert all(is_held_out(problem.b, problem.a) for problem in problems)
    # Training must still meet every step: all 100 pairs of ones digits occur in pairs that are not held out.
    trained = {(a % 10, b % 10) for a in range(10, 100) for b in range(10, 100) if not is_held_out(a, b)}
    assert len(trained) == 100
    # And the held-out ones are no special rows of the table either.
    assert len({(problem.a % 10, problem.b % 10) for problem in problems}) > 90
    # The first ones are a fair sample.
    assert len({problem.a // 10 for problem in problems[:100]}) == 9


def test_every_sum_is_judged_right(some: list[Sum]) -> None:
    for problem in [*some, *map(held_out_sum, range(held_out_count()))]:
        verdict = judge_sum(problem.text)
        assert verdict.well_formed and verdict.steps_right and verdict.answer_right, (verdict, problem.text)
        assert verdict.problem is None


def test_any_other_digit_is_refused(some: list[Sum]) -> None:
    """Every digit after the question is determined: with any other in its place the text is refused."""
    rng = random.Random(0)
    for problem in some[:1500]:
        start = len(problem.prompt)
        for position in [i for i in range(start, len(problem.text)) if problem.text[i].isdigit()]:
            digit = rng.choice([d for d in "0123456789" if d != problem.text[position]])
            damaged = problem.text[:position] + digit + problem.text[position + 1 :]
            verdict = judge_sum(damaged)
            assert not (verdict.well_formed and verdict.steps_right and verdict.answer_right), damaged
            assert verdict.problem


def test_a_wrong_answer_or_step_is_told_apart() -> None:
    steps = "47 + 38 = ?\nones: 7 + 8 = 15, write 5, carry 1\ntens: 4 + 3 + 1 = 8, write 8\n"
    assert judge_sum(steps + "answer: 85").answer_right
    verdict = judge_sum(steps + "answer: 86")
    assert verdict.well_formed and verdict.steps_right and verdict.answer_right is False
    verdict = judge_sum(steps.replace("7 + 8 = 15, write 5", "7 + 8 = 16, write 6") + "answer: 85")
    assert verdict.well_formed and verdict.steps_right is False and verdict.answer_right
    assert "wrong step: 'ones: 7 + 8 = 16" in str(verdict.problem)


REFUSED = {
    "empty": "",
    "no question": "answer: 85",
    "only a question": "47 + 38 = ?",
    "no answer": "47 + 38 = ?\nones: 7 + 8 = 15, write 5, carry 1\ntens: 4 + 3 + 1 = 8, write 8",
    "columns swapped": "47 + 38 = ?\ntens: 4 + 3 + 1 = 8, write 8\nones: 7 + 8 = 15, write 5, carry 1\nanswer: 85",
    "a column missing": "47 + 38 = ?\nones: 7 + 8 = 15, write 5, carry 1\nanswer: 85",
    "carry missing": "47 + 38 = ?\nones: 7 + 8 = 15, write 5\ntens: 4 + 3 + 1 = 8, write 8\nanswer: 85",
    "borrow for carry": "47 + 38 = ?\nones: 7 + 8 = 15, write 5, borrow 1\ntens: 4 + 3 + 1 = 8, write 8\nanswer: 85",
    "below zero": "38 - 47 = ?\nones: 8 - 7 = 1, write 1, borrow 0\ntens: 3 - 4 - 0 = 1, write 1\nanswer: 11",
    "one digit": "7 + 8 = ?\nones: 7 + 8 = 15, write 15\nanswer: 15",
    "leading zero": "47 + 38 = ?\nones: 7 + 8 = 15, write 5, carry 1\ntens: 4 + 3 + 1 = 8, write 8\nanswer: 085",
    "words after": "47 + 38 = ?\nones: 7 + 8 = 15, write 5, carry 1\ntens: 4 + 3 + 1 = 8, write 8\nanswer: 85 ok",
    "unknown name": "Anb has 34 shells and loses 12. How many shells does Anb have now?\n34 - 12 = ?\n"
    "ones: 4 - 2 = 2, write 2, borrow 0\ntens: 3 - 1 - 0 = 2, write 2\nanswer: 22",
    "two names": "Anna has 34 shells and loses 12. How many shells does Mira have now?\n34 - 12 = ?\n"
    "ones: 4 - 2 = 2, write 2, borrow 0\ntens: 3 - 1 - 0 = 2, write 2\nanswer: 22",
}


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_sums_are_refused(case: str) -> None:
    verdict = judge_sum(REFUSED[case])
    assert not verdict.well_formed and verdict.steps_right is None and verdict.answer_right is None and verdict.problem


def test_a_word_problem_must_be_read_right() -> None:
    text = (
        "Anna has 34 shells and loses 12. How many shells does Anna have now?\n34 {} 12 = ?\n"
        "ones: 4 {} 2 = {}, write {}, {} 0\ntens: 3 {} 1 {} 0 = {}, write {}\nanswer: {}"
    )
    assert judge_sum(text.format("-", "-", 2, 2, "borrow", "-", "-", 2, 2, 22)).answer_right
    verdict = judge_sum(text.format("+", "+", 6, 6, "carry", "+", "+", 4, 4, 46))
    assert verdict.well_formed and not verdict.steps_right and not verdict.answer_right
    assert "does not ask" in str(verdict.problem)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789+-x=?,: \nonestahudrwicyb", max_size=120))
def test_the_judge_refuses_noise_without_raising(text: str) -> None:
    assert not judge_sum(text).well_formed


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5999), st.integers(0, 200), st.characters(codec="utf-8"))
def test_the_judge_survives_damage(index: int, position: int, character: str) -> None:
    problem = generate_sum(TRAIN_SEED, index)
    text = problem.text[:position] + character + problem.text[position + 1 :]
    verdict = judge_sum(text)
    if text != problem.text and position < len(problem.text) - 1 and not character.isalnum():
        assert not (verdict.well_formed and verdict.steps_right and verdict.answer_right)
