"""What every Explorer has to do, for the tests of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv3_mini.viz.widgets.explorer import Explorer


def assert_every_control_moves_the_picture_and_back(explorer: Explorer, moves: Mapping[str, Any]) -> None:
    """`moves` has another value for each control. Each alone changes the picture, and set back gives the first again."""
    assert explorer.controls.keys() == moves.keys()
    first, start = explorer.picture.value, explorer.values
    for name, value in moves.items():
        explorer.set(**{name: value})
        assert explorer.picture.value != first, name
        explorer.set(**{name: start[name]})
        assert explorer.values == start and explorer.picture.value == first, name
