"""Lesson 21's pictures, read back from their artists, and its two widgets, moved."""

from __future__ import annotations

import base64

import pytest
from explorers import assert_every_control_moves_the_picture_and_back
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from dsv3_mini.config import ModelConfig
from dsv3_mini.course.cluster import recorded
from dsv3_mini.parallel.dry_run import Machine
from dsv3_mini.parallel.dry_run.sketch import Kept, lay_out, sketch
from dsv3_mini.parallel.dry_run.step import RankMemory
from dsv3_mini.viz.figures.cluster import LIMIT, STATE, bill_figure, memory_figure, plan_figure, scaling_figure
from dsv3_mini.viz.widgets.cluster import Planner, bill, bill_explorer

KEPT = {"671b": Kept(50.8e9, 8.9e9), "16b": Kept(7.2e9, 9.1e9)}
REPORT = dict(tokens=14_800_000_000_000, gpus=2048, hours_per_trillion=180_000, dollars=2.0)


def words(figure: Figure) -> str:
    return "\n".join(t.get_text() for t in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_each_size_has_its_bar_and_only_what_fits_has_a_speed() -> None:
    rows = recorded()["scaling"]
    memory, speed = scaling_figure(rows, Machine()).axes
    assert [bar.get_height() for bar in memory.patches] == pytest.approx([row.peak / 1e9 for row in rows])
    room = [row.peak <= 76e9 for row in rows]
    assert [bar.get_facecolor() == to_rgba(STATE) for bar in memory.patches] == room
    assert [bar.get_facecolor() == to_rgba(LIMIT) for bar in memory.patches] == [not fits for fits in room]
    (line,) = speed.lines
    assert list(line.get_ydata()) == [100 * row.mfu for row in rows if row.peak <= 76e9]
    assert [int(place) for place in line.get_xdata()] == [place for place, fits in enumerate(room) if fits]


def test_a_ranks_bar_is_its_kinds_one_on_the_other() -> None:
    ranks = [
        RankMemory(0, (0, 3), {"a": 10**10, "b": 5 * 10**9}, {"c": 2 * 10**10}, 10**9, ""),
        RankMemory(1, (1, 2), {"a": 10**10}, {"c": 4 * 10**10}, 2 * 10**9, ""),
    ]
    figure = memory_figure(ranks, Machine())
    (axes,) = figure.axes
    bars = {bar.get_gid(): (bar.get_y(), bar.get_height()) for bar in axes.patches}
    assert bars["0-weights, gradients, moments"] == pytest.approx((0, 15))
    assert bars["0-activations held"] == pytest.approx((15, 20)) and bars["0-the pass that runs"] == pytest.approx(
        (35, 1)
    )
    assert bars["1-the pass that runs"] == pytest.approx((50, 2))
    assert "Rank 1 is the fullest" in words(figure) and "52.0" in words(figure)
    assert 80 in [line.get_ydata()[0] for line in axes.lines]


def test_the_reports_bill() -> None:
    figure = bill_figure(bill(**REPORT), mfu=0.391)
    axes, _ = figure.axes
    bars = {bar.get_gid(): (bar.get_x(), bar.get_width()) for bar in axes.patches}
    assert bars == {
        "pre-training": pytest.approx((0, 2.664)),
        "context extension": pytest.approx((2.664, 0.119)),
        "post-training": pytest.approx((2.783, 0.005)),
    }
    assert "2.788M GPU hours, $5.576M: 56.7 days on 2,048 GPUs, MFU 39%" in words(figure)


def test_half_the_speed_costs_twice_as_much() -> None:
    once, twice = bill(**REPORT), bill(**{**REPORT, "hours_per_trillion": 360_000})
    assert [cost.dollars for cost in twice.values()] == pytest.approx([2 * cost.dollars for cost in once.values()])


def test_a_plan_is_drawn_as_it_was_sketched() -> None:
    cfg = ModelConfig.preset("671b")
    drawn = sketch(cfg, lay_out(cfg, 2048, 16, 64), KEPT["671b"])
    memory, times, fill = plan_figure(drawn).axes
    sizes = [bar.get_height() * 1e9 for bar in memory.patches]
    assert sizes == pytest.approx([drawn.state, drawn.activations, drawn.passing])
    seconds = [bar.get_width() / 1e3 for bar in times.patches]
    assert seconds == pytest.approx([drawn.arithmetic, drawn.wires.inside / 160e9, drawn.wires.network / 50e9])
    assert [bar.get_height() for bar in fill.patches] == [120, 32]
    assert f"{drawn.room / 1e9:.1f} GB to spare" in words(plan_figure(drawn))


def test_the_planner_says_what_is_wrong_with_a_plan() -> None:
    planner = Planner(KEPT)
    assert "Does not fit" in words(planner.draw(**planner.values))
    assert "must divide" in words(planner.draw(**{**planner.values, "model": "16b", "ep": 128, "pp": 2}))
    planner.set(pp=32)
    assert planner.sketch is None and "two stages on a rank make 64" in words(planner.draw(**planner.values))
    half = {**planner.values, "pp": 16, "gpus": 2048, "ep": 64, "batch": 1920}
    assert "the batch fills 47% of the pipeline" in words(planner.draw(**half))


def test_every_control_moves_its_picture() -> None:
    moves = {"tokens": 15.0, "gpus": 1024, "thousand_hours": 185, "dollars": 2.25}
    assert_every_control_moves_the_picture_and_back(bill_explorer(), moves)
    moves = {"model": "16b", "gpus": 512, "pp": 8, "ep": 8, "memory": 141, "network": 100, "batch": 7680}
    assert_every_control_moves_the_picture_and_back(Planner(KEPT), moves)


def test_they_show_something_without_a_kernel() -> None:
    for widget, word in ((bill_explorer(), "context extension"), (Planner(KEPT), "planned cluster")):
        data, _ = widget._repr_mimebundle_()
        assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG") and word in data["text/plain"]
