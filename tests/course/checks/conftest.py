"""Hands a lesson's own lists to the tests that all lessons share (`lesson_answers.py`)."""

from __future__ import annotations

import pytest

from dsv3_mini.course.checks.framework import exercises_of

pytest.register_assert_rewrite("lesson_answers")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`RIGHT`, `WRONG` and `check` are those of the module that imported the test."""
    module, wanted = metafunc.module, metafunc.function.__module__ == "lesson_answers" and metafunc.function.__name__
    if wanted == "test_right_answers_are_accepted":
        metafunc.parametrize("exercise, answer", module.RIGHT, ids=lambda value: getattr(value, "__name__", None))
    elif wanted == "test_wrong_answers_get_their_own_hint":
        ids = [f"{exercise.name}: {hint}" for exercise, _, hint in module.WRONG]
        metafunc.parametrize("exercise, answer, hint", module.WRONG, ids=ids)
    elif wanted == "test_blank_is_unsolved_and_every_exercise_knows_mistakes":
        metafunc.parametrize("exercise", exercises_of(module.check).values(), ids=lambda exercise: exercise.name)
