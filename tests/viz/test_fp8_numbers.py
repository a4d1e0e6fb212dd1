"""Lesson 15's pictures, read back from their artists; its three explorers, moved as a reader would."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
import pytest
import torch
from explorers import assert_every_control_moves_the_picture_and_back
from matplotlib.figure import Figure

from dsv3_mini.course.fp8_measures import sum_errors, with_outlier
from dsv3_mini.fp8.formats import E4M3, E5M2, E5M6, FloatFormat
from dsv3_mini.viz.figures.fp8_numbers import (
    MOST_TICKS,
    formats_figure,
    nearest,
    number_line_figure,
    outlier_figure,
    positive_numbers,
    promotion_figure,
    shares,
    sizes_figure,
    sums_figure,
    tiles_figure,
)
from dsv3_mini.viz.widgets import fp8_numbers as widgets
from dsv3_mini.viz.widgets.explorer import Explorer
from dsv3_mini.viz.widgets.fp8_numbers import (
    INNERS,
    INTERVALS,
    SIZES,
    accumulation_explorer,
    draw_number_line,
    error_of_each,
    number_line_explorer,
    outlier_explorer,
)

DTYPES = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def by_gid(figure: Figure) -> dict[str, Any]:
    return {artist.get_gid(): artist for artist in figure.findobj(lambda each: each.get_gid() is not None)}


def ticks_of(artist: Any) -> list[float]:
    return [float(segment[0][0]) for segment in artist.get_segments()]


# ---- which numbers there are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
def test_positive_numbers_are_torchs(fmt: FloatFormat) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(DTYPES[fmt.name]).double()
    wanted = values[values.isfinite() & (values > 0)].sort().values
    np.testing.assert_array_equal(positive_numbers(fmt), wanted.numpy())
    assert positive_numbers(fmt)[-1] == torch.finfo(DTYPES[fmt.name]).max


def test_e5m6_has_64_steps_from_one_power_of_two_to_the_next() -> None:
    numbers = positive_numbers(E5M6)
    np.testing.assert_array_equal(numbers[(numbers >= 1) & (numbers < 2)], 1 + np.arange(64) / 64)
    assert len(numbers) == 31 * 64 - 1 and numbers[0] == 2.0**-20


def test_formats_figure_is_reach_and_density() -> None:
    artists = by_gid(formats_figure((E4M3, E5M2), unit=1.0))
    for fmt, dtype in ((E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)):
        normal, subnormal = artists[f"{fmt.name}-normal"], artists[f"{fmt.name}-subnormal"]
        facts = torch.finfo(dtype)
        assert 2 ** normal.get_x() == pytest.approx(facts.smallest_normal)
        assert 2 ** (normal.get_x() + normal.get_width()) == pytest.approx(facts.max)
        assert subnormal.get_x() + subnormal.get_width() == pytest.approx(normal.get_x())
        ticks = ticks_of(artists[f"numbers-{fmt.name}"])
        assert ticks[0] == 0 and ticks[-1] == 1 and len(ticks) == 1 + int((positive_numbers(fmt) <= 1).sum())
    assert "253\nin all" in texts(formats_figure()) and "247\nin all" in texts(formats_figure())


# ---- where one number goes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
def test_nearest_is_torchs_cast(fmt: FloatFormat) -> None:
    grid = positive_numbers(fmt)
    middles = (grid[1:] + grid[:-1]) / 2
    tried = [*grid[:3], *middles, *(1.001 * middles[5:]), *(0.999 * middles[5:]), grid[0] / 2, grid[0] / 3, 0.0]
    for number in tried:
        for signed in (number, -number):
            wanted = torch.tensor(signed).clamp(-fmt.largest, fmt.largest).to(DTYPES[fmt.name]).float().item()
            assert nearest(signed, grid) == wanted, signed
    assert nearest(1e9, grid) == fmt.largest and nearest(-1e9, grid) == -fmt.largest


def test_number_line_shows_the_grid_and_where_the_number_goes() -> None:
    figure = number_line_figure(3.3, 0.6)
    artists = by_gid(figure)
    assert ticks_of(artists["grid-E4M3"]) == [2.75, 3.0, 3.25, 3.5, 3.75]
    assert ticks_of(artists["grid-E5M2"]) == [3.0, 3.5]
    assert artists["to-E4M3"].get_xdata()[0] == 3.25 and artists["to-E5M2"].get_xdata()[0] == 3.5
    assert artists["to-E5M6"].get_xdata()[0] == 3.3125
    assert artists["number"].get_xdata()[0] == 3.3
    assert artists["fate-E4M3"].get_text() == "off by -1.52%\nstep 0.25"
    assert "3.3 becomes: E4M3 3.25, E5M2 3.5, E5M6 3.3125" in texts(figure)


def test_a_scale_stretches_the_grid() -> None:
    artists = by_gid(number_line_figure(3.3, 0.6, scale=2.0**-9))
    assert artists["fate-E4M3"].get_text() == "overflow:\nstops at 0.875", "448 / 512"
    assert "to-E4M3" not in artists, "outside of the view"
    artists = by_gid(number_line_figure(0.0009, 0.001))
    assert artists["fate-E4M3"].get_text().startswith("underflow: zero") and artists["to-E4M3"].get_xdata()[0] == 0
    artists = by_gid(number_line_figure(0.0009, 0.001, scale=2.0**-10))
    assert artists["to-E4M3"].get_xdata()[0] == pytest.approx(0.9375 / 1024)


def test_too_many_numbers_are_a_band_that_says_how_many() -> None:
    figure = number_line_figure(3.3, 26.4)
    artists = by_gid(figure)
    assert "grid-E5M6" not in artists and len(ticks_of(artists["grid-E4M3"])) <= MOST_TICKS
    count = (
        1
        + 2 * int((positive_numbers(E5M6) <= 23.1).sum())
        + int(((positive_numbers(E5M6) > 23.1) & (positive_numbers(E5M6) <= 29.7)).sum())
    )
    assert f"{count:,} numbers" in texts(figure)


# ---- what a scale does -------------------------------------------------------------------------------------------------


def test_sizes_are_shares_of_the_numbers_against_what_formats_hold() -> None:
    numbers = torch.tensor([0.0, 0.0005, -0.001, 0.25, 0.25, 500.0, -3.0, 3.0, 2.0])
    figure = sizes_figure({"kind": {"as it is": numbers, "scaled": numbers / 2}}, "What it says")
    first, second = figure.axes
    heights = {int(bar.get_x()): bar.get_height() for bar in first.patches if bar.get_gid() == "sizes"}
    assert heights[-2] == 25 and heights[1] == 37.5 and heights[8] == 12.5, "zeros are not counted"
    assert sum(heights.values()) == pytest.approx(100)
    spans = {patch.get_gid(): patch for patch in first.patches if str(patch.get_gid()).startswith("holds-")}
    assert spans["holds-E4M3"].get_x() == -9 and spans["holds-E5M2"].get_x() == -16
    (said,) = [text.get_text() for text in first.texts if text.get_gid() == "said"]
    assert said == "E4M3: 12.5% to zero, 12.5% too large"
    (said,) = [text.get_text() for text in second.texts if text.get_gid() == "said"]
    assert said == "E4M3: 25.0% to zero"
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["as it is", "scaled"]
    assert figure.get_suptitle() == "What it says" and shares(torch.tensor([448.00003]), E4M3) == (0, 0)


def test_shares_are_counted_on_torchs_cast() -> None:
    numbers = torch.randn(20_000) * torch.exp2(torch.randint(-14, 12, (20_000,)))
    lost, beyond = shares(numbers, E4M3)
    assert lost == pytest.approx(float((numbers.to(torch.float8_e4m3fn).float() == 0).float().mean()))
    assert beyond == pytest.approx(float((numbers.abs() > 448).float().mean())) and beyond > 0


def test_tiles_figure_lights_one_block_of_k_in_both() -> None:
    artists = by_gid(tiles_figure(rows=4, blocks=3, columns=2, chosen=2))
    for name, high in (("a", 4), ("b", 2)):
        for row in range(high):
            faces = [artists[f"{name}-{row}-{block}"].get_facecolor()[:3] for block in range(3)]
            assert faces[0] == faces[1] == (1, 1, 1) != faces[2]
    assert artists["a-0-0"].get_height() == 1 and artists["b-0-0"].get_height() == 2


# ---- an outlier --------------------------------------------------------------------------------------------------------


def test_outlier_figure_is_its_data() -> None:
    errors = {"one": torch.rand(4, 256), "tiles": torch.rand(4, 256)}
    curves = {"one": [0.02, 0.5], "tiles": [0.02, 0.03], "integers": [0.1, 1.0]}
    figure = outlier_figure(errors, curves, [1.0, 1000.0], 1000.0, (2, 77), 128, "Who is lost")
    images = [axes.images[0] for axes in figure.axes if axes.images and axes.images[0].get_gid() == "errors"]
    for image, error in zip(images, errors.values(), strict=True):
        np.testing.assert_allclose(image.get_array(), error.numpy())
        assert image.get_clim() == (0, 1)
    rings = figure.findobj(lambda artist: artist.get_gid() == "outlier")
    assert [(ring.get_xdata()[0], ring.get_ydata()[0]) for ring in rings] == [(77, 2)] * 2
    artists = by_gid(figure)
    for name, values in curves.items():
        assert list(artists[name].get_xdata()) == [1, 1000]
        np.testing.assert_allclose(artists[name].get_ydata(), 100 * np.array(values))
    assert artists["size"].get_xdata()[0] == 1000 and figure.get_suptitle() == "Who is lost"


# ---- adding up ---------------------------------------------------------------------------------------------------------


def test_sums_figure_draws_each_way_by_k() -> None:
    axes = sums_figure({"never": {4096: 0.02, 128: 0.001}, "promoted": {128: 0.001, 4096: 0.0012}}, "It grows").axes[0]
    drawn = {line.get_gid(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert drawn["never"] == ([128, 4096], pytest.approx([0.1, 2.0]))
    assert drawn["promoted"] == ([128, 4096], pytest.approx([0.1, 0.12]))
    assert drawn["mark"][1] == [2, 2] and axes.get_title(loc="left") == "It grows"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["128", "4,096"]


def test_promotion_figure_has_a_bar_for_every_interval_and_marks_one() -> None:
    curves = {"never": {128: 0.001, 256: 0.002}, "every 64": {128: 0.001, 256: 0.001}}
    figure = promotion_figure(curves, {64: 0.001, 128: 0.0015, 256: 0.002}, 64, 256, "Title")
    artists = by_gid(figure)
    assert [artists[f"every-{each}"].get_height() for each in (64, 128, 256)] == pytest.approx([0.1, 0.15, 0.2])
    assert [artists[f"every-{each}"].get_alpha() for each in (64, 128, 256)] == [1.0, 0.45, 0.45]
    assert list(artists["never"].get_xdata()) == [128, 256]
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["64", "128", "never"]
    marked = by_gid(promotion_figure(curves, {64: 0.001, 256: 0.002}, 256, 256, "Title"))
    assert marked["every-256"].get_alpha() == 1.0 and marked["every-64"].get_alpha() == 0.45


# ---- explorers ---------------------------------------------------------------------------------------------------------

EXPLORERS: list[tuple[Any, dict[str, Any]]] = [
    (number_line_explorer, {"number": 700.0, "zoom": 8, "scale": -3}),
    (outlier_explorer, {"size": SIZES[3], "channel": 500, "token": 6, "format": "E5M2"}),
    (accumulation_explorer, {"bits": 10, "every": 4096, "operands": "positive"}),
]


@pytest.mark.parametrize(("make", "moves"), EXPLORERS)
def test_every_control_moves_the_picture_and_back(make: Any, moves: dict[str, Any]) -> None:
    assert_every_control_moves_the_picture_and_back(make(), moves)


@pytest.mark.parametrize(("make", "moves"), EXPLORERS)
def test_it_shows_something_without_a_kernel(make: Any, moves: dict[str, Any]) -> None:
    explorer: Explorer = make()
    data, _ = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == explorer.picture.value and len(data["text/plain"]) > 80


def shown(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """What the figure `name` is asked to draw from here on."""
    calls: list[Any] = []
    monkeypatch.setattr(widgets, name, lambda *given: calls.append(given) or Figure(figsize=(1, 1)))
    return calls


def test_zoom_halves_the_view_and_the_scale_is_a_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, explorer = shown(monkeypatch, "number_line_figure"), number_line_explorer()
    explorer.set(number=40.0, zoom=3, scale=-4)
    assert calls[-1] == (40.0, 40.0, 1 / 16)
    explorer.set(zoom=4)
    assert calls[-1] == (40.0, 20.0, 1 / 16)


@pytest.mark.parametrize("number", [2.0**-12, 2.0**18])
@pytest.mark.parametrize("zoom", [0, 9])
def test_the_ends_of_the_number_line_can_be_drawn(number: float, zoom: int) -> None:
    for scale in (-12, 12):
        figure = draw_number_line(number, zoom, scale)
        low, high = figure.axes[0].get_xlim()
        assert low < number < high
        figure.draw_without_rendering()


def test_the_outlier_explorer_quantizes_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, explorer = shown(monkeypatch, "outlier_figure"), outlier_explorer()
    explorer.set(size=2.0**20, channel=300, token=5)
    errors, curves, sizes, size, place, tile, title = calls[-1]
    assert (size, place, tile, sizes) == (2.0**20, (5, 300), 128, SIZES)
    x = with_outlier(2.0**20, 5, 300)
    scale = torch.tensor(2.0**20) / 448
    by_hand = (x / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(errors["one scale for all"], ((by_hand - x) / x).abs().clamp(max=1))
    tiles = errors["a scale per 1x128 tile"]
    apart = torch.ones(8, 512, dtype=torch.bool)
    apart[5, 256:384] = False
    assert tiles[~apart].mean() > 0.5 > 0.1 > tiles[apart].mean(), "its tile is lost, the others are not"
    assert f"{float((by_hand == 0).float().mean()):.1%}" in title
    assert list(curves) == ["one scale for all", "a scale per 1x128 tile", "whole numbers, one scale"]
    e4m3 = curves["one scale for all"]
    explorer.set(format="E5M2")
    assert calls[-1][1]["one scale for all"][0] > 1.5 * e4m3[0]


def test_error_of_each_is_relative_and_at_most_one() -> None:
    x = torch.tensor([2.0, -4.0, 0.0, 1.0])
    assert error_of_each(x, torch.tensor([2.5, 0.0, 0.0, 9.0])).tolist() == [0.25, 1.0, 0.0, 1.0]


def test_the_accumulation_explorer_measures_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, explorer = shown(monkeypatch, "promotion_figure"), accumulation_explorer()
    curves, by_interval, chosen, inner, title = calls[-1]
    never, promoted = (float(sum_errors(4096, each).max()) for each in (None, 128))
    assert (chosen, inner) == (128, 4096) and list(by_interval) == [*INTERVALS, 4096]
    assert by_interval[4096] == never == curves["never promoted"][4096]
    assert by_interval[128] == promoted == curves["promoted every 128"][4096]
    assert list(curves["never promoted"]) == list(INNERS)
    assert f"{never:.2%}" in title and f"{never / promoted:.3g} times less" in title
    explorer.set(every=4096)
    assert list(calls[-1][0]) == ["never promoted"] and "nothing is promoted" in calls[-1][4]
    explorer.set(bits=8, operands="positive")
    assert calls[-1][1][4096] == float(sum_errors(4096, None, 8, "positive").max()) > never


def test_more_bits_less_error() -> None:
    errors = [float(sum_errors(512, None, bits).max()) for bits in (8, 11, 14, 17)]
    assert all(math.isfinite(each) for each in errors) and errors == sorted(errors, reverse=True)
