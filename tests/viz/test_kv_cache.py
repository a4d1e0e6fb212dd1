"""Lesson 07's pictures, read back from their artists; its widgets, moved as a reader would."""

from __future__ import annotations

import base64
from typing import Any

import matplotlib.colors
import numpy as np
import pytest
from explorers import assert_every_control_moves_the_picture_and_back
from matplotlib.figure import Figure

from dsv3_mini.bench.decode import CONTEXT, NEW, Seconds
from dsv3_mini.config import ModelConfig
from dsv3_mini.ledger.decode import H800, WAYS, attention_flops, crossing, decode_step
from dsv3_mini.viz.figures.kv_cache import (
    ABSENT,
    COMPUTED,
    KEPT,
    brackets_figure,
    cells_of,
    crossing_figure,
    roofline_figure,
    steps_figure,
)
from dsv3_mini.viz.style import COLOURS
from dsv3_mini.viz.widgets import kv_cache as widgets
from dsv3_mini.viz.widgets.kv_cache import (
    RECORDED,
    Stopwatch,
    counted_ratios,
    roofline_explorer,
    stopwatch,
)

RELEASED = ModelConfig.preset("671b")


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def by_gid(figure: Figure) -> dict[str, Any]:
    return {artist.get_gid(): artist for artist in figure.findobj(lambda artist: artist.get_gid())}


# ---- figures -----------------------------------------------------------------------------------------------------------


def test_cells_without_and_with_a_cache() -> None:
    assert cells_of(2, 3, cached=False).tolist() == [
        [COMPUTED, COMPUTED, ABSENT, ABSENT],
        [COMPUTED, COMPUTED, COMPUTED, ABSENT],
        [COMPUTED, COMPUTED, COMPUTED, COMPUTED],
    ]
    assert cells_of(2, 3, cached=True).tolist() == [
        [COMPUTED, COMPUTED, ABSENT, ABSENT],
        [KEPT, KEPT, COMPUTED, ABSENT],
        [KEPT, KEPT, KEPT, COMPUTED],
    ]


def test_steps_figure_counts_what_it_shows() -> None:
    figure = steps_figure(6, 8)
    for axes, cached, count in zip(figure.axes[:2], (False, True), (sum(range(6, 14)), 6 + 7), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), cells_of(6, 8, cached))
        assert f"{count} positions computed" in axes.get_title(loc="left")
    assert all(word in texts(figure) for word in ("prefill", "decode", "kept from before", "computed now"))


def test_brackets_are_drawn_to_scale_and_counted() -> None:
    figure = brackets_figure(8, 32, 100)
    drawn = {name: (patch.get_width(), patch.get_height()) for name, patch in by_gid(figure).items()}
    for row in ("q (W_UK C): keys first", "(q W_UK) C: query first"):
        assert drawn[f"{row}: W_UK"] == (32, 8) and drawn[f"{row}: C"] == (100, 32)
        assert drawn[f"{row}: q"][0] == 8
    assert drawn["q (W_UK C): keys first: keys"] == (100, 8)
    assert drawn["(q W_UK) C: query first: q'"][0] == 32
    assert f"{8 * 32 * 100 + 8 * 100:,} multiplications" in texts(figure)
    assert f"{8 * 32 + 32 * 100:,} multiplications" in texts(figure)


def test_nothing_of_the_brackets_leaves_the_picture() -> None:
    for axes in brackets_figure(128, 512, 1024).axes:
        right = max(patch.get_x() + patch.get_width() for patch in axes.patches)
        assert right < axes.get_xlim()[1] and max(p.get_height() for p in axes.patches) / 2 < axes.get_ylim()[1]


def test_crossing_figure_shows_count_and_measurements() -> None:
    counted, measured = {1: 50.0, 8: 5.0, 64: 0.5}, {"here": {1: 20.0, 8: 4.0}, "there": {1: 30.0}}
    figure = crossing_figure(counted, 33.0, 64, measured)
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines}
    assert lines["counted in FLOPs"] == ([1, 8, 64], [50.0, 5.0, 0.5])
    assert lines["here"] == ([1, 8], [20.0, 4.0]) and lines["there"] == ([1], [30.0])
    assert "33 new tokens" in texts(figure) and "64 in the cache" in texts(figure)


def test_roofline_figure_puts_each_part_at_its_place() -> None:
    parts = decode_step(RELEASED, 16, 8192)
    figure = roofline_figure(parts, H800, 16, "Batch 16")
    roof, times = figure.axes[:2]
    points = {line.get_gid(): line for line in roof.lines if line.get_gid() not in (None, "roof")}
    bars = {bar.get_gid(): bar.get_width() for bar in times.patches}
    assert points.keys() == bars.keys() == {part.name for part in parts}
    for i, part in enumerate(parts):
        assert points[part.name].get_xdata()[0] == part.intensity
        assert points[part.name].get_ydata()[0] == H800.reached(part.intensity)
        assert bars[part.name] == pytest.approx(1e3 * part.seconds(H800))
        assert matplotlib.colors.to_hex(points[part.name].get_color()).upper() == COLOURS[i]
    (line,) = [line for line in roof.lines if line.get_gid() == "roof"]
    for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
        assert y == pytest.approx(min(989e12, 3.35e12 * x))
    total = sum(part.seconds(H800) for part in parts)
    slowest = max(parts, key=lambda part: part.seconds(H800))
    assert f"{slowest.seconds(H800) / total:.0%} of the time goes to {slowest.name}" in texts(figure)
    assert f"{16 / total:,.0f} tokens/s" in texts(figure)


