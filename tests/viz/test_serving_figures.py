"""Lesson 23's pictures, read back from their artists, and its two widgets, moved."""

from __future__ import annotations

import base64
from dataclasses import replace

import numpy as np
import pytest
import torch
from explorers import assert_every_control_moves_the_picture_and_back
from matplotlib.figure import Figure

from dsv3_mini.config import ModelConfig
from dsv3_mini.inference.placement import Placement, place_experts
from dsv3_mini.serving import H800_CARD, Lengths, Unit, poisson, simulate
from dsv3_mini.serving.overlap import Layer, timetable
from dsv3_mini.viz.figures.serving import placement_figure, refresh_figure, service_figure, timetable_figure
from dsv3_mini.viz.widgets.serving import Planner, in_order, placement_explorer

NANO = ModelConfig.preset("nano")
SLOW = replace(H800_CARD, fp8=1e9, bf16=1e9, memory_rate=1e9, network=1e8, inside=1e9, memory=1e8)
UNIT = Unit("small", nodes=2, gpus=2, tp=1, slots=NANO.n_routed_experts, card=SLOW)


def texts(figure: Figure) -> str:
    return "\n".join(t.get_text() for t in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_bars_are_the_shares_of_each_gpus_experts() -> None:
    load = torch.tensor([[10.0, 20.0, 40.0, 10.0], [1.0, 1.0, 1.0, 1.0]])
    placed = Placement(torch.tensor([[2, 0, 3, 2, 1, 1], [0, 1, 2, 3, 0, 1]]), 4, 2)
    figure = placement_figure({"In order": in_order(2, 4, 2), "Placed": placed}, load, layer=0)
    plain, better = figure.axes
    mean = 80 / 2
    assert {bar.get_gid(): bar.get_height() * mean for bar in plain.patches} == pytest.approx(
        {"0-0": 10, "0-1": 20, "1-2": 40, "1-3": 10}
    )
    bars = [(bar.get_gid(), bar.get_y() * mean, bar.get_height() * mean) for bar in better.patches]
    assert bars == [(gid, pytest.approx(y), pytest.approx(height)) for gid, y, height in (
        ("0-2", 0, 20), ("0-0", 20, 10), ("0-3", 30, 10), ("1-2", 0, 20), ("1-1", 20, 10), ("1-1", 30, 10))]  # fmt: skip
    colours = {bar.get_gid(): bar.get_facecolor() for bar in better.patches}
    assert colours["0-2"] == colours["1-1"] != colours["0-0"] == colours["0-3"]
    assert plain.get_title(loc="left") == "In order: busiest 1.25 means" and "Placed: busiest 1.00" in texts(figure)


def test_curves_are_the_values_and_changes_of_text_are_marked() -> None:
    curves = {"in order": [2.0, 2.1, 1.4], "placed": [1.2, 1.1, 1.3]}
    figure = refresh_figure(curves, ["code", "code", "sums"])
    (axes,) = figure.axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines if not line.get_label().startswith("_")}
    assert drawn == curves
    assert [line.get_xdata()[0] for line in axes.lines if line.get_label().startswith("_")] == [1.5]
    assert [t.get_text() for t in axes.texts] == ["code", "sums"]


def test_the_timetables_bars_are_its_tasks() -> None:
    layer = Layer(2e-3, 1e-3, 1.5e-3, 1e-3)
    tasks = timetable(layer, 2)
    (axes,) = timetable_figure(tasks, alone=4 * layer.alone).axes
    bars = [(bar.get_gid(), bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert bars == [(t.name, pytest.approx(1e3 * t.start), pytest.approx(1e3 * (t.end - t.start))) for t in tasks]
    share = max(t.end for t in tasks) / (4 * layer.alone)
    assert f"{share:.0%}" in axes.get_title(loc="left")


def test_a_service_is_drawn_as_it_was_served() -> None:
    served = simulate(NANO, poisson(20.0, 50, Lengths(20), Lengths(6, 0.5), seed=1), UNIT, UNIT)
    figure = service_figure(served)
    waits, steps, pools = figure.axes
    assert list(waits.lines[0].get_xdata()) == sorted(1e3 * served.time_to_first_token)
    assert list(steps.lines[0].get_xdata()) == sorted(1e3 * served.time_per_output_token)
    busy = [bar.get_height() for bar in pools.patches]
    assert busy[0] == pytest.approx(100 * served.prefill.busy / served.seconds)
    assert busy[2] == pytest.approx(100 * served.cache_peak / served.cache_tokens)
    assert "by 8 GPUs" in figure.get_suptitle()
    assert f"{np.median(1e3 * served.time_to_first_token):,.0f} ms" in figure.get_suptitle()


def test_a_service_of_single_tokens_has_no_rhythm_to_draw() -> None:
    served = simulate(NANO, poisson(20.0, 5, Lengths(20), Lengths(1), seed=1), UNIT, UNIT)
    assert not service_figure(served).axes[1].lines


@pytest.fixture(scope="module")
def loads() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: (300 * torch.randn(3, 16, generator=g).exp()).long() for name in ("code", "sums")}


def test_every_control_of_the_placement_moves_the_picture(loads: dict[str, torch.Tensor]) -> None:
    explorer = placement_explorer(loads, groups=4)
    moves = {"text": "sums", "layer": 2, "gpus": 4, "redundant": 0, "rule": "groups stay on a node"}
    assert_every_control_moves_the_picture_and_back(explorer, moves)


def test_the_placement_shown_is_the_packages(loads: dict[str, torch.Tensor]) -> None:
    figure = placement_explorer(loads, groups=4).draw("sums", 3, 4, 2, "groups stay on a node")
    busiest = place_experts(loads["sums"], 24, 4, nodes=2, groups=4).imbalance(loads["sums"])[2]
    assert f"24 slots: busiest {busiest:.2f} means" in texts(figure)


def test_the_planner_simulates_what_its_controls_say() -> None:
    planner = Planner(seconds=0.2)
    first = planner.served
    assert first is not None and len(first.requests) == 20 and first.prefill.gpus == 32 and first.decode.gpus == 320
    planner.set(rate=50, prefill_units=3, decode_units=2)
    assert planner.served is not None
    assert len(planner.served.requests) == 10
    assert (planner.served.prefill.gpus, planner.served.decode.gpus) == (96, 640)
    again = Planner(seconds=0.2)
    again.set(rate=50, prefill_units=3, decode_units=2)
    assert again.picture.value == planner.picture.value


def test_every_control_of_the_planner_moves_the_picture() -> None:
    cfg = ModelConfig.preset("16b")
    own = Unit("own", nodes=2, tp=2, slots=cfg.n_routed_experts, card=H800_CARD)
    planner = Planner({"a": (cfg, own, own), "b": (cfg, replace(own, nodes=1), own)}, seconds=0.05)
    moves = {
        "service": "b", "rate": 200, "prompt": 1024, "answer": 100, "prefill_units": 2, "decode_units": 2,
        "network": 25.0, "overlap": False, "drafts": True,
    }  # fmt: skip
    assert_every_control_moves_the_picture_and_back(planner, moves)


def test_they_show_something_without_a_kernel(loads: dict[str, torch.Tensor]) -> None:
    for widget, word in ((placement_explorer(loads, groups=4), "stacked bars"), (Planner(seconds=0.05), "first token")):
        data, _ = widget._repr_mimebundle_()
        assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG") and word in data["text/plain"]
