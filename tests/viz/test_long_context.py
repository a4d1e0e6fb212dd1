"""Lesson 17's pictures, read back from their artists; the stretch explorer, moved as a reader would."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from explorers import assert_every_control_moves_the_picture_and_back
from matplotlib.figure import Figure

from dsv3_mini.config import ModelConfig
from dsv3_mini.evaluate.needle import NeedleGrid
from dsv3_mini.model.rope import frequencies
from dsv3_mini.viz.figures.long_context import WAYS, angles_figure, needle_figure, stretch_figure
from dsv3_mini.viz.widgets.long_context import draw_stretch, stretch_explorer

PLAIN = frequencies(ModelConfig.preset("tiny"))
GRIDS = {
    "one": NeedleGrid([100, 208, 832], [0.0, 1.0], [[8, 7], [6, 5], [0, 4]], 8),
    "two": NeedleGrid([100, 208, 832], [0.0, 1.0], [[0, 0], [1, 2], [8, 8]], 8),
    "three": NeedleGrid([100, 208, 832], [0.0, 1.0], [[3, 3], [3, 3], [3, 3]], 8),
}


def by_gid(figure: Figure) -> dict[str, Any]:
    return {artist.get_gid(): artist for artist in figure.findobj(lambda each: each.get_gid() is not None)}


def test_bars_are_the_angles_that_distances_reach() -> None:
    bars = by_gid(angles_figure(PLAIN, 208, 832))
    for pair, w in enumerate(PLAIN):
        seen, unseen = bars[f"seen-{pair}"], bars[f"unseen-{pair}"]
        assert seen.get_width() == pytest.approx(min(math.degrees(208 * w), 360))
        assert seen.get_width() + unseen.get_width() == pytest.approx(min(math.degrees(832 * w), 360))
        assert unseen.get_x() == seen.get_width()
    assert [bars[f"unseen-{pair}"].get_width() > 0 for pair in range(8)] == [False] * 4 + [True] * 4


def test_marks_are_each_pairs_speed_and_the_band_is_the_ramp() -> None:
    ways = {"as trained": PLAIN, "position interpolation": [w / 4 for w in PLAIN], "YaRN": [w / 2 for w in PLAIN]}
    artists = by_gid(stretch_figure(ways, 208, 1, 4))
    for name, share in zip(WAYS, (1, 0.25, 0.5), strict=True):
        np.testing.assert_allclose(artists[name].get_xydata(), [(pair, share) for pair in range(8)])
    assert artists["ramp"].get_extents().transformed(
        artists["ramp"].axes.transData.inverted()
    ).intervalx == pytest.approx([1, 4])
    labels = [label.get_text() for label in artists["YaRN"].axes.get_xticklabels()]
    assert labels[0] == "0\n33" and labels[4] == "4\n0.33", "turns within 208 tokens"


def test_heat_maps_show_every_share_and_where_training_ended() -> None:
    figure = needle_figure(GRIDS, trained=208)
    artists = by_gid(figure)
    for name, grid in GRIDS.items():
        np.testing.assert_allclose(artists[name].get_array(), np.array(grid.right).T / 8)
        for depth in range(2):
            for length in range(3):
                text = artists[f"{name}-{depth}-{length}"]
                assert text.get_text() == f"{100 * grid.right[length][depth] / 8:.0f}"
                assert text.get_position() == (length, depth)
        assert list(artists[f"trained-{name}"].get_xdata()) == [1.5, 1.5]
    shown = [axes.get_title("left") for axes in figure.axes if axes.get_visible() and axes.get_title("left")]
    assert shown == list(GRIDS)
    assert len(needle_figure({"one": GRIDS["one"]}, 208).axes) == 2, "one map and its colours"


def test_every_control_of_the_explorer_moves_its_picture() -> None:
    moves = {"width": 64, "trained": 832, "factor": 8, "fast": 8, "slow": 1.75}
    assert_every_control_moves_the_picture_and_back(stretch_explorer(), moves)


def test_the_explorer_draws_what_a_config_gives() -> None:
    artists = by_gid(draw_stretch(64, 4096, 40, 32, 1.0))
    released = ModelConfig.preset("671b")
    plain = frequencies(released.replace(rope_scaling=None))
    expected = [w / v for w, v in zip(frequencies(released), plain, strict=True)]
    np.testing.assert_allclose(artists["YaRN"].get_ydata(), expected)
    assert artists["ramp"].get_x() == 10