@pytest.mark.parametrize("batch, context, way, new", [(1, 256, "absorbed", 1), (4096, 131_072, "heads cached", 4)])
def test_every_point_lies_within_the_axes(batch: int, context: int, way: str, new: int) -> None:
    axes = roofline_figure(decode_step(RELEASED, batch, context, new, way), H800, batch * new, "").axes[0]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    for line in axes.lines:
        if line.get_gid() not in (None, "roof"):
            assert left < line.get_xdata()[0] < right and low < line.get_ydata()[0] < high, line.get_gid()


def test_words_are_large_enough() -> None:
    for figure in (
        steps_figure(6, 8),
        brackets_figure(128, 512, 1024),
        crossing_figure(counted_ratios(RELEASED, CONTEXT), crossing(RELEASED, CONTEXT), CONTEXT, {"x": RECORDED}),
        roofline_figure(decode_step(RELEASED, 1, 4096), H800, 1, "Batch 1"),
    ):
        shown = [text for text in figure.findobj(lambda a: hasattr(a, "get_fontsize")) if text.get_text()]
        assert min(text.get_fontsize() for text in shown) >= 11


# ---- the roofline explorer ---------------------------------------------------------------------------------------------


def test_every_control_moves_the_picture_and_back() -> None:
    moves = {"batch": 64, "context": 131_072, "way": "rebuilt", "new": 2}
    assert_every_control_moves_the_picture_and_back(roofline_explorer(), moves)


def test_the_explorer_draws_what_its_controls_say(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(widgets, "roofline_figure", lambda *given: shown.append(given) or Figure(figsize=(1, 1)))
    explorer = roofline_explorer()
    explorer.set(batch=32)
    explorer.set(context=1024)
    explorer.set(way="heads cached")
    explorer.set(new=4)
    parts, machine, tokens, heading = shown[-1]
    assert parts == decode_step(RELEASED, 32, 1024, 4, "heads cached") and machine is H800 and tokens == 128
    assert heading == "Batch 32, 1,024 tokens each, heads cached"


def test_every_setting_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widgets, "roofline_figure", lambda parts, *_: Figure(figsize=(1, 1)))
    draw = roofline_explorer().draw
    for way in WAYS:
        for batch, context, new in ((1, 256, 4), (4096, 131_072, 4), (4096, 256, 1)):
            draw(batch=batch, context=context, way=way, new=new)


# ---- the stopwatch -----------------------------------------------------------------------------------------------------


def fake(times: dict[int, list[float]], asked: list[int] | None = None) -> Any:
    """Ratios in their order for each number of new tokens."""

    def run(new: int) -> Seconds:
        if asked is not None:
            asked.append(new)
        return Seconds(expanded=times[new].pop(0), absorbed=1.0)

    return run


def test_a_press_measures_in_turn_and_keeps_the_median() -> None:
    asked: list[int] = []
    watch = Stopwatch(fake({1: [99.0, 4.0, 2.0, 3.0], 5: [99.0, 0.5, 0.7, 0.6]}, asked), {1: 9.0}, 3.0, 8, (1, 5), 3)
    before = watch.picture.value
    assert watch.rounds_done == 0 and watch.measured == {}
    watch.button.click()
    assert asked == [1, 5] * 4, "a round of warming up, then both in each round"
    assert watch.measured == {1: 3.0, 5: 0.6} and watch.rounds_done == 3
    assert watch.picture.value != before and not watch.button.disabled


def test_a_second_press_adds_rounds_and_moves_the_picture() -> None:
    watch = Stopwatch(fake({1: [9.0, 2.0, 4.0, 6.0]}), {1: 9.0}, 3.0, 8, (1,), 1)
    watch.measure()
    first = watch.picture.value
    watch.measure(2)
    assert watch.rounds_done == 3 and watch.measured == {1: 4.0} and watch.picture.value != first


def test_an_error_while_measuring_is_raised_and_the_button_comes_back() -> None:
    watch = Stopwatch(fake({1: []}), {1: 9.0}, 3.0, 8, (1,))
    with pytest.raises(IndexError):
        watch.measure()
    assert not watch.button.disabled


def test_its_picture_shows_recorded_and_own_times(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(widgets, "crossing_figure", lambda *given: shown.append(given) or Figure(figsize=(1, 1)))
    watch = Stopwatch(fake({1: [9.0, 2.0]}), {1: 9.0}, 3.0, 8, (1,), 1)
    assert list(shown[-1][3].values()) == [RECORDED]
    watch.measure()
    counted, crosses, context, measured = shown[-1]
    assert (counted, crosses, context) == ({1: 9.0}, 3.0, 8)
    assert list(measured.values()) == [RECORDED, {1: 2.0}] and list(measured)[1].endswith("median of 1")


def test_without_a_kernel_it_shows_the_recorded_times() -> None:
    watch = Stopwatch(fake({}), {1: 9.0, 8: 0.5}, 3.0, 8, (1,))
    data, _ = watch._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == watch.picture.value and "absorbed" in data["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in data


def test_the_counted_curve_is_the_ledgers() -> None:
    ratios = counted_ratios(RELEASED, CONTEXT)
    assert min(ratios) == 1 and max(ratios) == CONTEXT and list(ratios) == sorted(ratios)
    for new, ratio in ratios.items():
        flops = attention_flops(RELEASED, new, CONTEXT)
        assert ratio == flops.rebuilt / flops.absorbed
        assert (ratio > 1) == (new < crossing(RELEASED, CONTEXT))


def test_the_real_one_measures_as_the_recorded_one_did() -> None:
    """One round here, wide bounds: on which side of 1 each far point lies, and the order of the points."""
    watch = stopwatch(rounds=1)
    measured = watch.measure()
    assert tuple(measured) == NEW == tuple(RECORDED)
    for ratios in (measured, RECORDED):
        assert ratios[1] > 3 and ratios[32] > 1 > ratios[512] and ratios[1024] < 1
