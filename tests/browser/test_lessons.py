"""Lessons in JupyterLab, two or with --all-lessons all: they run, and every control moves the picture beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from lab_server import LESSONS

if TYPE_CHECKING:
    from lesson_page import LessonPage

pytestmark = [pytest.mark.browser, pytest.mark.slow]
TWO = ("01_shapes_and_einops", "02_tokenizer")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "lesson" in metafunc.fixturenames:
        every = sorted(path.stem for path in LESSONS.glob("[0-9]*.ipynb"))
        chosen = every if metafunc.config.getoption("all_lessons", default=False) else [n for n in every if n in TWO]
        metafunc.parametrize("lesson", chosen)


def test_lesson_runs_and_every_control_moves_its_picture(lesson: str, examine: Callable[..., LessonPage]) -> None:
    page = examine(f"{lesson}.ipynb")
    assert not page.problems, "\n  ".join([f"{lesson}:", *page.problems])
    assert page.controls, f"{lesson}: there is no control to move"
