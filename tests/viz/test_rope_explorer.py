"""Lesson 05's pictures, read back from their artists; the frequency explorer, moved as a reader would."""

from __future__ import annotations

import base64
import math
from typing import Any

import matplotlib.colors
import numpy as np
import pytest
import torch
from explorers import assert_every_control_moves_the_picture_and_back
from matplotlib.figure import Figure

from dsv3_mini.config import ModelConfig
from dsv3_mini.model.rope import frequencies
from dsv3_mini.viz.figures.rope import (
    KINDS,
    LEAST_CHANGE,
    PART,
    ROUND,
    STILL,
    clocks_figure,
    cost_figure,
    frequency_figure,
    kinds,
    layout_figure,
    reach,
    shift_figure,
    stripes_figure,
)
from dsv3_mini.viz.widgets import rope as widgets
from dsv3_mini.viz.widgets.rope import CONTEXTS, THETAS, WIDTHS, draw_frequencies, frequency_explorer

FREQUENCIES = [1.0, 0.1, 0.01]


def by_gid(figure: Figure) -> dict[str, Any]:
    return {artist.get_gid(): artist for artist in figure.findobj(lambda each: each.get_gid() is not None)}


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def colour(artist: Any) -> str:
    return matplotlib.colors.to_hex(artist.get_facecolor(), keep_alpha=False).upper()


# ---- figures -----------------------------------------------------------------------------------------------------------


def test_every_hand_points_where_its_pair_has_turned() -> None:
    figure = clocks_figure(FREQUENCIES, pairs=[0, 2], positions=[0, 1, 5, 100])
    hands = {gid: artist for gid, artist in by_gid(figure).items() if gid.startswith("hand-")}
    assert len(hands) == 8
    for pair in (0, 2):
        for position in (0, 1, 5, 100):
            (x0, x1), (y0, y1) = hands[f"hand-{pair}-{position}"].get_data()
            turned = complex(x1 - x0, y1 - y0)
            angle = FREQUENCIES[pair] * position
            assert turned / abs(turned) == pytest.approx(complex(math.cos(angle), math.sin(angle)))
    assert "round in 6" in texts(figure) and "round in 628" in texts(figure)


def test_stripes_are_the_tables_on_one_scale() -> None:
    tables = {"added": torch.randn(5, 5), "turned": 3 * torch.randn(5, 5)}
    figure = stripes_figure(tables)
    images = [axes.images[0] for axes in figure.axes if axes.images and axes.get_xlabel()]
    for image, table in zip(images, tables.values(), strict=True):
        np.testing.assert_array_equal(image.get_array(), table.numpy())
        assert image.get_clim() == (-tables["turned"].abs().max(), tables["turned"].abs().max())
    assert "added" in texts(figure) and "turned" in texts(figure)


def test_layout_shows_which_numbers_are_a_pair_and_where_they_go() -> None:
    artists = by_gid(layout_figure(8))
    order = [int(artists[f"halves-number-{place}"].get_text()) for place in range(8)]
    assert order == [0, 2, 4, 6, 1, 3, 5, 7]
    for place in range(4):
        assert artists[f"halves-{place}"].get_edgecolor() == artists[f"halves-{place + 4}"].get_edgecolor()
        pair = artists[f"neighbours-{2 * place}"], artists[f"neighbours-{2 * place + 1}"]
        assert pair[0].get_edgecolor() == pair[1].get_edgecolor() == artists[f"halves-{place}"].get_edgecolor()
    for place, dimension in enumerate(order):
        assert list(artists[f"move-{dimension}"].get_xdata()) == [dimension, place]


def test_cost_bars_are_the_costs_from_the_top() -> None:
    figure = cost_figure({"as trained": 1.25, "reversed": 4.0})
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [1.25, 4.0]
    assert axes.yaxis_inverted() and colour(axes.patches[0]) != colour(axes.patches[1])
    assert "nats" in axes.get_xlabel() and "1.25" in texts(figure)


def test_shift_figure_shows_every_change_and_nothing_at_its_floor() -> None:
    figure = shift_figure([1, 10, 100], {"FP32": [0.0, 1e-5, 0.1], "BF16": [1.0, 2.0, 3.0]})
    first, second = figure.axes[0].lines
    assert list(first.get_ydata()) == [LEAST_CHANGE, 1e-5, 0.1] and list(second.get_ydata()) == [1.0, 2.0, 3.0]
    assert first.get_marker() != second.get_marker(), "told apart without colours, too"


# ---- what a pair tells apart -------------------------------------------------------------------------------------------


