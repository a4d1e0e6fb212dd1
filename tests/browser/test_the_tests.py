"""The browser tests' own tests: widgets that work pass, and each way to be broken is found and blamed on its cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import nbformat
import pytest
from lab_server import JupyterLab
from specimens import BROKEN, GOOD, SETUP

if TYPE_CHECKING:
    from lesson_page import LessonPage

pytestmark = [pytest.mark.browser, pytest.mark.slow]
# These happen in the page while the lesson runs: no cell is to be seen.
IN_THE_PAGE = ("a script raised at once", "asks the network")


def write(lab: JupyterLab, name: str, *cells: str) -> str:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, lab.root / name)
    return name


@pytest.fixture(scope="module")
def broken(lab: JupyterLab, examine: Callable[..., LessonPage]) -> LessonPage:
    cells = [f"# {name}\n{cell.strip()}" for name, (cell, _) in BROKEN.items()]
    return examine(write(lab, "broken.ipynb", SETUP, *cells), patience=2000)


def test_widgets_that_work_have_no_problem(lab: JupyterLab, examine: Callable[..., LessonPage]) -> None:
    page = examine(write(lab, "good.ipynb", SETUP, *[f"# {name}\n{cell.strip()}" for name, cell in GOOD.items()]))
    assert not page.problems, "\n".join(page.problems)
    moved = {control.partition("), ")[2] for control in page.controls}
    sliders = {f'slider "{name}"' for name in ("whole", "part", "range", "of", "power", "rows", "n", "step", "here")}
    buttons = {f'button "{name}"' for name in ("this", "that", "toggle", "press", "Back", "Next", "Play", "Grow")}
    boxes = {'text "text"', 'text "late"', 'text "lines"', 'number "number"', 'number "bounded"', 'text "combo"'}
    choices = {'dropdown "letter"', 'radio "a"', 'radio "b"', 'radio "c"', 'dropdown "list"', 'checkbox "tick"'}
    own = {'dropdown "colour"', 'checkbox "frame"', 'text "caption"'}
    assert moved == sliders | buttons | boxes | choices | own
    assert sum('slider "range"' in control for control in page.controls) == 1  # two handles of one name


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_widget_is_found(name: str, broken: LessonPage) -> None:
    for piece in BROKEN[name][1]:
        found = [problem for problem in broken.problems if piece in problem]
        assert found, f"{piece!r} is not in:\n" + "\n".join(broken.problems)
        assert piece.startswith(IN_THE_PAGE) or any(f"(# {name})" in problem for problem in found), found


def test_nothing_else_is_blamed(broken: LessonPage) -> None:
    pieces = [piece for _, pieces in BROKEN.values() for piece in pieces]
    assert not [problem for problem in broken.problems if not any(piece in problem for piece in pieces)]


def test_a_cell_that_stops_the_lesson(lab: JupyterLab, examine: Callable[..., LessonPage]) -> None:
    page = examine(write(lab, "stops.ipynb", "import sys; print('careful', file=sys.stderr)", "1 / 0", "'never'"))
    assert page.problems == [
        "cell 1 (import sys; print('careful', file=sys.stderr)): wrote to stderr: careful\n",
        "cell 2 (1 / 0): error: ZeroDivisionError: division by zero",
        "cell 3 ('never'): was not run",
    ]
    assert not page.controls
