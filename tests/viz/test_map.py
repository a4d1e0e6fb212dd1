"""The map names every lesson once, where it can be read."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from dsv3_mini.viz.figures.map import LESSONS, PART_COLOURS, PILL, map_figure

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def figure() -> Figure:
    return map_figure()


def texts(figure: Figure) -> dict[str, Text]:
    return {text.get_text(): text for text in figure.axes[0].texts if text.get_text()}


def box(figure: Figure, text: Text) -> Bbox:
    """Where a text stands, in the units of the drawing."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    return text.get_window_extent(renderer).transformed(figure.axes[0].transData.inverted())


def test_every_lesson_is_named_once(figure: Figure) -> None:
    assert [lesson.number for lesson in LESSONS] == list(range(29))
    assert len({lesson.name for lesson in LESSONS}) == 29
    for lesson in LESSONS:
        own = [text for text in texts(figure) if text.startswith(f"{lesson.number:02d} ")]
        assert own == [f"{lesson.number:02d} {lesson.name}"]
    assert {lesson.part for lesson in LESSONS} == set(PART_COLOURS)


def test_the_lessons_that_there_are_have_their_number() -> None:
    numbers = {int(source.name[:2]) for source in (ROOT / "solutions").glob("[0-9][0-9]_*.py")}
    assert numbers <= {lesson.number for lesson in LESSONS}


def test_names_stay_in_their_labels(figure: Figure) -> None:
    for lesson in LESSONS:
        for drawn in (figure, map_figure(here=lesson.number)):  # marked, a name is bold, and wider
            extent = box(drawn, texts(drawn)[f"{lesson.number:02d} {lesson.name}"])
            assert lesson.x < extent.x0 and extent.x1 < lesson.x + lesson.width, lesson.name
            assert lesson.y < extent.y0 and extent.y1 < lesson.y + PILL, lesson.name


def test_nothing_lies_over_anything_else(figure: Figure) -> None:
    labels = {f"{lesson.number:02d}": Bbox.from_bounds(lesson.x, lesson.y, lesson.width, PILL) for lesson in LESSONS}
    words = {name: box(figure, text) for name, text in texts(figure).items() if not text.get_gid()}
    for (one, first), (other, second) in combinations((labels | words).items(), 2):
        assert not first.overlaps(second), (one, other)
    for extent in (labels | words).values():
        assert extent.x0 > 0 and extent.x1 < 124 and extent.y0 > 0 and extent.y1 < 84


def test_words_are_large_enough(figure: Figure) -> None:
    assert min(text.get_fontsize() for text in texts(figure).values()) >= 11


def test_the_lesson_that_one_reads_is_marked(figure: Figure) -> None:
    assert {text.get_fontweight() for text in figure.axes[0].texts if text.get_gid()} == {"normal"}
    marked = [
        text.get_gid()
        for text in map_figure(here=8).axes[0].texts
        if text.get_gid() and text.get_fontweight() == "bold"
    ]
    assert marked == ["lesson-08"]
