"""Every lesson that is there: its notebooks are those of its source, were run whole, and its answers pass its checks."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import nbformat
import pytest

from dsv3_mini.course.build import LARGEST, NOTEBOOKS, sources, unexecuted
from dsv3_mini.course.checks.framework import exercises_of
from dsv3_mini.course.source import BEGIN, Cell, Lesson, blank, read_lesson
from dsv3_mini.course.syllabus import syllabus

ROOT = Path(__file__).parents[2]
SOURCES = sources(ROOT)
each_lesson = pytest.mark.parametrize("source", SOURCES, ids=[path.stem for path in SOURCES])


@each_lesson
@pytest.mark.parametrize("folder", NOTEBOOKS)
def test_a_notebook_is_its_source_and_was_run_whole(source: Path, folder: str) -> None:
    path = ROOT / folder / f"{source.stem}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    wanted = unexecuted(read_lesson(source).cells, NOTEBOOKS[folder])
    assert [(c.id, c.source) for c in notebook.cells] == [(c.id, c.source) for c in wanted.cells], "run make notebooks"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "a cell was never run"
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert path.stat().st_size <= LARGEST


@each_lesson
def test_a_lesson_holds_no_answer(source: Path) -> None:
    text = (ROOT / "lessons" / f"{source.stem}.ipynb").read_text()
    assert "SOLUTION" not in text and text.count("raise NotImplementedError") >= len(read_lesson(source).exercises)


@each_lesson
def test_the_answers_are_right_and_the_blanks_are_blank(source: Path) -> None:
    lesson = read_lesson(source)
    checks = exercises_of(importlib.import_module(f"dsv3_mini.course.checks.lesson_{lesson.name[:2]}"))
    assert [exercise.name for exercise in lesson.exercises] == list(checks), "in the lesson's order"
    for name, check in checks.items():
        assert len(check.mistakes) + len(check.properties) >= 3, f"{name} knows fewer than three mistakes"
        result = check.run(answer(lesson, name, lambda cell: cell.source))
        assert result.state == "right", str(result)
        assert check.run(answer(lesson, name, lambda cell: blank(cell.source))).state == "unsolved"


def answer(lesson: Lesson, name: str, text: Any) -> Any:
    """The function of one exercise, with the lesson's imports and constants and nothing else of it."""
    namespace: dict[str, Any] = {}
    for cell in lesson.cells:
        if cell.kind == "code":
            exec(_imports(cell), namespace)
    (cell,) = [c for c in lesson.cells if BEGIN in c.source and f"def {name}(" in c.source]
    exec(text(cell), namespace)
    return namespace[name]


def _imports(cell: Cell) -> str:
    lines = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in cell.source.split("\n"))
    kept = [node for node in ast.parse(lines).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n".join(ast.unparse(node) for node in kept)


def test_the_syllabus_is_of_these_lessons() -> None:
    page = (ROOT / "lessons" / "README.md").read_text()
    assert page == syllabus([read_lesson(path.relative_to(ROOT)) for path in SOURCES])
    for source in SOURCES:
        assert f"({source.stem}.ipynb)" in page


def test_notebooks_and_sources_are_the_same_lessons() -> None:
    for folder in NOTEBOOKS:
        assert sorted(path.stem for path in (ROOT / folder).glob("*.ipynb")) == [path.stem for path in SOURCES]
