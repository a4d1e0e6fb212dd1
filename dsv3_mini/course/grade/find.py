"""Which notebooks to grade: FOLDER/NN_topic.ipynb is one person's, FOLDER/PERSON/NN_topic.ipynb a class's."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from dsv3_mini.course.grade.results import Submission, clean
from dsv3_mini.errors import UserError

NAME = re.compile(r"\d\d_\w+\.ipynb", re.ASCII)
CHECKS = "dsv3_mini.course.checks.lesson_{number}"


def find_notebooks(folder: Path) -> tuple[list[Submission], list[str]]:
    """The notebooks of a folder by person and lesson, and the notebooks that have no lesson's name (passed over).

    Raises:
        UserError: there is no such folder, or no lesson in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is {'a file' if folder.exists() else 'not there'}: name a folder of notebooks")
    found, passed_over = [], []
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    for place in [folder, *below]:
        for file in sorted(place.glob("*.ipynb")):
            if NAME.fullmatch(file.name):
                found.append(Submission(clean(place.resolve().name), file.stem, file))
            else:
                passed_over.append(clean(file.relative_to(folder)))
    if not found:
        raise UserError(
            f"{folder} holds no lesson: looked for NN_topic.ipynb (such as 04_transformer.ipynb) in it and in the folders below"
        )
    return found, passed_over


def with_checks(found: Sequence[Submission], checks: str) -> tuple[list[Submission], list[str]]:
    """Those whose lesson has a checker module (`checks`, with {number} in it), and the lessons that have none."""
    lessons = {submission.number for submission in found}
    graded = {number for number in lessons if _exists(checks.format(number=number))}
    return [s for s in found if s.number in graded], sorted({s.lesson for s in found if s.number not in graded})


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
