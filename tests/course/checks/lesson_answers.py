"""What every lesson's checks have to do with answers: a lesson's test file imports these tests and brings the answers.

It names its checks `check`, and lists `RIGHT`, (exercise, answer), and `WRONG`, (exercise, answer, words of its hint).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsv3_mini.course.checks.framework import Exercise


def test_right_answers_are_accepted(exercise: Exercise, answer: Callable[..., Any]) -> None:
    result = exercise.run(answer)
    assert result.passed, result


def test_wrong_answers_get_their_own_hint(exercise: Exercise, answer: Callable[..., Any], hint: str) -> None:
    result = exercise.run(answer)
    assert result.state == "wrong"
    assert hint in "\n".join(result.lines), result


def test_blank_is_unsolved_and_every_exercise_knows_mistakes(exercise: Exercise) -> None:
    def blank(*_: Any) -> Any:
        raise NotImplementedError

    assert exercise.run(blank).state == "unsolved"
    assert len(exercise.mistakes) >= 3
    assert len({mistake.hint for mistake in exercise.mistakes}) == len(exercise.mistakes)