def test_reach_is_from_a_turn_of_so_many_degrees_to_a_whole_one() -> None:
    step, wavelength = reach(FREQUENCIES, 90)
    for w, near, far in zip(FREQUENCIES, step, wavelength, strict=True):
        assert w * near == pytest.approx(math.pi / 2) and w * far == pytest.approx(2 * math.pi)


def test_kinds_by_what_a_pair_does_within_the_context() -> None:
    # Wavelengths 6.3, 62.8 and 628; a tenth of them is 0.6, 6.3 and 63.
    assert kinds(FREQUENCIES, 50, 36) == [ROUND, PART, STILL]
    assert kinds(FREQUENCIES, 63, 36) == [ROUND, ROUND, PART]
    assert kinds(FREQUENCIES, 6, 36) == [PART, STILL, STILL]
    assert kinds(FREQUENCIES, 6, 3) == [PART, PART, PART]


def test_the_released_models_pairs() -> None:
    """Lesson 17's ramp ends at pair 22.51, where a pair turns once within 4,096: 23 pairs, 0 to 22, come round."""
    released = frequencies(ModelConfig.preset("671b", rope_scaling=None))
    assert kinds(released, 4096, 10) == [ROUND] * 23 + [PART] * 9
    assert kinds(released, 163_840, 10) == [ROUND] * 32


def test_frequency_figure_is_its_data() -> None:
    figure = frequency_figure(FREQUENCIES, context=50, degrees=36, pair=1)
    artists = by_gid(figure)
    step, wavelength = reach(FREQUENCIES, 36)
    for pair, kind in enumerate(kinds(FREQUENCIES, 50, 36)):
        bar = artists[f"pair-{pair}"]
        assert (bar.get_x(), bar.get_x() + bar.get_width()) == pytest.approx((step[pair], wavelength[pair]))
        assert colour(bar) == KINDS[kind].upper()
    assert artists["pair-1"].get_linewidth() > artists["pair-0"].get_linewidth()
    x, y = artists["one pair"].get_data()
    assert x[-1] == 50 and y == pytest.approx(np.cos(0.1 * x))
    x, y = artists["all pairs"].get_data()
    assert x[0] == 1 and x[-1] == 50
    assert y == pytest.approx([sum(math.cos(d * w) for w in FREQUENCIES) / 3 for d in x])
    assert "Of 3 pairs, 1 come round within 50 tokens; 1 make part of a turn, 1 hardly move" in figure.get_suptitle()
    assert "Pair 1: 80% of a turn" in texts(figure)


# ---- the explorer ------------------------------------------------------------------------------------------------------

MOVES = {"theta": 100.0, "width": 128, "context": 163_840, "degrees": 60, "pair": 20}


def test_every_control_moves_the_picture_and_back() -> None:
    assert_every_control_moves_the_picture_and_back(frequency_explorer(), MOVES)


def test_the_explorer_draws_what_its_controls_say(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(widgets, "frequency_figure", lambda *given: shown.append(given) or Figure(figsize=(1, 1)))
    explorer = frequency_explorer()
    for name, value in MOVES.items():
        explorer.set(**{name: value})
    w, context, degrees, pair = shown[-1]
    assert w == pytest.approx([100.0 ** (-j / 64) for j in range(64)])
    assert (context, degrees, pair) == (163_840, 60, 20)
    explorer.set(width=8)
    assert len(shown[-1][0]) == 4 and shown[-1][3] == 3, "where there is no pair 20 the last one is shown"
    assert explorer.controls["pair"].max == 3, "and its slider ends there"
    explorer.set(width=16, pair=7)
    assert len(shown[-1][0]) == 8 and shown[-1][3] == 7
    assert all(pair < len(frequencies) for frequencies, _, _, pair in shown)


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("width", (WIDTHS[0], WIDTHS[-1]))
def test_every_setting_fits_the_ruler(theta: float, width: int) -> None:
    for context in (CONTEXTS[0], CONTEXTS[-1]):
        figure = draw_frequencies(theta, width, context, 5, width // 2 - 1)
        low, high = figure.axes[0].get_xlim()
        bars = [artist for gid, artist in by_gid(figure).items() if gid.startswith("pair-")]
        assert len(bars) == width // 2
        assert all(low < bar.get_x() and bar.get_x() + bar.get_width() < high for bar in bars)
        assert low < context < high


def test_it_shows_something_without_a_kernel() -> None:
    explorer = frequency_explorer()
    data, _ = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == explorer.picture.value and "wavelength" in data["text/plain"]
