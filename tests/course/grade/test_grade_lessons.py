"""A real lesson, as it ships: solved it has full points, blank it has none, and neither breaks a rule of the grader."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv3_mini.course.grade.find import CHECKS
from dsv3_mini.course.grade.results import Submission
from dsv3_mini.course.grade.supervise import Limits, grade

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("folder", "state"), [("solutions", "right"), ("lessons", "unsolved")])
def test_a_lesson(folder: str, state: str) -> None:
    file = next((ROOT / folder).glob("01_*.ipynb"), None)
    if file is None:
        pytest.skip(f"{folder}/01_*.ipynb is not built")
    graded = grade(Submission("course", file.stem, file), CHECKS.format(number="01"), Limits())
    assert graded.notes == ()
    assert {outcome.state for outcome in graded.outcomes} == {state}
    assert graded.of >= 3
