"""The explorer: its picture follows its controls, and a page without a kernel has the first one."""

from __future__ import annotations

import base64

import ipywidgets
import pytest
from matplotlib.figure import Figure

from dsv3_mini.viz.figures import png
from dsv3_mini.viz.widgets.explorer import Explorer


def draw(n: int, kind: str) -> Figure:
    figure = Figure(figsize=(2, 1))
    axes = figure.subplots()
    axes.plot(range(n))
    axes.set_title(kind)
    return figure


@pytest.fixture
def explorer() -> Explorer:
    return Explorer(draw, "a line", n=ipywidgets.IntSlider(3, 2, 9), kind=ipywidgets.Dropdown(options=["a", "b"]))


def test_each_control_moves_the_picture_and_back(explorer: Explorer) -> None:
    first = explorer.picture.value
    assert first == png(draw(3, "a")) and explorer.values == {"n": 3, "kind": "a"}
    for change in ({"n": 7}, {"kind": "b"}):
        before = explorer.values
        explorer.set(**change)
        assert explorer.picture.value == png(draw(**{**before, **change})) != first
        explorer.set(**{name: before[name] for name in change})
        assert explorer.picture.value == first


def test_an_error_is_raised_where_the_control_was_moved(explorer: Explorer) -> None:
    def fails(**_: object) -> Figure:
        raise ZeroDivisionError

    explorer.draw = fails
    with pytest.raises(ZeroDivisionError):
        explorer.set(n=4)


def test_what_a_notebook_is_given(explorer: Explorer) -> None:
    data, _ = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == explorer.picture.value
    assert data["text/plain"] == "a line"
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.box.model_id


def test_the_same_figure_is_the_same_bytes() -> None:
    assert png(draw(5, "a")) == png(draw(5, "a"))
    assert b"Matplotlib" not in png(draw(5, "a"))
