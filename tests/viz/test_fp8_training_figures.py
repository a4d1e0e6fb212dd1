"""Lesson 16's pictures, read back from their artists; its explorers, moved as a reader would; its race, run a few steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from explorers import assert_every_control_moves_the_picture_and_back
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from dsv3_mini.course.fp8_runs import BASE, LINE, REPORTS, YARDSTICK, Off, Recording, Run, Step
from dsv3_mini.fp8.recipe import ABLATIONS
from dsv3_mini.viz.figures.fp8_training import (
    LENGTHS,
    LINES,
    PRODUCTS,
    SUMMED,
    WIDE,
    gap_figure,
    gap_of,
    kept_figure,
    layer_errors_figure,
    noise_figure,
    products_figure,
    running_mean,
)
from dsv3_mini.viz.widgets import fp8_training as widgets
from dsv3_mini.viz.widgets.fp8_training import PrecisionRace, ablation_explorer, gap_explorer


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


# ---- the three products ------------------------------------------------------------------------------------------------


def test_every_tile_lies_along_the_axis_that_is_summed_over() -> None:
    figure = products_figure()
    tiles: dict[str, list[Any]] = {}
    for patch in figure.axes[0].patches:
        if patch.get_gid():
            tiles.setdefault(patch.get_gid(), []).append(patch)
    for product in PRODUCTS:
        assert product.left.axes[1] == product.right.axes[0], "the left's columns meet the right's rows"
        assert product.result.axes == (product.left.axes[0], product.right.axes[1])
        for operand, summed_is in ((product.left, "width"), (product.right, "height")):
            own = tiles[f"{product.name} {operand.name}"]
            rows, columns = (LENGTHS[letter] for letter in operand.axes)
            sizes = {(round(tile.get_width(), 6), round(tile.get_height(), 6)) for tile in own}
            assert len(sizes) == 1
            width, height = sizes.pop()
            assert (width if summed_is == "width" else height) == 1, "128 numbers of the summed axis share a scale"
            other = height if summed_is == "width" else width
            assert other == (1 if operand.tile == (WIDE, WIDE) else pytest.approx(1 / LINES, abs=1e-5))
            assert sum(tile.get_width() * tile.get_height() for tile in own) == pytest.approx(rows * columns)
        assert len(tiles[f"{product.name} {product.result.name}"]) == 1


def test_each_matrix_has_one_colour_and_the_summed_letter_stands_out_twice_a_product() -> None:
    figure = products_figure()
    for letter in "xgw":
        operands = [o for p in PRODUCTS for o in (p.left, p.right) if o.name.strip("ᵀ") == letter]
        assert len(operands) == 2 and len({operand.colour for operand in operands}) == 1
    bold = [text.get_text() for text in figure.axes[0].texts if text.get_color() == SUMMED]
    assert sorted(bold) == sorted(2 * [product.summed for product in PRODUCTS])
    said = texts(figure)
    assert all(product.formula in said and product.note in said for product in PRODUCTS)


# ---- bars --------------------------------------------------------------------------------------------------------------


def test_noise_figure_shows_both_noises_part_by_part() -> None:
    figure = noise_figure({"a": 0.05, "b": 0.1}, {"a": 0.9, "b": 1.5}, "title")
    (axes,) = figure.axes
    rounding, batch = axes.containers
    assert [bar.get_width() for bar in rounding] == pytest.approx([5, 10])
    assert [bar.get_width() for bar in batch] == pytest.approx([90, 150])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b"]


def test_layer_errors_figure_shows_error_and_what_is_missing_of_both_variants() -> None:
    results = ("y", "dx")
    errors = {
        "the report's": dict(zip(results, (Off(0.04, 0.001), Off(0.05, -0.002)), strict=True)),
        "other": dict(zip(results, (Off(0.06, 0.0), Off(1.0, 0.9)), strict=True)),
    }
    error, missing = layer_errors_figure(errors, "title").axes
    for axes, field in ((error, 0), (missing, 1)):
        for bars, by_result in zip(axes.containers, errors.values(), strict=True):
            assert bars.get_label() in errors
            assert [bar.get_height() for bar in bars] == pytest.approx([100 * by_result[r][field] for r in results])
    assert error.get_yscale() == "log"
    low, high = missing.get_ylim()
    assert low <= -5 and high > 90


def test_kept_figure_stacks_types_and_writes_the_sum() -> None:
    figure = kept_figure({"BF16": {"BF16": 4096, "FP32": 1024}, "FP8": {"E4M3": 2048}}, "title")
    (axes,) = figure.axes
    ends: dict[float, float] = {}
    for bar in axes.patches:
        row = round(bar.get_y() + bar.get_height() / 2)
        assert bar.get_width() == 0 or bar.get_x() == pytest.approx(ends.get(row, 0.0))
        ends[row] = max(ends.get(row, 0.0), bar.get_x() + bar.get_width())
    assert ends == pytest.approx({0: 5.0, 1: 2.0})
    assert [text.get_text().strip() for text in axes.texts] == ["5 KiB", "2 KiB"]


# ---- two trainings -----------------------------------------------------------------------------------------------------


def test_running_mean_against_a_loop() -> None:
    values = list(np.random.default_rng(0).normal(size=12))
    assert running_mean(values, 4) == pytest.approx([sum(values[i : i + 4]) / 4 for i in range(9)])
    assert running_mean(values[:3], 5) == pytest.approx([sum(values[:3]) / 3])
    assert running_mean([], 5) == []


def test_a_gap_is_between_the_means_over_the_steps_that_both_have() -> None:
    assert gap_of([2.0, 2.0, 4.0], [1.0, 2.0, 2.0, 99.0], 1) == pytest.approx([1.0, 0.0, 1.0])
    assert gap_of([3.0, 5.0], [2.0, 2.0], 2) == pytest.approx([1.0])
    assert gap_of([], [1.0], 3) == []


def test_gap_figure_shows_losses_distance_and_line() -> None:
    base, other = [4.0, 3.0, 2.0, 1.0], [4.0, 3.3, 2.0, 1.1]
    before = {"BF16": base, "FP32": [4.0, 2.7, 2.0, 1.0]}
    loss, gap = gap_figure({"BF16": base, "FP8": other}, before, 1, 4, "title").axes
    drawn = [(line.get_alpha(), list(line.get_ydata())) for line in loss.lines]
    assert (None, other) in drawn and (0.4, before["FP32"]) in drawn
    sides = sorted(line.get_ydata()[0] for line in gap.lines[:2])
    assert sides == pytest.approx([-100 * LINE, 100 * LINE]) and 100 * LINE == 0.25
    pale, bold = gap.lines[2:]
    assert list(bold.get_ydata()) == pytest.approx([0, 10, 0, 10])
    assert list(pale.get_ydata()) == pytest.approx([0, -10, 0, 0])
    assert list(bold.get_xdata()) == [1, 2, 3, 4]
    assert to_hex(bold.get_color()) != to_hex(pale.get_color())
    low, high = gap.get_ylim()
    assert low == -high and high >= 1.0


def test_gap_figure_of_runs_that_have_not_begun() -> None:
    loss, gap = gap_figure({"BF16": [], "FP8": []}, {"BF16": [3.0, 2.0], "FP8": [3.0, 2.1]}, 2, 2, "t").axes
    assert [len(line.get_ydata()) for line in loss.lines] == [1, 1, 0, 0]
    assert len(gap.lines) == 4


# ---- explorers ---------------------------------------------------------------------------------------------------------


def recording() -> Recording:
    random = np.random.default_rng(1)

    def run(size: str, way: str, seed: int, shift: float) -> Run:
        losses = tuple(float(v) for v in (3 + shift + np.linspace(1, 0, 60) + 0.003 * random.normal(size=60)))
        return Run(size, way, seed, losses, 3.0 + shift)

    ways = {BASE: 0.0, YARDSTICK: 0.001, REPORTS: -0.002, "per-tensor scaling": 0.05}
    nano = [run("nano", way, seed, shift) for seed in (0, 1) for way, shift in {**ways, "no promotion": 0.2}.items()]
    return Recording((*nano, *(run("tiny", way, 0, shift) for way, shift in ways.items())))


def test_every_control_of_the_gap_explorer_moves_the_picture_and_back() -> None:
    explorer = gap_explorer(recording())
    assert explorer.values == {"run": ("tiny", 0), "way": REPORTS, "window": 30}
    moves = {"run": ("nano", 1), "way": "per-tensor scaling", "window": 5}
    assert_every_control_moves_the_picture_and_back(explorer, moves)


def test_the_gap_explorer_says_whether_a_run_is_inside_the_line() -> None:
    runs = recording()
    explorer = gap_explorer(runs)
    for way in (REPORTS, "per-tensor scaling"):
        said = texts(explorer.draw(("tiny", 0), way, 15))
        gap = runs.gap("tiny", way)
        assert f"{way}: {gap:+.2%}" in said and ("inside" if abs(gap) < 0.0025 else "outside") in said
    assert "inside" in texts(explorer.draw(("tiny", 0), REPORTS, 15))
    assert "outside" in texts(explorer.draw(("tiny", 0), "per-tensor scaling", 15))
    assert "no promotion was not recorded for tiny" in texts(explorer.draw(("tiny", 0), "no promotion", 15))


def test_every_control_of_the_ablation_explorer_moves_the_picture_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """With errors that are made up: the real ones are tested with the runs."""
    names = list(ABLATIONS)

    def made_up(recipe: Any, outlier: float) -> dict[str, Off]:
        place = next(i for i, name in enumerate(names) if ABLATIONS[name] is recipe)
        return {r: Off(0.04 * (1 + place), 0.001 * outlier**0.5 * place) for r in ("y", "dx", "dw")}

    monkeypatch.setattr(widgets, "layer_errors", made_up)
    explorer = ablation_explorer()
    assert set(explorer.controls["changed"].options) == set(names) - {"the report's"}
    assert_every_control_moves_the_picture_and_back(explorer, {"changed": "E5M2 gradients", "outlier": 1_000_000})
    said = texts(explorer.draw("block-wise Dgrad", 100))
    assert "100 times as loud" in said and "block-wise Dgrad" in said and "the report's" in said


def test_the_race_trains_two_models_in_turn_on_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    began: list[tuple[str, Any]] = []
    monkeypatch.setattr(widgets, "gap_figure", lambda *given: shown.append(given) or Figure(figsize=(1, 1)))
    monkeypatch.setattr(widgets, "recorded", recording)
    monkeypatch.setattr(widgets, "training_batches", lambda size, steps, seed: ("text", size, seed))
    monkeypatch.setattr(widgets, "fresh_model", lambda size, way, seed: (way, f"start {seed}"))

    def steps(model: str, start: str, batches: Any, recipe: Any, moments: Any) -> Any:
        began.append((model, [next(batches) for _ in range(3)]))
        return iter([Step(i, 4.0 - 0.1 * i - 0.01 * (model == REPORTS)) for i in range(1, 10)])

    monkeypatch.setattr(widgets, "training_steps", steps)
    race = PrecisionRace()
    curves, before, _, _, title = shown[-1]
    assert not any(curves.values()) and list(before) == [BASE, REPORTS] and "arithmetic alone" in title
    assert before[REPORTS] == recording().run("nano", REPORTS, 0).loss
    race.train(6)
    assert [model for model, _ in began] == [BASE, REPORTS] and began[0][1] == began[1][1]
    assert {name: len(losses) for name, losses in race.losses.items()} == {BASE: 6, REPORTS: 6}
    assert race.gap == pytest.approx(-0.01 / 3.45)
    assert f"{race.gap:+.2%}" in shown[-1][-1]
